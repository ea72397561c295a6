"""Choices, and characters as ranges."""

import constrained
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.engine.constrain import choice
from nanorlhf.engine.constrain.language import ANY, LAST, chars, other_than

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda pair: (pair[0], sum(pair))), max_size=5)


def points(some):
    return {point for low, high in some.ranges for point in range(low, high + 1)}


@settings(deadline=None)
@given(RANGES)
def test_ranges_are_merged_and_turned_round_as_sets_are(ranges):
    some = chars(ranges)
    assert points(some) == {point for low, high in ranges for point in range(low, high + 1)}
    assert all(a[1] + 1 < b[0] for a, b in zip(some.ranges, some.ranges[1:], strict=False)), "sorted, apart"
    others = other_than(some).ranges
    assert all(high < low or last < first for low, last in others for first, high in some.ranges), "apart from these"
    assert sum(high - low + 1 for low, high in others + some.ranges) == LAST + 1 - 2048, "all without the surrogates"


def test_any_character_is_all_but_surrogates():
    assert ANY.ranges == ((0, 0xD7FF), (0xE000, LAST))


def test_a_choice_has_its_texts_and_no_other():
    texts = ["yes", "no", "yet", "", "né", "no"]
    assert constrained.texts(choice(texts), 6) == set(texts)


@pytest.mark.parametrize("wrong", ["yes", [], [1], ["a", b"b"]])
def test_a_choice_of_no_texts_is_an_error(wrong):
    with pytest.raises(ValueError, match="choice: expected a list of texts, at least one"):
        choice(wrong)


def test_languages_written_alike_are_equal():
    assert choice(["a", "b"]) == choice(["a", "b"]) != choice(["b", "a"])
    assert hash(choice(["a"])) == hash(choice(["a"]))
