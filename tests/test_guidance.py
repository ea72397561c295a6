"""Masks against llguidance's, bit by bit, and llguidance as the engine."""

import json
import random

import constrained
import numpy as np
import pytest

pytest.importorskip("llguidance")

from nanorlhf.engine.constrain import (  # noqa: E402
    GuidanceConstraint, constrain, grammar, guidance_json_schema, guidance_lark, guidance_regex, json_schema, regex,
)  # fmt: skip

SCHEMAS = [
    {"type": "string"}, {"type": "string", "minLength": 2, "maxLength": 5}, {"type": "string", "pattern": "^[a-z]+-[0-9]{2,3}$"}, {"type": "string", "pattern": "ab|^c.d"},
    {"type": "string", "maxLength": 90}, {"type": "string", "format": "uuid"}, {"type": "string", "format": "ipv4"},
    {"type": "integer"}, {"type": "integer", "minimum": -5, "maximum": 120}, {"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 0},
    {"type": "integer", "exclusiveMinimum": 0}, {"type": "integer", "multipleOf": 3}, {"type": "number"}, {"type": "number", "minimum": 1.5, "maximum": 3},
    {"type": "boolean"}, {"type": ["null", "string"]}, {"enum": ["a", 1, None, {"b": [1, None]}, "é\n"]}, {"const": {"x": "y"}},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}}, "required": ["b"]},
    {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}},
     "required": ["name", "age"], "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}}, {"type": "object", "patternProperties": {"^x": {"type": "null"}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": False, "b": True}, "required": ["c"]}, {"properties": {"a": {"type": "integer"}}},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}, {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": {"type": "null"}, "minItems": 1},
    {"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"k": {"const": "v"}}, "required": ["k"], "additionalProperties": False}]},
    {"$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                        "required": ["v", "next"], "additionalProperties": False}}, "$ref": "#/$defs/node"},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}]},
    {}, {"type": "array"}, {"type": "object"},
]  # fmt: skip
REGEXES = [
    r"\d{3}-\d{4}", r"[a-z]+(?: [a-z]+){0,4}", r"(?:foo|bar|bazz)*qux?", r"[^\"]{0,20}", r".*", r"[\s\S]{5,}", r"(?:[A-Z][a-z]+ )+\d+", r"-?(?:0|[1-9]\d*)(?:\.\d+)?",
    r"[А-я ё]+", r"[\u3040-\u30ff]{1,8}!?", r"\w+@\w+\.(?:com|org)", r"(?:a|ab)(?:c|bcd)(?:d*)", r"\W\S\D+", r"<(?:b|i)>[^<]*</(?:b|i)>", r"(?:def|class) [A-Za-z_]\w*\(?:?",
    r"😀{2,4}[^a]?", r"a{2,3}|ab*", r"[^\x00-\x7f]+", r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", r"( |\n|\t)*return .{1,30}",
]  # fmt: skip
# The same languages in both notations. llguidance's terminals are taken as long as they can be, so that here they end where nothing could go on.
GRAMMARS = [
    ('root ::= "(" root ")" root | "x"', 'start: root\nroot: "(" root ")" root | "x"'),
    ('root ::= term (("+" | "-") term)*\nterm ::= [0-9]+ | "(" root ")"', 'start: term (("+" | "-") term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]+/'),
    ('root ::= "a" root "b" | "a" root "c" | ""', 'start: "a" start "b" | "a" start "c" | ""'),
    ('root ::= root "," word | word\nword ::= [a-z]+', 'start: start "," WORD | WORD\nWORD: /[a-z]+/'),
]
# Beside named properties llguidance 1.9 takes any \\u escape in the names of others, so that "\\u0061" may be a second "a"; here they
# are written in one way. Tokens with \\u are not compared there, and no backslash is drawn.
OPEN = [json.dumps(schema)[:60] for schema in SCHEMAS if any(part.get("properties") and part.get("additionalProperties", True) for part in (
    schema, *schema.get("allOf", [])))]
CASES = (
    [(json.dumps(schema)[:60], lambda s=schema: json_schema(s), lambda s=schema: guidance_json_schema(s)) for schema in SCHEMAS]
    + [(pattern, lambda p=pattern: regex(p), lambda p=pattern: guidance_regex(p)) for pattern in REGEXES]
    + [(ours, lambda g=ours: grammar(g), lambda g=theirs: guidance_lark(g)) for ours, theirs in GRAMMARS]
)


def differences(case, size, prefixes):
    """Where both masks, or whether a text is whole, are not the same after that many random prefixes: (text, tokens). Walks of allowed tokens,
    half of which are signs that end something."""
    _, ours, theirs = case
    tokenizer = constrained.vocabulary(size)
    ends = constrained.ends(tokenizer)
    mine, oracle = constrain(ours(), tokenizer, ends), GuidanceConstraint(theirs(), tokenizer, ends)
    signs = {j for j, token in enumerate(tokenizer.vocabulary.tokens) if token and not token[-1:].isalnum() and len(token) < 4}
    escapes = np.array([case[0] in OPEN and b"\\" in token for token in tokenizer.vocabulary.tokens])
    rng, seen = random.Random(case[0]), 0
    while seen < prefixes:
        state, other = mine.start(), oracle.start()
        for _ in range(rng.randint(1, 60)):
            mask, expected = mine.mask(state), oracle.mask(other)
            wrong = np.flatnonzero((constrained.bits(mask, size) != constrained.bits(expected, size)) & ~escapes)
            if len(wrong) or mine.complete(state) != oracle.complete(other):
                return [(state.text, [(j, tokenizer.decode_bytes([int(j)])) for j in wrong[:5]])]
            seen += 1
            allowed = [token for token in mine.allowed(state) if not escapes[token]]
            closing = [token for token in allowed if token in signs]
            token = rng.choice(closing if closing and rng.random() < 0.5 else allowed)
            if token in ends or seen >= prefixes:
                break
            state, other = mine.advance(state, token), oracle.advance(other, token)
    return []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_masks_are_llguidances(case):
    assert differences(case, 4096, 30) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [4096, 49152])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_masks_are_llguidances_after_five_hundred_prefixes(case, size):
    assert differences(case, size, 500) == []


def test_bounds_that_llguidance_lets_through_are_kept_here():
    """0 is not above 0. llguidance 1.9 allows it to end there, so that bounds of numbers at 0 are left out above."""
    assert not constrained.accepts(json_schema({"type": "number", "exclusiveMinimum": 0, "maximum": 0.25}), "0")


def test_a_name_that_llguidance_lets_come_twice_is_one_here():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    constraint = GuidanceConstraint(guidance_json_schema(schema), constrained.byte_vocabulary(), [256])
    state = constraint.start()
    for byte in rb'{"\u0061":true}':
        state = constraint.advance(state, byte)
    assert constraint.complete(state), "if not, OPEN can go"
    assert not constrained.accepts(json_schema(schema), r'{"\u0061":true}')


# --- as an engine -----------------------------------------------------------------------------------------------------


def test_states_are_pure_however_they_are_visited():
    """More states at once than parsers are kept, in a random order."""
    tokenizer = constrained.vocabulary(4096)
    mine = constrain(json_schema({}), tokenizer, constrained.ends(tokenizer))
    oracle = GuidanceConstraint(guidance_json_schema({}), tokenizer, constrained.ends(tokenizer))
    rng, states = random.Random(0), [(mine.start(), oracle.start())]
    for _ in range(300):
        state, other = rng.choice(states)
        assert np.array_equal(mine.mask(state), oracle.mask(other))
        token = rng.choice(mine.allowed(state))
        states.append((mine.advance(state, token), oracle.advance(other, token)))
    assert len({other for _, other in states}) > 64


def test_ends_and_errors_are_as_elsewhere():
    vocabulary = constrained.byte_vocabulary()
    oracle = GuidanceConstraint(guidance_regex("ab"), vocabulary, [256])
    state = oracle.advance(oracle.advance(oracle.start(), 97), 98)
    assert oracle.complete(state) and oracle.complete(oracle.advance(state, 256)) and not oracle.complete(oracle.start())
    assert constrained.bits(oracle.mask(oracle.advance(state, 256)), 257).nonzero()[0].tolist() == [256]
    with pytest.raises(ValueError, match="a token that the mask allows, got 120 at byte 1 of a text of llguidance's grammar, after 'a'"):
        oracle.advance((97,), 120)
    with pytest.raises(ValueError, match="a grammar that llguidance takes"):
        GuidanceConstraint(guidance_json_schema({"type": "string", "format": "nothing"}), vocabulary, [256])
    with pytest.raises(ValueError, match="at least one end id"):
        GuidanceConstraint(guidance_regex("a"), vocabulary, [])


def test_a_grammar_that_begins_with_itself_by_way_of_another():
    """What the own automata refuse."""
    lark = 'start: other "a" | "b"\nother: start "c"'
    oracle = GuidanceConstraint(guidance_lark(lark), constrained.byte_vocabulary(), [256])
    state = oracle.start()
    for byte in b"bcaca":
        state = oracle.advance(state, byte)
    assert oracle.complete(state)
