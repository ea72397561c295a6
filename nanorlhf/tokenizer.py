"""Byte-level BPE: train a vocabulary on text, encode text to ids, decode ids to text.

The splitting, counting, merging and encoding are native code (csrc/pretokenize, csrc/bpe) that runs without the GIL;
this file checks arguments and holds the vocabulary. Algorithm: Sennrich et al. 2016, arXiv 1508.07909, on bytes as in
GPT-2; ids agree with tiktoken's and Hugging Face tokenizers' for the same vocabulary and split rule.
"""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nanorlhf import _C
from nanorlhf.pretokenize import PATTERNS, known_pattern, pieces
from nanorlhf.tokenizer_json import Vocabulary, read_folder, read_json, read_tiktoken, write_folder

TIE_BREAKS = ("hf", "raw", "first")
_BATCH_BYTES = 1 << 26  # text gathered before the native counter is called


def _utf8(text: str | bytes, caller: str) -> bytes:
    """Text as bytes. Surrogate pairs are joined and lone surrogates become U+FFFD, as tiktoken does."""
    if isinstance(text, bytes):
        return text
    if not isinstance(text, str):
        raise ValueError(f"{caller}: expected str or bytes, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _default_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Tokenizer:
    """A byte-level BPE tokenizer. Made by `train` or `load`; immutable, thread-safe and picklable.

    >>> tok = Tokenizer.train(["aaabdaaabac"], vocab_size=260, special_tokens=["<|end|>"])
    >>> tok.encode("aaabdaaabac")
    [258, 100, 258, 97, 99]
    >>> tok.decode([258, 100, 258, 97, 99]), tok.special_tokens
    ('aaabdaaabac', {'<|end|>': 259})
    """

    def __init__(self, vocabulary: Vocabulary):
        v = self._vocabulary = vocabulary
        v.pattern = known_pattern(v.pattern)
        specials = sorted(v.special_tokens.values())
        by_bytes = v.merges is None
        self._model = _C.BpeModel(v.tokens, specials, v.merges or [], v.results, by_bytes, v.whole_piece_first)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return len(self._vocabulary.tokens)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens' texts and ids."""
        return dict(self._vocabulary.special_tokens)

    @property
    def pattern(self) -> str:
        """The name of the split rule, or its regular expression."""
        return self._vocabulary.pattern

    @property
    def token_byte_lengths(self) -> np.ndarray:
        """int32 (V,): the bytes of text that each token stands for; 0 for special tokens.

        >>> Tokenizer.train(["aaaa"], 257, special_tokens=[]).token_byte_lengths[255:].tolist()
        [1, 2]
        """
        lengths = np.array([len(t) for t in self._vocabulary.tokens], np.int32)
        lengths[list(self._vocabulary.special_tokens.values())] = 0
        return lengths

    @classmethod
    def train(
        cls,
        texts_or_paths: Iterable[str | bytes | os.PathLike],
        vocab_size: int,
        pattern: str = "gpt4",
        special_tokens: Sequence[str] = (),
        tie_break: str = "hf",
    ) -> Tokenizer:
        """Learns a vocabulary: ids 0 to 255 are the bytes, then the merges in order, then the special tokens.

        texts_or_paths  texts (str or bytes) and files (pathlib.Path or other os.PathLike), in any mixture; each is one
                        document, and special tokens' texts in it are plain text
        vocab_size      all tokens, special ones included
        pattern         gpt2, cl100k (also gpt4), o200k, llama3, qwen2, or a regular expression
        tie_break       which of several pairs of equal count merges first: "hf" as Hugging Face's trainer, "raw" the
                        lowest (left, right) ids, "first" the first in the text

        Raises ValueError when the text cannot give that many tokens, or a file is missing or empty.
        """
        special_tokens = list(special_tokens)
        if tie_break not in TIE_BREAKS:
            raise ValueError(f"Tokenizer.train: expected tie_break among {', '.join(TIE_BREAKS)}, got {tie_break!r}")
        if len(set(special_tokens)) != len(special_tokens) or not all(isinstance(s, str) and s for s in special_tokens):
            raise ValueError(f"Tokenizer.train: expected distinct, non-empty special tokens, got {special_tokens}")
        fixed = 256 + len(special_tokens)
        if not isinstance(vocab_size, (int, np.integer)) or vocab_size < fixed:
            raise ValueError(f"Tokenizer.train: expected vocab_size of at least {fixed}, got {vocab_size}")
        pattern = known_pattern(pattern)
        training = _count(texts_or_paths, pattern)
        merges = training.merges(vocab_size - fixed, TIE_BREAKS.index(tie_break))
        if len(merges) < vocab_size - fixed:
            raise ValueError(
                f"Tokenizer.train: expected vocab_size of at most {fixed + len(merges)}, "
                f"which is all that this text can give, got {vocab_size}"
            )
        tokens = [bytes([b]) for b in range(256)]
        for left, right in merges:
            tokens.append(tokens[left] + tokens[right])
        specials = {text: len(tokens) + i for i, text in enumerate(special_tokens)}
        results = list(range(256, len(tokens)))
        tokens += [_utf8(text, "Tokenizer.train") for text in special_tokens]
        # In a trained vocabulary a piece that is a token merges to that token, so looking it up whole changes no id.
        return cls(Vocabulary(tokens, specials, pattern, merges, results, whole_piece_first=True))

    @classmethod
    def load(cls, path: str | os.PathLike, pattern: str | None = None) -> Tokenizer:
        """Reads a folder that holds a tokenizer.json, a tokenizer.json itself, or a .tiktoken rank file.

        A rank file has no split rule, so it needs the pattern. Raises ValueError for a file that is missing or is not
        a byte-level BPE.
        """
        path = Path(path)
        if path.suffix == ".tiktoken":
            if pattern is None:
                raise ValueError(f"Tokenizer.load: expected a pattern for the rank file {path}, got None")
            if not path.is_file():
                raise ValueError(f"Tokenizer.load: expected a tokenizer at {path}, got no such file")
            return cls(read_tiktoken(path, pattern))
        vocabulary = read_folder(path) if path.is_dir() else read_json(path)
        if pattern is not None:
            vocabulary.pattern = pattern
        return cls(vocabulary)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json into the folder; `load` and transformers read them."""
        write_folder(self._vocabulary, Path(folder))

    def encode(self, text: str | bytes, allowed_special: Iterable[str] | str = frozenset()) -> list[int]:
        """The ids of a text. Special tokens' texts are plain text unless allowed_special ("all", or some) names them.

        Bytes need not be valid UTF-8. Raises ValueError for a name that is no special token.

        >>> tok = Tokenizer.train([], 257, special_tokens=["<|end|>"])
        >>> tok.encode("a<|end|>"), tok.encode("a<|end|>", allowed_special="all")
        ([97, 60, 124, 101, 110, 100, 124, 62], [97, 256])
        """
        data = self._normalized(_utf8(text, "Tokenizer.encode"))
        known = self._vocabulary.special_tokens
        names = list(known) if allowed_special == "all" else allowed_special
        names = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"Tokenizer.encode: expected allowed_special among {sorted(known)}, got {unknown[0]!r}")
        specials = [(self._vocabulary.tokens[known[name]], known[name]) for name in names]
        if self.pattern in PATTERNS:
            return self._model.encode(self.pattern, data, specials)
        return self._encode_by_regex(data, dict(specials))

    def encode_batch(self, texts: Iterable[str | bytes], threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Many texts as plain text: (ids int32 (N,), offsets int64 (B+1,)); text i is ids[offsets[i]:offsets[i+1]].

        >>> ids, offsets = Tokenizer.train([], 256).encode_batch(["ab", "", "c"])
        >>> ids.tolist(), offsets.tolist()
        ([97, 98, 99], [0, 2, 2, 3])
        """
        if isinstance(texts, (str, bytes)):
            raise ValueError(f"Tokenizer.encode_batch: expected a list of texts, got {type(texts).__name__}")
        if threads is not None and threads < 1:
            raise ValueError(f"Tokenizer.encode_batch: expected threads of at least 1, got {threads}")
        if self.pattern in PATTERNS:
            data = [self._normalized(_utf8(text, "Tokenizer.encode_batch")) for text in texts]
            return self._model.encode_batch(self.pattern, data, threads or _default_threads())
        ids = [self.encode(text) for text in texts]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        return np.array([i for one in ids for i in one], np.int32), offsets

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of ids. Raises KeyError for an id that the vocabulary does not have."""
        array = np.asarray(ids)
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(f"Tokenizer.decode: expected integer ids, got dtype {array.dtype}")
        return self._model.decode(array.astype(np.int64).reshape(-1))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, with U+FFFD for bytes that are not UTF-8. Raises KeyError for an unknown id."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> TokenStream:
        """A decoder that takes one id at a time."""
        return TokenStream(self)

    def _normalized(self, data: bytes) -> bytes:
        if not self._vocabulary.nfc:
            return data
        text = unicodedata.normalize("NFC", data.decode("utf-8", "surrogateescape"))
        return text.encode("utf-8", "surrogateescape")

    def _encode_by_regex(self, data: bytes, specials: dict[bytes, int]) -> list[int]:
        longest_first = sorted(specials, key=len, reverse=True)
        parts = re.split(b"(" + b"|".join(map(re.escape, longest_first)) + b")", data) if specials else [data]
        ids: list[int] = []
        for i, part in enumerate(parts):
            ids += [specials[part]] if i % 2 else self._model.encode_pieces(pieces(self.pattern, part))
        return ids

    def __reduce__(self):
        return Tokenizer, (self._vocabulary,)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, pattern={self.pattern!r})"


class TokenStream:
    """Decodes ids as they come; a character is given out only when all of its bytes are there.

    >>> stream = Tokenizer.train([], 256).stream()
    >>> [stream.push(b) for b in "é!".encode()], stream.finish()
    (['', 'é', '!'], '')
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that this id completes."""
        return self._decoder.decode(self._tokenizer.decode_bytes([id]))

    def finish(self) -> str:
        """What is left: U+FFFD if the ids ended inside a character. The stream can then be used again."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _count(texts_or_paths: Iterable[str | bytes | os.PathLike], pattern: str) -> _C.BpeTraining:
    """Counts the pieces of texts and files, in their order."""
    if isinstance(texts_or_paths, (str, bytes)):
        raise ValueError(f"Tokenizer.train: expected a list of texts or paths, got {type(texts_or_paths).__name__}")
    if isinstance(texts_or_paths, os.PathLike):
        texts_or_paths = [texts_or_paths]
    training = _C.BpeTraining(_default_threads())
    batch: list[bytes] | list[str] = []
    batch_is_files, size = False, 0

    def flush() -> None:
        nonlocal batch, size
        if pattern not in PATTERNS:
            for text in batch:
                training.add_pieces(pieces(pattern, _read(text) if batch_is_files else text))
        elif batch:
            training.add_files(pattern, batch) if batch_is_files else training.add(pattern, batch)
        batch, size = [], 0

    for item in texts_or_paths:
        is_file = isinstance(item, os.PathLike)
        if is_file != batch_is_files or size > _BATCH_BYTES:
            flush()
        batch_is_files = is_file
        batch.append(os.fspath(item) if is_file else _utf8(item, "Tokenizer.train"))
        size += 0 if is_file else len(batch[-1])
    flush()
    return training


def _read(path: str) -> bytes:
    """A whole file, for patterns that have no native scanner."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"Tokenizer.train: expected a readable file, got {path}") from error
    if not data:
        raise ValueError(f"Tokenizer.train: expected text in {path}, got an empty file")
    return data
