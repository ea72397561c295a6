"""Best-of-n: the reward model as a filter of samples instead of a teacher, and what each n would have given from one lot of samples."""

import math
from typing import Callable, List, Sequence

import numpy as np
import torch

from ..engine import Completion, generate
from ..engine.sample import SamplingConfig
from ..model import Model


def kl_bound(n: float) -> float:
    """KL(best-of-n ‖ one sample) in nats: exact where no two samples tie, and never more.

    Source: Stiennon et al. 2020, appendix G.3; the bound: Beirami et al. 2024.

    >>> round(kl_bound(1), 4), round(kl_bound(16), 4)
    (0.0, 1.8351)
    """
    return math.log(n) - (n - 1) / n


def expected_best(proxy: np.ndarray, value: np.ndarray, n: int) -> np.ndarray:
    """(P,): for each row the mean ``value`` of the sample of highest ``proxy`` among n of its N samples, over all choices of n.

    proxy, value: (P, N). The sample of rank i from below is the best of C(i − 1, n − 1) of C(N, n) choices; equal proxies share theirs.
    Unbiased for n ≤ N. Source: Nakano et al. 2021 (WebGPT), appendix I. Raises ValueError for n outside 1..N.

    >>> expected_best(np.array([[0.0, 1.0, 2.0]]), np.array([[1.0, 2.0, 6.0]]), 2).round(4).tolist()  # 2 of 3 choices hold the last
    [4.6667]
    """
    P, N = proxy.shape
    if value.shape != proxy.shape or not np.isfinite(proxy).all():
        raise ValueError(f"expected_best: expected finite proxies and values of one shape, got {proxy.shape} and {value.shape}")
    if not 1 <= n <= N:
        raise ValueError(f"expected_best: expected n from 1 to the {N} samples there are, got {n}")
    rank = np.arange(1, N + 1)
    log_choose = np.vectorize(lambda a, b: math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1) if a >= b else -math.inf)
    weight = np.exp(log_choose(rank - 1, n - 1) - log_choose(N, n))
    means = np.empty(P)
    for p in range(P):
        order = np.argsort(proxy[p], kind="stable")
        levels, level = np.unique(proxy[p][order], return_inverse=True)
        share = np.bincount(level, weight, len(levels)) / np.bincount(level, minlength=len(levels))
        means[p] = (share[level] * value[p][order]).sum()
    return means


@torch.no_grad()
def best_of_n(model: Model, prompts: Sequence[List[int]], n: int, score: Callable[[List[List[int]]], torch.Tensor], end: int,
              max_new_tokens: int, temperature: float, seed: int) -> List[Completion]:
    """Of n samples of each prompt the one that the reward model scores highest, among those that ended themselves if any did.

    Errors: ValueError for a score that is not finite."""
    drawn = generate(model, prompts, max_new_tokens, n, [end], SamplingConfig(temperature), seed)
    scores = score([prompts[i // n] + c.ids for i, c in enumerate(drawn)])
    if not bool(scores.isfinite().all()):
        raise ValueError("best_of_n: the reward model's scores must be finite")
    place = lambda j: (drawn[j].finished, float(scores[j]))
    return [drawn[max(range(i * n, i * n + n), key=place)] for i in range(len(prompts))]
