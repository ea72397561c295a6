"""The rules that split text into pieces before any merge: by name (native scanners) or by regular expression."""

from __future__ import annotations

import re

import regex

from nanorlhf import _C

# The split rules by name, in a spelling that means the same to Hugging Face's engine, tiktoken's and Python's `regex`.
# (?![\s\S]) is the end of the text: $ and \Z differ between the three.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s++(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}

# Other spellings of the same rules, as they stand in published tokenizers.
SPELLINGS = {pattern: name for name, pattern in PATTERNS.items()} | {
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ): "cl100k",
}
ALIASES = {"gpt4": "cl100k"}


def known_pattern(pattern: str) -> str:
    """The name of a split rule that has a native scanner; any other pattern as it is, once it compiles.

    Raises ValueError for an unknown name and for what is no regular expression.

    >>> known_pattern("gpt4"), known_pattern(r"\\w+|\\s+")
    ('cl100k', '\\\\w+|\\\\s+')
    """
    if not isinstance(pattern, str):
        raise ValueError(f"Tokenizer: expected a pattern's name or a regular expression, got {type(pattern).__name__}")
    name = ALIASES.get(pattern, SPELLINGS.get(pattern, pattern))
    if name in PATTERNS:
        return name
    if re.fullmatch(r"[\w-]*", name):
        names = ", ".join([*PATTERNS, *ALIASES])
        raise ValueError(f"Tokenizer: expected one of {names} or a regular expression, got {pattern!r}")
    try:
        regex.compile(name)
    except regex.error as error:
        raise ValueError(f"Tokenizer: expected a regular expression, got {pattern!r} ({error})") from error
    return name


def pieces(pattern: str, data: bytes) -> list[bytes]:
    """The pieces of UTF-8 text; they join to the text. What a regular expression does not match is a piece too.

    A named pattern runs natively; a regular expression runs in the `regex` module, which is slower by far.

    >>> pieces("cl100k", b"It's 12345"), pieces(r"\\w+", b"It's")
    ([b'It', b"'s", b' ', b'123', b'45'], [b'It', b"'", b's'])
    """
    if pattern in PATTERNS:
        return _C.pretokenize(pattern, data)
    text = data.decode("utf-8", "surrogateescape")
    found, end = [], 0
    for match in regex.finditer(pattern, text):  # regex keeps what it has compiled
        found += [text[end : match.start()], match.group()]
        end = match.end()
    found.append(text[end:])
    return [piece.encode("utf-8", "surrogateescape") for piece in found if piece]
