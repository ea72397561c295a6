"""What texts there are, apart from any vocabulary: expressions, and the languages made of them.

An expression is built of the classes below, which are plain data: characters and strings, sequences, alternatives,
repetitions, calls of rules, and the intersection and the difference of two expressions without rules. Every kind of constraint
(choices, regular expressions, JSON Schema, grammars, templates) is a way of writing one; network.py turns it into an
automaton over the bytes of UTF-8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)  # stand for no character alone, so that they are in no text


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of some: sorted, disjoint ranges (first, last) of code points."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """This text, which may be empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Seq:
    """One part after another."""

    parts: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """One of the parts; no text at all if there are none."""

    parts: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """The part at least ``low`` times and at most ``high``, None for any number."""

    part: Expr
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class Rule:
    """The text of a rule of the language, by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Both:
    """A text that one part is and, if ``other`` says so, the other is too, else is not. Neither may call a rule."""

    part: Expr
    second: Expr
    other: bool = True


Expr = Chars | Text | Seq | Alt | Repeat | Rule | Both

EMPTY, NOTHING = Text(""), Alt(())


@contextmanager
def nesting_bounded(name: str):
    """ValueError where what is parsed or built recursively is nested too deeply for that."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"{name}: expected less nesting: this is too deep, or refers to itself without end") from None


def chars(ranges: Iterable[tuple[int, int]]) -> Chars:
    """The characters of ranges in any order, which may overlap; surrogates are left out.

    >>> chars([(100, 110), (97, 99), (105, 120)])
    Chars(ranges=((97, 120),))
    """
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    first, last = SURROGATES
    parts = [part for low, high in merged for part in ((low, min(high, first - 1)), (max(low, last + 1), high))]
    return Chars(tuple((low, high) for low, high in parts if low <= high))


def other_than(some: Chars) -> Chars:
    """Every character but these.

    >>> other_than(chars([(0, 96), (98, LAST)]))
    Chars(ranges=((97, 97),))
    """
    gaps, start = [], 0
    for low, high in some.ranges:
        gaps.append((start, low - 1))
        start = high + 1
    return chars([(low, high) for low, high in [*gaps, (start, LAST)] if low <= high])


ANY = other_than(Chars(()))


def seq(*parts: Expr) -> Expr:
    return parts[0] if len(parts) == 1 else Seq(parts)


def alt(*parts: Expr) -> Expr:
    return parts[0] if len(parts) == 1 else Alt(parts)


def optional(part: Expr) -> Expr:
    return Repeat(part, 0, 1)


def mapped(expr: Expr, leaf: Callable[[Chars | Text], Expr], rule: Callable[[Rule], Expr] = lambda rule: rule) -> Expr:
    """The same expression with other characters and texts in it, and other rules."""
    match expr:
        case Chars() | Text():
            return leaf(expr)
        case Rule():
            return rule(expr)
        case Seq(parts):
            return Seq(tuple(mapped(part, leaf, rule) for part in parts))
        case Alt(parts):
            return Alt(tuple(mapped(part, leaf, rule) for part in parts))
        case Repeat(part, low, high):
            return Repeat(mapped(part, leaf, rule), low, high)
        case Both(part, second, other):
            return Both(mapped(part, leaf, rule), mapped(second, leaf, rule), other)
    raise AssertionError(expr)


@dataclass(frozen=True)
class Language:
    """A set of texts. Two are equal, and share an automaton, if they were written alike.

    source: what it was made from, for messages and for caches; rules: by their names, those of ``expr`` and of one another.
    """

    source: str
    expr: Expr = field(compare=False, repr=False)
    rules: dict[str, Expr] = field(compare=False, repr=False, default_factory=dict)


def choice(texts: Iterable[str]) -> Language:
    """One of these texts.

    >>> choice(["yes", "no"]).source
    "choice ['yes', 'no']"
    """
    texts = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"choice: expected a list of texts, at least one, got none, or something else")
    return Language(f"choice {texts!r}", alt(*map(Text, dict.fromkeys(texts))))
