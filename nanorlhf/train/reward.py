"""Stage 3, the reward model: a scalar at the end-of-turn token, fitted to rankings of completions of one prompt.

Source: Ouyang et al. 2022 §3.5 (RM) eq. 1: K completions in one forward, all C(K,2) pairs in one loss.
"""

from dataclasses import dataclass, field
from itertools import combinations
from typing import Callable, List, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import parallel
from ..checkpoint import StageState
from ..config import RewardConfig
from ..engine.generate import ragged
from ..model import Model
from ..optim import Optimizer
from .loss import kwise_loss, pairwise_loss


@dataclass(frozen=True)
class Ranking:
    """K whole conversations (ids, each ending in the end-of-turn token) that share a prompt. ranks: 0 is best."""

    source: str
    sequences: List[List[int]]
    ranks: List[int]
    utilities: List[float] = field(default_factory=list)  # what the labeller found each worth, where that is known


def score_sequences(model: Model, sequences: Sequence[Sequence[int]]) -> Tensor:
    """The scalar at the last token of each sequence: float32 (B,)."""
    tokens, cu_seqlens = ragged(sequences, model.device)
    return model.scores(tokens, cu_seqlens, cu_seqlens[1:].long() - 1)


@torch.no_grad()
def score_all(model: Model, sequences: Sequence[Sequence[int]], batch: int = 256) -> Tensor:
    """``score_sequences`` over any number of sequences, some at a time, without gradient. The result is on the CPU."""
    parts = [score_sequences(model, sequences[i:i + batch]).cpu() for i in range(0, len(sequences), batch)]
    return torch.cat(parts) if parts else torch.zeros(0)


def group_bounds(rankings: Sequence[Ranking]) -> Tensor:
    return torch.from_numpy(np.cumsum([0] + [len(r.ranks) for r in rankings]))


def pair_accuracy(model: Model, rankings: Sequence[Ranking]) -> float:
    """Share of all pairs of different rank that the model orders rightly, ties counting one half."""
    scores = score_all(model, [s for r in rankings for s in r.sequences])
    ranks = torch.tensor([rank for r in rankings for rank in r.ranks])
    return float(kwise_loss(scores, ranks, group_bounds(rankings))[1])


def ranking_loss(scores: Tensor, ranks: Tensor, bounds: Tensor, config: RewardConfig) -> tuple[Tensor, Tensor]:
    """The configured loss of some groups, and the share of their pairs that is ordered rightly."""
    if config.loss == "kwise" and not config.margin:
        return kwise_loss(scores, ranks, bounds)
    better, worse, group = ranked_pairs(ranks, bounds)
    margins = config.margin * (ranks[worse] - ranks[better])
    losses = pairwise_loss(scores[better], scores[worse], margins)
    if config.loss == "kwise":  # each group's pairs count as one
        counts = torch.bincount(group)[group]
        losses = losses / counts * len(losses) / len(group.unique())
    gap = (scores[better] - scores[worse]).detach()
    return losses.mean(), (gap > 0).float().mean() + 0.5 * (gap == 0).float().mean()


def ranked_pairs(ranks: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of different rank within a group: indices of the better (P,), of the worse (P,), and their group (P,)."""
    group = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff()).to(ranks.device)
    better, worse = torch.nonzero((group[:, None] == group) & (ranks[:, None] < ranks), as_tuple=True)
    if not len(better):
        raise ValueError("reward: no group holds two completions of different rank")
    return better, worse, group[better]


def backward(model: Model, rankings: Sequence[Ranking], config: RewardConfig) -> dict:
    """The gradients of the loss of all rankings, of which every rank forms its part. Returns loss and pair accuracy of all."""
    pairs = [sum(a != b for a, b in combinations(r.ranks, 2)) for r in rankings]
    parts = [float(p > 0) for p in pairs] if config.loss == "kwise" else pairs  # what the loss is a mean over
    share, loss, right = parallel.share(len(rankings)), 0.0, 0.0
    if any(pairs[share]) or not any(pairs):
        mine = rankings[share]
        scores = score_sequences(model, [s for r in mine for s in r.sequences])
        ranks = torch.tensor([rank for r in mine for rank in r.ranks], device=scores.device)
        value, accuracy = ranking_loss(scores, ranks, group_bounds(mine), config)
        value = value * (sum(parts[share]) / sum(parts))
        value.backward()
        loss, right = float(value.detach()), float(accuracy) * sum(pairs[share]) / sum(pairs)
    every = parallel.gather((loss, right))
    return {"loss": sum(x for x, _ in every), "pair_accuracy": sum(x for _, x in every)}


def train_reward(model: Model, epochs: Sequence[Sequence[Ranking]], config: RewardConfig, seed: int, state: StageState,
                 evaluate: Callable[[Model], dict], log: Callable[[dict], None], stage: str = "reward") -> Model:
    """Fit ``model`` to the rankings, ``epochs[e]`` being those of pass e; each pass is shuffled. ``stage``: of its rows of metrics.

    evaluate(model) → held-out pair accuracy by source. Errors: ValueError when there is no ranking.
    """
    plan = []
    for epoch, rankings in enumerate(epochs):
        order = np.random.default_rng([seed, epoch, 3]).permutation(len(rankings))
        plan += [[rankings[i] for i in order[j:j + config.groups_per_step]]
                 for j in range(0, len(order), config.groups_per_step)]
    if not plan:
        raise ValueError("train_reward: expected at least one ranking, got none")
    optimizer = Optimizer(model, config.optim, len(plan))
    first = state.restore(model=model, optimizer=optimizer)["step"]
    eval_steps = {round(len(plan) * i / 4) for i in range(4)}
    for step in range(first, len(plan)):
        if step in eval_steps:
            log({"stage": stage, "event": "eval", "step": step, "pair_accuracy": evaluate(model)})
        measured = backward(model, plan[step], config)
        parallel.sum_gradients(optimizer.params)
        lr, norm = optimizer.step(step)
        log({"stage": stage, "step": step + 1, "steps": len(plan), **measured, "lr": lr, "grad_norm": norm})
        state.tick(step + 1)
    log({"stage": stage, "event": "eval", "step": len(plan), "pair_accuracy": evaluate(model)})
    return model


@torch.no_grad()
def normalise(model: Model, sequences: Sequence[Sequence[int]]) -> float:
    """Scale the head so that scores on ``sequences`` have deviation 1; returns their mean, to be subtracted.

    Source: Ziegler et al. 2019 §2.1 (the reward model's mean 0 and variance 1 on samples of the policy).
    Errors: ValueError when there is no sequence.
    """
    if not sequences:
        raise ValueError("normalise: expected at least one sequence, got none")
    scores = score_all(model, sequences)
    deviation = float(scores.std(unbiased=False))
    if deviation > 0:
        model.score.weight.div_(deviation)
        return float(scores.mean()) / deviation
    return float(scores.mean())


class Ensemble:
    """Reward models that judge together: the mean of their scores, or the least of them, which a policy finds harder to exploit
    (Coste et al. 2023). offsets: what is subtracted of each model's scores."""

    def __init__(self, models: Sequence[Model], offsets: Sequence[float], member_score: str = "mean"):
        self.models, self.offsets, self.member_score = list(models), list(offsets), member_score

    def __call__(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(B,), on the CPU."""
        scores = torch.stack([score_all(m, sequences) - o for m, o in zip(self.models, self.offsets)])
        return scores.mean(0) if self.member_score == "mean" else scores.amin(0)
