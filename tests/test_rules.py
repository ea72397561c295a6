"""What can be checked about a response."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.data import rules
from nanorlhf.data.instruct import Example


@pytest.mark.parametrize("text, word, found", [
    ("The King's horse.", "king", True), ("A kingdom.", "king", False), ("Unking him.", "king", False),
    ("KING!", "king", True), ("a_king_b", "king", True), ("", "king", False)])
def test_a_word_counts_only_whole_and_in_any_case(text, word, found):
    assert rules.has_word(text, word) is found


@pytest.mark.parametrize("text, holds", [
    ("It rains.", True), ("Does it?", True), ("“It rains.”", True), ("Dr. Smith is out.", True),
    ("It rains", False), ("it rains.", False), ("It rains. It pours.", False), ("It rains.\nIt pours.", False),
    ("It rains. and pours.", False), ("Wow!!!!", False), ("", False), ("  ", False), ("About 3.5 of them.", True)])
def test_one_sentence_is_one_capital_one_end_one_line(text, holds):
    assert rules.is_one_sentence(text) is holds


def test_repeats_counts_the_share_of_runs_seen_before():
    """"the cat sat the cat sat down" has runs tcs, cst, stc, tcs, csd: one of five occurred before."""
    assert rules.repeats("The cat sat, the cat sat down.") == pytest.approx(0.2)


@given(st.text(max_size=60))
def test_every_check_answers_with_a_bool_for_any_text(text):
    for family, meta in (("word", {"word": "a"}), ("favourable", {}), ("describe", {}),
                         ("docstring", {"signature": "f(x)"})):
        assert all(type(value) is bool for value in rules.check(Example(family, "", "", meta), text).values())
    assert 0 <= rules.repeats(text) < 1


def test_length_bounds_include_their_ends():
    assert [rules.is_within("w " * n, (2, 4)) for n in range(1, 6)] == [False, True, True, True, False]


def test_a_docstring_is_checked_for_its_verb_its_names_and_its_period():
    example = Example("docstring", "", "", {"signature": "readLines(self, max_size=None)"})
    good = rules.check(example, "Read at most the given number of lines.")
    assert all(good.values()) and {"verb", "names", "period"} <= good.keys()
    bad = rules.check(example, "the Spam of it")
    assert not (bad["verb"] or bad["names"] or bad["period"] or bad["one_sentence"])


@pytest.mark.parametrize("text", ["Return x.", "Returns x.", "Copies x.", "Fetches x."])
def test_verbs_count_in_both_forms(text):
    assert rules.starts_with_verb(text)


def test_a_description_shares_words_with_its_article():
    example = Example("describe", "", "", {"extract": "Io is one of the moons of Jupiter.", "bounds": (2, 9)})
    assert rules.check(example, "Moon of Jupiter")["article"]
    assert not rules.check(example, "American baseball player")["article"]
    assert "one_sentence" not in rules.check(example, "Moon of Jupiter")
