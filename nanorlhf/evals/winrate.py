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
    ours, theirs = _finite("win_rate", scores), _finite("win_rate", rivals)
    if len(ours) != len(theirs):
        raise ValueError(f"win_rate: expected one rival score a score, got {len(ours)} scores and {len(theirs)} rivals")
    if not len(ours):
        raise ValueError("win_rate: expected at least 1 prompt, got 0")
    wins, ties = int((ours > theirs).sum()), int((ours == theirs).sum())
    rate = (wins + ties / 2) / len(ours)
    return {"mean": rate, "ci95": wilson_interval(rate, len(ours)), "n": len(ours), "wins": wins, "ties": ties}


def wilson_interval(rate: float, n: int) -> list[float]:
    """Wilson's 95 % interval [low, high] for a rate seen in n trials.

    >>> [round(x, 4) for x in wilson_interval(0.5, 100)]
    [0.4038, 0.5962]
    """
    shrink = 1 + Z95**2 / n
    centre = (rate + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n**2))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def _finite(name: str, values: Sequence[float]) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not np.isfinite(sample).all():
        raise ValueError(f"{name}: expected a flat sequence of finite numbers, got {sample}")
    return sample
