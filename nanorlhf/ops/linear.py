"""Linear maps whose fp32 master weights are cast to the input's type, several of one input as one product. Plain torch, but
for the forward product where backend.deterministic is on, and the gradient of a weight in bf16 on a CPU with AMX."""

import threading
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from nanorlhf import _C
from nanorlhf.ops import backend
from nanorlhf.ops.matmul import has_outer, matmul, outer


FEW_ROWS = 64  # on AMX torch's product of bf16 takes two to five times as long as ours for fewer rows, and as long for twice as many
_TILES = _C.isa() == "amx"

_held = threading.local()  # its casts: {(dtype, ids of the weights): (the weights, which keeps their ids theirs, their cast)}


@contextmanager
def weights_held(casts=None):
    """Within it no weight may change, and each is cast once: for decoding, where a step is not much more work than its casts.

    casts: a dict that keeps them from one time to the next; whoever changes a weight in between empties it, or has them ``recast``.
    """
    before, _held.casts = getattr(_held, "casts", None), {} if casts is None else casts
    try:
        yield
    finally:
        _held.casts = before


@torch.no_grad()
def recast(casts):
    """Cast again, to where they are, what ``weights_held`` has kept in this dict: for who changes weights in place."""
    for tensors, rows in casts.values():
        _fill(rows, tensors)


def linear(x, weights, biases=()):
    """x · weightᵀ + bias for each of the weights, as one product with all of their rows.

    x: (..., C); weights: (R, C) each, with an R of its own; biases: (R,) each, or none. Returns a (..., R) for each, in x's dtype;
    they are the columns of one tensor. The gradients of weights and biases have their dtype, whatever that of the product.
    Raises ValueError for shapes that do not fit.

    >>> [y.tolist() for y in linear(torch.tensor([[1.0, 2.0]]), [torch.eye(2), torch.ones(1, 2)])]
    [[[1.0, 2.0]], [[3.0]]]
    """
    width, shapes = x.shape[-1:], [w.shape for w in weights]
    sizes = [s[0] for s in shapes]
    fit = all([s[1:] == width for s in shapes]) and [b.shape[0] for b in biases if b.dim() == 1] in ([], sizes)
    if not fit or len(biases) not in (0, len(weights)):
        raise ValueError(
            f"linear: expected x of shape (..., C), weights of shape (R, C) and biases of shape (R,), got {tuple(x.shape)}, "
            f"{[tuple(w.shape) for w in weights]} and {[tuple(b.shape) for b in biases]}"
        )
    if not backend.use_native("linear", x):
        return linear_reference(x, weights, biases)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *biases)):
        return _Linear.apply(x, len(weights), *weights, *biases)
    return _product(x, _stacked(weights, x.dtype), biases, sizes)


def linear_reference(x, weights, biases=()):
    """The same, product by product."""
    biases = [b.to(x.dtype) for b in biases] or [None] * len(weights)
    return tuple(F.linear(x, w.to(x.dtype), b) for w, b in zip(weights, biases, strict=True))


def _product(x, rows, biases, sizes):
    few = _TILES and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling() and x.is_cpu and 0 < x.numel() <= FEW_ROWS * rows.shape[1]
    ours = backend.is_deterministic() or few
    bias = _stacked(biases, torch.float32 if ours else x.dtype) if biases else None
    out = (matmul if ours else F.linear)(x, rows, bias)
    return (out,) if len(sizes) == 1 else torch.split_with_sizes(out, sizes, -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count, *weights_and_biases):
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        rows = _stacked(weights, x.dtype)
        ctx.sizes, ctx.dtypes = [w.shape[0] for w in weights], [t.dtype for t in weights_and_biases]
        ctx.save_for_backward(x, rows)
        return _product(x, rows, biases, ctx.sizes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        x, rows = ctx.saved_tensors
        sizes, flat = ctx.sizes, x.reshape(-1, x.shape[-1])
        apart = parts = [dy.reshape(-1, size) for dy, size in zip(dys, sizes)]
        whole = _whole(parts)
        if whole is not None:  # one product with all columns; else one each, which costs less than putting them together
            parts, sizes = [whole], [sum(sizes)]
        dx, gradients = None, [None] * len(ctx.dtypes)
        if ctx.needs_input_grad[0]:
            first, *others = zip(parts, rows.split(sizes))
            dx = torch.mm(*first)
            for other in others:
                dx.addmm_(*other)
            dx = dx.view(x.shape)
        if any(ctx.needs_input_grad[2:]):
            made = [(outer(part, flat) if has_outer(part, flat) else part.T @ flat).to(ctx.dtypes[0]) for part in parts]
            made = made if whole is None else made[0].split(ctx.sizes)
            biases = [part.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)) for part in apart[: len(ctx.dtypes) - len(made)]]
            gradients = [g.to(dtype) for g, dtype in zip([*made, *biases], ctx.dtypes, strict=True)]
        return dx, None, *gradients


def _stacked(tensors, dtype):
    """All rows of these in one tensor of ``dtype``; it may be the only one of them itself."""
    if len(tensors) == 1 and tensors[0].dtype == dtype:
        return tensors[0].detach()
    casts = getattr(_held, "casts", None)
    key = (dtype, *map(id, tensors)) if casts is not None else None
    if key is not None and key in casts:
        return casts[key][1]
    rows = torch.empty((sum(t.shape[0] for t in tensors), *tensors[0].shape[1:]), dtype=dtype, device=tensors[0].device)
    with torch.no_grad():
        _fill(rows, tensors)
    if key is not None and all(isinstance(t, torch.nn.Parameter) for t in tensors):
        casts[key] = tensors, rows
    return rows


def _fill(rows, tensors):
    for part, t in zip(rows.split([t.shape[0] for t in tensors]), tensors):
        part.copy_(t)


def _whole(parts):
    """The matrix of which these are all the columns, in order; None if they lie apart."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        beside = part.storage_offset() == at and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not beside or part.stride() != (first.stride(0), 1):
            return None if len(parts) > 1 else first
        at += part.shape[1]
    return first.as_strided((len(first), at - first.storage_offset()), first.stride())
