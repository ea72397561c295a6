"""The tokenizer's algorithm in plain Python: what csrc/bpe and csrc/bpe_train compute, short enough to read.

Training (Sennrich et al. 2016, arXiv 1508.07909): count the pieces of the text, then merge the most frequent pair of
neighbouring tokens everywhere, again and again. Encoding: split the text into pieces, and in each piece merge the pair of
the lowest rank until no two neighbours merge. The tests hold the native code to this file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from nanorlhf.pretokenize import pieces
from nanorlhf.tokenizer_json import BYTE_TO_CHAR

Pair = tuple[int, int]


def count_pieces(texts: Sequence[bytes], pattern: str) -> Counter[bytes]:
    """How often each piece occurs, in the order of first occurrence."""
    counts: Counter[bytes] = Counter()
    for text in texts:
        counts.update(pieces(pattern, text))
    return counts


def merge_everywhere(tokens: list[int], pair: Pair, new: int) -> list[int]:
    """The tokens with every occurrence of the pair replaced, from left to right.

    >>> merge_everywhere([97, 97, 97, 98], (97, 97), 256)
    [256, 97, 98]
    """
    merged: list[int] = []
    i = 0
    while i < len(tokens):
        found = tuple(tokens[i:i + 2]) == pair
        merged.append(new if found else tokens[i])
        i += 2 if found else 1
    return merged


def order_of_bytes() -> dict[int, int]:
    """Where each byte stands in the alphabet of GPT-2's byte-level tokenizers: Hugging Face breaks ties by it."""
    return {byte: i for i, byte in enumerate(sorted(range(256), key=lambda b: BYTE_TO_CHAR[b]))}


def train(texts: Sequence[bytes], n_merges: int, pattern: str = "gpt4", tie_break: str = "hf") -> list[Pair]:
    """At most ``n_merges`` merges, most frequent first; the new token of merge i is 256 + i.

    tie_break: which of several pairs of equal count comes first, as in ``Tokenizer.train``.

    >>> train([b"aaabdaaabac"], 3)
    [(97, 97), (97, 98), (256, 257)]
    """
    counts = count_pieces(texts, "cl100k" if pattern == "gpt4" else pattern)
    words = [(list(piece), count) for piece, count in counts.items()]
    order = order_of_bytes() if tie_break == "hf" else {}
    merges: list[Pair] = []
    while len(merges) < n_merges:
        pairs: Counter[Pair] = Counter()  # in the order of first occurrence
        for tokens, count in words:
            for pair in zip(tokens, tokens[1:]):
                pairs[pair] += count
        if not pairs:
            break
        most = max(pairs.values())
        ties = [pair for pair, count in pairs.items() if count == most]
        best = ties[0] if tie_break == "first" else min(ties, key=lambda pair: [order.get(t, t) for t in pair])
        merges.append(best)
        words = [(merge_everywhere(tokens, best, 255 + len(merges)), count) for tokens, count in words]
    return merges


def steps(piece: bytes, rank: Callable[[bytes, bytes], int | None]) -> Iterator[list[bytes]]:
    """The tokens of a piece before the first merge and after each one, as bytes.

    rank(left, right) is the place of the merge of two tokens, the lowest first, or None.
    """
    tokens = [bytes([b]) for b in piece]
    yield list(tokens)
    while True:
        ranked = [(rank(a, b), i) for i, (a, b) in enumerate(zip(tokens, tokens[1:]))]
        ranked = [(r, i) for r, i in ranked if r is not None]
        if not ranked:
            return
        _, i = min(ranked)
        tokens[i:i + 2] = [tokens[i] + tokens[i + 1]]
        yield list(tokens)


class Twin:
    """A vocabulary that encodes in plain Python: the same ids as the ``Tokenizer`` that it is made from.

    >>> from nanorlhf.tokenizer import Tokenizer
    >>> twin = Twin(Tokenizer.train(["aaabdaaabac"], vocab_size=259))
    >>> twin.encode("aaabdaaabac"), twin.encode("aaab") == [258]
    ([258, 100, 258, 97, 99], True)
    >>> print(twin.draw("aaab"))
    a|a|a|b
    aa|a|b
    aa|ab
    aaab
    """

    def __init__(self, tokenizer):
        vocabulary = tokenizer.vocabulary
        special = set(vocabulary.special_tokens.values())
        self.pattern, self.whole_piece_first = vocabulary.pattern, vocabulary.whole_piece_first
        self.ids: dict[bytes, int] = {}
        for i, token in enumerate(vocabulary.tokens):
            if token and i not in special:
                self.ids.setdefault(token, i)
        self.ranks: dict[tuple[bytes, bytes], int] | None = None  # None: the rank is the id of what the two make
        if vocabulary.merges is not None:
            spelled = [(vocabulary.tokens[a], vocabulary.tokens[b]) for a, b in vocabulary.merges]
            self.ranks = {}
            for i, pair in enumerate(spelled):
                self.ranks.setdefault(pair, i)

    def rank(self, left: bytes, right: bytes) -> int | None:
        """The place of the merge of two tokens, or None."""
        return self.ids.get(left + right) if self.ranks is None else self.ranks.get((left, right))

    def encode_piece(self, piece: bytes) -> list[int]:
        """The ids of one piece."""
        if self.whole_piece_first and piece in self.ids:
            return [self.ids[piece]]
        *_, last = steps(piece, self.rank)
        return [self.ids[token] for token in last]

    def split(self, text: str | bytes) -> list[bytes]:
        """The pieces of a text."""
        return pieces(self.pattern, text.encode() if isinstance(text, str) else text)

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text; special tokens' texts in it are plain text."""
        return [i for piece in self.split(text) for i in self.encode_piece(piece)]

    def draw(self, piece: str | bytes) -> str:
        """One line for each state of a piece, from bytes to tokens."""
        data = piece.encode() if isinstance(piece, str) else piece
        return "\n".join("|".join(t.decode("utf-8", "backslashreplace") for t in s) for s in steps(data, self.rank))
