r"""Context-free grammars, in a notation close to llama.cpp's GBNF.

    # sums of numbers, with nesting
    root   ::= term (("+" | "-") term)*
    term   ::= number | "(" root ")"
    number ::= [0-9]+ | /0x[0-9a-f]{1,8}/

A rule is a name, ``::=`` and alternatives with ``|`` between; it may go on over several lines, up to the next ``name ::=``. Parts are
texts in double quotes with the escapes of JSON, character classes ``[a-z]`` and ``[^"]``, regular expressions between slashes (regex.py's
syntax), ``.`` for any character, names of rules, groups in parentheses; after a part ``* + ? {m} {m,} {m,n}``. White space between
parts means nothing, ``#`` starts a comment. There is no lexer, so white space in texts is written where it may be.

A rule may call itself anywhere but at its own beginning by way of another rule; where an alternative of a rule begins with the rule
itself, as in ``sum ::= sum "+" term | term``, it is rewritten as a repetition, which has the same texts.
"""

from __future__ import annotations

import json
import re

from nanorlhf.engine.constrain.language import ANY, EMPTY, Alt, Expr, Language, Repeat, Rule, Seq, Text, alt, nesting_bounded, seq
from nanorlhf.engine.constrain.regex import expression

_TOKEN = re.compile(r"""(?P<space>(?:\s|\#[^\n]*)+) | (?P<head>[A-Za-z_][\w-]*\s*::=) | (?P<name>[A-Za-z_][\w-]*) | (?P<text>"(?:[^"\\\n]|\\.)*")
    | (?P<class>\[(?:[^\]\\\n]|\\.)*\]) | (?P<regex>/(?:[^/\\\n]|\\.)+/) | (?P<bounds>\{\d*(?:,\d*)?\}|[*+?]) | (?P<sign>[.()|])""", re.VERBOSE)


def grammar(text: str, start: str = "root") -> Language:
    """The texts that the rule ``start`` of a grammar derives.

    Raises ValueError for what is not in the notation, with the line; for names without a rule; and, when the language is put on a
    vocabulary, for rules that begin with themselves by way of others, and for a grammar that derives nothing.

    >>> balanced = grammar('root ::= "(" root ")" root | ""')
    >>> sorted(balanced.rules)
    ['root']
    """
    if not isinstance(text, str):
        raise ValueError(f"grammar: expected a grammar as a str, got {type(text).__name__}")
    parser = _Parser(text)
    with nesting_bounded("grammar"):
        rules = parser.rules()
    if start not in rules:
        raise ValueError(f"grammar: expected a rule called {start}, got {', '.join(rules) or 'no rules'}")
    for name, line in parser.called:
        if name not in rules:
            raise ValueError(f"grammar: expected the rule {name} of line {line} to be defined, got {', '.join(rules)}")
    rules = {name: _without_left_recursion(name, body) for name, body in rules.items()}
    return Language(f"the grammar {text!r} from {start}", Rule(start), rules)


class _Parser:
    def __init__(self, text: str):
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, line
        self.called: list[tuple[str, int]] = []
        self.at, place = 0, 0
        while place < len(text):
            line = text.count("\n", 0, place) + 1
            found = _TOKEN.match(text, place)
            if not found:
                raise ValueError(f"grammar: expected a rule, a text, a class, a name or a sign in line {line}, got {text[place:place + 20]!r}")
            if found.lastgroup != "space":
                self.tokens.append((found.lastgroup, found[0], line))
            place = found.end()
        self.tokens.append(("end", "the grammar's end", text.count("\n") + 1))

    def error(self, expected: str) -> ValueError:
        _, text, line = self.tokens[self.at]
        return ValueError(f"grammar: expected {expected} in line {line}, got {text}")

    def take(self, *wanted: str) -> str | None:
        """The next token's text if its kind or its text is wanted."""
        kind, text, _ = self.tokens[self.at]
        if kind not in wanted and text not in wanted:
            return None
        self.at += 1
        return text

    def rules(self) -> dict[str, Expr]:
        rules: dict[str, Expr] = {}
        while not self.take("end"):
            head = self.take("head")
            if head is None:
                raise self.error("a rule, name ::= …,")
            name = head.removesuffix("::=").strip()
            if name in rules:
                raise ValueError(f"grammar: expected one rule {name}, got another in line {self.tokens[self.at - 1][2]}")
            rules[name] = self.alternatives()
        return rules

    def alternatives(self) -> Expr:
        found = [self.sequence()]
        while self.take("|"):
            found.append(self.sequence())
        return alt(*found)

    def sequence(self) -> Expr:
        parts = []
        while self.tokens[self.at][0] not in ("head", "end") and self.tokens[self.at][1] not in ("|", ")"):
            part = self.part()
            while bounds := self.take("bounds"):
                part = Repeat(part, *self.repeats(bounds))
            parts.append(part)
        return seq(*parts) if parts else EMPTY

    def repeats(self, bounds: str) -> tuple[int, int | None]:
        if bounds in "*+?":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[bounds]
        low, comma, high = bounds[1:-1].partition(",")
        low, high = int(low or 0), int(high) if high else None if comma else int(low or -1)
        if high is not None and high < low:
            self.at -= 1
            raise self.error("bounds in order")
        return low, high

    def part(self) -> Expr:
        if self.take("("):
            inside = self.alternatives()
            if not self.take(")"):
                raise self.error("a closing parenthesis")
            return inside
        if self.take("."):
            return ANY
        line = self.tokens[self.at][2]
        if name := self.take("name"):
            self.called.append((name, line))
            return Rule(name)
        if text := self.take("text"):
            try:
                return Text(json.loads(text.replace("\t", "\\t")))
            except ValueError as error:
                raise ValueError(f"grammar: expected a text with the escapes of JSON in line {line}, got {text}") from error
        if pattern := self.take("class", "regex"):
            try:
                return expression(pattern[1:-1].replace(r"\/", "/") if pattern[0] == "/" else pattern)
            except ValueError as error:
                raise ValueError(f"grammar: in line {line}, {error}") from error
        raise self.error("a text, a class, a regular expression, a name or a group")


def _without_left_recursion(name: str, body: Expr) -> Expr:
    """A ::= A x | y as y x*: the same texts."""
    parts = body.parts if isinstance(body, Alt) else (body,)
    again, others = [], []
    for part in parts:
        steps = part.parts if isinstance(part, Seq) else (part,)
        if steps and steps[0] == Rule(name):
            again += [seq(*steps[1:])] if len(steps) > 1 else []  # A ::= A says nothing
        else:
            others.append(part)
    if not again:
        return alt(*others) if len(others) < len(parts) else body
    return seq(alt(*others), Repeat(alt(*again), 0, None))
