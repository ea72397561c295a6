"""Templates: fixed text is forced, holes keep to their languages, and what stands in them is told."""

import json
import random
import re

import constrained
import pytest

from nanorlhf.engine.constrain import choice, constrain, grammar, json_schema, regex, template

CARD = r"Name: {name:[A-Z][a-z]{1,3}}, age {age:int}; {{{mood}}} {data}"


def card():
    return template(CARD, {"mood": choice(["glad", "sad"]), "data": json_schema({"type": "array", "items": {"type": "boolean"}})})


def test_texts_of_a_template():
    accepts = constrained.acceptor(card())
    assert accepts("Name: Al, age 7; {glad} [true,false]")
    for text in ("Name: al, age 7; {glad} []", "Name: Al, age 07; {glad} []", "Name: Al, age 7; {mad} []", "Name: Al, age 7; {sad} [1]", "Name: Al, age 7; {sad} [] "):
        assert not accepts(text), text


def test_fixed_text_is_forced():
    constraint = constrain(card(), constrained.byte_vocabulary(), [256])
    state = constraint.start()
    assert constraint.forced(state) == b"Name: "
    for byte in b"Name: Al, age 7; {g":
        assert byte in constraint.allowed(state)
        state = constraint.advance(state, byte)
    assert constraint.forced(state) == b"lad} ["


def test_what_is_written_is_read_again():
    tokenizer = constrained.vocabulary(4096)
    language, rng = card(), random.Random(0)
    constraint = constrain(language, tokenizer, constrained.ends(tokenizer))
    for _ in range(20):
        tokens = constrained.random_walk(constraint, rng)
        if tokens is None:
            continue
        text = tokenizer.decode(tokens)
        found = language.values(text)
        assert list(found) == ["name", "age", "mood", "data"]
        assert re.fullmatch("[A-Z][a-z]{1,3}", found["name"]) and found["mood"] in ("glad", "sad")
        int(found["age"]), json.loads(found["data"])
        assert text == f"Name: {found['name']}, age {found['age']}; {{{found['mood']}}} {found['data']}"


def test_of_several_readings_the_first_hole_takes_most():
    language = template("{a:b*}{c:b*}!", {})
    assert language.values("bbb!") == {"a": "bbb", "c": ""}
    assert template("{a}, {b}").values("x, y, z") == {"a": "x, y", "b": "z"}
    with pytest.raises(ValueError, match="template: expected a text of template"):
        language.values("bbb")


def test_the_words_for_holes():
    language = template("{a:int} {b:number} {c:word} {d:bool} {e:string} {f:line}")
    assert language.values('-3 1.5e3 n_1 true "a \\" b" any, thing') == {
        "a": "-3", "b": "1.5e3", "c": "n_1", "d": "true", "e": '"a \\" b"', "f": "any, thing"}
    assert not constrained.accepts(language, '-3 1.5e3 n_1 true "a" two\nlines')


def test_rules_of_two_holes_do_not_mix():
    one, two = grammar('root ::= "(" root ")" | "x"'), grammar('root ::= "[" root "]" | "y"')
    assert constrained.texts(template("{a}{b}", {"a": one, "b": two}), 5) == {"xy", "(x)y", "x[y]"}


@pytest.mark.parametrize("text, holes, words", [
    ("a } b", {}, "for a brace at place 2"), ("a {b", {}, "at place 2"), ("{1:int}", {}, "a hole"), ("{a:int}{a:int}", {}, "two called a"), ("{}", {}, "a hole"),
    ("{a:int}", {"a": regex("b")}, "to be told once"), ("{a}", {"b": regex("b")}, "one for b"), ("{a:(}", {}, "regex: expected"), (b"a", {}, "as a str"),
])  # fmt: skip
def test_what_is_no_template_is_an_error(text, holes, words):
    with pytest.raises(ValueError, match=words):
        template(text, holes)
