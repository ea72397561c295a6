"""What a reward model's scores are worth beyond one accuracy: by how sure the labels and the model are, whether its probabilities
hold, and what the length of the responses alone would explain."""

from collections.abc import Sequence

import numpy as np


def pairs(ranks: Sequence[int], bounds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Indices (better (P,), worse (P,)) of all pairs of different rank within each group bounds[g] .. bounds[g+1]; rank 0 is best.

    >>> [x.tolist() for x in pairs([0, 1, 1, 0, 2], [0, 3, 5])]
    [[0, 0, 3], [1, 2, 4]]
    """
    ranks, better, worse = np.asarray(ranks), [], []
    for start, end in zip(bounds, bounds[1:]):
        own = ranks[start:end]
        i, j = np.nonzero(own[:, None] < own[None, :])
        better.append(i + start)
        worse.append(j + start)
    return np.concatenate([*better, np.zeros(0, int)]).astype(int), np.concatenate([*worse, np.zeros(0, int)]).astype(int)


def accuracy(gap: Sequence[float]) -> float:
    """Share of pairs whose better response scores higher, gap (P,) = s_better − s_worse; a tie counts one half.

    >>> accuracy([1.0, -1.0, 0.0, 2.0])
    0.625
    """
    gap = _gaps("accuracy", gap)
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())


def accuracy_by(confidence: Sequence[float], gap: Sequence[float], bins: int = 4) -> list[dict]:
    """Accuracy in bins of equally many pairs, from the least to the most confident: [{"from", "to", "accuracy", "n"}].

    confidence (P,): whatever says how clear the label is, for example the labeller's gap in utility. Fewer bins where values repeat.

    >>> [row["accuracy"] for row in accuracy_by([0.1, 0.2, 3.0, 4.0], [-1.0, 1.0, 1.0, 1.0], bins=2)]
    [0.5, 1.0]
    """
    confidence, gap = np.asarray(confidence, dtype=np.float64), np.asarray(gap, dtype=np.float64)
    if len(confidence) != len(gap):
        raise ValueError(f"accuracy_by: expected a confidence for each of {len(gap)} pairs, got {len(confidence)}")
    edges = np.unique(np.quantile(confidence, np.linspace(0, 1, bins + 1))) if len(gap) else []
    which = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, max(len(edges) - 2, 0))
    rows = []
    for b in range(max(len(edges) - 1, 1) if len(gap) else 0):
        mine = which == b
        if mine.any():
            rows.append({"from": float(confidence[mine].min()), "to": float(confidence[mine].max()), "accuracy": accuracy(gap[mine]),
                         "n": int(mine.sum())})
    return rows


def calibration(gap: Sequence[float], bins: int = 5) -> dict:
    """Whether σ(s_i − s_j) is how often i is the better one: {"error", "bins": [{"predicted", "observed", "n"}]}.

    A pair is read from the side that the model prefers, so predictions lie in [½, 1]; bins are of equal width. error: the expected
    calibration error, Σ share · |observed − predicted|. Source: Guo et al. 2017, eq. 3.

    >>> calibration([2.0, 2.0, 2.0, -2.0])["bins"]
    [{'predicted': 0.8807970779778823, 'observed': 0.75, 'n': 4}]
    """
    gap = _gaps("calibration", gap)
    predicted, right = 1 / (1 + np.exp(-np.abs(gap))), (gap > 0) + 0.5 * (gap == 0)
    which = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = [{"predicted": float(predicted[which == b].mean()), "observed": float(right[which == b].mean()), "n": int((which == b).sum())}
            for b in range(bins) if (which == b).any()]
    return {"error": float(sum(r["n"] * abs(r["predicted"] - r["observed"]) for r in rows) / len(gap)), "bins": rows}


def length_check(scores: Sequence[float], lengths: Sequence[float], better: np.ndarray, worse: np.ndarray) -> dict:
    """What length alone explains: {"longer_wins": share of pairs whose better response is longer (the labels'), "model_prefers_longer":
    share of pairs whose longer response the model scores higher, "correlation": Spearman's of score and length, "accuracy_same_length":
    the model's on pairs of lengths within 10 %, or None}.

    >>> found = length_check([1.0, 0.0], [5, 9], np.array([0]), np.array([1]))
    >>> found["longer_wins"], found["model_prefers_longer"]
    (0.0, 0.0)
    """
    scores, lengths = np.asarray(scores, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    gap, longer = scores[better] - scores[worse], lengths[better] - lengths[worse]
    near = np.abs(longer) <= 0.1 * np.maximum(lengths[better], lengths[worse])
    a, b = _mean_ranks(scores), _mean_ranks(lengths)
    spread = a.std() * b.std()
    return {"longer_wins": accuracy(longer), "model_prefers_longer": accuracy(gap * np.sign(longer)),
            "correlation": float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread else 0.0,
            "accuracy_same_length": accuracy(gap[near]) if near.any() else None}


def _gaps(name: str, gap: Sequence[float]) -> np.ndarray:
    gap = np.asarray(gap, dtype=np.float64)
    if not len(gap) or not np.isfinite(gap).all():
        raise ValueError(f"{name}: expected at least one pair, got none" if not len(gap) else f"{name}: expected finite gaps, got {gap}")
    return gap


def _mean_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return ((ends - counts + ends - 1) / 2)[which]
