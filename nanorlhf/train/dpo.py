"""Direct preference optimisation: the policy is fitted to comparisons by its own log-ratio to the SFT model, without rollouts.

Sources: Rafailov et al. 2023 (DPO) eq. 7; Azar et al. 2023 (IPO) eq. 17.
"""

from dataclasses import dataclass
from typing import Callable, List, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import parallel
from ..checkpoint import StageState
from ..config import DPOConfig
from ..engine.generate import ragged
from ..model import Model
from ..optim import Optimizer
from .loss import dpo_loss, ipo_loss, sum_by_sequence


@dataclass(frozen=True)
class Pair:
    """Two conversations (ids) of one prompt, of which the first ``start`` ids are the prompt."""

    chosen: List[int]
    rejected: List[int]
    start: int


def response_sums(model: Model, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """log π of the responses: (P,) of the chosen ones, (P,) of the rejected ones. Both come from one forward."""
    both = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    starts = [p.start for p in pairs] * 2
    tokens, cu_seqlens = ragged(both, model.device)
    response, _ = ragged([[0] * s + [1] * (len(ids) - s) for ids, s in zip(both, starts)], model.device)
    logprobs, _ = model.logprobs(tokens, cu_seqlens, torch.nonzero(response).squeeze(-1) - 1)
    bounds = torch.tensor([0] + [len(ids) - s for ids, s in zip(both, starts)], device=model.device).cumsum(0)
    return sum_by_sequence(logprobs, bounds).chunk(2)


def check_pairs(pairs: Sequence[Pair], context: int) -> None:
    if not pairs:
        raise ValueError("dpo: expected at least one pair, got none")
    for i, pair in enumerate(pairs):
        shortest, longest = sorted((len(pair.chosen), len(pair.rejected)))
        if not 0 < pair.start < shortest or longest > context:
            raise ValueError(f"dpo: pair {i} has {len(pair.chosen)} and {len(pair.rejected)} tokens after a prompt of {pair.start}: both "
                             f"must go beyond the prompt and fit a context of {context}")


def backward(policy: Model, ref: Model, batch: Sequence[Pair], config: DPOConfig) -> dict:
    """The gradients of the mean loss over the batch, of which every rank forms its pairs' part. Returns what was measured."""
    mine, measured = batch[parallel.share(len(batch))], []
    if mine:
        with torch.no_grad():
            ref_chosen, ref_rejected = response_sums(ref, mine)
        chosen, rejected = response_sums(policy, mine)
        margin = (chosen - ref_chosen) - (rejected - ref_rejected)  # over β, the difference of the implicit rewards
        loss = (dpo_loss(margin, config.beta, config.label_smoothing) if config.loss == "sigmoid" else ipo_loss(margin, config.beta)).mean()
        (loss * (len(mine) / len(batch))).backward()
        facts = {"loss": loss, "margin": margin.mean(), "pair_accuracy": (margin > 0).float().mean() + 0.5 * (margin == 0).float().mean(),
                 "chosen": (chosen - ref_chosen).mean(), "rejected": (rejected - ref_rejected).mean()}
        measured.append((len(mine), {name: float(x.detach()) for name, x in facts.items()}))
    return parallel.weighted_means(measured)


def dpo(policy: Model, ref: Model, pairs: Sequence[Pair], config: DPOConfig, seed: int, state: StageState,
        log: Callable[[dict], None]) -> Model:
    """Fit ``policy`` to the pairs for ``config.steps`` steps of shuffled passes.

    Errors: ValueError, before anything is trained, without pairs, for one that does not fit, or different vocabularies.
    """
    check_pairs(pairs, policy.config.context)
    if policy.config.vocab_size != ref.config.vocab_size:
        raise ValueError(f"dpo: policy and reference have vocabularies of different sizes, {policy.config.vocab_size} "
                         f"and {ref.config.vocab_size}")
    optimizer = Optimizer(policy, config.optim, config.steps)
    first = state.restore(policy=policy, policy_optimizer=optimizer)["step"]
    count = min(config.pairs_per_step, len(pairs))
    per_pass = len(pairs) // count
    for step in range(first, config.steps):
        turn, at = divmod(step, per_pass)
        order = np.random.default_rng([seed, turn, 6]).permutation(len(pairs))
        batch = [pairs[i] for i in order[at * count:(at + 1) * count]]
        measured = backward(policy, ref, batch, config)
        parallel.sum_gradients(optimizer.params)
        lr, norm = optimizer.step(step)
        log({"stage": "dpo", "step": step + 1, **measured, "lr": lr, "grad_norm": norm})
        state.tick(step + 1)
    return policy
