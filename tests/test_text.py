"""data/text.py: words, sentences, stems and hashes."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.data.text import STOP_WORDS, sentences, stable_hash, stem, words


def test_words_are_lower_case_letters_with_their_apostrophes():
    assert words("Don’t stop at 12, O'Brien-Müller!") == ["don't", "stop", "at", "o'brien", "müller"]
    assert words("42 -- …") == []
    assert all(words(word) == [word] for word in STOP_WORDS)


@pytest.mark.parametrize("text, expected", [
    ("One. Two! Three?", ["One.", "Two!", "Three?"]),
    ("Dr. Who met St. John.", ["Dr. Who met St. John."]),  # an abbreviation ends no sentence
    ("J. R. Smith sat.", ["J. R. Smith sat."]),  # nor does an initial
    ("It costs 3.50 now. yes", ["It costs 3.50 now. yes"]),  # what follows must begin like a sentence
    ("He said “Go.” Then he went.", ["He said “Go.”", "Then he went."]),
    ("  no   end  ", ["no end"]),
    ("", []),
])  # fmt: skip
def test_sentences_end_where_a_reader_ends_them(text, expected):
    assert sentences(text) == expected


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="aB.!? \n\"'“”()", max_size=60))
def test_sentences_lose_and_add_no_word(text):
    assert " ".join(sentences(text)).split() == text.split()


def test_stems_join_a_word_with_its_forms_and_leave_short_words():
    assert {stem(w) for w in ("open", "opens", "opened", "opening")} == {"open"}
    assert stem("is") == "is" and stem("Thing") == "thing" and stem("encyclopaedia") == "encycl"


def test_a_hash_is_the_same_in_another_process_and_differs_by_salt():
    code = "from nanorlhf.data.text import stable_hash; print(stable_hash('rain', 'x'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=sys.path[0] + "/..")
    assert int(other.stdout) == stable_hash("rain", "x") != stable_hash("rain", "y")
    assert 0 <= stable_hash("\udc80") < 2**64  # a byte that was not UTF-8
