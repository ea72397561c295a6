"""Elo ratings of several models that answered the same prompts, by Bradley–Terry maximum likelihood."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .winrate import Z95

ELO_PER_NAT = 400 / math.log(10)  # ten to one odds are 400 points


def ratings(
    scores: Mapping[str, Sequence[float]], resamples: int = 1000, seed: int = 0, prior_ties: float = 1.0
) -> dict[str, dict]:
    """Elo of each model from `scores[model] (n,)`, the judge's scores on the same n prompts.

    On every prompt every pair of models plays one game; equal scores are a tie, half a win for both. The mean
    rating is 1000. Returns {model: {"rating", "ci95": [low, high], "ci95_analytic": [low, high]}}: the interval is the 2.5 and
    97.5 % quantiles over `resamples` bootstrap draws of the prompts, so games on one prompt stay together; the analytic one is
    rating ± 1.96 standard errors of the sandwich estimator with the prompts as clusters, which says the same of many prompts.

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
    half = Z95 * ELO_PER_NAT * standard_errors(wins, (points[0] - 1000) / ELO_PER_NAT)
    return {
        model: {"rating": float(points[0, m]), "ci95": [float(low[m]), float(high[m])],
                "ci95_analytic": [float(points[0, m] - half[m]), float(points[0, m] + half[m])]}
        for m, model in enumerate(scores)
    }


def standard_errors(wins: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """(M,) in nats: of Bradley–Terry strengths fitted to records `wins (n, M, M)` of n prompts, which are the independent draws.

    The inverse curvature around the spread of the prompts' gradients. Source: White 1982; Liang & Zeger 1986 for clusters.
    """
    n_model = wins.shape[-1]
    chance = 1 / (1 + np.exp(strength[None, :] - strength[:, None]))  # P(i beats j)
    games = wins + wins.swapaxes(-1, -2)
    gradients = (wins - games * chance).sum(-1)  # (n, M)
    weight = (games * chance * (1 - chance)).sum(0)
    inverse = np.linalg.pinv(np.diag(weight.sum(-1)) - weight)  # the free direction, all up or down, has no error
    return np.sqrt(np.clip(np.diag(inverse @ (gradients.T @ gradients) @ inverse), 0, None)) * np.sqrt(len(wins) / max(len(wins) - 1, 1)) \
        * np.ones(n_model)


def davidson(wins: np.ndarray, ties: np.ndarray) -> tuple[np.ndarray, float]:
    """Log strengths `(M,)`, mean 0, and the weight ν of a tie, that make wins and ties most likely.

    `wins[i, j]`: how often i beat j; `ties[i, j]` = `ties[j, i]`: how often they drew. With p = e^s, P(i beats j) is
    p_i / (p_i + p_j + ν √(p_i p_j)), and a tie has the rest. Raises ValueError where no finite maximum exists, or nothing tied.
    Source: Davidson 1970, "On extending the Bradley-Terry model to accommodate ties", eq. 2.1.

    >>> strength, nu = davidson(np.array([[0.0, 3.0], [3.0, 0.0]]), np.array([[0.0, 2.0], [2.0, 0.0]]))
    >>> strength.round(6).tolist(), round(nu, 4)  # even strengths; a tie is 2 / 8 of the games, so ν / (2 + ν) = 1/4
    ([0.0, 0.0], 0.6667)
    """
    wins, ties = np.asarray(wins, dtype=np.float64), np.asarray(ties, dtype=np.float64)
    if not np.triu(ties).sum() or not wins.sum():
        raise ValueError("davidson: expected at least one tie and one win; without any tie it is bradley_terry")
    _check_finite_maximum(wins + ties)
    n_model = len(wins)
    points = wins + ties / 2  # of i against j
    games = np.triu(wins + wins.T + ties, 1)
    draws, at = np.triu(ties).sum(), np.zeros(n_model + 1)  # strengths, and ln ν last

    def value(x):
        s, tie = x[:-1], x[-1]
        gap = s[:, None] - s[None, :]
        return (points * gap / 2).sum() + draws * tie - (games * np.log(np.exp(gap / 2) + np.exp(-gap / 2) + np.exp(tie))).sum()

    for _ in range(200):
        s, nu = at[:-1], np.exp(at[-1])
        gap = s[:, None] - s[None, :]
        up, down = np.exp(gap / 2), np.exp(-gap / 2)
        total = up + down + nu
        mean = (up - down) / 2 / total  # expected half points of i over j
        whole = games + games.T
        gradient = np.append((points - points.T).sum(1) / 2 - (whole * mean).sum(1), draws - (games * nu / total).sum())
        spread = whole * ((up + down) / 4 / total - mean**2)
        curvature = np.zeros((n_model + 1, n_model + 1))
        curvature[:-1, :-1] = np.diag(spread.sum(1)) - spread + np.ones((n_model, n_model))
        curvature[:-1, -1] = curvature[-1, :-1] = -(whole * mean * nu / total).sum(1)
        curvature[-1, -1] = (games * nu / total * (1 - nu / total)).sum()
        step = np.linalg.solve(curvature, gradient)
        scale, before = 1.0, value(at)
        while value(at + scale * step) < before - 1e-12 * abs(before) and scale > 1e-6:
            scale /= 2
        at = at + scale * step
        at[:-1] -= at[:-1].mean()
        if np.abs(step).max() < 1e-10:
            return at[:-1], float(np.exp(at[-1]))
    raise ValueError("davidson: the likelihood is too flat to find its maximum")


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
