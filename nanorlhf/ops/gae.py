"""Advantages and returns: scans over ragged episodes from the last token of each to its first.

Native on CPUs and GPUs (csrc/gae.h). Source: Schulman et al. 2016, eq. 11-16.
"""

import torch

from nanorlhf.ops import backend


def gae(rewards, values, cu_seqlens, gamma, lam):
    """Generalised advantage estimates: rewards (M,), values (M,) → advantages (M,), returns (M,).

    δ_t = r_t + γ V_{t+1} − V_t with V after an episode's last token 0; A_t = Σ (γλ)^l δ_{t+l}; returns = A + V.
    cu_seqlens: (B+1,) integers from 0 to M. Sums are fp64, rounded once to the dtype of values. No gradient: to the loss
    they are constants. Raises ValueError for shapes or cu_seqlens that do not fit together.

    >>> a, r = gae(torch.tensor([0.0, 1.0]), torch.zeros(2), torch.tensor([0, 2]), 1.0, 0.5)
    >>> a.tolist(), r.tolist()
    ([0.5, 1.0], [0.5, 1.0])
    """
    if rewards.dim() != 1 or values.shape != rewards.shape or not values.is_floating_point() or cu_seqlens.dim() != 1 \
            or not len(cu_seqlens) or cu_seqlens.is_floating_point():
        raise ValueError(
            "gae: expected rewards and values of shape (M,) and cu_seqlens of shape (B+1,) in integers, got "
            f"{tuple(rewards.shape)}, {tuple(values.shape)} in {values.dtype}, {tuple(cu_seqlens.shape)} in {cu_seqlens.dtype}"
        )
    if not backend.use_native_fp32("gae", rewards, values):
        return gae_reference(rewards, values, cu_seqlens, gamma, lam)
    return _op(rewards.detach(), values.detach(), cu_seqlens, gamma, lam)


def reward_to_go(rewards, cu_seqlens, gamma=1.0):
    """Σ γ^l r_{t+l} to the end of the episode, rewards (M,) → (M,): the advantage where every value is 0 and λ is 1.

    >>> reward_to_go(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 3]), 0.5).tolist()
    [2.0, 2.0, 4.0]
    """
    return gae(rewards, torch.zeros_like(rewards), cu_seqlens, gamma, 1.0)[0]


@torch.no_grad()
def gae_reference(rewards, values, cu_seqlens, gamma, lam):
    """The same in plain torch, one step of all episodes at a time, in the dtype of values."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    starts = cu_seqlens[:-1].long()
    if bool((lengths < 0).any()) or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(values):
        raise ValueError(f"gae: expected cu_seqlens to rise from 0 to N = {len(values)}")
    advantages = torch.zeros_like(values)
    carry = torch.zeros(len(lengths), dtype=values.dtype, device=values.device)
    after = torch.zeros_like(carry)
    for back in range(int(lengths.max()) if len(lengths) else 0):  # t counts from the end, for all episodes at once
        live = lengths > back
        t = (starts + lengths - 1 - back)[live]
        delta = rewards[t] + gamma * after[live] - values[t]
        carry[live] = delta + gamma * lam * carry[live]
        after[live] = values[t]
        advantages[t] = carry[live]
    return advantages, advantages + values


def _run(rewards, values, cu_seqlens, gamma, lam):
    rewards, values, cu_seqlens = rewards.contiguous(), values.contiguous(), cu_seqlens.to(torch.int32).contiguous()
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    module, lane = backend.native(rewards)
    module.gae(
        cu_seqlens.data_ptr(), len(cu_seqlens) - 1, len(rewards), gamma, lam, rewards.data_ptr(), values.data_ptr(),
        advantages.data_ptr(), returns.data_ptr(), lane,
    )  # fmt: skip
    return advantages, returns


_op = backend.define(
    "gae(Tensor rewards, Tensor values, Tensor cu_seqlens, float gamma, float lam) -> (Tensor, Tensor)",
    _run,
    lambda rewards, values, cu_seqlens, gamma, lam: (rewards.new_empty(rewards.shape), values.new_empty(values.shape)),
)
