import math
from itertools import combinations

import pytest

from nanorlhf.evals.diversity import distinct_n, mean_length, pass_at_k, self_bleu


def test_distinct_2_worked_by_hand():
    """1 2 1 2 has the pairs 12, 21, 12; 2 1 has 21. Two distinct of four."""
    assert distinct_n([[1, 2, 1, 2], [2, 1]], 2) == 0.5


def test_a_model_that_repeats_one_response_goes_to_zero():
    """k copies of a response with four distinct pairs: 4 / 4k."""
    for k in (1, 2, 50):
        assert distinct_n([[1, 2, 3, 4, 5]] * k, 2) == 1 / k


def test_grams_never_span_two_responses():
    assert distinct_n([[1], [2], [3]], 2) == 0.0
    assert distinct_n([[1, 2], [2, 1]], 2) == 1.0


def test_strings_count_words_as_the_same_sequence_of_tokens_would():
    assert distinct_n(["a b  a b", "b\na"], 2) == distinct_n([["a", "b", "a", "b"], ["b", "a"]], 2)
    assert mean_length(["a b c", ""]) == 1.5


def test_bad_input_gets_one_sentence():
    with pytest.raises(ValueError, match="n ≥ 1, got 0"):
        distinct_n([[1]], 0)
    with pytest.raises(ValueError, match="at least 1 response"):
        mean_length([])


def test_self_bleu_by_hand():
    """"a b c d" against "a b c e e": unigrams 3/4, bigrams 2/3, trigrams 1/2, no 4-gram of 1 (0.1), the other longer: e^(1 − 5/4).
    The other way: 3/5, 2/4, 1/3, 0.1/2, no penalty."""
    one = math.exp(-0.25) * (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25
    other = (3 / 5 * 2 / 4 * 1 / 3 * 0.1 / 2) ** 0.25
    assert self_bleu(["a b c d", "a b c e e"]) == pytest.approx((one + other) / 2)
    assert self_bleu(["a b c d e"] * 5) == 1.0 and self_bleu(["", ""]) == 0.0
    with pytest.raises(ValueError, match="self_bleu: expected at least 2 responses, got 1"):
        self_bleu(["a"])


def test_a_count_is_clipped_to_the_largest_of_any_one_other_response():
    """BLEU-1 of "a a", "a b b" and "a". The first: a matches once of two, nearest lengths 3 and 1, the shorter counts: no penalty,
    1/2. The second: a matches, b does not, 1/3, nearest 2: no penalty. The third: 1, nearest 2: e^(1 − 2)."""
    assert self_bleu(["a a", "a b b", "a"], n=1) == pytest.approx((1 / 2 + 1 / 3 + math.exp(-1)) / 3)


@pytest.mark.parametrize("n, correct", [(5, 0), (5, 2), (5, 5), (6, 1)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n, correct):
    for k in range(1, n + 1):
        choices = list(combinations(range(n), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(min(c) < correct for c in choices) / len(choices))
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(n, n + 1, 1)
