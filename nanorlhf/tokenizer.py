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
from rich.console import Console
from rich.progress import Progress

from nanorlhf import _C
from nanorlhf.pretokenize import PATTERNS, known_pattern, pieces
from nanorlhf.tokenizer_json import Vocabulary, add_special_tokens, read_folder, read_json, read_tiktoken, write_folder, write_json, write_tiktoken

TIE_BREAKS = ("hf", "raw", "first")
_BATCH_BYTES = 1 << 22  # text gathered before the native counter is called
_MERGES = 1024  # merges between two looks at the keyboard


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
        if not isinstance(vocabulary, Vocabulary):
            raise ValueError(f"Tokenizer: expected a Vocabulary, got {type(vocabulary).__name__}; files are read by Tokenizer.load")
        v = self._vocabulary = vocabulary
        v.pattern = known_pattern(v.pattern)
        specials = sorted(v.special_tokens.values())
        by_bytes = v.merges is None
        self._model = _C.BpeModel(v.tokens, specials, v.merges or [], v.results, by_bytes, v.whole_piece_first,
                                  v.pattern if v.pattern in PATTERNS else "")
        if v.pattern in PATTERNS and not v.nfc:  # the method below is then only the way round
            indirect = object.__new__(type(self))  # an object of its own, so that this one is in no cycle
            indirect.__dict__.update(self.__dict__)
            self.encode = _C.direct_encoder(self._model, indirect.encode)

    @property
    def vocabulary(self) -> Vocabulary:
        """Everything that the tokenizer is, as plain data. Not to be changed."""
        return self._vocabulary

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
        threads: int | None = None,
        progress: bool = False,
    ) -> Tokenizer:
        """Learns a vocabulary: ids 0 to 255 are the bytes, then the merges in order, then the special tokens.

        texts_or_paths  texts (str or bytes) and files (pathlib.Path or other os.PathLike), in any mixture; each is one
                        document, and special tokens' texts in it are plain text; files are read a part at a time
        vocab_size      all tokens, special ones included
        pattern         gpt2, cl100k (also gpt4), o200k, llama3, qwen2, or a regular expression
        tie_break       which of several pairs of equal count merges first: "hf" as Hugging Face's trainer, "raw" the
                        lowest (left, right) ids, "first" the first in the text
        threads         that count the text; default: as many as there are cores
        progress        whether to show a bar on the standard error

        Raises ValueError when the text cannot give that many tokens, or a file is missing or empty.
        """
        if isinstance(special_tokens, str) or not (threads is None or isinstance(threads, int)):
            raise ValueError(f"Tokenizer.train: expected a list of special tokens and a number of threads, got {special_tokens!r} "
                             f"and {threads!r}")
        special_tokens = list(special_tokens)
        if tie_break not in TIE_BREAKS:
            raise ValueError(f"Tokenizer.train: expected tie_break among {', '.join(TIE_BREAKS)}, got {tie_break!r}")
        if len(set(special_tokens)) != len(special_tokens) or not all(isinstance(s, str) and s for s in special_tokens):
            raise ValueError(f"Tokenizer.train: expected distinct, non-empty special tokens, got {special_tokens}")
        fixed = 256 + len(special_tokens)
        if not isinstance(vocab_size, (int, np.integer)) or vocab_size < fixed:
            raise ValueError(f"Tokenizer.train: expected vocab_size of at least {fixed}, got {vocab_size!r}")
        pattern = known_pattern(pattern)
        with Progress(*Progress.get_default_columns(), console=Console(stderr=True), disable=not progress) as bar:
            training = _count(texts_or_paths, pattern, _default_threads() if threads is None else threads, bar)
            training.finish(TIE_BREAKS.index(tie_break))
            merges, task = [], bar.add_task("merges", total=vocab_size - fixed)
            while len(merges) < vocab_size - fixed:
                found = training.merges(min(_MERGES, vocab_size - fixed - len(merges)))
                if not found:
                    break
                merges += found
                bar.update(task, completed=len(merges))
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
    def load(cls, path: str | os.PathLike, pattern: str | None = None,
             special_tokens: dict[str, int] | None = None) -> Tokenizer:
        """Reads a folder that holds a tokenizer.json, a tokenizer.json itself, or a .tiktoken rank file.

        A rank file has no split rule, so it needs the pattern, and no special tokens: special_tokens gives their texts and
        ids, and adds to those of another file. Raises ValueError for a file that is missing or is not a byte-level BPE, and
        for a special token whose id is another token's.
        """
        path = Path(path)
        if path.suffix == ".tiktoken":
            if pattern is None:
                raise ValueError(f"Tokenizer.load: expected a pattern for the rank file {path}, got None")
            if not path.is_file():
                raise ValueError(f"Tokenizer.load: expected a tokenizer at {path}, got no such file")
            vocabulary = read_tiktoken(path, pattern)
        else:
            vocabulary = read_folder(path) if path.is_dir() else read_json(path)
        if pattern is not None:
            vocabulary.pattern = pattern
        add_special_tokens(vocabulary, special_tokens or {})
        return cls(vocabulary)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a .tiktoken rank file, a .json file, or else a folder of tokenizer.json and tokenizer_config.json.

        `load` reads each again, and so do tiktoken, Hugging Face tokenizers and transformers. A rank file holds the
        ordinary tokens alone: ValueError if its ranks would not give the same ids.
        """
        path = Path(path)
        write = {".tiktoken": write_tiktoken, ".json": write_json}.get(path.suffix, write_folder)
        write(self._vocabulary, path)

    def encode(self, text: str | bytes, allowed_special: Iterable[str] | str = frozenset(),
               disallowed_special: Iterable[str] | str = frozenset()) -> list[int]:
        """The ids of a text. Special tokens' texts are plain text unless allowed_special ("all", or some) names them.

        Bytes need not be valid UTF-8. Raises ValueError for a name that is no special token, and for a text that holds
        one of disallowed_special ("all" but those allowed, or some).

        >>> tok = Tokenizer.train([], 257, special_tokens=["<|end|>"])
        >>> tok.encode("a<|end|>"), tok.encode("a<|end|>", allowed_special="all")
        ([97, 60, 124, 101, 110, 100, 124, 62], [97, 256])
        """
        known = self._vocabulary.special_tokens
        names = self._special_names(allowed_special, "allowed_special")
        banned = self._special_names(disallowed_special, "disallowed_special")
        data = text
        if banned:
            data = _utf8(text, "Tokenizer.encode")
            found = next((n for n in banned if self._vocabulary.tokens[known[n]] in data
                          and not (disallowed_special == "all" and n in names)), None)
            if found is not None:
                raise ValueError(f"Tokenizer.encode: expected a text without the special token {found!r}; name it in "
                                 "allowed_special to have it parsed")
        specials = [(self._vocabulary.tokens[known[name]], known[name]) for name in names]
        if self.pattern in PATTERNS and not (self._vocabulary.nfc and specials):
            return self._model.encode(self._normalized(data), specials)
        return self._encode_between(_utf8(data, "Tokenizer.encode"), dict(specials))

    def _special_names(self, given: Iterable[str] | str, argument: str) -> list[str]:
        known = self._vocabulary.special_tokens
        names = list(known) if given == "all" else [given] if isinstance(given, str) else list(given)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"Tokenizer.encode: expected {argument} among {sorted(known)}, got {unknown[0]!r}")
        return names

    def encode_batch(self, texts: Iterable[str | bytes], threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Many texts as plain text: (ids int32 (N,), offsets int64 (B+1,)); text i is ids[offsets[i]:offsets[i+1]].

        >>> ids, offsets = Tokenizer.train([], 256).encode_batch(["ab", "", "c"])
        >>> ids.tolist(), offsets.tolist()
        ([97, 98, 99], [0, 2, 2, 3])
        """
        texts, threads = self._batch(texts, threads, "Tokenizer.encode_batch")
        if self.pattern in PATTERNS:
            return self._model.encode_batch(texts, threads)
        ids = [self.encode(text) for text in texts]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        return np.array([i for one in ids for i in one], np.int32), offsets

    def encode_lists(self, texts: Iterable[str | bytes], threads: int | None = None) -> list[list[int]]:
        """Many texts as plain text: a list of ids for each.

        >>> Tokenizer.train([], 256).encode_lists(["ab", "", "c"])
        [[97, 98], [], [99]]
        """
        texts, threads = self._batch(texts, threads, "Tokenizer.encode_lists")
        if self.pattern in PATTERNS:
            return self._model.encode_lists(texts, threads)
        return [self.encode(text) for text in texts]

    def _batch(self, texts: Iterable[str | bytes], threads: int | None, caller: str) -> tuple[Iterable, int]:
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
            raise ValueError(f"{caller}: expected a list of texts, got {type(texts).__name__}")
        if threads is not None and threads < 1:
            raise ValueError(f"{caller}: expected threads of at least 1, got {threads}")
        return [self._normalized(text) for text in texts] if self._vocabulary.nfc else texts, threads or _default_threads()

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of ids. Raises KeyError for an id that the vocabulary does not have."""
        return self._model.decode_bytes(ids)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, with U+FFFD for bytes that are not UTF-8. Raises KeyError for an unknown id."""
        return self._model.decode(ids)

    def stream(self) -> TokenStream:
        """A decoder that takes one id at a time."""
        return TokenStream(self)

    def _normalized(self, text: str | bytes) -> str | bytes:
        if not self._vocabulary.nfc:
            return text
        data = _utf8(text, "Tokenizer.encode")
        normal = unicodedata.normalize("NFC", data.decode("utf-8", "surrogateescape"))
        return normal.encode("utf-8", "surrogateescape")

    def _encode_between(self, data: bytes, specials: dict[bytes, int]) -> list[int]:
        """What lies between the special tokens is normalised and split on its own."""
        longest_first = sorted(specials, key=len, reverse=True)
        parts = re.split(b"(" + b"|".join(map(re.escape, longest_first)) + b")", data) if specials else [data]
        ids: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(specials[part])
            elif self.pattern in PATTERNS:
                ids += self._model.encode(self._normalized(part), [])
            else:
                ids += self._model.encode_pieces(pieces(self.pattern, self._normalized(part)))
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


def _count(texts_or_paths: Iterable[str | bytes | os.PathLike], pattern: str, threads: int,
           bar: Progress) -> _C.BpeTraining:
    """Counts the pieces of texts and files, in their order."""
    if isinstance(texts_or_paths, (str, bytes)) or not isinstance(texts_or_paths, (Iterable, os.PathLike)):
        raise ValueError(f"Tokenizer.train: expected a list of texts or paths, got {type(texts_or_paths).__name__}")
    if isinstance(texts_or_paths, os.PathLike):
        texts_or_paths = [texts_or_paths]
    if threads < 1:
        raise ValueError(f"Tokenizer.train: expected threads of at least 1, got {threads}")
    training, task = _C.BpeTraining(threads), bar.add_task("bytes", total=None)
    batch: list[bytes] = []
    size = 0

    def flush() -> None:
        nonlocal batch, size
        if pattern in PATTERNS:
            training.add(pattern, batch)
        else:
            for text in batch:
                training.add_pieces(pieces(pattern, text))
        bar.update(task, advance=size)
        batch, size = [], 0

    for item in texts_or_paths:
        for text in _parts(item, pattern in PATTERNS) if isinstance(item, os.PathLike) else [_utf8(item, "Tokenizer.train")]:
            batch.append(text)
            size += len(text)
            if size >= _BATCH_BYTES:
                flush()
    flush()
    return training


def _parts(path: os.PathLike, may_cut: bool) -> Iterable[bytes]:
    """A file in parts, cut where a cut changes no piece; whole for patterns of which that is not known."""
    try:
        with open(path, "rb") as file:
            rest = b"" if may_cut else file.read()
            empty = not rest
            while may_cut and (block := file.read(_BATCH_BYTES)):
                empty = False
                rest = rest + block if rest else block
                cut = _C.last_safe_cut(rest)
                if cut:
                    yield rest[:cut]
                    rest = rest[cut:]
    except OSError as error:
        raise ValueError(f"Tokenizer.train: expected a readable file, got {os.fspath(path)}") from error
    if empty:
        raise ValueError(f"Tokenizer.train: expected text in {os.fspath(path)}, got an empty file")
    if rest:
        yield rest
