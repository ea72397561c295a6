"""How terms of tokens become one number, and what makes up for a sampler that is not the policy; all on ragged tensors.

The terms themselves are in loss.py. M tokens (or actions) of B sequences lie end to end, bounded by ``cu_seqlens (B+1,)``.
"""

from typing import Optional

import torch
from torch import Tensor

from .loss import check_alike, sum_by_sequence

MEANS = ("token", "sequence", "sum")


def average(x: Tensor, cu_seqlens: Tensor, by: str = "token", count: Optional[float] = None, length: float = 1.0) -> Tensor:
    """One number of x (M,), so that parts of a batch, each with the whole's ``count``, add up to the whole's, whatever the parts are.

    by "token": Σ x / tokens; every token counts alike (pretraining, SFT, PPO). "sequence": the mean of the sequences' own means, so
    a token of a long one counts less (Shao et al. 2024, GRPO, eq. 3). "sum": the sequences' sums, averaged (Ahmadian et al. 2024,
    RLOO, eq. 6), over a constant ``length`` where one is given (Liu et al. 2025, Dr. GRPO, §3.2).
    count: of the whole batch, all micro-batches and ranks together: its tokens for "token", else its sequences; unless given,
    those of x. A sequence without tokens adds 0. Raises ValueError for an unknown ``by`` and when there is nothing to count.

    >>> x, cu_seqlens = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 1, 3])
    >>> [round(float(average(x, cu_seqlens, by)), 2) for by in MEANS]  # (1+2+6)/3, (1 + 4)/2, (1 + 8)/2
    [3.0, 2.5, 4.5]
    """
    if by not in MEANS:
        raise ValueError(f"average: unknown mean {by!r}; there are {', '.join(MEANS)}")
    count = (len(x) if by == "token" else len(cu_seqlens) - 1) if count is None else count
    if not count > 0:
        raise ValueError(f"average: expected at least one {'token' if by == 'token' else 'sequence'} to average over, got {count}")
    if by == "token":
        return x.sum() / count
    sums = sum_by_sequence(x, cu_seqlens)
    return (sums / cu_seqlens.diff().clamp_min(1) if by == "sequence" else sums / length).sum() / count


def reinforce_loss(logprobs: Tensor, rewards: Tensor, cu_seqlens: Tensor, baseline: Tensor | float = 0.0,
                   count: Optional[float] = None) -> Tensor:
    """The language-model loss of the sampled tokens, each response's weighted by its reward: −mean_b (R_b − baseline) Σ_t log π_t.

    logprobs (M,), rewards (B,), baseline (B,) or a number that does not depend on the response. On samples of the policy itself its
    gradient is, in expectation, that of −E[R]; a baseline lowers the variance and leaves the expectation.
    Source: Williams 1992, REINFORCE; "State of GPT" words it so.

    >>> logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    >>> reinforce_loss(logprobs, torch.tensor([2.0, -1.0]), torch.tensor([0, 2, 3])).backward()
    >>> logprobs.grad.tolist()  # −R/B at every token of the response
    [-1.0, -1.0, 0.5]
    """
    if rewards.shape != (len(cu_seqlens) - 1,):
        raise ValueError(f"reinforce_loss: expected one reward for each of {len(cu_seqlens) - 1} responses, got {tuple(rewards.shape)}")
    return -average((rewards - baseline).repeat_interleave(cu_seqlens.diff().long()) * logprobs, cu_seqlens, "sum", count)


def importance_weights(logprobs: Tensor, sampled: Tensor, cap: float) -> Tensor:
    """(M,): min(π / what was drawn from, cap), both (M,) in log; constants to the gradient.

    It makes up for a sampler that filters or rounds otherwise than the trainer. Without a cap it would be without bias, and of
    unbounded variance. Source: Ionides 2008, truncated importance sampling; for language models Yao et al. 2025.
    Raises ValueError for a cap of 0 or less.

    >>> importance_weights(torch.tensor([0.0, -1.0]), torch.tensor([-3.0, -1.0]), 2.0).tolist()
    [2.0, 1.0]
    """
    if not cap > 0:
        raise ValueError(f"importance_weights: expected a cap above 0, got {cap}")
    check_alike("importance_weights", logprobs, sampled)
    return (logprobs - sampled).detach().exp().clamp(max=cap)


def sampler_kl(logprobs: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates of KL(sampler ‖ trainer) at each token that the sampler drew, (M,) each, in nats: k1 = log q − log π with q the
    sampler, and k3 = π/q − 1 − log π/q, which is never negative. Source: Schulman 2020, "Approximating KL divergence".

    With a filter, π/q has the mean Σ π over the kept tokens, less than 1: k1 is then still without bias, k3 too low by the mass cut.

    >>> [x.tolist() for x in sampler_kl(torch.tensor([-2.0]), torch.tensor([-2.0]))]
    [[0.0], [0.0]]
    """
    check_alike("sampler_kl", logprobs, sampled)
    gap = (sampled - logprobs).detach()
    return gap, (-gap).expm1() + gap


def logits_kl(logits: Tensor, ref_logits: Tensor, temperature: float = 1.0, rows: int = 2048) -> Tensor:
    """(M,), nats: KL(softmax(logits/T) ‖ softmax(ref_logits/T)) of each row, over the whole vocabulary; ``loss.full_kl`` has the same
    from hidden states. logits, ref_logits (M, V); −inf where a token cannot be: 0 log 0 is 0, and what only the reference forbids is
    infinitely far. Some rows at a time; fp32, or fp64 for fp64 logits.

    >>> round(float(logits_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0986, 0.0]]))), 3)  # ½ ln(½ / ¾) + ½ ln(½ / ¼)
    0.144
    """
    if logits.shape != ref_logits.shape or logits.dim() != 2:
        raise ValueError(f"logits_kl: expected two tensors of one shape (M, V), got {tuple(logits.shape)} and {tuple(ref_logits.shape)}")
    wide, parts = torch.promote_types(logits.dtype, torch.float32), []
    for one, other in zip(logits.split(rows), ref_logits.split(rows)):
        p, q = ((x.to(wide) / temperature).log_softmax(-1) for x in (one, other))
        chance = p.exp()
        parts.append((chance * (p - q).masked_fill(chance == 0, 0)).sum(-1))
    return torch.cat(parts)
