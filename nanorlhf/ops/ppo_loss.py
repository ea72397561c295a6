"""The two halves of the PPO loss over the tokens given, each with what is measured beside it and its gradient in one read.

Two ops, not one: they share no input, so that one pass over both would read as much, and a policy and a value model that
are two networks can each be done with before the other's activations exist.
Native on CPUs and GPUs (csrc/ppo_loss.h). Source: Schulman et al. 2017 (PPO) eq. 7; Ziegler et al. 2019, code.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from nanorlhf.ops import backend


class PolicyLoss(NamedTuple):
    """Means over tokens, each 0-d; only the loss has a gradient. r: this policy's probability over the sampler's."""

    loss: Tensor
    clip_fraction: Tensor
    ratio_max: Tensor  # e^(largest |log r|)
    kl1: Tensor  # −log r            of the sampler to this policy, as Schulman's note "Approximating KL divergence" has them
    kl2: Tensor  # (log r)² / 2
    kl3: Tensor  # r − 1 − log r
    ref_kl1: Optional[Tensor] = None  # the same of this policy to the reference, where one is given
    ref_kl3: Optional[Tensor] = None


class ValueLoss(NamedTuple):
    loss: Tensor
    clip_fraction: Tensor


def ppo_policy_loss(logprobs, old, advantages, clip, ref=None):
    """``policy_loss`` with its gradient and the estimates of PolicyLoss. logprobs, old, advantages, ref: (M,), M ≥ 1.

    Differentiable in logprobs; sums are fp32 within a block of tokens and fp64 over the blocks. Raises ValueError for shapes
    that do not fit and for no token: there is no mean.

    >>> round(ppo_policy_loss(torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([2.0]), 0.2).loss.item(), 4)
    -2.4
    """
    given = [logprobs, old, advantages] + ([] if ref is None else [ref])
    _validate("ppo_policy_loss", *given)
    if not backend.use_native_fp32("ppo_policy_loss", *given):
        return ppo_policy_loss_reference(logprobs, old, advantages, clip, ref)
    loss, terms = _Half.apply(logprobs, old.detach(), advantages.detach(), None if ref is None else ref.detach(), clip, False)
    _, clipped, ratio_max, *kls = terms.unbind()
    return PolicyLoss(loss, clipped, ratio_max, *kls[: 3 if ref is None else 5])


def ppo_value_loss(values, old, returns, clip):
    """``value_loss`` with its gradient, and the share of tokens where the value left the bounds and the error at the
    bound is the larger; as above.

    >>> round(ppo_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2).loss.item(), 4)
    0.32
    """
    _validate("ppo_value_loss", values, old, returns)
    if not backend.use_native_fp32("ppo_value_loss", values, old, returns):
        return ppo_value_loss_reference(values, old, returns, clip)
    loss, terms = _Half.apply(values, old.detach(), returns.detach(), None, clip, True)
    return ValueLoss(loss, terms[1])


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Mean over tokens of max(−A·r, −A·clip(r, 1−ε, 1+ε)) with r = exp(logprobs − old); and the share of tokens
    where the clipped branch is the larger. Source: Schulman et al. 2017 (PPO) eq. 7.

    >>> loss, clipped = policy_loss(torch.zeros(1), torch.zeros(1), torch.tensor([2.0]), 0.2)
    >>> float(loss), float(clipped)
    (-2.0, 0.0)
    """
    ratio = torch.exp(logprobs - old)
    free = -advantages * ratio
    bound = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(free, bound).mean(), (bound > free).to(ratio.dtype).mean()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ mean of max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²). Source: Ziegler et al. 2019, code; PPO's eq. 9 term.

    >>> round(float(value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2)), 4)
    0.32
    """
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).mean()


def ppo_policy_loss_reference(logprobs, old, advantages, clip, ref=None):
    """The same in plain torch."""
    gap = (logprobs - old).detach()
    kls = [(-gap).mean(), (0.5 * gap**2).mean(), (gap.expm1() - gap).mean()]
    if ref is not None:
        gap = (ref - logprobs).detach()
        kls += [(-gap).mean(), (gap.expm1() - gap).mean()]
    return PolicyLoss(*policy_loss(logprobs, old, advantages, clip), (logprobs - old).detach().abs().max().exp(), *kls)


def ppo_value_loss_reference(values, old, returns, clip):
    """The same in plain torch."""
    moved = values - old
    larger = (old + moved.clamp(-clip, clip) - returns) ** 2 > (values - returns) ** 2
    return ValueLoss(value_loss(values, old, returns, clip), (larger & (moved.abs() > clip)).to(values.dtype).mean())


class _Half(torch.autograd.Function):
    """The gradient is made with the loss, which knows its weight, 1/M; backward scales it."""

    @staticmethod
    def forward(ctx, x, old, target, ref, clip, value):
        terms, grad = _op(x, old, target, ref, clip, value, x.requires_grad)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(terms)
        return terms[0].clone(), terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, _):
        return ctx.saved_tensors[0] * dloss, None, None, None, None, None


def _validate(op, x, *others):
    if x.dim() != 1 or not x.numel() or any(y.shape != x.shape or not y.is_floating_point() for y in (x, *others)):
        got = ", ".join(f"{tuple(y.shape)} in {y.dtype}" for y in (x, *others))
        raise ValueError(f"{op}: expected tensors of one shape (M,), M at least 1, in floating point, got {got}")


def _run(x, old, target, ref, clip, value, want_grad):
    x, old, target = x.contiguous(), old.contiguous(), target.contiguous()
    ref = None if ref is None else ref.contiguous()
    terms, grad = x.new_empty(8), x.new_empty(x.shape if want_grad else 0)
    module, lane = backend.native(x, lambda m: m.ppo_loss_workspace(len(x)))
    module.ppo_loss(
        value, len(x), clip, x.data_ptr(), old.data_ptr(), target.data_ptr(), 0 if ref is None else ref.data_ptr(),
        grad.data_ptr() if want_grad else 0, terms.data_ptr(), lane,
    )  # fmt: skip
    return terms, grad


_op = backend.define(
    "ppo_loss(Tensor x, Tensor old, Tensor target, Tensor? ref, float clip, bool value, bool want_grad) -> (Tensor, Tensor)",
    _run,
    lambda x, old, target, ref, clip, value, want_grad: (x.new_empty(8), x.new_empty(x.shape if want_grad else 0)),
)
