r"""Regular expressions: a documented part of Python's syntax, matched against the whole text.

Literals; ``.`` (any character but a newline); classes ``[a-z]`` and ``[^a-z]``; the escapes ``\d \w \s`` and their negations
``\D \W \S``, in ASCII as with re.ASCII; ``\n \t \r \f \v \a \0``, ``\xhh``, ``\uhhhh``, ``\Uhhhhhhhh``, and a backslash before any
character that is no letter or digit; ``|``; groups ``(…)``, ``(?:…)``, ``(?P<name>…)``, of which nothing is captured; ``* + ? {m}
{m,} {m,n} {,n}``, also lazy, which matches the same texts; ``^`` where a text starts and ``$`` where it ends, which change nothing
in a whole match. Lookaround, backreferences, word boundaries, possessive repetitions, atomic groups, flags and ``\p{…}`` are refused.
"""

from __future__ import annotations

from nanorlhf.engine.constrain.language import ANY, EMPTY, LAST, Chars, Expr, Language, Repeat, Text, alt, chars, nesting_bounded, other_than, seq

_DIGIT = chars([(48, 57)])
_WORD = chars([(48, 57), (65, 90), (95, 95), (97, 122)])
_SPACE = chars([(9, 13), (32, 32)])
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE, **{name.upper(): other_than(some) for name, some in
                                                      (("d", _DIGIT), ("w", _WORD), ("s", _SPACE))}}
_CONTROLS = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "a": 7, "0": 0}
_HEX = {"x": 2, "u": 4, "U": 8}
_NOT_NEWLINE = other_than(chars([(10, 10)]))
MOST_REPEATS = 100_000


def regex(pattern: str) -> Language:
    r"""The texts that a regular expression matches as a whole.

    Raises ValueError for what is not in the syntax above, with the place in the pattern.

    >>> regex(r"\d{4}-(?:0[1-9]|1[0-2])").source
    '/\\d{4}-(?:0[1-9]|1[0-2])/'
    """
    if not isinstance(pattern, str):
        raise ValueError(f"regex: expected a pattern as a str, got {type(pattern).__name__}")
    with nesting_bounded("regex"):
        return Language(f"/{pattern}/", expression(pattern))


def expression(pattern: str, search: bool = False) -> Expr:
    """The pattern as an expression. search: with any text before and after, where no ^ and $ forbid it, as JSON Schema has it."""
    parser = _Parser(pattern, search)
    expr = parser.alternatives(top=True)
    if parser.at < len(pattern):
        raise parser.error("no closing parenthesis that opens nothing")
    return expr


class _Parser:
    def __init__(self, pattern: str, search: bool = False):
        self.pattern, self.search, self.at = pattern, search, 0

    def error(self, expected: str, at: int | None = None) -> ValueError:
        at = self.at if at is None else at
        return ValueError(f"regex: expected {expected} at place {at} of {self.pattern!r}, got {self.pattern[at:at + 8] or 'its end'!r}")

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self, text: str) -> bool:
        if self.pattern.startswith(text, self.at):
            self.at += len(text)
            return True
        return False

    def alternatives(self, top: bool) -> Expr:
        found = [self.sequence(top)]
        while self.take("|"):
            found.append(self.sequence(top))
        return alt(*found)

    def sequence(self, top: bool) -> Expr:
        """One alternative. top: no group is around it, so that ^ and $ are where texts start and end."""
        parts: list[Expr] = []
        from_start, to_end = False, False
        while self.take("^"):
            if not top:
                raise self.error("^ only where the text starts", self.at - 1)
            from_start = True
        while self.peek() not in ("", "|", ")"):
            if self.take("$"):
                if not top or self.peek() not in ("", "|", "$"):
                    raise self.error("$ only where the text ends", self.at - 1)
                to_end = True
                continue
            parts.append(self.repeated())
        if self.search:
            anything = Repeat(ANY, 0, None)
            parts = [*([] if from_start or not top else [anything]), *parts, *([] if to_end or not top else [anything])]
        return seq(*parts) if parts else EMPTY

    def repeated(self) -> Expr:
        part = self.atom()
        while True:
            start = self.at
            bounds = self.bounds()
            if bounds is None:
                return part
            low, high = bounds
            if self.take("+"):
                raise self.error("a repetition that is not possessive", start)
            self.take("?")  # lazy: the same texts
            if self.peek() and self.peek() in "*+?":
                raise self.error("one repetition, or a group around the first")
            part = Repeat(part, low, high)

    def bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return bounds
        if self.peek() != "{":
            return None
        start, close = self.at, self.pattern.find("}", self.at)
        low, comma, high = self.pattern[start + 1 : close].partition(",") if close > 0 else ("", "", "")
        if not all(text == "" or (text.isascii() and text.isdigit()) for text in (low, high)) or not (low or high):
            raise self.error(r"{m}, {m,}, {,n} or {m,n}, or \{ for a brace", start)
        bounds = int(low or 0), (int(high) if high else None) if comma else int(low)
        if max(bounds[0], bounds[1] or 0) > MOST_REPEATS or (bounds[1] is not None and bounds[0] > bounds[1]):
            raise self.error(f"bounds in order and of at most {MOST_REPEATS}", start)
        self.at = close + 1
        return bounds

    def atom(self) -> Expr:
        start = self.at
        if self.take("("):
            return self.group(start)
        if self.take("["):
            return self.char_class(start)
        if self.take("."):
            return _NOT_NEWLINE
        if self.take("\\"):
            found = self.escape()
            return found if isinstance(found, Chars) else Text(chr(found))
        if self.peek() in "*+?{":
            raise self.error("something to repeat")
        if self.peek() == "^":
            raise self.error("^ only where the text starts")
        self.at += 1
        return Text(self.pattern[start])

    def group(self, start: int) -> Expr:
        if self.take("?"):
            if self.take("P<"):
                close = self.pattern.find(">", self.at)
                if close < 0 or not self.pattern[self.at : close].isidentifier():
                    raise self.error("a group's name")
                self.at = close + 1
            elif not self.take(":"):
                raise self.error("a group (…), (?:…) or (?P<name>…), without lookaround, flags and backreferences", start)
        inside = self.alternatives(top=False)
        if not self.take(")"):
            raise self.error("a closing parenthesis")
        return inside

    def escape(self, in_class: bool = False) -> Chars | int:
        """After a backslash: a class, or one code point."""
        start, letter = self.at - 1, self.peek()
        self.at += 1
        if letter in _CLASSES and letter:
            return _CLASSES[letter]
        if letter in _HEX and letter:
            digits = self.pattern[self.at : self.at + _HEX[letter]]
            try:
                point = int(digits, 16) if len(digits) == _HEX[letter] and digits.isalnum() else -1
            except ValueError:
                point = -1
            if not 0 <= point <= LAST or 0xD800 <= point <= 0xDFFF:
                raise self.error(f"{_HEX[letter]} hexadecimal digits of a character", start)
            self.at += _HEX[letter]
            return point
        if letter in _CONTROLS and letter:
            if letter == "0" and self.peek().isdigit():
                raise self.error(r"\0 without digits after it; \xhh is a character by its number", start)
            return _CONTROLS[letter]
        if letter == "b" and in_class:
            return 8
        if not letter or (letter.isascii() and letter.isalnum()):
            raise self.error("an escape without a word boundary, a backreference or a property", start)
        return ord(letter)

    def char_class(self, start: int) -> Chars:
        negated = self.take("^")
        ranges: list[tuple[int, int]] = []
        first = True
        while first or not self.take("]"):
            low = self.member(start)
            first = False
            at = self.at
            if isinstance(low, int) and self.take("-"):
                if self.peek() == "]":
                    ranges.append((45, 45))
                else:
                    high = self.member(start)
                    if not isinstance(high, int) or high < low:
                        raise self.error("a range of characters in order", at)
                    ranges.append((low, high))
                    continue
            ranges += [(low, low)] if isinstance(low, int) else low.ranges
        found = other_than(chars(ranges)) if negated else chars(ranges)
        if not found.ranges:
            raise self.error("a class with a character in it", start)
        return found

    def member(self, start: int) -> Chars | int:
        if not self.peek():
            raise self.error("a class that is closed", start)
        if self.take("\\"):
            return self.escape(in_class=True)
        self.at += 1
        return ord(self.pattern[self.at - 1])
