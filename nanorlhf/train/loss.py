"""The arithmetic of the four stages, as pure functions on ragged tensors. Each has one definition, here or in ops."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import gae, ppo_policy_loss, ppo_value_loss, token_divergence  # noqa: F401  what the stages take from here
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


def pairwise_loss(better: Tensor, worse: Tensor, margins: Tensor | float = 0.0) -> Tensor:
    """(P,): −log σ(s_better − s_worse − margin) of P pairs of scores, each (P,); margins (P,) or one number, in units of score.

    Source: Touvron et al. 2023 (Llama 2) eq. 2; without margins it is Bradley-Terry. Errors: ValueError for other shapes.

    >>> [round(x, 4) for x in pairwise_loss(torch.tensor([2.0, 2.0]), torch.zeros(2), torch.tensor([0.0, 2.0])).tolist()]
    [0.1269, 0.6931]
    """
    check_alike("pairwise_loss", better, worse, *([margins] if isinstance(margins, Tensor) and margins.dim() else []))
    return -torch.nn.functional.logsigmoid(better - worse - margins)


def whiten(x: Tensor, shift_mean: bool = True) -> Tensor:
    """(x − mean) / sqrt(population variance + 1e-8), any shape; with ``shift_mean`` off the mean is added again: rewards may be
    scaled, but not moved (Ziegler et al. 2019, code).

    >>> whiten(torch.tensor([1.0, 3.0])).tolist(), whiten(torch.tensor([1.0, 3.0]), shift_mean=False).tolist()
    ([-1.0, 1.0], [1.0, 3.0])
    """
    out = (x - x.mean()) * torch.rsqrt(x.var(unbiased=False) + 1e-8)
    return out if shift_mean else out + x.mean()


def check_alike(name: str, *tensors: Tensor) -> None:
    """ValueError unless all have the same shape: (M,) beside (M, 1) would be spread over a square, and averaged."""
    if any(x.shape != tensors[0].shape for x in tensors):
        raise ValueError(f"{name}: expected tensors of one shape, got {', '.join(str(tuple(x.shape)) for x in tensors)}")


def sum_by_sequence(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x (M,) → (B,): the sum over each sequence. Errors: ValueError where cu_seqlens are not bounds of x.

    >>> sum_by_sequence(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 3])).tolist()
    [3.0, 4.0]
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    if x.dim() != 1 or bool((lengths < 0).any()) or int(lengths.sum()) != len(x):
        raise ValueError(f"sum_by_sequence: expected x of shape (M,) and cu_seqlens that rise from 0 to M, got {tuple(x.shape)} and "
                         f"sequences of {int(lengths.sum())} in all")
    which = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
    return torch.zeros(len(lengths), dtype=x.dtype, device=x.device).index_add_(0, which, x)


@dataclass
class AdaptiveKL:
    """The KL coefficient β, moved so that the KL of a response stays near ``target`` nats.

    β ← β · (1 + clip(KL/target − 1, ±0.2) · episodes/horizon); a target of 0 leaves it alone. Source: Ziegler et al. 2019 §2.2.

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


def full_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, temperature: float = 1.0) -> Tensor:
    """(M,) float32, nats: KL(policy ‖ reference) at every state, summed over the whole vocabulary: nothing in it is sampled.

    hidden, ref_hidden (M, C) and (M, C'), weight (V, C), ref_weight (V, C'); logits are divided by the temperature. No gradient;
    never all logits at once (``ops.token_divergence``, which has the log-probs of both from the same pass).

    >>> even, sure = torch.zeros(1, 2), torch.tensor([[1.0986, 0.0]])  # chances ½, ½ and ¾, ¼
    >>> round(float(full_kl(even, torch.eye(2), sure, torch.eye(2))), 3)  # ½ ln(½ / ¾) + ½ ln(½ / ¼)
    0.144
    """
    return token_divergence(hidden, weight, ref_hidden, ref_weight, torch.zeros_like(hidden[:, 0], dtype=torch.int64), temperature)[3]


def kl_loss(logprobs: Tensor, ref: Tensor, kind: str) -> Tensor:
    """(M,): an estimate of KL(policy ‖ reference) at each sampled action, k = log π − log π_ref, both (M,), in nats.

    As a number, "k1" is k and "k3" e^−k − 1 + k, both without bias, and "k2" k²/2, with some. As a loss on the policy's own
    samples, what counts is the expected gradient: k1's is 0 whatever the policy (E ∇log π = 0), k2's is that of the KL itself,
    E k ∇log π, and k3's, E (1 − π_ref/π) ∇log π, that of the forward KL(reference ‖ policy). Source: Schulman 2020, "Approximating
    KL divergence"; Shao et al. 2024 (GRPO) eq. 4 has k3. Errors: ValueError for another kind.

    >>> [round(float(kl_loss(torch.tensor([-1.0]), torch.tensor([-1.5]), k)), 4) for k in ("k1", "k2", "k3")]
    [0.5, 0.125, 0.1065]
    """
    check_alike("kl_loss", logprobs, ref)
    gap = logprobs - ref
    if kind == "k1":
        return gap
    if kind == "k2":
        return 0.5 * gap**2
    if kind == "k3":
        return (-gap).expm1() + gap
    raise ValueError(f"kl_loss: unknown estimator {kind!r}; there are k1, k2 and k3")


def _groups(name: str, rewards: Tensor, samples: int) -> Tensor:
    """(G, samples) float64 of (G·samples,): in float32 the mean of equal rewards may be another number, and the rest, divided by
    itself, an advantage. ValueError for a group that cannot be compared with itself, or rewards that are not finite."""
    if samples < 2:
        raise ValueError(f"{name}: a group needs at least 2 samples to compare, got {samples}")
    if len(rewards) % samples:
        raise ValueError(f"{name}: {len(rewards)} rewards are no whole number of groups of {samples}")
    if not bool(rewards.isfinite().all()):
        raise ValueError(f"{name}: expected finite rewards, got {rewards[~rewards.isfinite()][0]:.0f}")
    return rewards.double().view(-1, samples)


def rloo_advantages(rewards: Tensor, samples: int) -> Tensor:
    """rewards (G·samples,), group by group → the same shape: each reward less the mean of the others of its group.

    Source: Ahmadian et al. 2024 (RLOO) eq. 8. Errors: ValueError for a group of one.

    >>> rloo_advantages(torch.tensor([1.0, 2.0, 6.0]), 3).tolist()
    [-3.0, -1.5, 4.5]
    """
    r = _groups("rloo", rewards, samples)
    return (r - (r.sum(1, keepdim=True) - r) / (samples - 1)).flatten().to(rewards.dtype)


def grpo_advantages(rewards: Tensor, samples: int, std_norm: bool = True) -> Tensor:
    """rewards (G·samples,), group by group → the same shape: each reward less its group's mean, over the group's deviation
    (of the sample, n − 1; plus 1e-4, so that equal rewards give 0).

    Source: Shao et al. 2024 (GRPO) §4.1.2; without the deviation Liu et al. 2025 (Dr. GRPO). Errors: ValueError for a group of one.

    >>> grpo_advantages(torch.tensor([1.0, 2.0, 6.0]), 3, std_norm=False).tolist()
    [-2.0, -1.0, 3.0]
    """
    r = _groups("grpo", rewards, samples)
    centred = r - r.mean(1, keepdim=True)
    return (centred / (r.std(1, keepdim=True) + 1e-4) if std_norm else centred).flatten().to(rewards.dtype)


def policy_terms(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, dict]:
    """The clipped policy loss of each token, (M,), not yet averaged, and what is measured beside it; all inputs (M,).

    Each is max(−A·r, −A·clip(r, 1−ε, 1+ε)) with r = exp(logprobs − old). Source: Schulman et al. 2017 (PPO) eq. 7.

    >>> terms, facts = policy_terms(torch.tensor([0.0, 1.0]), torch.zeros(2), torch.tensor([2.0, 1.0]), 0.2)
    >>> [round(x, 2) for x in terms.tolist()], facts["clip_fraction"], facts["approx_kl"]
    ([-2.0, -1.2], 0.5, 0.25)
    """
    check_alike("policy_terms", logprobs, old, advantages)
    log_ratio = logprobs - old
    ratio = torch.exp(log_ratio)
    free, bound = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        facts = {"clip_fraction": float((bound > free).float().mean()), "approx_kl": float(0.5 * log_ratio.square().mean()),
                 "ratio_max": float(log_ratio.abs().max().exp())}
    return torch.maximum(free, bound), facts


def dpo_loss(margin: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """(P,): −(1 − ε) log σ(β·margin) − ε log σ(−β·margin); margin (P,), nats: the policy's log-ratio to the reference of the chosen
    response less that of the rejected one; ε: the chance that a label is wrong.

    Source: Rafailov et al. 2023 (DPO) eq. 7; ε as in its code (conservative DPO).

    >>> [round(x, 4) for x in dpo_loss(torch.tensor([0.0, 20.0]), 0.1).tolist()]  # ln 2 where nothing is told apart
    [0.6931, 0.1269]
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(1 - smoothing) * log_sigmoid(beta * margin) - smoothing * log_sigmoid(-beta * margin)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """(P,): (margin − 1/(2β))²: the margin, (P,), is drawn to a finite value instead of ever farther. Source: Azar et al. 2023 eq. 17.

    >>> ipo_loss(torch.tensor([0.0, 5.0]), 0.1).tolist()
    [25.0, 0.0]
    """
    return (margin - 1 / (2 * beta)) ** 2
