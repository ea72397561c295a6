"""Means and win-rates with the 95 % intervals that every comparison in a report carries."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


def mean_ci95(values: Sequence[float]) -> dict:
    """Mean of `values (n,)` with the normal 95 % interval, mean ± 1.96 · s / √n (s with n − 1 below).

    The sample is over prompts, so the interval says how far another draw of prompts would move the mean;
    it knows nothing of other seeds of training.

    Raises ValueError on fewer than two values, or on one that is not finite.

    >>> mean_ci95([1.0, 1.0, 1.0, 1.0])
    {'mean': 1.0, 'ci95': [1.0, 1.0], 'n': 4}
    """
    sample = _finite("mean_ci95", values)
    if len(sample) < 2:
        raise ValueError(f"mean_ci95: expected at least 2 values, got {len(sample)}")
    mean = float(sample.mean())
    half = Z95 * float(sample.std(ddof=1)) / math.sqrt(len(sample))
    return {"mean": mean, "ci95": [mean - half, mean + half], "n": len(sample)}


def win_rate(scores: Sequence[float], rivals: Sequence[float]) -> dict:
    """How often `scores (n,)` beat `rivals (n,)` on the same n prompts; a tie counts one half.

    Returns mean, ci95 = [low, high], n, wins and ties. The interval is Wilson's score interval on n trials.
    It is right at 0 and at 1, where the normal interval has no width. With ties the outcomes {0, ½, 1} vary
    less than the coin that Wilson's variance p (1 − p) assumes, so the interval is then a little too wide.

    Raises ValueError on unequal lengths, on no prompts, or on a score that is not finite.
    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    >>> result = win_rate([1.0, 2.0, 3.0, 3.0], [0.0, 2.0, 5.0, 1.0])
    >>> result["mean"], result["wins"], result["ties"], result["n"]
    (0.625, 2, 1, 4)
    """
    ours, theirs = _paired("win_rate", scores, rivals)
    wins, ties = int((ours > theirs).sum()), int((ours == theirs).sum())
    rate = (wins + ties / 2) / len(ours)
    return {"mean": rate, "ci95": wilson_interval(rate, len(ours)), "n": len(ours), "wins": wins, "ties": ties}


def difference(scores: Sequence[float], rivals: Sequence[float]) -> dict:
    """Mean of `scores − rivals` on the same n prompts with its paired normal 95 % interval: what varies from prompt to prompt for
    both falls out, so it is narrower than the two means' own intervals suggest.

    >>> difference([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    {'mean': 1.0, 'ci95': [1.0, 1.0], 'n': 3}
    """
    ours, theirs = _paired("difference", scores, rivals)
    return mean_ci95(ours - theirs)


def length_controlled(scores: Sequence[float], rivals: Sequence[float], lengths: Sequence[float], rival_lengths: Sequence[float]) -> dict:
    """The win-rate that answers of equal length would have: {"mean", "ci95", "slope"}.

    A logistic regression of the win (½ for a tie) on an intercept and tanh of the standardised difference of lengths; the mean is
    its prediction at no difference. slope: log-odds for one standard deviation of extra length, near 0. The interval is that of the
    intercept (sandwich), and win_rate's own where all outcomes are alike: length explains nothing then, and the likelihood
    has no maximum. Raises ValueError as win_rate does. Source: Dubois et al. 2024, "Length-controlled AlpacaEval", eq. 2,
    without its terms for prompts.

    >>> even = length_controlled([1, 0, 1, 0], [0, 1, 0, 1], [5, 5, 9, 9], [5, 5, 9, 9])
    >>> round(even["mean"], 6), even["slope"]
    (0.5, 0.0)
    """
    ours, theirs = _paired("length_controlled", scores, rivals)
    gap = np.subtract(*_paired("length_controlled", lengths, rival_lengths))
    if len(gap) != len(ours):
        raise ValueError(f"length_controlled: expected a length for each of {len(ours)} answers, got {len(gap)}")
    won = (ours > theirs) + 0.5 * (ours == theirs)
    if (won == won[0]).all():
        return {"mean": float(won[0]), "ci95": wilson_interval(float(won[0]), len(won)), "slope": 0.0}
    deviation = gap.std()
    x = np.stack([np.ones(len(gap)), np.tanh(gap / deviation) if deviation else np.zeros(len(gap))], 1)
    ridge = np.diag([1e-6, 1e-3])  # so that a side that always wins has a finite place
    theta = np.zeros(2)
    for _ in range(100):
        chance = 1 / (1 + np.exp(-x @ theta))
        curvature = (x * (chance * (1 - chance))[:, None]).T @ x + ridge
        step = np.linalg.solve(curvature, x.T @ (won - chance) - ridge @ theta)
        theta = theta + step / max(1.0, np.abs(step).max())
        if np.abs(step).max() < 1e-10:
            break
    inverse = np.linalg.inv(curvature)
    residual = x * (won - chance)[:, None]
    error = math.sqrt((inverse @ residual.T @ residual @ inverse)[0, 0])
    squash = lambda z: float(1 / (1 + math.exp(-z)))
    return {"mean": squash(theta[0]), "ci95": [squash(theta[0] - Z95 * error), squash(theta[0] + Z95 * error)], "slope": float(theta[1])}


def wilson_interval(rate: float, n: int) -> list[float]:
    """Wilson's 95 % interval [low, high] for a rate seen in n trials.

    >>> [round(x, 4) for x in wilson_interval(0.5, 100)]
    [0.4038, 0.5962]
    """
    shrink = 1 + Z95**2 / n
    centre = (rate + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n**2))
    return [min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))]  # rounding aside, the rate is always inside


def _paired(name: str, scores: Sequence[float], rivals: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = _finite(name, scores), _finite(name, rivals)
    if len(ours) != len(theirs):
        raise ValueError(f"{name}: expected one rival score a score, got {len(ours)} scores and {len(theirs)} rivals")
    if not len(ours):
        raise ValueError(f"{name}: expected at least 1 prompt, got 0")
    return ours, theirs


def _finite(name: str, values: Sequence[float]) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not np.isfinite(sample).all():
        raise ValueError(f"{name}: expected a flat sequence of finite numbers, got {sample}")
    return sample
