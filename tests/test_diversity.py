import pytest

from nanorlhf.evals.diversity import distinct_n, mean_length


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
