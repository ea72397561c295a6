"""The linear sentiment classifier."""

import math

import numpy as np
import pytest

from nanorlhf.data import archive
from nanorlhf.data.films import labelled_reviews, load_films, same_film_pairs, split_films
from nanorlhf.data.sentiment import Sentiment, features, pair_accuracy

TEXTS = ["a fine film", "fine and funny", "a dull film", "dull and long"] * 5
LABELS = [1, 1, 0, 0] * 5


def test_naive_bayes_is_what_is_left_without_steps():
    """Two documents "x" (up) and "y" (down), alpha 1: counts of x are 1 + 1 of (2 + 1) up and 0 + 1 of 3 down, so the
    log-count ratio of x is log((2/3)/(1/3)) = log 2, and that of y is −log 2."""
    model = Sentiment(prior=1.0, steps=0).fit(["x", "y"], [1, 0])
    assert model.log_odds("x") == pytest.approx(math.log(2))
    assert model.log_odds("y y y") == pytest.approx(-math.log(2))  # presence counts, not number
    assert model.log_odds("unknown") == 0


def test_the_fit_finds_the_minimum_of_its_loss():
    """At the minimum of Σ log-loss + ½ l2‖w − prior‖² the gradient is zero, so l2 (prior − w) = Xᵀ (p − label).
    Checked with a dense design matrix built here, in the scaled features."""
    model = Sentiment(l2=2.0, steps=3000).fit(TEXTS, LABELS)
    names = list(model.index)
    dense = np.array([[name in features(text) for name in names] for text in TEXTS], float)
    up, down = dense.T @ np.array(LABELS) + 1, dense.T @ (1 - np.array(LABELS)) + 1
    ratio = np.log(up / up.sum()) - np.log(down / down.sum())
    told = np.abs(ratio) > 1e-9
    weight = np.where(told, model.weight / np.where(told, ratio, 1), model.prior)
    p = 1 / (1 + np.exp(-(dense @ model.weight + model.bias)))
    np.testing.assert_allclose(ratio * (dense.T @ (p - LABELS)), 2.0 * (model.prior - weight), atol=1e-6)


def test_probability_is_the_logistic_of_the_log_odds_and_orders_texts():
    model = Sentiment().fit(TEXTS, LABELS)
    assert model.probability("fine") == pytest.approx(1 / (1 + math.exp(-model.log_odds("fine"))))
    assert model.probability("fine") > 0.5 > model.probability("dull")


def test_two_fits_are_equal_bit_for_bit():
    first, second = (Sentiment().fit(TEXTS, LABELS) for _ in range(2))
    assert np.array_equal(first.weight, second.weight) and first.bias == second.bias


def test_pair_accuracy_counts_a_tie_one_half():
    assert pair_accuracy({"a": 1, "b": 1, "c": 2}.get, [("T", "a", "b"), ("T", "a", "c"), ("T", "c", "b")]) == 0.5
    with pytest.raises(ValueError, match="at least one pair"):
        pair_accuracy(len, [])


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match="labels of both kinds"):
        Sentiment().fit(["a", "b"], [1, 1])
    with pytest.raises(ValueError, match="before fit"):
        Sentiment().log_odds("a")


def test_real_reviews_of_unseen_films_are_told_apart():
    try:
        split = split_films(load_films(offline=True), 0)
    except archive.Unavailable as reason:
        pytest.skip(str(reason))
    pairs = same_film_pairs(split.test, 0, 4000)
    assert pair_accuracy(Sentiment().fit(*labelled_reviews(split.train)).log_odds, pairs) > 0.78
    assert pair_accuracy(Sentiment().fit(*labelled_reviews(split.gold)).log_odds, pairs) > 0.70
