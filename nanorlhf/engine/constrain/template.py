r"""Texts with holes: what is fixed is forced, what is a hole keeps to its own language.

    "Name: {name:[A-Z][a-z]+}, age {age:int}"

A hole is ``{name}`` or ``{name:what}``. What: one of the words of `WORDS`, else a regular expression (regex.py's syntax; braces in it
come in pairs); without it the hole is one of those given to `template`, or else of any text without a newline. ``{{`` and ``}}`` are braces.
"""

from __future__ import annotations

from nanorlhf.engine.constrain import json_text
from nanorlhf.engine.constrain.language import ANY, Expr, Language, Repeat, Rule, Text, alt, chars, mapped, nesting_bounded, other_than, seq
from nanorlhf.engine.constrain.network import automaton
from nanorlhf.engine.constrain.regex import expression

_LINE = Repeat(other_than(chars([(10, 10), (13, 13)])), 0, None)
WORDS: dict[str, Expr] = {
    "int": json_text.INTEGER,
    "number": json_text.NUMBER,
    "word": Repeat(chars([(48, 57), (65, 90), (95, 95), (97, 122)]), 1, None),
    "line": _LINE,
    "bool": alt(Text("true"), Text("false")),
    "string": seq(Text('"'), mapped(Repeat(ANY, 0, None), json_text.encoded), Text('"')),
}


class Template(Language):
    """A language whose texts have named parts."""

    parts: list[tuple[str | None, Language]]

    def values(self, text: str) -> dict[str, str]:
        """What stands in the holes of a text. Of several ways to read it, the one whose first holes are longest.

        Raises ValueError for a text that is not the template's.

        >>> template("{a:[a-z]*}-{b:int}").values("x-12")
        {'a': 'x', 'b': '12'}
        """
        data = text.encode()
        machines = [automaton(part) for _, part in self.parts]
        ends: list[dict[int, list[int]]] = []  # of each part: where it may end, by where it starts
        starts = {0}
        for machine in machines:
            ends.append({start: _ends(machine, data, start) for start in starts})
            starts = set().union(*ends[-1].values())
        good = {len(data)} & starts
        if not good:
            raise ValueError(f"template: expected a text of {self.source}, got {text!r}")
        for places in reversed(ends):  # from the back, only what leads to the end of the text
            for start in places:
                places[start] = [end for end in places[start] if end in good]
            good = {start for start, found in places.items() if found}
        values, start = {}, 0
        for (name, _), places in zip(self.parts, ends, strict=True):
            end = max(places[start])
            if name is not None:
                values[name] = data[start:end].decode()
            start = end
        return values


def template(text: str, holes: dict[str, Language] | None = None) -> Template:
    """The texts of a template. holes: the languages of holes by their names, a regex, a JSON Schema, a grammar or a choice.

    Raises ValueError for braces that do not pair, two holes of one name, and languages for holes that there are not.

    >>> from nanorlhf.engine.constrain import choice
    >>> template("Answer: {answer}.", {"answer": choice(["yes", "no"])}).source
    "template 'Answer: {answer}.' with answer: choice ['yes', 'no']"
    """
    if not isinstance(text, str):
        raise ValueError(f"template: expected a template as a str, got {type(text).__name__}")
    holes = holes or {}
    parts: list[tuple[str | None, Language]] = []
    for name, what in _split(text):
        if name is None:
            parts.append((None, Language("text", Text(what))))
            continue
        if name in (known for known, _ in parts):
            raise ValueError(f"template: expected holes of different names, got two called {name}")
        if what is not None and name in holes:
            raise ValueError(f"template: expected the hole {name} to be told once, got {what!r} in the template and {holes[name].source}")
        if what is None:
            parts.append((name, holes.get(name) or Language("line", _LINE)))
        else:
            with nesting_bounded("template"):
                parts.append((name, Language(what, WORDS[what] if what in WORDS else expression(what))))
    unknown = sorted(set(holes) - {name for name, _ in parts})
    if unknown:
        raise ValueError(f"template: expected languages for the holes {sorted(name for name, _ in parts if name)}, got one for {unknown[0]}")
    rules: dict[str, Expr] = {}
    exprs = [_renamed(part, str(k), rules) for k, (_, part) in enumerate(parts)]
    told = "; ".join(f"{name}: {language.source}" for name, language in holes.items())
    made = Template(f"template {text!r}" + (f" with {told}" if told else ""), seq(*exprs), rules)
    object.__setattr__(made, "parts", parts)
    return made


def _ends(machine, data: bytes, start: int) -> list[int]:
    node, ends = machine.start(), []
    for place in range(start, len(data) + 1):
        if machine.complete(node):
            ends.append(place)
        node = machine.walk(node, data[place : place + 1]) if place < len(data) else -1
        if node < 0:
            break
    return ends


def _split(text: str):
    """(None, fixed text) and (hole's name, what or None), in their order."""
    fixed, at = "", 0
    while at < len(text):
        if text[at : at + 2] in ("{{", "}}"):
            fixed, at = fixed + text[at], at + 2
            continue
        if text[at] == "}":
            raise ValueError(f"template: expected }}}} for a brace at place {at} of {text!r}, got }}")
        if text[at] != "{":
            fixed, at = fixed + text[at], at + 1
            continue
        close, depth = at, 0
        while close < len(text):
            depth += {"{": 1, "}": -1}.get(text[close], 0)
            if depth == 0:
                break
            close += 1
        name, colon, what = text[at + 1 : close].partition(":")
        if depth or not name.isidentifier():
            raise ValueError(f"template: expected a hole {{name}} or {{name:what}} at place {at} of {text!r}, got {text[at:at + 20]!r}")
        if fixed:
            yield None, fixed
        fixed, at = "", close + 1
        yield name, what if colon else None
    if fixed:
        yield None, fixed


def _renamed(part: Language, prefix: str, rules: dict[str, Expr]) -> Expr:
    """The expression of a part, its rules added to those of the whole under names of their own."""
    def rename(expr: Expr) -> Expr:
        return mapped(expr, lambda leaf: leaf, lambda rule: Rule(f"{prefix} {rule.name}"))

    rules.update({f"{prefix} {name}": rename(body) for name, body in part.rules.items()})
    return rename(part.expr)
