"""What reinforcement learning trains on: responses sampled from the policy, with what every model says of them.

The ids that were sampled are the ids that are trained on; no text in between is tokenised again.
"""

from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Callable, List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import ops, parallel
from ..config import RLConfig
from ..engine import SamplingConfig, generate
from ..engine.generate import ragged
from ..model import Model
from .loss import sum_by_sequence
from .objective import importance_weights, sampler_kl


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
    logprobs: Tensor  # (M,) of the policy, as training computes them, at the sampling temperature
    ref_logprobs: Tensor  # (M,)
    values: Tensor  # (M,); empty where there is no value model
    scores: Tensor  # (B,)
    finished: Tensor  # (B,) whether the response ended itself
    sampled: Tensor  # (M,) log-probs of what the engine really drew from: filters, precision and all
    entropy: Tensor  # (M,) of the policy, nats
    full_kl: Tensor  # (M,) KL(policy ‖ reference) over the whole vocabulary, nats

    def to(self, device: torch.device | str) -> "Rollout":
        return Rollout(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def measured(self) -> dict:
        """What every algorithm's row of metrics says of its rollout; means are over responses unless said otherwise."""
        log_ratio = self.logprobs - self.ref_logprobs
        gap, gap_k3 = sampler_kl(self.logprobs, self.sampled)
        by_response = lambda x: float(sum_by_sequence(x, self.cu_actions).mean())
        return {
            "score": float(self.scores.mean()), "kl": by_response(log_ratio), "kl_exact": by_response(self.full_kl),
            "kl_k2": by_response(0.5 * log_ratio**2), "kl_k3": by_response((-log_ratio).expm1() + log_ratio),
            "entropy": float(self.entropy.mean()),
            "length": float(self.cu_actions.diff().float().mean()), "finished": float(self.finished.float().mean()),
            # The latter two per token: KL(sampler ‖ trainer).
            "sampler_gap": float(gap.abs().max()), "sampler_kl": float(gap.mean()), "sampler_kl_k3": float(gap_k3.mean()),
        }


def check_prompts(stage: str, prompts: Sequence[List[int]], config: RLConfig, context: int) -> None:
    """ValueError, before anything is trained, without prompts or for one that leaves no room to answer."""
    if not prompts:
        raise ValueError(f"{stage}: expected at least one prompt, got none")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= context - config.max_new_tokens:
            raise ValueError(f"{stage}: prompt {i} has {len(prompt)} tokens and leaves no room for {config.max_new_tokens} more "
                             f"in a context of {context}")


def drawn_prompts(prompts: Sequence[List[int]], count: int, seed: int, step: int) -> List[List[int]]:
    """The ``count`` prompts of a step: shuffled passes over all of them, one after the other."""
    turn, at = divmod(step * count, len(prompts))
    order = np.concatenate([np.random.default_rng([seed, turn + t, 5]).permutation(len(prompts))
                            for t in range(2 + count // len(prompts))])[at:at + count]
    return [prompts[i] for i in order]


@torch.no_grad()
def roll_out(policy: Model, ref: Model, value: Optional[Callable], judge: Judge, prompts: Sequence[List[int]], config: RLConfig,
             seed: int, n: int = 1) -> Rollout:
    """Sample n responses for each prompt and let all models judge the very ids that were sampled. Ranks share the prompts, and
    every one gets the whole rollout.

    value(tokens, cu_seqlens, where) → (M,), or None. Errors: ValueError when the judge gives a score that is not finite.
    """
    mine = parallel.share(len(prompts))
    sampling = SamplingConfig(config.temperature, config.top_k, config.top_p, config.min_p)
    drawn = generate(policy, prompts[mine], config.max_new_tokens, n, [judge.end], sampling, seed, first_request=mine.start * n)
    starts = [p for p in prompts[mine] for _ in range(n)]
    sequences = [p + c.ids for p, c in zip(starts, drawn)]
    scores = judge.score(sequences).to(policy.device)
    if not bool(scores.isfinite().all()):
        worst = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(f"rollout: the judge's score of response {worst} is {float(scores[worst])}; it must be finite")
    tokens, cu_seqlens = ragged(sequences, policy.device)
    action, _ = ragged([[0] * len(p) + [1] * len(c.ids) for p, c in zip(starts, drawn)], policy.device)
    where = torch.nonzero(action).squeeze(-1) - 1
    hidden, ref_hidden = policy(tokens, cu_seqlens)[where], ref(tokens, cu_seqlens)[where]
    logprobs, entropy, ref_logprobs, full_kl = ops.token_divergence(
        hidden, policy.head_weight, ref_hidden, ref.head_weight, tokens[where + 1], config.temperature)
    finished = torch.tensor([c.finished for c in drawn], dtype=torch.bool, device=policy.device)
    part = Rollout(
        tokens, cu_seqlens, where, ragged([c.ids for c in drawn], policy.device)[1], logprobs, ref_logprobs,
        torch.zeros(0, device=policy.device) if value is None else value(tokens, cu_seqlens, where),
        end_rule(scores, finished, config), finished, torch.tensor([x for c in drawn for x in c.logprobs], device=policy.device),
        entropy, full_kl)
    return merged([r.to(policy.device) for r in parallel.gather(part.to("cpu"))]) if parallel.size() > 1 else part


def merged(parts: Sequence[Rollout]) -> Rollout:
    """Several rollouts as one, end to end."""
    columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Rollout)}
    before = [0, *accumulate(len(p.tokens) for p in parts)]
    columns["where"] = [where + b for where, b in zip(columns["where"], before)]
    bounds = {name: torch.cat([c.diff() for c in columns.pop(name)]) for name in ("cu_seqlens", "cu_actions")}
    return Rollout(**{name: torch.cat(c) for name, c in columns.items()},
                   **{name: torch.nn.functional.pad(x.cumsum(0), (1, 0)).to(torch.int32) for name, x in bounds.items()})


def end_rule(scores: Tensor, finished: Tensor, config: RLConfig) -> Tensor:
    """(B,): the scores, where a response without an end of turn has another one, or so much less.

    Source: Ziegler et al. 2019 replace it; TRL takes a penalty off.
    """
    if config.missing_end == "keep":
        return scores
    other = torch.full_like(scores, config.missing_end_score)
    return scores.where(finished, other if config.missing_end == "replace" else scores + other)


def episodes(rollout: Rollout, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The part of a rollout that some episodes make: tokens, cu_seqlens, where, and their actions' indices (M',)."""
    device, pick = rollout.tokens.device, torch.as_tensor(chosen, dtype=torch.int64)
    cu_seqlens, inside = spans(rollout.cu_seqlens.cpu(), pick)
    cu_actions, index = spans(rollout.cu_actions.cpu(), pick)
    moved = (cu_seqlens[:-1] - rollout.cu_seqlens.cpu()[pick]).repeat_interleave(cu_actions.diff())
    return (rollout.tokens[inside.to(device)], cu_seqlens.to(device, torch.int32),
            rollout.where[index.to(device)] + moved.to(device), index.to(device))


def spans(bounds: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
    """The segments ``pick`` of those that bounds (B+1,) bound: their bounds end to end, and the indices (M',) of what is in them.

    >>> [x.tolist() for x in spans(torch.tensor([0, 2, 2, 5]), torch.tensor([2, 0]))]
    [[0, 3, 5], [2, 3, 4, 0, 1]]
    """
    lengths = bounds.diff()[pick].long()
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return ends, torch.arange(int(ends[-1])) + (bounds[pick] - ends[:-1]).repeat_interleave(lengths)


def importance(rollout: Rollout, cap: float) -> Tensor:
    """(M,): ``importance_weights`` of the actions; 1 where the cap is 0."""
    return importance_weights(rollout.logprobs, rollout.sampled, cap) if cap else torch.ones_like(rollout.logprobs)
