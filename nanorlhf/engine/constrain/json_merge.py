"""Two JSON schemas as one that asks for both."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import zip_longest

ANNOTATIONS = {"$schema", "$id", "$comment", "$anchor", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
_LARGER, _SMALLER = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}, {
    "maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}


def fail(where: str, expected: str, got) -> ValueError:
    """The error of a schema at a JSON pointer."""
    return ValueError(f"json_schema: expected {expected} at {where}, got {got if isinstance(got, str) else json.dumps(got)}")


def show(value) -> str:
    """A scalar as JSON has it."""
    return json.dumps(value, ensure_ascii=False)


def number(value, key: str, where: str):
    """The value of a keyword that has to be a number, a finite one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise fail(f"{where}/{key}", "a number", value)
    return value


def same(one, two) -> bool:
    """Whether two values are equal in JSON, where true is not 1.

    >>> same([1, {"a": 1.0}], [1.0, {"a": 1}]), same([True], [1])
    (True, False)
    """
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return isinstance(one, bool) == isinstance(two, bool) and one == two


def _list(schema: dict, key: str, where: str) -> list:
    value = schema.get(key, [])
    if not isinstance(value, list):
        raise fail(f"{where}/{key}", "a list", value)
    return value


def merged(one, two, where: str, resolved: Callable):
    """One schema that asks for what both do. resolved(target, where): the schema that a reference means.

    Raises ValueError for keywords of both that this cannot make one of, such as two patterns.

    >>> merged({"type": ["integer", "null"], "minimum": 1}, {"type": "integer", "minimum": 3}, "#", None)
    {'type': ['integer'], 'minimum': 3}
    """
    if one is False or two is False:
        return False
    one, two = ({} if schema is True else schema for schema in (one, two))
    if not isinstance(one, dict) or not isinstance(two, dict):
        raise fail(where, "a schema, which is an object, true or false", two if isinstance(one, dict) else one)
    one, two = (_without_reference(schema, where, resolved) for schema in (one, two))
    if one is False or two is False:
        return False
    result = dict(one)
    for key, value in two.items():
        result[key] = _both(key, one[key], value, where, resolved) if key in one else value
    if any("prefixItems" in here and there.keys() & {"prefixItems", "items"} for here, there in ((one, two), (two, one))):
        firsts = [_list(schema, "prefixItems", where) for schema in (one, two)]
        pairs = zip_longest(*firsts)
        result["prefixItems"] = [merged(*(schema.get("items", True) if item is None else item for schema, item in zip((one, two), pair)),
                                        where, resolved) for pair in pairs]
    for here, there in ((one, two), (two, one)):  # what one calls additional, the other may name
        if here.get("additionalProperties", True) is not True:
            for name in there.get("properties", {}):
                if name not in here.get("properties", {}):
                    result["properties"] = {**result["properties"], name: merged(there["properties"][name], here["additionalProperties"],
                                                                                 where, resolved)}
            for pattern in there.get("patternProperties", {}):
                if pattern not in here.get("patternProperties", {}):
                    result["patternProperties"] = {**result["patternProperties"], pattern: merged(
                        there["patternProperties"][pattern], here["additionalProperties"], where, resolved)}
    return result


def _without_reference(schema: dict, where: str, resolved: Callable):
    if "$ref" not in schema:
        return schema
    rest = {key: value for key, value in schema.items() if key != "$ref"}
    return merged(resolved(schema["$ref"], where), rest, where, resolved)


def _both(key: str, one, two, where: str, resolved: Callable):
    if same(one, two) or key in ANNOTATIONS or key == "prefixItems":
        return one
    if key in _LARGER | _SMALLER:
        return (max if key in _LARGER else min)(number(value, key, where) for value in (one, two))
    if key == "type":
        one, two = ([value] if isinstance(value, str) else _list({key: value}, key, where) for value in (one, two))
        common = [kind for kind in one if kind in two or (kind == "integer" and "number" in two)]
        common += [kind for kind in two if kind == "integer" and "number" in one and kind not in common]
        return common or fail_types(where, one, two)
    if key in ("properties", "$defs", "definitions", "patternProperties"):
        if not isinstance(one, dict) or not isinstance(two, dict):
            raise fail(f"{where}/{key}", "an object of schemas", two if isinstance(one, dict) else one)
        common = {name: merged(one[name], two[name], where, resolved) for name in one if name in two}
        return {**one, **two, **{name: common[name] for name in common}}
    if key in ("required", "enum", "allOf"):
        one, two = (_list({key: value}, key, where) for value in (one, two))
    if key == "required":
        return [*one, *(name for name in two if name not in one)]
    if key == "enum":
        return [value for value in one if any(same(value, other) for other in two)]
    if key in ("items", "additionalProperties"):
        return merged(one, two, where, resolved)
    if key == "allOf":
        return [*one, *two]
    raise fail(where, f"{key} in one of the schemas that must all fit", f"{json.dumps(one)} and {json.dumps(two)}")


def fail_types(where: str, one: list, two: list):
    raise fail(where, "types in common among the schemas that must all fit", f"{one} and {two}")
