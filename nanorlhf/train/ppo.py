"""Stage 4, reinforcement learning from the reward model: PPO with a per-token KL penalty to the SFT model.

Sources: Ziegler et al. 2019 §2.2; Ouyang et al. 2022 §3.5 (RL); Schulman et al. 2017.
"""

import math
from typing import Callable, List, Sequence

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import StageState
from ..config import PPOConfig
from ..model import Model
from ..optim import Optimizer
from .loss import gae, kl_loss, ppo_policy_loss, ppo_value_loss, whiten
from .rollout import Judge, Rollout, check_prompts, episodes, importance, roll_out
from .update import improve, passes, share_of


class Critic:
    """The value of a state: a model of its own, or a head on the policy's trunk. Either is zero at the start where its head is;
    a copy of the reward model starts at the scores."""

    def __init__(self, model: Model, offset: float = 0.0):
        self.model, self.offset = model, offset

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor, where: Tensor) -> Tensor:
        return self.model.scores(tokens, cu_seqlens, where) - self.offset


def token_rewards(rollout: Rollout, beta: float, config: PPOConfig) -> Tensor:
    """(M,): −β·k with k = log π − log π_ref at every action, and the score at the last one of each episode (Ziegler et al.
    2019 §2.2); with the KL in the loss, the scores alone. With ``kl_centred``, k less its mean over the batch's actions:
    otherwise the penalty charges every token for being there, and the policy learns to end its answers early, whatever the
    reward model thinks of them.
    """
    kl = rollout.logprobs - rollout.ref_logprobs
    rewards = -beta * (kl - kl.mean() if config.kl_centred else kl) if config.kl_in == "reward" else torch.zeros_like(kl)
    last = rollout.cu_actions[1:].long() - 1
    rewards = rewards.index_add(0, last, rollout.scores)
    return whiten(rewards, shift_mean=False) if config.whiten_rewards else rewards


def update(policy: Model, critic: Critic, optimizers: Sequence[Optimizer], rollout: Rollout, beta: float, config: PPOConfig,
           seed: int, step: int) -> dict:
    """The PPO epochs on one rollout. Returns the means of what they measured."""
    rewards = token_rewards(rollout, beta, config)
    advantages, returns = gae(rewards, rollout.values, rollout.cu_actions, config.gamma, config.lam)
    spread = returns.var(unbiased=False)
    unexplained = (returns - rollout.values).var(unbiased=False) / spread if spread > 1e-12 else math.nan  # nothing to explain
    weights = importance(rollout, config.importance_cap)
    if config.whiten_advantages == "batch":
        advantages = whiten(advantages)

    def loss(part: np.ndarray, whole: np.ndarray) -> tuple[Tensor, dict]:
        tokens, cu_seqlens, where, index = episodes(rollout, part)
        gain = advantages[index]
        if config.whiten_advantages == "minibatch":
            of_whole = advantages[episodes(rollout, whole)[3]]
            gain = (gain - of_whole.mean()) * torch.rsqrt(of_whole.var(unbiased=False) + 1e-8)
        logprobs, _ = policy.logprobs(tokens, cu_seqlens, where, config.temperature)
        p = ppo_policy_loss(logprobs, rollout.logprobs[index], gain * weights[index], config.clip)
        v = ppo_value_loss(critic(tokens, cu_seqlens, where), rollout.values[index], returns[index], config.value_clip)
        total = p.loss + v.loss * (config.value_coef if config.value == "shared" else 1.0)
        if config.kl_in == "loss":
            total = total + beta * (kl_loss(logprobs, rollout.ref_logprobs[index], config.kl_loss) * weights[index]).mean()
        return total * share_of(rollout, part, whole), {
            "policy_loss": float(p.loss.detach()), "value_loss": float(v.loss.detach()), "clip_fraction": float(p.clip_fraction),
            "approx_kl": float(p.kl2), "ratio_max": float(p.ratio_max)}

    measured = passes(rollout, config, seed, step, loss, optimizers)
    return {**measured, "explained_variance": float(1 - unexplained), "importance": float(weights.mean())}


def ppo(policy: Model, ref: Model, value: Model, judge: Judge, prompts: Sequence[List[int]], config: PPOConfig,
        seed: int, state: StageState, log: Callable[[dict], None]) -> Model:
    """Improve ``policy`` on ``prompts`` (each rendered up to the assistant's turn) for ``config.steps`` steps.

    value: a model with a scalar head; with ``config.value == "shared"`` it is the policy itself. The run stops early, for good,
    when the KL to ``ref`` passes ``config.kl_budget``.
    Errors: ValueError, before anything is trained, for prompts that leave no room or models of different vocabularies.
    """
    check_prompts("ppo", prompts, config, policy.config.context)
    if (config.value == "shared") != (value is policy):
        raise ValueError(f"ppo: with a {config.value} value function the value model {'is' if config.value == 'shared' else 'is not'} "
                         "the policy")
    if not policy.config.vocab_size == ref.config.vocab_size == value.config.vocab_size:
        raise ValueError("ppo: policy, reference and value model have vocabularies of different sizes: "
                         f"{policy.config.vocab_size}, {ref.config.vocab_size} and {value.config.vocab_size}")
    updates, separate = config.steps * config.epochs * config.minibatches, config.value == "separate"
    optimizers = [Optimizer(policy, config.optim, updates)] + ([Optimizer(value, config.value_optim, updates)] if separate else [])
    own = {"value": value, "value_optimizer": optimizers[-1]} if separate else {}
    critic = Critic(value, judge.offset if separate and config.value_init == "reward" else 0.0)
    return improve("ppo", policy, prompts, config, seed, state, {"policy": policy, "policy_optimizer": optimizers[0], **own},
                   lambda asked, draw: roll_out(policy, ref, critic, judge, asked, config, draw),
                   lambda rollout, beta, step: update(policy, critic, optimizers, rollout, beta, config, seed, step), log)
