"""evals/best_of_n.py: what the best of n would be, by enumerating every choice of n."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from nanorlhf.engine import Completion
from nanorlhf.evals import best_of_n as room
from nanorlhf.evals.best_of_n import best_of_n, expected_best, kl_bound
from tiny import model


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_expected_best_is_the_mean_over_all_choices(n):
    """6 samples a prompt; among equal proxies each is as likely to be the one that is taken."""
    rng = np.random.default_rng(0)
    proxy, value = rng.permuted(np.tile(np.arange(6.0), (4, 1)), axis=1), rng.normal(size=(4, 6))
    proxy[1] = [1, 1, 2, 2, 2, 0]
    for p in range(4):
        chosen = []
        for subset in combinations(range(6), n):
            top = max(proxy[p, list(subset)])
            chosen.append(np.mean([value[p, i] for i in subset if proxy[p, i] == top]))
        assert expected_best(proxy, value, n)[p] == pytest.approx(np.mean(chosen))


def test_more_than_there_are_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="expected n from 1 to the 3 samples there are, got 4"):
        expected_best(np.zeros((1, 3)), np.zeros((1, 3)), 4)


def test_the_kl_of_the_best_of_n_is_the_integral_of_its_density():
    """Of a continuous score with distribution u in (0, 1) the best of n has density n u^(n−1): ∫ that · its log."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 16):
        density = n * u ** (n - 1)
        assert kl_bound(n) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-4)


def test_of_each_prompts_samples_the_best_that_ended_is_taken(monkeypatch):
    """Two prompts, three samples; the highest score of the first did not end. Of the second none did: the highest score of all."""
    drawn = [Completion([k], [], k in (0, 1)) for k in range(6)]
    monkeypatch.setattr(room, "generate", lambda *_: drawn)
    best = best_of_n(model(), [[9], [8]], 3, lambda seqs: torch.tensor([float(s[-1]) for s in seqs]), 21, 4, 1.0, 0)
    assert [c.ids for c in best] == [[1], [5]]
    assert math.isfinite(kl_bound(3))


def test_scores_that_cannot_be_compared_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(room, "generate", lambda *_: [Completion([1], [], True), Completion([2], [], True)])
    with pytest.raises(ValueError, match="best_of_n: the reward model's scores must be finite"):
        best_of_n(model(), [[9]], 2, lambda seqs: torch.tensor([0.0, math.nan]), 21, 4, 1.0, 0)
    for proxy, value in ((np.zeros((1, 3)), np.zeros((1, 5))), (np.array([[0.0, math.nan]]), np.zeros((1, 2)))):
        with pytest.raises(ValueError, match="expected finite proxies and values of one shape"):
            expected_best(proxy, value, 2)
