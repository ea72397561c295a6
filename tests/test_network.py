"""From expressions to automata: bytes of characters, intersections, rules that end."""

import math
import random

import constrained
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.engine.constrain import grammar, network, regex
from nanorlhf.engine.constrain.language import ANY, NOTHING, Alt, Both, Language, Repeat, Rule, Text, alt, chars, optional, seq
from nanorlhf.engine.constrain.network import automaton, byte_ranges

POINT = st.integers(0, 0x10FFFF) | st.sampled_from([0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000, 0x10FFFF, 0xD7FF, 0xE000])


@settings(deadline=None)
@given(POINT, POINT, st.integers(0, 1 << 30))
def test_ranges_of_bytes_are_those_of_the_characters(one, other, seed):
    ranges = chars([(min(one, other), max(one, other))]).ranges
    rng = random.Random(seed)
    for low, high in ranges:
        made = byte_ranges(low, high)
        size = sum(math.prod(last - first + 1 for first, last in pairs) for pairs in made)
        assert size == high - low + 1, "as many texts as characters"
        for point in {low, high, rng.randint(low, high)}:
            data = chr(point).encode()
            fits = [pairs for pairs in made if len(pairs) == len(data) and all(a <= b <= c for (a, c), b in zip(pairs, data, strict=True))]
            assert len(fits) == 1


def test_surrogates_are_in_no_text():
    machine = automaton(Language("any", ANY))
    assert machine.walk(machine.start(), b"\xed\xa0") == -1
    assert machine.walk(machine.start(), b"\xed\x9f\xbf") >= 0


def test_both_and_one_without_the_other_are_what_sets_say():
    one, two = regex("(?:a|b){0,3}"), regex("a*b?|ba+")
    first, second = constrained.texts(one, 3), constrained.texts(two, 3)
    assert constrained.texts(Language("", Both(one.expr, two.expr)), 3) == first & second
    assert constrained.texts(Language("", Both(one.expr, two.expr, other=False)), 3) == first - second
    assert constrained.texts(Language("", Both(one.expr, NOTHING, other=False)), 3) == first
    nested = Both(Both(one.expr, two.expr), Text("ba"), other=False)
    assert constrained.texts(Language("", seq(nested, Text("!"))), 4) == {text + "!" for text in (first & second) - {"ba"}}


@pytest.mark.parametrize("part", [Text("ab"), optional(Text("a")), Repeat(Text("a"), 0, None), chars([(97, 98)]), alt(Text(""), Text("b")),
                                  Repeat(alt(Text("a"), Text("bb")), 1, 2)], ids=str)  # fmt: skip
@pytest.mark.parametrize("low, high", [(0, 0), (0, 1), (0, 3), (2, 2), (1, 3), (0, None), (2, None)])
def test_repetitions_are_what_sets_say(part, low, high):
    """By repeating the set of the part's texts, up to the length that is looked at."""
    longest = 5
    once = constrained.texts(Language("", part), longest)
    power, expected = {""}, set()
    for n in range(longest + 3 if high is None else high + 1):
        if n >= low:
            expected |= power
        power = {a + b for a in power for b in once if len(a + b) <= longest}
    assert constrained.texts(Language("", Repeat(part, low, high)), longest) == expected


def test_a_long_part_that_repeats_is_built_once():
    """1000 characters of eight states each take some thousand states, and the bounds still hold."""
    language = Language("", Repeat(ANY, 2, 1000))
    machine = automaton(language)
    for n, whole in ((1, False), (2, True), (1000, True)):
        node = machine.walk(machine.start(), "é".encode() * n)
        assert machine.complete(node) == whole
    assert machine.walk(machine.start(), "é".encode() * 1000 + b"a") == -1


def test_states_that_reach_no_end_are_not_there():
    """a(b|c NOTHING): after the a there is b alone, and a rule that never ends leads nowhere."""
    language = Language("", seq(Text("a"), alt(Text("b"), seq(Text("c"), NOTHING), seq(Text("d"), Rule("loop")))), {"loop": seq(Text("x"), Rule("loop"))})
    machine = automaton(language)
    assert [arc[:2] for arc in machine.row(machine.walk(machine.start(), b"a"))] == [(98, 98)]


@pytest.mark.parametrize("expr", [NOTHING, seq(Text("a"), NOTHING), Both(Text("a"), Text("b")), Both(Text("a"), Text("a"), other=False), Rule("loop")])
def test_a_language_without_a_text_is_an_error(expr):
    with pytest.raises(ValueError, match="constrain: expected a language with a text in it, got none that satisfies the source"):
        automaton(Language("the source", expr, {"loop": alt(seq(Text("x"), Rule("loop")), seq(Rule("loop2"), Text("y"))), "loop2": Alt(())}))


def test_rules_that_begin_with_one_another_are_an_error():
    for text in ('root ::= other "a" | "b"\nother ::= root "c"', 'root ::= maybe root "a" | "b"\nmaybe ::= "x"?', 'root ::= ("y" | root) "a"'):
        with pytest.raises(ValueError, match="no rule that begins with itself"):
            automaton(grammar(text))


def test_a_rule_that_there_is_not_is_an_error():
    with pytest.raises(ValueError, match="expected the rule missing to be defined"):
        automaton(Language("", Rule("missing"), {"there": Text("")}))


def test_too_many_states_are_an_error(monkeypatch):
    monkeypatch.setattr(network, "MOST_STATES", 1000)
    assert automaton(regex("(?:(?:a{100}b){100}c){100}")), "shared parts are built once"
    with pytest.raises(ValueError, match="bound its repetitions lower"):
        automaton(regex("a{2000}"))


def test_what_may_be_empty_is_repeated_without_end_of_stack_or_memory():
    assert constrained.texts(grammar('root ::= ""{499000}'), 1) == {""}  # a chain of as many jumps
    assert constrained.texts(regex("(ab?c?d?|){1,3}"), 1) == {"", "a"}
    with pytest.raises(ValueError, match="what may be empty to be repeated at most 2000 times"):
        network.automaton(regex("(|ab|cd){90000}"))
