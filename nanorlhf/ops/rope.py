"""Rotary position embedding, alone or after RMSNorm of each head. Native on CPUs and GPUs (csrc/rope.h).

Source: Su et al., arXiv 2104.09864, eq. 34; dimension i is paired with i + D/2, as in Hugging Face's Llama. Norm, then
rotation, as in Qwen3 (arXiv 2505.09388, §2).
"""

import functools

import torch

from nanorlhf.ops import backend
from nanorlhf.ops.norm import rms_norm_reference

_tables = {}  # (base, D) -> (2, length, D/2) fp32: cosines and sines, grown when a longer sequence comes


def positions_from_cu_seqlens(cu_seqlens):
    """Each token's place in its own sequence, from 0. cu_seqlens: (B+1,) int32; returns (N,) int64.

    >>> positions_from_cu_seqlens(torch.tensor([0, 3, 3, 5], dtype=torch.int32)).tolist()
    [0, 1, 2, 0, 1]
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"positions_from_cu_seqlens: expected cu_seqlens of shape (B+1,), got {tuple(cu_seqlens.shape)}"
        )
    bounds = cu_seqlens.long()
    starts = bounds[:-1].repeat_interleave(bounds.diff())
    return torch.arange(int(bounds[-1]), device=cu_seqlens.device) - starts


def rope(x, positions, base=10000.0):
    """Turn each pair (x[i], x[i + D/2]) by positions · base^(-2i/D).

    x: (N, H, D), D even; positions: (N,) int64, at least 0. Returns (N, H, D) in x's dtype; differentiable in x.
    Queries and keys side by side in one x take one call. Raises ValueError for shapes that do not fit.

    >>> x = torch.tensor([[[1.0, 0.0]]])
    >>> [round(v, 4) for v in rope(x, torch.tensor([1]), base=1.0).flatten().tolist()]  # (cos 1, sin 1)
    [0.5403, 0.8415]
    """
    _validate("rope", positions, x=x)
    if not backend.use_native("rope", x):
        return rope_reference(x, positions, base)
    none = x[:, :0]  # no keys beside these
    return _turned(x, none, none, positions, base, None, None, 0.0)[0]


def rope_reference(x, positions, base=10000.0):
    """The same in plain torch, with angles in fp64."""
    cosines, sines = _angles(positions.double(), x.shape[2], base)
    wide = torch.promote_types(x.dtype, torch.float32)
    cosines, sines = cosines[:, None].to(wide), sines[:, None].to(wide)  # (N, 1, D/2)
    first, second = x.to(wide).chunk(2, -1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1).to(x.dtype)


def rope_qkv(q, k, v, positions, base=10000.0, q_weight=None, k_weight=None, eps=1e-5):
    """Queries and keys, each head normalised if a weight is given, then turned as by ``rope``: (q, k, v), v as it was.

    q: (N, H, D); k, v: (N, Hkv, D), alike, fp32 or bf16; positions: (N,) int64; q_weight, k_weight: (D,) of ``rms_norm``, both or
    none. Any of q, k, v may be columns of one product: no copy is made. Their gradients always are the columns of one array
    (N, (H + 2 Hkv) D), which is why v is here. Differentiable in all but positions. Raises ValueError for shapes that do not fit.

    >>> q, k = torch.randn(1, 2, 4), torch.randn(1, 1, 4)
    >>> turned = rope_qkv(q, k, k, torch.tensor([0]), q_weight=torch.ones(4), k_weight=torch.ones(4), eps=0.0)
    >>> torch.allclose(turned[0].square().mean(-1), torch.ones(1, 2))
    True
    """
    _validate("rope_qkv", positions, q=q, k=k, v=v)
    if k.shape[2] != q.shape[2] or v.shape != k.shape or not q.dtype == k.dtype == v.dtype:
        shapes = ", ".join(f"{tuple(x.shape)} in {x.dtype}" for x in (q, k, v))
        raise ValueError(f"rope_qkv: expected q (N, H, D) and k, v (N, Hkv, D) of one dtype, got {shapes}")
    weights = [w for w in (q_weight, k_weight) if w is not None]
    if len(weights) == 1 or any(w.shape != q.shape[2:] for w in weights):
        raise ValueError(f"rope_qkv: expected two weights of shape ({q.shape[2]},) or none, got {[tuple(w.shape) for w in weights]}")
    if not backend.use_native("rope_qkv", q) or any(w.dtype not in backend.DTYPES for w in weights):
        return rope_qkv_reference(q, k, v, positions, base, q_weight, k_weight, eps)
    return _turned(q, k, v, positions, base, q_weight, k_weight, eps)


def rope_qkv_reference(q, k, v, positions, base=10000.0, q_weight=None, k_weight=None, eps=1e-5):
    """The same in plain torch."""
    if q_weight is not None:
        q, k = rms_norm_reference(q, q_weight, eps), rms_norm_reference(k, k_weight, eps)
    return rope_reference(q, positions, base), rope_reference(k, positions, base), v


def _turned(q, k, v, positions, base, q_weight, k_weight, eps):
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, q_weight, k_weight)):
        return _Rope.apply(q, k, v, positions, float(base), q_weight, k_weight, eps)
    out = _forward_op(q, k, positions, float(base), q_weight, k_weight, eps)
    return *torch.split_with_sizes(out, (q.shape[1], k.shape[1]), 1), v


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, positions, base, q_weight, k_weight, eps):
        ctx.save_for_backward(positions, *((q, k, q_weight, k_weight) if q_weight is not None else ()))
        ctx.base, ctx.eps = base, eps
        heads = q.shape[1]
        out = _forward_op(q, k, positions, base, q_weight, k_weight, eps)
        return out[:, :heads], out[:, heads:], v.view_as(v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk, dv):
        positions, *norm = ctx.saved_tensors
        heads, keys = dq.shape[1], dq.shape[1] + dk.shape[1]
        packed, q_weight_grad, k_weight_grad = _backward_op(dq, dk, dv, positions, ctx.base, *(norm or [None] * 4), ctx.eps)
        weights = (q_weight_grad, k_weight_grad) if norm else (None, None)
        return packed[:, :heads], packed[:, heads:keys], packed[:, keys:], None, None, *weights, None


def _validate(op, positions, **inputs):
    for name, x in inputs.items():
        if x.dim() != 3 or x.shape[2] % 2 or not x.is_floating_point():
            raise ValueError(f"{op}: expected {name} of shape (N, H, D) with D even, got {tuple(x.shape)} in {x.dtype}")
        if positions.shape != x.shape[:1] or positions.dtype != torch.int64:
            raise ValueError(
                f"{op}: expected positions of shape ({x.shape[0]},) in int64, got {tuple(positions.shape)} in {positions.dtype}"
            )


def _angles(positions, dim, base):
    """(cosines, sines), each (len(positions), dim / 2) in fp64."""
    angles = positions[:, None] * _frequencies(base, dim, positions.device)
    return angles.cos(), angles.sin()


def _frequencies(base, dim, device):
    """(dim / 2,) fp64: by how much each pair turns from one position to the next."""
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


_held_frequencies = functools.cache(_frequencies)


def _table(base, dim, length):
    table = _tables.get((base, dim))
    if table is None or table.shape[1] < length:
        rows = 1 << max(8, (length - 1).bit_length())
        table = torch.stack(_angles(torch.arange(rows, dtype=torch.float64), dim, base)).float()
        _tables[base, dim] = table
    return table


def _call(is_backward, q, k, dq, dk, positions, base, weights, eps, out, dweight):
    """out: (N, H + Hkv or more, D), q's and k's side by side."""
    N, H, D = dq.shape
    if not N:
        return
    inner = [x if x.stride(2) == 1 else x.contiguous() for x in (q, k, dq, dk)]
    rows = [(x.data_ptr(), *x.stride()[:2]) for x in (*inner, out)]
    keys = rows[4][0] + H * D * out.element_size(), *rows[4][1:]
    wide = [None if w is None else w.detach().float().contiguous() for w in weights]
    weights = [0 if w is None else w.data_ptr() for w in wide]
    positions = positions.contiguous()
    module, lane = backend.native(dq, lambda m: m.rope_workspace(N, D // 2) if dweight is not None else 0)
    if isinstance(lane, backend.Lane):  # the largest position is not known without waiting: the kernel computes the angles
        turns = _held_frequencies(base, D, dq.device).data_ptr(), 0, -1
    else:
        cosines, sines = _table(base, D, int(positions.max()) + 1)
        turns = cosines.data_ptr(), sines.data_ptr(), cosines.shape[0]
    module.rope(
        is_backward, N, D // 2, backend.DTYPES[dq.dtype], positions.data_ptr(), *turns, eps, (H, rows[0], rows[4], rows[2], weights[0]), (dk.shape[1], rows[1], keys, rows[3], weights[1]),
        0 if dweight is None else dweight.data_ptr(), lane,
    )  # fmt: skip


def _forward(q, k, positions, base, q_weight, k_weight, eps):
    out = q.new_empty((q.shape[0], q.shape[1] + k.shape[1], q.shape[2]))
    _call(False, q, k, q, k, positions, base, (q_weight, k_weight), eps, out, None)
    return out


def _backward(dq, dk, dv, positions, base, q, k, q_weight, k_weight, eps):
    N, H, D = dq.shape
    keys = H + dk.shape[1]
    packed = dq.new_empty((N, keys + dv.shape[1], D))
    packed[:, keys:] = dv
    normed = q_weight is not None
    dweight = dq.new_zeros((4, -(-D // 2 // 16) * 16), dtype=torch.float32) if normed else None  # halves of q's, then of k's
    q, k = (q, k) if normed else (dq, dk)  # without a norm the values are not looked at
    _call(True, q, k, dq, dk, positions, base, (q_weight, k_weight), eps, packed, dweight)
    if not normed:
        return packed, dq.new_empty(0, dtype=torch.float32), dq.new_empty(0, dtype=torch.float32)
    dweight = dweight[:, : D // 2].reshape(2, D)
    return packed, dweight[0].to(q_weight.dtype, copy=True), dweight[1].to(k_weight.dtype, copy=True)


def _backward_fake(dq, dk, dv, positions, base, q, k, q_weight, k_weight, eps):
    packed = dq.new_empty((dq.shape[0], dq.shape[1] + dk.shape[1] + dv.shape[1], dq.shape[2]))
    return packed, *((w.new_empty(w.shape) if w is not None else dq.new_empty(0, dtype=torch.float32) for w in (q_weight, k_weight)))


_forward_op = backend.define(
    "rope_forward(Tensor q, Tensor k, Tensor positions, float base, Tensor? q_weight, Tensor? k_weight, float eps) -> Tensor",
    _forward,
    lambda q, k, positions, base, q_weight, k_weight, eps: q.new_empty((q.shape[0], q.shape[1] + k.shape[1], q.shape[2])),
)
_backward_op = backend.define(
    "rope_backward(Tensor dq, Tensor dk, Tensor dv, Tensor positions, float base, Tensor? q, Tensor? k, Tensor? q_weight, "
    "Tensor? k_weight, float eps) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
