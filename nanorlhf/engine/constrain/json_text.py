"""How JSON writes characters and numbers, and the formats of strings, as expressions.

Every character is written in one way, so that texts can be compared as they stand: plainly, if it may be, else escaped; only
control characters have two, the short escape and the \\u00 form (as llguidance 1.9 has it, whose masks are the tests' oracle).
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

from nanorlhf.engine.constrain.language import EMPTY, NOTHING, Alt, Both, Chars, Expr, Repeat, Rule, Text, alt, chars, optional, other_than, seq

_SHORT = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}
_ESCAPED = [*range(32), 34, 92, 127]
_PLAIN = other_than(chars((point, point) for point in _ESCAPED))
_HEX_LETTERS = {letter: Chars(((ord(letter), ord(letter)), (ord(letter) + 32, ord(letter) + 32))) for letter in "ABCDEF"}
DIGIT, _FROM_1 = chars([(48, 57)]), chars([(49, 57)])
_DIGITS = Repeat(DIGIT, 0, None)
_WHOLE = alt(Text("0"), seq(_FROM_1, _DIGITS))
_FRACTION = optional(seq(Text("."), Repeat(DIGIT, 1, None)))
INTEGER = seq(optional(Text("-")), _WHOLE)
NUMBER = seq(INTEGER, _FRACTION, optional(seq(chars([(69, 69), (101, 101)]), optional(chars([(43, 43), (45, 45)])), Repeat(DIGIT, 1, None))))


def encoded(leaf: Chars | Text) -> Expr:
    """Characters or a text as they stand between the quotes of a JSON string."""
    if isinstance(leaf, Text):
        return seq(*(encoded(Chars(((ord(c), ord(c)),))) for c in leaf.text)) if leaf.text else leaf
    plain = Chars(tuple((max(a, c), min(b, d)) for a, b in leaf.ranges for c, d in _PLAIN.ranges if max(a, c) <= min(b, d)))
    escapes = [_escape(point) for point in _ESCAPED if any(low <= point <= high for low, high in leaf.ranges)]
    return alt(*([plain] if plain.ranges else []), *(escapes if len(escapes) < len(_ESCAPED) else [_ALL_ESCAPES]))


def _escape(point: int) -> Expr:
    short = [Text("\\" + _SHORT[point])] if point in _SHORT else []
    if point in (34, 92):
        return short[0]
    return alt(*short, seq(Text("\\u00"), *(_HEX_LETTERS.get(digit, Text(digit)) for digit in f"{point:02X}")))


_ALL_ESCAPES = Alt(tuple(map(_escape, _ESCAPED)))


# --- numbers -----------------------------------------------------------------------------------------------------------


def integers(low: int | None, high: int | None) -> Expr:
    """The integers from low to high, None for no bound; 0 also as -0 where there are
    both negative and positive ones.

    >>> integers(5, 4)
    Alt(parts=())
    """
    if low is not None and high is not None and low > high:
        return NOTHING
    parts: list[Expr] = []
    if high is None or high >= 0:
        parts.append(_naturals(max(low or 0, 0), high))
    if low is None or low < 0:
        parts.append(seq(Text("-"), _naturals(0 if high is None or high > 0 else max(-high, 1), None if low is None else -low)))
    return alt(*parts)


def _naturals(low: int, high: int | None) -> Expr:
    """From low to high without leading zeros; 0 is one digit."""
    if high is not None and low > high:
        return NOTHING
    first, parts = str(low), []
    for length in range(len(first), len(str(high)) + 1 if high is not None else len(first) + 1):
        least = first if length == len(first) else "1" + "0" * (length - 1)
        most = str(high) if high is not None and length == len(str(high)) else "9" * length
        parts.append(_same_length(least, most))
    if high is None:
        parts.append(seq(_FROM_1, Repeat(DIGIT, len(first), None)))
    return alt(*parts)


def _same_length(low: str, high: str) -> Expr:
    """The strings of digits of one length from low to high."""
    if not low or (set(low) == {"0"} and set(high) == {"9"}):
        return Repeat(DIGIT, len(low), len(low))
    if low[0] == high[0]:
        return seq(Text(low[0]), _same_length(low[1:], high[1:]))
    rest = len(low) - 1
    parts = [seq(Text(low[0]), _same_length(low[1:], "9" * rest)), seq(Text(high[0]), _same_length("0" * rest, high[1:]))]
    if ord(high[0]) - ord(low[0]) > 1:
        parts.append(seq(Chars(((ord(low[0]) + 1, ord(high[0]) - 1),)), Repeat(DIGIT, rest, rest)))
    return alt(*parts)


def numbers(low: Decimal | None, high: Decimal | None, above: bool, below: bool) -> Expr:
    """Decimal fractions from low to high, without exponents; above, below: the bounds themselves are left out."""
    sides = [_at_least(low, above)] if low is not None else []
    sides += [_at_most(high, below)] if high is not None else []
    return NUMBER if not sides else sides[0] if len(sides) == 1 else Both(*sides)


def _at_least(bound: Decimal, strictly: bool) -> Expr:
    if bound > 0 or (bound == 0 and strictly):
        return _from(bound, strictly)
    negative = _to(-bound, strictly) if bound else Text("0")
    return alt(seq(_WHOLE, _FRACTION), seq(Text("-"), negative))


def _at_most(bound: Decimal, strictly: bool) -> Expr:
    if bound < 0 or (bound == 0 and strictly):
        return seq(Text("-"), _from(-bound, strictly))
    return alt(seq(Text("-"), _WHOLE, _FRACTION), _to(bound, strictly))


def _split(bound: Decimal) -> tuple[int, str]:
    whole, _, fraction = f"{bound:f}".partition(".")
    return int(whole), fraction.rstrip("0")


def _from(bound: Decimal, strictly: bool) -> Expr:
    """Without a sign, at least the bound."""
    whole, fraction = _split(bound)
    larger = seq(_naturals(whole + 1, None), _FRACTION)
    if not fraction and not strictly:
        return seq(_naturals(whole, None), _FRACTION)
    zeros = Repeat(Text("0"), 0, None)  # for a bound that is whole, or whose digits are all equal so far
    tail = seq(zeros, _FROM_1, _DIGITS) if strictly else _DIGITS
    for digit in reversed(fraction):
        greater = [seq(Chars(((ord(digit) + 1, 57),)), _DIGITS)] if digit < "9" else []
        tail = alt(seq(Text(digit), tail), *greater)
    return alt(larger, seq(Text(str(whole)), Text("."), tail))


def _to(bound: Decimal, strictly: bool) -> Expr:
    """Without a sign, at most the bound."""
    whole, fraction = _split(bound)
    smaller = seq(_naturals(0, whole - 1), _FRACTION)
    if not fraction:
        equal = NOTHING if strictly else seq(Text(str(whole)), optional(seq(Text("."), Repeat(Text("0"), 1, None))))
        return alt(smaller, equal)
    tail = NOTHING if strictly else Repeat(Text("0"), 0, None)
    for k, digit in reversed(list(enumerate(fraction))):
        less = [seq(Chars(((48, ord(digit) - 1),)), _DIGITS)] if digit > "0" else []
        tail = alt(seq(Text(digit), tail), *less, *([EMPTY] if k else []))
    return alt(smaller, seq(Text(str(whole)), optional(seq(Text("."), tail))))


def multiples(of: int, rules: dict[str, Expr]) -> Expr:
    """The integers that a positive one divides: a rule for each remainder of the digits so far, added to ``rules``."""
    names = [f"multiple of {of}, remainder {r}" for r in range(of)]
    for r, name in enumerate(names):
        more = [seq(Text(str(d)), Rule(names[(10 * r + d) % of])) for d in range(10)]
        rules[name] = alt(*more, *([EMPTY] if r == 0 else []))
    first = [seq(Text(str(d)), Rule(names[d % of])) for d in range(1, 10)]
    return seq(optional(Text("-")), alt(Text("0"), *first))


def whole_bounds(low: Fraction | None, high: Fraction | None, above: bool, below: bool) -> tuple[int | None, int | None]:
    """The least and the greatest integer between bounds; above, below: the bounds themselves are left out."""
    least = None if low is None else math.floor(low) + 1 if above else math.ceil(low)
    most = None if high is None else math.ceil(high) - 1 if below else math.floor(high)
    return least, most


# --- formats, as regular expressions -------------------------------------------------------------------------------------

_YEAR = r"(?:[1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])"
_LEAP = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
         rf"|{_LEAP}-02-29)")
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_H = "[0-9A-Fa-f]{1,4}"
_COMPRESSED = "|".join(f"(?:{_H}(?::{_H}){{{k - 1}}})?::(?:{_H}(?::{_H}){{0,{6 - k}}})?" if k else f"::(?:{_H}(?::{_H}){{0,6}})?" for k in range(7))
_PATH = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"{_OCTET}(?:\.{_OCTET}){{3}}",
    "ipv6": rf"(?:{_H}:){{7}}{_H}|{_COMPRESSED}|(?:{_H}:){{1,7}}:",
    "hostname": _HOST,
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@{_HOST}",
    "uri": rf"[A-Za-z][A-Za-z0-9+.-]*:(?://{_HOST}(?::\d{{1,5}})?(?:/{_PATH})?|[A-Za-z0-9]{_PATH})(?:\?{_PATH})?(?:#{_PATH})?",
}
