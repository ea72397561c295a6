"""Elo ratings of several models that answered the same prompts, by Bradley–Terry maximum likelihood."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

ELO_PER_NAT = 400 / math.log(10)  # ten to one odds are 400 points


def ratings(
    scores: Mapping[str, Sequence[float]], resamples: int = 1000, seed: int = 0, prior_ties: float = 1.0
) -> dict[str, dict]:
    """Elo of each model from `scores[model] (n,)`, the judge's scores on the same n prompts.

    On every prompt every pair of models plays one game; equal scores are a tie, half a win for both. The mean
    rating is 1000. Returns {model: {"rating", "ci95": [low, high]}}, the interval being the 2.5 and 97.5 %
    quantiles over `resamples` bootstrap draws of the prompts, so games on one prompt stay together.

    `prior_ties` ties are added to each pair's record, so that a model that never loses still has a finite
    rating. With hundreds of prompts one such tie moves nothing that can be seen; 0 is plain maximum likelihood.

    Raises ValueError on fewer than two models, unequal or zero lengths, scores that are not finite, or, with
    prior_ties = 0, a record for which no finite maximum exists.
    Source: Bradley & Terry 1952; ties as half wins are this package's choice (Davidson 1970 models them).

    >>> table = ratings({"a": [1, 0, 1, 1], "b": [0, 1, 1, 0]}, resamples=50)
    >>> table["a"]["rating"] > 1000 > table["b"]["rating"]
    True
    """
    wins = _wins_per_prompt(scores)  # (n, M, M)
    n, n_model = wins.shape[:2]
    prior = prior_ties / 2 * (1 - np.eye(n_model))
    # A bootstrap draw is how many times each prompt was drawn; row 0 is the sample itself.
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    counts = np.concatenate([np.ones((1, n)), draws])
    records = np.tensordot(counts, wins, axes=1) + prior  # (1 + resamples, M, M)
    points = 1000 + ELO_PER_NAT * bradley_terry(records)
    low, high = np.quantile(points[1:], [0.025, 0.975], axis=0) if resamples else (points[0], points[0])
    return {
        model: {"rating": float(points[0, m]), "ci95": [float(low[m]), float(high[m])]}
        for m, model in enumerate(scores)
    }


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Log strengths `(…, M)`, mean 0, that make the records `wins (…, M, M)` most likely.

    `wins[…, i, j]` is how often i beat j (a tie adds one half to both); P(i beats j) = σ(s_i − s_j).

    Raises ValueError where no finite maximum exists: some group of models never lost to the rest.
    Source: Newton's method on the concave log-likelihood. A step whose largest change of a difference is r is
    scaled by log(1 + r) / r, which makes every step an ascent (Bach 2010, "Self-concordant analysis for
    logistic regression", §2.2).

    >>> bradley_terry(np.array([[0.0, 3.0], [1.0, 0.0]])).round(4).tolist()     # half of ln 3 each way
    [0.5493, -0.5493]
    """
    wins = np.asarray(wins, dtype=np.float64)
    n_model = wins.shape[-1]
    _check_finite_maximum(wins)
    games = wins + wins.swapaxes(-1, -2)
    strength = np.zeros(wins.shape[:-1])
    for _ in range(200):
        chance = 1 / (1 + np.exp(strength[..., None, :] - strength[..., :, None]))  # P(i beats j)
        gradient = (wins - games * chance).sum(-1)
        weight = games * chance * (1 - chance)
        # Adding a constant to every strength changes nothing; ones(M, M) fixes that free direction at 0.
        curvature = np.eye(n_model) * weight.sum(-1)[..., None] - weight + np.ones((n_model, n_model))
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        reach = np.maximum(np.ptp(step, axis=-1, keepdims=True), 1e-12)
        strength = strength + step * np.log1p(reach) / reach
        if reach.max() < 1e-9:
            return strength - strength.mean(-1, keepdims=True)
    raise ValueError("bradley_terry: the likelihood is too flat to find its maximum; add prior ties")


def _wins_per_prompt(scores: Mapping[str, Sequence[float]]) -> np.ndarray:
    """(n, M, M): 1 where model i's score beats model j's on that prompt, ½ where they tie, 0 on the diagonal."""
    if len(scores) < 2:
        raise ValueError(f"elo: expected at least 2 models, got {len(scores)}")
    lengths = {model: len(values) for model, values in scores.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"elo: expected the same prompts for every model, got {lengths}")
    table = np.array(list(scores.values()), dtype=np.float64).T  # (n, M)
    if not np.isfinite(table).all():
        raise ValueError("elo: expected finite scores, got one that is not")
    ours, theirs = table[:, :, None], table[:, None, :]
    wins = (ours > theirs) + 0.5 * (ours == theirs)
    return wins * (1 - np.eye(len(scores)))


def _check_finite_maximum(wins: np.ndarray) -> None:
    """A maximum exists exactly if every model can be reached from every other by wins (Ford 1957)."""
    n_model = wins.shape[-1]
    reached = (wins > 0) | np.eye(n_model, dtype=bool)
    for _ in range(max(1, math.ceil(math.log2(n_model)))):
        reached = (reached[..., :, :, None] & reached[..., None, :, :]).any(-2)
    if not reached.all():
        raise ValueError("bradley_terry: expected every model to lose to the rest at least once, got one that does not")
