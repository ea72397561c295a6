"""The arithmetic of the four stages, as pure functions on ragged tensors. Each has one definition, here or in ops."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import gae, ppo_policy_loss, ppo_value_loss  # noqa: F401  what the stages take from here
from ..ops.ppo_loss import policy_loss, value_loss  # noqa: F401  the same losses as they are read in the papers


def kwise_loss(scores: Tensor, ranks: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of each group of ranked completions in one loss.

    scores (M,) float32, ranks (M,) where 0 is best, cu_groups (G+1,): group g is [cu_groups[g], cu_groups[g+1]).
    A group's loss is the mean of −log σ(s_better − s_worse) over its pairs of different rank, and the groups are
    averaged, so that a prompt with many completions does not outweigh the others. Returns (loss, share of the pairs that
    the scores order rightly, ties counting one half).

    Source: Ouyang et al. 2022 (InstructGPT) eq. 1; with two completions it is Bradley-Terry.
    Errors: ValueError when no group holds two different ranks.

    >>> loss, right = kwise_loss(torch.tensor([2.0, 0.0]), torch.tensor([0, 1]), torch.tensor([0, 2]))
    >>> round(float(loss), 4), float(right)
    (0.1269, 1.0)
    """
    losses, right, pairs = [], 0.0, 0
    bounds = cu_groups.tolist()
    for start, end in zip(bounds, bounds[1:]):
        better, worse = torch.nonzero(ranks[start:end, None] < ranks[None, start:end], as_tuple=True)
        if len(better) == 0:
            continue
        margin = scores[start:end][better] - scores[start:end][worse]
        losses.append(-torch.nn.functional.logsigmoid(margin).mean())
        right += float((margin > 0).sum()) + 0.5 * float((margin == 0).sum())
        pairs += len(better)
    if not pairs:
        raise ValueError("kwise_loss: no group holds two completions of different rank")
    return torch.stack(losses).mean(), torch.tensor(right / pairs)


def whiten(x: Tensor, shift_mean: bool = True) -> Tensor:
    """(x − mean) / sqrt(population variance + 1e-8).

    >>> whiten(torch.tensor([1.0, 3.0])).tolist()
    [-1.0, 1.0]
    """
    out = (x - x.mean()) * torch.rsqrt(x.var(unbiased=False) + 1e-8)
    return out if shift_mean else out + x.mean()


def sum_by_sequence(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x (M,) → (B,): the sum over each sequence.

    >>> sum_by_sequence(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 3])).tolist()
    [3.0, 4.0]
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    which = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
    return torch.zeros(len(lengths), dtype=x.dtype, device=x.device).index_add_(0, which, x)


@dataclass
class AdaptiveKL:
    """The KL coefficient β, moved so that the KL of a response stays near ``target`` nats.

    β ← β · (1 + clip(KL/target − 1, ±0.2) · episodes/horizon). Source: Ziegler et al. 2019 §2.2.

    >>> controller = AdaptiveKL(0.1, target=6.0, horizon=100)
    >>> controller.update(12.0, 50)
    >>> round(controller.beta, 4)
    0.11
    """

    beta: float
    target: float
    horizon: float

    def update(self, kl: float, episodes: int) -> None:
        if not self.target:
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * episodes / self.horizon


def full_kl(hidden, weight, ref_hidden, ref_weight, temperature=1.0):
    out = []
    for at in range(0, len(hidden), 2048):
        a, b = ((h[at:at + 2048].float() @ w.float().T / temperature).log_softmax(-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
        out.append((a.exp() * (a - b)).sum(-1))
    return torch.cat(out) if out else torch.zeros(0)


def kl_loss(logprobs, ref, kind):
    gap = logprobs - ref
    return gap if kind == "k1" else 0.5 * gap**2 if kind == "k2" else (-gap).exp() - 1 + gap


def rloo_advantages(rewards, samples):
    r = rewards.view(-1, samples)
    return (r - (r.sum(1, keepdim=True) - r) / (samples - 1)).flatten()


def grpo_advantages(rewards, samples, std_norm=True):
    r = rewards.view(-1, samples)
    a = r - r.mean(1, keepdim=True)
    return (a / (r.std(1, keepdim=True) + 1e-4) if std_norm else a).flatten()


def policy_terms(logprobs, old, advantages, clip):
    ratio = torch.exp(logprobs - old)
    free, bound = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        facts = {"clip_fraction": float((bound > free).float().mean()), "approx_kl": float(0.5 * (logprobs - old).square().mean()), "ratio_max": float((logprobs - old).abs().max().exp())}
    return torch.maximum(free, bound), facts


def dpo_loss(margin, beta, smoothing=0.0):
    f = torch.nn.functional.logsigmoid
    return -(1 - smoothing) * f(beta * margin) - smoothing * f(-beta * margin)


def ipo_loss(margin, beta):
    return (margin - 1 / (2 * beta)) ** 2
