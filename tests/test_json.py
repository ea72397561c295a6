"""JSON Schema: what is written under the masks is JSON that validates, and nothing that should be allowed is not."""

import json
import random
from decimal import Decimal
from itertools import product

import constrained
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.engine.constrain import Language, constrain, json_schema
from nanorlhf.engine.constrain.json_merge import merged
from nanorlhf.engine.constrain.json_text import FORMATS, integers, multiples, numbers
from nanorlhf.engine.constrain.regex import expression

PERSON = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "minLength": 1, "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                   "mail": {"type": "string", "format": "email", "maxLength": 40}, "tags": {"type": "array", "items": {"enum": ["a", "b", 3]}, "maxItems": 4}},
}  # fmt: skip
SCHEMAS = [
    PERSON,
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": {"type": "null"}, "minItems": 1, "maxItems": 5},
    {"type": "array", "items": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25}, "minItems": 2, "maxItems": 4},
    {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 7}, "b": {"const": {"x": [1, "é\n"]}}}, "required": ["b", "z"],
     "additionalProperties": {"type": "string", "pattern": "^[a-c]+$"}, "maxProperties": 4},
    {"type": "object", "patternProperties": {"^n_": {"type": "null"}, "^b_": {"type": "boolean"}}, "additionalProperties": False, "minProperties": 1, "maxProperties": 5},
    {"anyOf": [{"type": "string", "pattern": "b.d", "maxLength": 9}, {"type": ["integer", "null"], "exclusiveMinimum": -3}]},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"v": {"type": "integer"}, "sub": {
        "type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}}, "required": ["v"], "additionalProperties": False}}},
    {"allOf": [{"$ref": "#/definitions/named"}, {"properties": {"n": {"maximum": 9}}, "required": ["n"]}], "definitions": {
        "named": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}, "s": {"type": "string", "format": "date"}}}}},
    {"oneOf": [{"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "number"}}, "required": ["kind"], "additionalProperties": False},
               {"type": "object", "properties": {"kind": {"const": "b"}, "y": {"type": "string"}}, "required": ["kind"], "additionalProperties": False}]},
    {"properties": {"p": False, "q": {"type": "boolean"}}, "required": ["q"]},
]  # fmt: skip


def closing(tokenizer):
    return {j for j, token in enumerate(tokenizer.vocabulary.tokens) if token in (b'"', b"]", b"}", b'"}', b'"]', b"}]", b"]}")}


def written(schema, count, seed):
    """Texts that tokens drawn at random, as an untrained model would, give under the masks, with the end token at last."""
    tokenizer = constrained.vocabulary(4096)
    constraint = constrain(json_schema(schema), tokenizer, constrained.ends(tokenizer))
    rng, texts = random.Random(seed), []
    while len(texts) < count:
        tokens = constrained.random_walk(constraint, rng, most=300, closing=closing(tokenizer))
        if tokens is not None:  # else it was cut off, as by max_new_tokens
            texts.append(tokenizer.decode_bytes(tokens))
    return texts


def validates(schema, text):
    value = json.loads(text.decode())  # not lenient: an error where bytes are not UTF-8
    return jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER).is_valid(value)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_what_is_written_parses_and_validates(schema):
    texts = written(schema, 15, 0)
    assert len(texts) == 15 and [text for text in texts if not validates(schema, text)] == []


@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_what_is_written_parses_and_validates_a_thousand_times(schema):
    texts = written(schema, 1000, 1)
    assert len(texts) == 1000 and [text for text in texts if not validates(schema, text)] == []


VALUES = [None, True, 0, 3, -2, 1.5, "", "a", "bad", "b\nd", [], [1], [1, True], [1, True, None], {}, {"q": True}, {"p": 1}, {"n": 3}, {"n": 3, "s": "2024-02-29"},
          {"kind": "a"}, {"kind": "a", "x": 1.5}, {"kind": "b", "x": 1}, {"v": 1, "sub": [{"v": 2}]}, {"v": 1, "sub": [{"v": 2}] * 3}, {"name": "é", "age": 150},
          {"name": "é", "age": 151}, {"name": "", "age": 1}, {"name": "n", "age": 1, "tags": ["a", 3]}, {"n_": None, "b_x": False}, {"n_": 1}, {"x": 1},
          {"a": 14, "b": {"x": [1, "é\n"]}, "z": "abc"}, {"b": {"x": [1, "é\n"]}, "z": "abd"}, [0.5, 2.125], [0.5, 2.25], [-1.5, -1.6]]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_a_value_is_allowed_just_when_it_validates(schema):
    accepts = constrained.acceptor(json_schema(schema))
    for value in VALUES:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        assert accepts(text) == jsonschema.Draft202012Validator(schema).is_valid(value), text


# --- numbers ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.none() | st.integers(-1200, 1200), st.none() | st.integers(-1200, 1200))
def test_integers_between_bounds(low, high):
    inside = [n for n in range(-1300, 1301) if (low is None or low <= n) and (high is None or n <= high)]
    if not inside:
        with pytest.raises(ValueError, match="a language with a text in it"):
            constrained.accepts(Language("bounds", integers(low, high)), "0")
        return
    accepts = constrained.acceptor(Language("", integers(low, high)))
    assert {n for n in range(-1300, 1301) if accepts(str(n))} == set(inside)
    assert not any(accepts(text) for text in ("", "-", "007", "+1", "1.0", "--1", "-00"))


BOUNDS = st.none() | st.decimals(-12, 12, places=2) | st.sampled_from([Decimal(0), Decimal("0.25"), Decimal("-0.5"), Decimal(10)])


@settings(max_examples=150, deadline=None)
@given(BOUNDS, BOUNDS, st.booleans(), st.booleans(), st.lists(st.tuples(st.integers(0, 13), st.text("0123456789", max_size=4), st.booleans()), max_size=30))
def test_numbers_between_bounds(low, high, above, below, written_ones):
    language = Language("bounds", numbers(low, high, above, below))
    texts = [f"{'-' * minus}{whole}{'.' + fraction if fraction else ''}" for whole, fraction, minus in written_ones]
    texts += [str(bound) for bound in (low, high) if bound is not None]

    def fits(text):
        value = Decimal(text)
        return (low is None or value > low or (value == low and not above)) and (high is None or value < high or (value == high and not below))

    try:
        accepts = constrained.acceptor(language)
    except ValueError:
        assert not any(map(fits, texts)), "there is none"
        return
    for text in texts:
        if text.startswith("-0") and Decimal(text) == 0:
            continue  # minus nought is left out where only positive numbers, or only negative ones, are allowed
        assert accepts(text) == fits(text), text


@pytest.mark.parametrize("of", [1, 2, 3, 7, 12])
def test_multiples(of):
    rules = {}
    accepts = constrained.acceptor(Language("", multiples(of, rules), rules))
    for n in range(-300, 301):
        assert accepts(str(n)) == (n % of == 0)
    assert not any(map(accepts, ("", "-", "00", f"0{of}")))


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_those_of_the_checker(name):
    """Random texts of a format, and the same with a character changed, against jsonschema's own, where it has one here."""
    from test_regex import sampled

    checker, rng, language = jsonschema.Draft202012Validator.FORMAT_CHECKER, random.Random(0), Language(name, expression(FORMATS[name]))
    known = name in checker.checkers
    seen = 0
    for _ in range(300):
        text = sampled(language, rng, most=60)
        if text is None:
            continue
        seen += 1
        assert not known or checker.conforms(text, name), text
        changed = list(text)
        changed[rng.randrange(len(text))] = rng.choice("0159:-.aZ")
        changed = "".join(changed)
        if name in ("date", "ipv4") and known:
            assert constrained.accepts(language, changed) == checker.conforms(changed, name), changed
    assert seen > 50


def test_dates_are_those_of_the_calendar():
    import datetime

    accepts = constrained.acceptor(Language("", expression(FORMATS["date"])))
    for year, month, day in product((1, 4, 100, 400, 1900, 2000, 2023, 2024, 9999), range(14), range(33)):
        try:
            datetime.date(year, month, day)
            there = True
        except ValueError:
            there = False
        assert accepts(f"{year:04}-{month:02}-{day:02}") == there
    assert not accepts("0000-01-01")


# --- forms --------------------------------------------------------------------------------------------------------------


def test_white_space_is_bounded():
    language = json_schema({"type": "array", "items": {"type": "integer"}}, whitespace=2)
    for text, whole in (("[1,2]", True), ("[ 1 , 2 ]", True), ("[\n\t1]", True), ("[   1]", False), ("[]", True), ("[  ]", True), ("[1 2]", False), (" [1]", False)):
        assert constrained.accepts(language, text) == whole, text
    assert not constrained.accepts(json_schema({"type": "array"}), "[ ]")
    objects = json_schema({"type": "object", "properties": {"a": {"const": [1, {"b": 2}]}}}, whitespace=1)
    for text in ('{ "a" : [ 1 , { "b" : 2 } ] }', '{"a":[1,{"b":2}]}', "{ }"):
        assert constrained.accepts(objects, text)


def test_properties_come_in_order_and_once():
    language = json_schema({"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}})
    for text, whole in (('{"a":1,"b":2}', True), ('{"b":2}', True), ('{"b":2,"a":1}', False), ('{"a":1,"a":1}', False), ('{"a":1,"ab":0}', True), ('{"":0}', True)):
        assert constrained.accepts(language, text) == whole, text


def test_strings_are_escaped_where_they_must_be():
    language = json_schema({"type": "string", "minLength": 1, "maxLength": 1})
    for text, whole in ((r'"\n"', True), (r'"\u000a"', True), (r'"\u000A"', True), (r'"\""', True), (r'"\\"', True), ('"é"', True), ('"\n"', False), (r'"\/"', False),
                        (r'"\u0061"', False), (r'"\ud800"', False), ('"😀"', True), ('"ab"', False), ('"\x7f"', False), (r'"\u007f"', True)):
        assert constrained.accepts(language, text) == whole, text


def test_patterns_search_and_count_with_lengths():
    language = json_schema({"type": "string", "pattern": "a", "maxLength": 3})
    for text, whole in (('"a"', True), ('"xya"', True), ('"xyz"', False), ('"xxxa"', False), ('"日a日"', True)):
        assert constrained.accepts(language, text) == whole, text


@pytest.mark.parametrize("schema, words", [
    ({"not": {}}, "keywords among .* at #, got not"), ({"type": "array", "uniqueItems": True}, "got uniqueItems"), ({"if": {}}, "got if"),
    ({"properties": {"a": {"contains": {}}}}, "at #/properties/a, got contains"), ({"type": "text"}, "at #/type"), ({"type": []}, "at #/type"), (3, "a schema, which is"),
    ({"$ref": "#/$defs/none"}, "a reference to something"), ({"$ref": "http://x/y"}, "into the schema itself"), ({"enum": []}, "a list of values"),
    ({"type": "string", "format": "iri"}, "at #/format, got iri"), ({"type": "string", "pattern": "(?=a)"}, "regex: expected"), ({"type": "string", "minLength": -1}, "#/minLength"),
    ({"type": "number", "multipleOf": 0.1}, "multipleOf"), ({"type": "integer", "multipleOf": 2, "minimum": 0}, "without bounds"), ({"minimum": "1"}, "a number at #/minimum"),
    ({"items": [{}]}, "prefixItems"), ({"prefixItems": {}}, "a list of schemas"), ({"properties": []}, "an object of schemas"), ({"required": "a"}, "a list of names"),
    ({"anyOf": []}, "at least one"), ({"type": "object", "minProperties": 2}, "a name could come twice"), ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "pattern in one of"),
    ({"patternProperties": {"a": {}, "b": {}}}, "no name fits two"), ({"enum": [[1]], "minItems": 1}, "of scalars"), ("{", "a schema in JSON"),
    ('{"items":' * 5000 + "{}" + "}" * 5000, "less nesting"), ({"$ref": "#", "type": "object"}, "less nesting"), ({"allOf": [{"$ref": "#"}]}, "less nesting"), ({"enum": [{1}]}, "what JSON has"),
    ('{"type": "integer", "minimum": 1e400}', "what JSON has"), ({"const": float("nan")}, "what JSON has"), ({"type": "string", "minLength": []}, "a number at #/minLength"),
    ({"allOf": [{"minLength": "a"}, {"minLength": 3}]}, "a number at #/minLength"), ({"format": []}, "at #/format"), ({"type": "object", "maxProperties": 10**9}, "bound their number lower"),
    ({"allOf": [{"required": 3}, {"required": ["a"]}]}, "a list at #/required"), ({"type": "object", "required": ["a", "a"], "minProperties": 2}, "a name could come twice"),
    ({"allOf": [{"enum": [True]}, {"enum": [1]}]}, "at least one"), ({"allOf": [{"const": True}, {"const": 1}]}, "const in one of"),
])  # fmt: skip
def test_what_is_not_known_or_makes_no_sense_is_an_error(schema, words):
    with pytest.raises(ValueError, match=words) as error:
        json_schema(schema)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("schema", [
    False, {"type": "integer", "minimum": 3, "maximum": 2}, {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}, {"type": "string", "minLength": 3, "maxLength": 2},
    {"type": "string", "pattern": "^ab$", "maxLength": 1}, {"type": "object", "required": ["a"], "additionalProperties": False}, {"properties": {"a": False}, "required": ["a"],
     "type": "object"}, {"type": "array", "items": False, "minItems": 1}, {"enum": [1, 2], "type": "string"}, {"type": "number", "minimum": 1, "exclusiveMaximum": 1},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}}}, {"allOf": [{"type": "object"}, False]},
])  # fmt: skip
def test_an_impossible_schema_is_an_error(schema):
    with pytest.raises(ValueError, match="constrain: expected a language with a text in it, got none that satisfies JSON Schema"):
        constrain(json_schema(schema), constrained.byte_vocabulary(), [256])


def test_types_that_have_none_in_common_are_an_error():
    with pytest.raises(ValueError, match="types in common"):
        json_schema({"allOf": [{"type": "string"}, {"type": "integer"}]})


def test_a_reference_to_itself_is_an_error():
    with pytest.raises(ValueError, match="no rule that begins with itself"):
        constrain(json_schema({"$ref": "#"}), constrained.byte_vocabulary(), [256])


@pytest.mark.parametrize("schema", [
    {"type": "array", "maxItems": 3, "allOf": [{"prefixItems": [{"enum": [1, "a"]}]}, {"items": {"type": "integer"}}]},
    {"type": "array", "maxItems": 3, "allOf": [{"prefixItems": [{"enum": [1, "a"]}, {"type": "string"}]}, {"prefixItems": [{"type": "string"}], "items": {"const": "a"}}]},
    {"type": "object", "allOf": [{"patternProperties": {"^x": {"type": "integer"}}}, {"additionalProperties": False}]},
    {"type": "object", "allOf": [{"patternProperties": {"^x": {"enum": [1, "a"]}}}, {"additionalProperties": {"type": "integer"}}]},
])  # fmt: skip
def test_what_one_schema_names_and_the_other_does_not_has_to_fit_both(schema):
    accepts, validator = constrained.acceptor(json_schema(schema)), jsonschema.Draft202012Validator(schema)
    values = [[], [1], ["a"], [1, 1], ["a", "a"], ["a", 1], ["a", "a", "a"], ["a", "a", "b"], {}, {"x": 1}, {"x": "a"}, {"y": 1}, {"y": "a"}]
    for value in values:
        assert accepts(json.dumps(value, separators=(",", ":"))) == validator.is_valid(value), value


def test_objects_of_many_properties():
    names = [f"p{i}" for i in range(1500)]
    accepts = constrained.acceptor(json_schema({"type": "object", "properties": {name: {"type": "null"} for name in names}}))
    assert accepts(json.dumps(dict.fromkeys(names), separators=(",", ":"))) and accepts('{"p7":null,"p1499":null,"other":1}') and not accepts('{"p7":null,"p6":null}')


def test_merged_schemas_ask_for_both():
    one = {"type": "object", "properties": {"a": {"type": ["integer", "string"], "minimum": 1}}, "required": ["a"], "maxProperties": 3}
    two = {"properties": {"a": {"type": "number", "minimum": 0}, "b": {"enum": [1, 2]}}, "required": ["b", "a"], "maxProperties": 2, "title": "t"}
    assert merged(one, two, "#", None) == {
        "type": "object", "properties": {"a": {"type": ["integer"], "minimum": 1}, "b": {"enum": [1, 2]}}, "required": ["a", "b"], "maxProperties": 2, "title": "t"}
