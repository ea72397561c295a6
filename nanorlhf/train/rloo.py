"""Reinforcement learning without a value model: several responses to a prompt judge one another (RLOO, GRPO), or none does
(REINFORCE, as the talk words it: the language-model loss of the sampled tokens, weighted by the reward).

Sources: Ahmadian et al. 2024 (RLOO) eq. 8; Shao et al. 2024 (GRPO) eq. 3; Liu et al. 2025 (Dr. GRPO); Williams 1992.
"""

from typing import Callable, List, Sequence

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import StageState
from ..config import GroupConfig
from ..model import Model
from ..optim import Optimizer
from .loss import grpo_advantages, kl_loss, policy_terms, rloo_advantages, sum_by_sequence
from .objective import average
from .rollout import Judge, Rollout, check_prompts, episodes, importance, roll_out
from .update import improve, passes, share_of


def check_group(config: GroupConfig) -> None:
    """ValueError for a group that cannot judge itself."""
    if config.advantage != "reinforce" and config.samples < 2:
        raise ValueError(f"{config.advantage}: a group needs at least 2 samples to compare, got {config.samples}")


def advantages(rollout: Rollout, beta: float, config: GroupConfig) -> Tensor:
    """(B,): one number for each response. RLOO and REINFORCE take the KL off the reward, as Ahmadian et al. do; GRPO has it in
    the loss."""
    kl = sum_by_sequence(rollout.logprobs - rollout.ref_logprobs, rollout.cu_actions)
    rewards = rollout.scores if config.advantage == "grpo" else rollout.scores - beta * kl
    if config.advantage == "grpo":
        return grpo_advantages(rewards, config.samples, config.std_norm)
    if config.advantage == "rloo":
        return rloo_advantages(rewards, config.samples)
    return rewards - rewards.mean() if config.baseline else rewards


def update(policy: Model, optimizer: Optimizer, rollout: Rollout, beta: float, config: GroupConfig, seed: int, step: int) -> dict:
    """The passes over one rollout. Returns the means of what they measured."""
    lengths = rollout.cu_actions.diff().long()
    weights = importance(rollout, config.importance_cap)
    gain = advantages(rollout, beta, config).repeat_interleave(lengths) * weights
    grpo = config.advantage == "grpo"
    by = "sequence" if grpo and config.length_norm else "sum"
    length = config.max_new_tokens if grpo else 1.0  # Liu et al. 2025: a constant, so that length weighs nothing

    def loss(part: np.ndarray, whole: np.ndarray) -> tuple[Tensor, dict]:
        tokens, cu_seqlens, where, index = episodes(rollout, part)
        logprobs, _ = policy.logprobs(tokens, cu_seqlens, where, config.temperature)
        terms, facts = policy_terms(logprobs, rollout.logprobs[index], gain[index], config.clip)
        if grpo:
            terms = terms + beta * kl_loss(logprobs, rollout.ref_logprobs[index], "k3") * weights[index]
        bounds = torch.nn.functional.pad(lengths[torch.as_tensor(part, device=lengths.device)].cumsum(0), (1, 0))
        value = average(terms, bounds, by, len(whole), length)
        return value, {"policy_loss": float(value.detach()) / share_of(rollout, part, whole), **facts}

    return passes(rollout, config, seed, step, loss, [optimizer])


def rloo(policy: Model, ref: Model, judge: Judge, prompts: Sequence[List[int]], config: GroupConfig, seed: int, state: StageState,
         log: Callable[[dict], None], stage: str = "") -> Model:
    """Improve ``policy`` on ``prompts`` (each rendered up to the assistant's turn) for ``config.steps`` steps; ``stage`` is what
    its rows of metrics are called, the kind of advantage unless given.

    Errors: ValueError, before anything is trained, for a group of one, prompts that leave no room, or different vocabularies.
    """
    stage = stage or config.advantage
    check_group(config)
    check_prompts(stage, prompts, config, policy.config.context)
    if policy.config.vocab_size != ref.config.vocab_size:
        raise ValueError(f"{stage}: policy and reference have vocabularies of different sizes, {policy.config.vocab_size} "
                         f"and {ref.config.vocab_size}")
    optimizer = Optimizer(policy, config.optim, config.steps * config.epochs * config.minibatches)
    return improve(stage, policy, prompts, config, seed, state, {"policy": policy, "policy_optimizer": optimizer},
                   lambda asked, draw: roll_out(policy, ref, None, judge, asked, config, draw, config.samples),
                   lambda rollout, beta, step: update(policy, optimizer, rollout, beta, config, seed, step), log)
