"""JSON Schema (2020-12, the part below) as a language of JSON texts.

Known keywords: type, enum, const, $ref within the schema, $defs, definitions, allOf, anyOf, oneOf; minLength, maxLength, pattern,
format; minimum, maximum, exclusiveMinimum, exclusiveMaximum, multipleOf (of integers, without bounds); properties, required,
additionalProperties, patternProperties, minProperties, maxProperties; prefixItems, items, minItems, maxItems. Annotations (title,
description, default, …) say nothing about texts; any other keyword is an error.

Of the texts of a value some are left out, so that what is written is short and has one form: properties come in the schema's
order and once, additional ones after them; between tokens there is at most as much white space as asked for, by default none;
characters are escaped only where they must be; numbers with bounds have no exponents, and integers no fraction. oneOf is read as
anyOf: where two of its schemas overlap, a text may fit both. Patterns search, as the standard has it, with regex.py's syntax.
"""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction

from nanorlhf.engine.constrain import json_text
from nanorlhf.engine.constrain.json_merge import ANNOTATIONS, fail, merged, number, same, show
from nanorlhf.engine.constrain.language import ANY, NOTHING, Alt, Both, Expr, Language, Repeat, Rule, Text, alt, chars, mapped, nesting_bounded, optional, seq
from nanorlhf.engine.constrain.network import NoText, automaton
from nanorlhf.engine.constrain.regex import expression

OF_TYPE = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"},
    "array": {"prefixItems", "items", "minItems", "maxItems"},
}
OF_TYPE["integer"] = OF_TYPE["number"]
TYPES = ("string", "number", "integer", "object", "array", "boolean", "null")
_MOST_PLACES = 20_000  # of an object: places among its properties, times numbers of them where these are bounded
KNOWN = {"type", "enum", "const", "$ref", "$defs", "definitions", "allOf", "anyOf", "oneOf", *ANNOTATIONS, *set().union(*OF_TYPE.values())}


def json_schema(schema: dict | bool | str, whitespace: int = 0) -> Language:
    """The JSON texts of a schema, given as Python has it or as text.

    whitespace: the most characters of white space between two tokens. Raises ValueError for keywords that are not known, for
    values of theirs that make no sense, and, when the language is put on a vocabulary, for a schema that no value satisfies.

    >>> person = json_schema({"properties": {"age": {"type": "integer", "minimum": 0}}, "type": "object"})
    >>> person.source
    'JSON Schema {"properties": {"age": {"type": "integer", "minimum": 0}}, "type": "object"}'
    """
    if isinstance(schema, str):
        try:
            with nesting_bounded("json_schema"):
                schema = json.loads(schema)
        except ValueError as error:
            raise ValueError(f"json_schema: expected a schema in JSON, got {schema[:80]!r} ({error})") from error
    if not isinstance(whitespace, int) or whitespace < 0:
        raise ValueError(f"json_schema: expected whitespace of at least 0 characters, got {whitespace!r}")
    made = _Schema(schema, whitespace)
    with nesting_bounded("json_schema"):
        try:
            source = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"json_schema: expected a schema of what JSON has ({error})") from error
        expr = made.value(schema, "#")
    spaces = f" with up to {whitespace} spaces" if whitespace else ""
    return Language(f"JSON Schema {source}{spaces}", expr, made.rules)


class _Schema:
    """The expressions of one schema. Objects and arrays are rules, so that what is used twice is built once."""

    def __init__(self, root, whitespace: int):
        self.root, self.rules = root, {}
        self.known: dict[str, Rule] = {}
        space = Repeat(chars([(9, 10), (13, 13), (32, 32)]), 0, whitespace)
        self.space = [space] if whitespace else []
        self.comma, self.colon = (seq(*self.space, Text(sign), *self.space) for sign in ",:")

    def rule(self, expr: Expr) -> Rule:
        name = f"#{len(self.rules)}"
        self.rules[name] = expr
        return Rule(name)

    def shared(self, key: str, make) -> Rule:
        """The rule of that key, made when it is first asked for; it may call itself."""
        if key not in self.known:
            self.known[key] = Rule(key)
            self.rules[key] = make()
        return self.known[key]

    def value(self, schema, where: str) -> Expr:
        """The texts of a schema. where: its JSON pointer, for messages."""
        if schema is True or schema == {}:
            return self.anything()
        if schema is False:
            return NOTHING
        if not isinstance(schema, dict):
            raise fail(where, "a schema, which is an object, true or false", schema)
        unknown = sorted(set(schema) - KNOWN)
        if unknown:
            raise fail(where, f"keywords among {', '.join(sorted(KNOWN - ANNOTATIONS))}", unknown[0])
        told = {key: value for key, value in schema.items() if key not in ANNOTATIONS and key not in ("$defs", "definitions")}
        if "$ref" in told and len(told) == 1:
            target = told["$ref"]
            return self.shared(f"$ref {target}", lambda: self.value(self.resolved(target, where), str(target)))
        if "$ref" in told:
            rest = {key: value for key, value in told.items() if key != "$ref"}
            return self.value(merged(self.resolved(told["$ref"], where), rest, where, self.resolved), where)
        for key in ("allOf", "anyOf", "oneOf"):
            if key in told:
                return self.combined(key, told, where)
        if "const" in told or "enum" in told:
            return self.listed(told, where)
        types = told.get("type", [t for t in TYPES if t != "integer"])
        types = types if isinstance(types, list) else [types]
        if not types or not all(isinstance(t, str) and t in TYPES for t in types):
            raise fail(f"{where}/type", f"one or some of {', '.join(TYPES)}", told["type"])
        return alt(*(self.typed(t, told, where) for t in dict.fromkeys(types) if not (t == "integer" and "number" in types)))

    def resolved(self, target, where: str):
        """The schema that a reference means."""
        if not isinstance(target, str) or not target.startswith("#") or target[1:2] not in ("", "/"):
            raise fail(f"{where}/$ref", "a reference into the schema itself, such as #/$defs/name", target)
        found = self.root
        for step in target[2:].split("/") if target != "#" else []:
            step = step.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(step)] if isinstance(found, list) else found[step]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise fail(f"{where}/$ref", "a reference to something in the schema", target) from error
        return found

    def combined(self, key: str, told: dict, where: str) -> Expr:
        options, rest = told[key], {k: v for k, v in told.items() if k != key}
        if not isinstance(options, list) or not options:
            raise fail(f"{where}/{key}", "a list of schemas, at least one", options)
        if key == "allOf":
            for option in options:
                rest = merged(rest, option, where, self.resolved)
            return self.value(rest, where)
        return alt(*(self.value(merged(rest, option, where, self.resolved) if rest else option, f"{where}/{key}/{k}")
                     for k, option in enumerate(options)))

    def typed(self, kind: str, told: dict, where: str) -> Expr:
        if kind == "boolean":
            return alt(Text("true"), Text("false"))
        if kind == "null":
            return Text("null")
        own = {key: value for key, value in told.items() if key in OF_TYPE[kind]}
        if kind in ("number", "integer"):
            return self.number(kind, own, where)
        make = {"string": self.string, "object": self.object, "array": self.array}[kind]
        return make(own, where) if kind == "string" else self.shared(f"{kind} {json.dumps(own)}", lambda: make(own, where))

    def anything(self) -> Expr:
        return self.shared("any", lambda: alt(*(self.typed(kind, {}, "#") for kind in TYPES if kind != "integer")))

    def listed(self, told: dict, where: str) -> Expr:
        """const and enum: those of their values that the other keywords allow."""
        values = told["enum"] if "enum" in told else [told["const"]]
        if not isinstance(values, list) or not values:
            raise fail(f"{where}/enum", "a list of values, at least one", values)
        if "const" in told:
            values = [value for value in values if same(value, told["const"])]
        rest = {key: value for key, value in told.items() if key not in ("const", "enum")}
        if rest:
            values = [value for value in values if self.fits(value, rest, where)]
        return Alt(tuple(self.literal(value) for value in values))

    def fits(self, value, rest: dict, where: str) -> bool:
        if isinstance(value, (list, dict)) and set(rest) - {"type"}:
            raise fail(where, "const and enum of scalars, or without other keywords than type", json.dumps(value))
        try:
            plain = _Schema(self.root, 0)
            made = automaton(Language(where, plain.value({**rest, "type": rest.get("type", list(TYPES))}, where), plain.rules))
        except NoText:
            return False
        if isinstance(value, (list, dict)):
            types = rest["type"] if isinstance(rest["type"], list) else [rest["type"]]
            return ("array" if isinstance(value, list) else "object") in types
        node = made.walk(made.start(), show(value).encode())
        return node >= 0 and made.complete(node)

    def literal(self, value) -> Expr:
        match value:
            case str():
                return _quoted(Text(value))
            case list():
                return self.enclosed("[", "]", [self.literal(item) for item in value])
            case dict():
                return self.enclosed("{", "}", [seq(_quoted(Text(key)), self.colon, self.literal(item)) for key, item in value.items()])
        return Text(show(value))

    def enclosed(self, opening: str, closing: str, items: list[Expr]) -> Expr:
        inside = [part for item in items for part in (self.comma, item)][1:]
        return seq(Text(opening), *self.space, *inside, *(self.space if items else []), Text(closing))

    def string(self, own: dict, where: str) -> Expr:
        low, high = _count(own, "minLength", where) or 0, _count(own, "maxLength", where)
        if high is not None and high < low:
            return NOTHING
        parts = [Repeat(ANY, low, high)] if low or high is not None or not own.keys() & {"pattern", "format"} else []
        if "pattern" in own:
            if not isinstance(own["pattern"], str):
                raise fail(f"{where}/pattern", "a regular expression", own["pattern"])
            parts.append(expression(own["pattern"], search=True))
        if "format" in own:
            if not isinstance(own["format"], str) or own["format"] not in json_text.FORMATS:
                raise fail(f"{where}/format", f"one of {', '.join(json_text.FORMATS)}", own["format"])
            parts.append(expression(json_text.FORMATS[own["format"]]))
        content = parts[0]
        for part in parts[1:]:
            content = Both(content, part)
        return _quoted(content)

    def number(self, kind: str, own: dict, where: str) -> Expr:
        for key, value in own.items():
            number(value, key, where)
        bounds = {key: Decimal(str(value)) for key, value in own.items() if key != "multipleOf"}
        # Of two bounds that are equal the one that leaves itself out is the tighter.
        low, above = max(((bounds[key], key != "minimum") for key in ("minimum", "exclusiveMinimum") if key in bounds), default=(None, False))
        high, at = min(((bounds[key], key == "maximum") for key in ("maximum", "exclusiveMaximum") if key in bounds), default=(None, True))
        if "multipleOf" in own:
            of = own["multipleOf"]
            if of != int(of) or not 0 < of <= 1000 or bounds:
                raise fail(f"{where}/multipleOf", "a whole number from 1 to 1000, without bounds beside it", of)
            return json_text.multiples(int(of), self.rules)
        if kind == "number":
            return json_text.numbers(low, high, above, below=not at)
        low, high = (None if bound is None else Fraction(bound) for bound in (low, high))
        return json_text.integers(*json_text.whole_bounds(low, high, above, below=not at))

    def array(self, own: dict, where: str) -> Expr:
        prefix, low, high = own.get("prefixItems", []), _count(own, "minItems", where) or 0, _count(own, "maxItems", where)
        if not isinstance(prefix, list):
            raise fail(f"{where}/prefixItems", "a list of schemas", prefix)
        if isinstance(own.get("items"), list):
            raise fail(f"{where}/items", "a schema; a list of them is called prefixItems", own["items"])
        firsts = [self.value(schema, f"{where}/prefixItems/{k}") for k, schema in enumerate(prefix)][:high]
        other = self.rule(self.value(own.get("items", True), f"{where}/items"))
        if own.get("items") is False:
            high = min(len(firsts), len(firsts) if high is None else high)
        if high is not None and high < low:
            return NOTHING
        if high == 0:
            return self.enclosed("[", "]", [])
        done = len(firsts)
        more = NOTHING if high == done else Repeat(seq(self.comma, other), max(low - max(done, 1), 0), None if high is None else high - max(done, 1))
        rest = Text("") if high == done else more
        items = firsts or [other]
        for k in range(len(items) - 1, 0, -1):
            rest = seq(self.comma, items[k], rest) if k < low else optional(seq(self.comma, items[k], rest))
        inside = seq(items[0], rest, *self.space)
        return seq(Text("["), *self.space, inside if low else optional(inside), Text("]"))

    def object(self, own: dict, where: str) -> Expr:
        named, required = own.get("properties", {}), own.get("required", [])
        if not isinstance(named, dict):
            raise fail(f"{where}/properties", "an object of schemas", named)
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise fail(f"{where}/required", "a list of names", required)
        additional = own.get("additionalProperties", True)
        named = {**named, **{name: additional for name in required if name not in named}}
        pairs = [(seq(_quoted(Text(name)), self.colon, self.value(schema, f"{where}/properties/{name}")), name in required)
                 for name, schema in named.items()]
        extra = self.extra(named, own, where)
        low, high = _count(own, "minProperties", where) or 0, _count(own, "maxProperties", where)
        if low > max(1, len(set(required))) and extra != NOTHING:
            raise fail(f"{where}/minProperties", "at most 1 or the number of required ones, where others may come: a name could come twice", low)
        return seq(Text("{"), *self.space, self.members([(self.rule(pair), must) for pair, must in pairs], self.rule(extra), low, high), Text("}"))

    def members(self, pairs: list[tuple[Expr, bool]], extra: Expr, low: int, high: int | None) -> Expr:
        """Of each place in the order of properties a rule, for what follows; where their number matters, of each number, too."""
        counts = bool(low) or high is not None
        made: dict[tuple[int, int], Rule] = {}
        waiting: list[tuple[int, int]] = []

        def following(k: int, count: int) -> Expr:
            key = (k, min(count, low if high is None else high + 1)) if counts else (k, min(count, 1))
            if key not in made:
                if len(made) >= _MOST_PLACES:
                    raise ValueError(f"json_schema: expected at most {_MOST_PLACES} places and numbers of properties, got more; bound their number lower")
                made[key] = self.rule(NOTHING)
                waiting.append(key)
            return made[key]

        def rest(k: int, count: int) -> Expr:
            if high is not None and count > high:
                return NOTHING
            comma = [self.comma] if count else []
            if k == len(pairs):
                end = [seq(*(self.space if count else []))] if count >= low else []
                return alt(seq(*comma, extra, following(k, count + 1)), *end)
            pair, must = pairs[k]
            taken = seq(*comma, pair, following(k + 1, count + 1))
            return taken if must else alt(taken, following(k + 1, count))

        first = following(0, 0)
        while waiting:
            key = waiting.pop()
            self.rules[made[key].name] = rest(*key)
        return first

    def extra(self, named: dict, own: dict, where: str) -> Expr:
        """A member whose name is none of the named: of a pattern's schema, or of additionalProperties."""
        names = Alt(tuple(Text(name) for name in named))
        patterns = own.get("patternProperties", {})
        if not isinstance(patterns, dict):
            raise fail(f"{where}/patternProperties", "an object of schemas", patterns)
        taken, parts = names, []
        for pattern, schema in patterns.items():
            name = expression(pattern, search=True)
            if _overlap(name, taken):
                raise fail(f"{where}/patternProperties", "patterns of which no name fits two, nor one that properties has", pattern)
            parts.append(seq(_quoted(name), self.colon, self.value(schema, f"{where}/patternProperties/{pattern}")))
            taken = alt(taken, name)
        additional = self.value(own.get("additionalProperties", True), f"{where}/additionalProperties")
        name = Repeat(ANY, 0, None) if taken == NOTHING else Both(Repeat(ANY, 0, None), taken, other=False)
        if additional != NOTHING:
            parts.append(seq(_quoted(name), self.colon, additional))
        return Alt(tuple(parts))


def _quoted(content: Expr) -> Expr:
    return seq(Text('"'), mapped(content, json_text.encoded), Text('"'))


def _overlap(one: Expr, other: Expr) -> bool:
    try:
        automaton(Language("", Both(one, other)))
    except NoText:
        return False
    return True


def _count(own: dict, key: str, where: str) -> int | None:
    value = own.get(key)
    if value is not None and (number(value, key, where) % 1 or value < 0):
        raise fail(f"{where}/{key}", "a whole number of at least 0", value)
    return None if value is None else int(value)
