"""engine/rank.py: orders worked out by hand."""

import math

import pytest

from nanorlhf.engine import Completion, by_likelihood, by_score, by_vote


def drawn(*rows):
    return [Completion(list(range(len(logprobs))), list(logprobs), text=text) for text, logprobs in rows]


def test_the_highest_score_comes_first_and_of_equals_the_earlier():
    assert by_score(lambda c: len(c.text))(drawn(("ab", []), ("abc", []), ("xy", []), ("", []))) == [1, 0, 2, 3]
    assert by_score(len)([]) == []
    with pytest.raises(ValueError, match="completion 1 has no number for a score"):
        by_score(lambda c: math.nan if c.text == "b" else 1.0)(drawn(("a", []), ("b", [])))


def test_likelihood_with_the_penalty_of_length():
    """Sums -4, -3 and -4.9 over 7, 1 and 13 tokens; penalties of 1 divide by 2, 1 and 3: -2, -3, -1.633."""
    rows = drawn(("a", [-4 / 7] * 7), ("b", [-3.0]), ("c", [-4.9 / 13] * 13))
    assert by_likelihood()(rows) == [1, 0, 2] and by_likelihood(1.0)(rows) == [2, 0, 1]
    assert by_likelihood(0.25)(rows) == [1, 0, 2]  # -3.36, -3, -3.72


def test_most_votes_then_the_most_probable_and_no_answer_last():
    rows = drawn(("7", [-5.0]), ("8", [-1.0]), ("", [-0.1]), ("7", [-2.0]), ("9", [-0.5]), ("", [-0.1]), ("", [-0.1]))
    answer = lambda c: c.text or None
    assert by_vote(answer)(rows) == [3, 0, 1, 4, 2, 5, 6]
    with pytest.raises(ValueError, match="by_vote: the votes for '9' have no number for a weight"):
        by_vote(answer, weight=lambda c: math.nan if c.text == "9" else 1.0)(rows)
    assert by_vote(answer, weight=lambda c: 3.0 if c.text == "9" else 1.0)(rows) == [4, 3, 0, 1, 2, 5, 6]
