"""Stage 4, reinforcement learning from the reward model: PPO with a per-token KL penalty to the SFT model.

Sources: Ziegler et al. 2019 §2.2; Ouyang et al. 2022 §3.5 (RL); Schulman et al. 2017.
"""

from dataclasses import dataclass
from typing import Callable, List, Sequence

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import StageState
from ..config import PPOConfig
from ..engine import SamplingConfig, generate
from ..engine.generate import ragged
from ..model import Model
from ..optim import Optimizer
from .loss import AdaptiveKL, gae, ppo_policy_loss, ppo_value_loss, sum_by_sequence, whiten


@dataclass(frozen=True)
class Judge:
    """The reward model's score of whole conversations (ids): float32 (B,), mean 0 and deviation 1 on SFT samples."""

    score: Callable[[Sequence[Sequence[int]]], Tensor]
    end: int  # the end-of-turn token
    offset: float = 0.0  # what was subtracted: the value model, a copy of the reward model, starts that much too high


@dataclass
class Rollout:
    """Conversations of one step, ragged. The M response tokens lie end to end, episode by episode."""

    tokens: Tensor  # (N,)
    cu_seqlens: Tensor  # (B+1,) over tokens
    where: Tensor  # (M,) positions that predict the response tokens: the states in which the policy acts
    cu_actions: Tensor  # (B+1,) over the M actions
    logprobs: Tensor  # (M,) of the policy that sampled
    ref_logprobs: Tensor  # (M,)
    values: Tensor  # (M,)
    scores: Tensor  # (B,)
    finished: Tensor  # (B,) whether the response ended itself
    entropy: float  # mean over actions, nats
    sampler_gap: float  # largest |log-prob of the engine − log-prob of the trainer|


@torch.no_grad()
def roll_out(policy: Model, ref: Model, value: Model, judge: Judge, prompts: List[List[int]], config: PPOConfig,
             seed: int) -> Rollout:
    """Sample one response for each prompt and score it with all four models, on the very ids that were sampled."""
    sampling = SamplingConfig(temperature=config.temperature)
    drawn = generate(policy, prompts, config.max_new_tokens, stop=[judge.end], sampling=sampling, seed=seed)
    sequences = [p + c.ids for p, c in zip(prompts, drawn)]
    tokens, cu_seqlens = ragged(sequences, policy.device)
    action, _ = ragged([[0] * len(p) + [1] * len(c.ids) for p, c in zip(prompts, drawn)], policy.device)
    where = torch.nonzero(action).squeeze(-1) - 1
    logprobs, entropy = policy.logprobs(tokens, cu_seqlens, where, config.temperature)
    ref_logprobs, _ = ref.logprobs(tokens, cu_seqlens, where, config.temperature)
    sampled = torch.tensor([x for c in drawn for x in c.logprobs], device=logprobs.device)
    finished = torch.tensor([c.finished for c in drawn], device=policy.device)
    scores = judge.score(sequences).to(policy.device)
    return Rollout(
        tokens, cu_seqlens, where, ragged([c.ids for c in drawn], policy.device)[1], logprobs, ref_logprobs,
        value.scores(tokens, cu_seqlens, where) - judge.offset, scores.where(finished, torch.tensor(config.missing_end_score)), finished,
        float(entropy.mean()), float((sampled - logprobs).abs().max()))


def token_rewards(rollout: Rollout, beta: float, centred: bool) -> Tensor:
    """(M,): −β·k with k = log π − log π_ref at every action, and the score at the last one of each episode (Ziegler et al.
    2019 §2.2). With ``centred``, k less its mean over the batch's actions: otherwise the penalty charges every token for
    being there, and the policy learns to end its answers early, whatever the reward model thinks of them.
    """
    kl = rollout.logprobs - rollout.ref_logprobs
    rewards = -beta * (kl - kl.mean() if centred else kl)
    last = rollout.cu_actions[1:].long() - 1
    return rewards.index_add(0, last, rollout.scores)


def episodes(rollout: Rollout, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The part of a rollout that some episodes make: tokens, cu_seqlens, where, and their actions' indices (M',)."""
    pick = torch.as_tensor(chosen)
    bounds, actions = rollout.cu_seqlens.tolist(), rollout.cu_actions.tolist()
    spans = [torch.arange(bounds[i], bounds[i + 1]) for i in pick]
    index = torch.cat([torch.arange(actions[i], actions[i + 1]) for i in pick])
    lengths = torch.tensor([len(s) for s in spans])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    moved = torch.cat([torch.full((actions[i + 1] - actions[i],), int(cu_seqlens[j]) - bounds[i])
                       for j, i in enumerate(pick)])
    device = rollout.tokens.device
    return (rollout.tokens[torch.cat(spans).to(device)], cu_seqlens.to(device, torch.int32),
            rollout.where[index.to(device)] + moved.to(device), index.to(device))


def update(policy: Model, value: Model, optimizers: tuple[Optimizer, Optimizer], rollout: Rollout, beta: float,
           offset: float, config: PPOConfig, seed: int, step: int) -> dict:
    """The PPO epochs on one rollout. Returns the means of what they measured."""
    rewards = token_rewards(rollout, beta, config.kl_centred)
    advantages, returns = gae(rewards, rollout.values, rollout.cu_actions, config.gamma, config.lam)
    advantages = whiten(advantages)
    rows = []
    for epoch in range(config.epochs):
        order = np.random.default_rng([seed, step, epoch, 4]).permutation(len(rollout.scores))
        for part, chosen in enumerate(np.array_split(order, config.minibatches)):
            tokens, cu_seqlens, where, index = episodes(rollout, chosen)
            logprobs, _ = policy.logprobs(tokens, cu_seqlens, where, config.temperature)
            p = ppo_policy_loss(logprobs, rollout.logprobs[index], advantages[index], config.clip)
            p.loss.backward()
            v = ppo_value_loss(value.scores(tokens, cu_seqlens, where) - offset, rollout.values[index], returns[index],
                               config.value_clip)
            v.loss.backward()
            at = (step * config.epochs + epoch) * config.minibatches + part
            norms = [optimizer.step(at)[1] for optimizer in optimizers]
            rows.append({"policy_loss": float(p.loss.detach()), "value_loss": float(v.loss.detach()),
                         "clip_fraction": float(p.clip_fraction), "approx_kl": float(p.kl2),
                         "ratio_max": float(p.ratio_max), "grad_norm": norms[0]})
    measured = {key: float(np.mean([r[key] for r in rows])) for key in rows[0]}
    unexplained = (returns - rollout.values).var() / returns.var().clamp_min(1e-12)
    return {**measured, "first_ratio_max": rows[0]["ratio_max"], "explained_variance": float(1 - unexplained)}


def ppo(policy: Model, ref: Model, value: Model, judge: Judge, prompts: Sequence[List[int]], config: PPOConfig,
        seed: int, state: StageState, log: Callable[[dict], None]) -> Model:
    """Improve ``policy`` on ``prompts`` (each rendered up to the assistant's turn) for ``config.steps`` steps.

    Errors: ValueError when there is no prompt.
    """
    if not prompts:
        raise ValueError("ppo: expected at least one prompt, got none")
    updates = config.steps * config.epochs * config.minibatches
    optimizers = Optimizer(policy, config.optim, updates), Optimizer(value, config.value_optim, updates)
    held = state.restore(policy=policy, value=value, policy_optimizer=optimizers[0], value_optimizer=optimizers[1])
    controller = AdaptiveKL(held.get("beta", config.kl_coef), config.kl_target, config.kl_horizon)
    for step in range(held["step"], config.steps):
        turn, at = divmod(step * config.prompts, len(prompts))
        order = np.concatenate([np.random.default_rng([seed, turn + t, 5]).permutation(len(prompts))
                                for t in range(2 + config.prompts // len(prompts))])[at:at + config.prompts]
        rollout = roll_out(policy, ref, value, judge, [prompts[i] for i in order], config, seed * 1_000_003 + step)
        measured = update(policy, value, optimizers, rollout, controller.beta, judge.offset, config, seed, step)
        kl = sum_by_sequence(rollout.logprobs - rollout.ref_logprobs, rollout.cu_actions)
        lengths = (rollout.cu_actions[1:] - rollout.cu_actions[:-1]).float()
        log({"stage": "ppo", "step": step + 1, "score": float(rollout.scores.mean()), "kl": float(kl.mean()),
             "kl_coef": controller.beta, "reward": float((rollout.scores - controller.beta * kl).mean()),
             "entropy": rollout.entropy, "length": float(lengths.mean()),
             "finished": float(rollout.finished.float().mean()), "sampler_gap": rollout.sampler_gap, **measured})
        controller.update(float(kl.mean()), config.prompts)
        state.tick(step + 1, beta=controller.beta)
    return policy
