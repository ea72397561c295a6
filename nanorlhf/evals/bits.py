"""Bits per byte: a language model's loss in a unit that does not depend on its tokenizer, and what xz reaches."""

import lzma
import math


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Summed negative log-likelihood `nats` of a text of `n_bytes` UTF-8 bytes, in bits per byte.

    Raises ValueError on a text without bytes.

    >>> bits_per_byte(8 * math.log(2), 4)
    2.0
    """
    if n_bytes < 1:
        raise ValueError(f"bits_per_byte: expected at least 1 byte, got {n_bytes}")
    return nats / math.log(2) / n_bytes


def xz_bits_per_byte(text: str | bytes) -> float:
    """Bits per byte that `xz -9` needs for this text alone: the container counts, no dictionary is given.

    On a short text the container's tens of bytes weigh heavily; it is a baseline from about 10 kB on.

    Raises ValueError on an empty text.

    >>> xz_bits_per_byte("na" * 10_000) < 0.1
    True
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if not data:
        raise ValueError("xz_bits_per_byte: expected at least 1 byte, got 0")
    return 8 * len(lzma.compress(data, preset=9)) / len(data)
