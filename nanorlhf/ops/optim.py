"""What AdamW and Muon do to many tensors at once, each element read once: native on CPUs and GPUs (csrc/optim.h), ``torch._foreach``
elsewhere. Lists go together: gradients[i] and moments[i] are those of params[i]. ``scale`` multiplies the gradients first.

Sources: Loshchilov & Hutter 2019 (AdamW), algorithm 2; Jordan et al. 2024 (Muon).
"""

import math

import torch

from nanorlhf.ops import backend

_NORM, _ADAMW, _MOMENTUM, _APPLY = range(4)


def gradient_norm(gradients):
    """The Euclidean norm of all gradients together, as a float.

    >>> gradient_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    5.0
    """
    if not _native(gradients):
        return float(torch.nn.utils.get_total_norm(gradients))
    return math.sqrt(_pass(_NORM, gradients=gradients))


def adamw_(params, gradients, first, second, step, lr, betas, eps, weight_decay, scale=1.0):
    """The ``step``-th update (from 1) of params and of their moments ``first`` and ``second``, in place.

    >>> p, m, v = torch.ones(1), torch.zeros(1), torch.zeros(1)
    >>> adamw_([p], [torch.ones(1)], [m], [v], 1, lr=0.5, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0)
    >>> round(p.item(), 4)
    0.5
    """
    (beta1, beta2), keep = betas, 1 - lr * weight_decay
    rate, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    if _native(gradients, params, first, second):
        _pass(_ADAMW, params, gradients, first, second, scale=scale, keep=keep, rate=rate, beta1=beta1, beta2=beta2,
              root=root, eps=eps)  # fmt: skip
        return
    gradients = torch._foreach_mul(gradients, scale)
    torch._foreach_mul_(params, keep)
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    sizes = torch._foreach_sqrt(second)
    torch._foreach_mul_(sizes, root)
    torch._foreach_add_(sizes, eps)
    torch._foreach_addcdiv_(params, first, sizes, -rate)


def momentum_(gradients, momenta, beta, dtype, scale=1.0):
    """momenta ← β·momenta + (1 − β)·gradients, in place; returns Nesterov's β·momenta + (1 − β)·gradients of the new ones,
    stacked, in ``dtype``. All are of one shape.

    >>> momentum_([torch.ones(1, 1)], [torch.zeros(1, 1)], 0.5, torch.float32).item()
    0.75
    """
    if not _native(gradients, momenta) or dtype not in backend.DTYPES:
        gradients = torch._foreach_mul(gradients, scale)
        torch._foreach_lerp_(momenta, gradients, 1 - beta)
        return torch.stack(torch._foreach_lerp(gradients, momenta, beta)).to(dtype)
    updates = gradients[0].new_empty((len(gradients), *gradients[0].shape), dtype=dtype)
    _pass(_MOMENTUM, None, gradients, momenta, None, updates, scale=scale, beta1=beta)
    return updates


def apply_(params, updates, keep, rate):
    """params[i] ← keep · params[i] − rate · updates[i], in place. updates: (k, …) in any floating type.

    >>> p = torch.ones(2)
    >>> apply_([p], torch.ones(1, 2), keep=0.5, rate=0.25)
    >>> p.tolist()
    [0.25, 0.25]
    """
    if _native([], params) and updates.dtype in backend.DTYPES:
        _pass(_APPLY, params, None, None, None, updates.contiguous(), keep=keep, rate=rate)
        return
    torch._foreach_mul_(params, keep)
    torch._foreach_add_(params, list(updates.to(params[0].dtype)), alpha=-rate)


def _native(gradients, *in_place):
    """Whether the kernels can do it: all fp32 on one device that has them, and what they write flat in memory."""
    written = [t for tensors in in_place for t in tensors]
    both = [*gradients, *written]
    plain = all(t.dtype == torch.float32 and t.device == both[0].device and backend.use_native("optim", t) for t in both)
    return plain and all(t.is_contiguous() for t in written)


def _pass(kind, params=None, gradients=None, first=None, second=None, other=None, scale=1.0, keep=1.0, rate=0.0, beta1=0.0,
          beta2=0.0, root=1.0, eps=0.0):  # fmt: skip
    """One native pass; None is a column of the table (struct OptimSpan) that this kind does not read."""
    gradients = gradients and [g.contiguous() for g in gradients]
    columns = params, gradients, first, second, other
    sizes = [t.numel() for t in (params if gradients is None else gradients)]
    spans = torch.tensor([[0] * len(sizes) if c is None else [t.data_ptr() for t in c] for c in columns] + [sizes]).T.contiguous()
    dtype = torch.float32 if other is None else other.dtype
    like = next((c[0] for c in columns if c is not None and len(c)), spans)
    if like.is_cuda:  # in the order of the stream, as are the kernel and the next use of the memory
        spans = spans.pin_memory().to(like.device, non_blocking=True)
    module, lane = backend.native(like, lambda m: m.optim_workspace(len(sizes)))
    total = module.optim(kind, backend.DTYPES[dtype], spans.data_ptr(), len(sizes), scale, keep, rate, beta1, beta2, root, eps,
                         lane)  # fmt: skip
    if kind == _NORM and isinstance(lane, backend.Lane):
        total = float(lane.workspace[:8].view(torch.float64))  # waits for the GPU, as whoever asks for a number must
    for written in (params, first, second):
        torch.autograd.graph.increment_version(written or [])
    return total
