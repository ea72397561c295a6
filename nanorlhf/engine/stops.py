"""Text as its tokens come: whole characters, and nothing that may yet be the beginning of a stop text."""

import codecs
from typing import Sequence, Tuple

from ..tokenizer import Tokenizer


class TextStream:
    """Decodes ids one at a time until a stop text is there. Special tokens stand for no text, and no more do ids
    of the model that the tokenizer does not have.

    Of several stop texts the one that is complete first counts, of those the longest; how the text is cut into tokens does not matter.

    >>> stream = TextStream(Tokenizer.train([], 256), ["END"])
    >>> [stream.push(b) for b in b"xENx"]
    [('x', False), ('', False), ('', False), ('ENx', False)]
    >>> [stream.push(b) for b in b"yEND"], stream.finish()
    ([('y', False), ('', False), ('', False), ('', True)], '')
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, [s.encode() for s in stop]
        self._special = set(tokenizer.special_tokens.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = b""  # bytes that may be the beginning of a stop text

    def push(self, token: int) -> Tuple[str, bool]:
        """(the text that is now sure, whether a stop text has ended it)."""
        if token in self._special or token >= self._tokenizer.vocab_size:
            return "", False
        data = self._held + self._tokenizer.decode_bytes([token])
        found = [(at + len(s), at) for s in self._stop if (at := data.find(s)) >= 0]
        if found:
            self._held = b""
            return self._decoder.decode(data[:min(found)[1]], final=True), True
        keep = max((_overlap(data, s) for s in self._stop), default=0)
        self._held = data[len(data) - keep:]
        return self._decoder.decode(data[:len(data) - keep]), False

    def finish(self) -> str:
        """What was held back, when no stop text came: U+FFFD for an unfinished character."""
        return self._decoder.decode(self._held, final=True)


def _overlap(data: bytes, stop: bytes) -> int:
    """Length of the longest end of data that is a beginning of stop, but not all of it.

    >>> _overlap(b"xaab", b"aabb"), _overlap(b"xa", b"b")
    (3, 0)
    """
    return next((n for n in range(min(len(data), len(stop) - 1), 0, -1) if data.endswith(stop[:n])), 0)
