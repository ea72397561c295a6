"""Rotary position embedding. Native on the CPU (csrc/rope.h).

Source: Su et al., arXiv 2104.09864, eq. 34; dimension i is paired with i + D/2, as in Hugging Face's Llama.
"""

import torch

from nanorlhf import _C
from nanorlhf.ops import backend

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
    if x.dim() != 3 or x.shape[2] % 2 or not x.is_floating_point():
        raise ValueError(f"rope: expected x of shape (N, H, D) with D even, got {tuple(x.shape)} in {x.dtype}")
    if positions.shape != x.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(
            f"rope: expected positions of shape ({x.shape[0]},) in int64, "
            f"got {tuple(positions.shape)} in {positions.dtype}"
        )
    if not backend.use_native("rope", x):
        return rope_reference(x, positions, base)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rope.apply(x, positions, float(base))
    return _op(x, positions, float(base), False)


def rope_reference(x, positions, base=10000.0):
    """The same in plain torch, with angles in fp64."""
    cosines, sines = _angles(positions.double(), x.shape[2], base)
    wide = torch.promote_types(x.dtype, torch.float32)
    cosines, sines = cosines[:, None].to(wide), sines[:, None].to(wide)  # (N, 1, D/2)
    first, second = x.to(wide).chunk(2, -1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1).to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, base):
        ctx.save_for_backward(positions)
        ctx.base = base
        return _op(x, positions, base, False)

    @staticmethod
    def backward(ctx, dout):
        return _op(dout, ctx.saved_tensors[0], ctx.base, True), None, None


def _angles(positions, dim, base):
    """(cosines, sines), each (len(positions), dim / 2) in fp64."""
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angles = positions[:, None] * frequencies
    return angles.cos(), angles.sin()


def _table(base, dim, length):
    table = _tables.get((base, dim))
    if table is None or table.shape[1] < length:
        rows = 1 << max(8, (length - 1).bit_length())
        table = torch.stack(_angles(torch.arange(rows, dtype=torch.float64), dim, base)).float()
        _tables[base, dim] = table
    return table


def _cpu(x, positions, base, inverse):
    x = x if x.stride(2) == 1 else x.contiguous()
    positions = positions.contiguous()
    N, H, D = x.shape
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        cosines, sines = _table(base, D, int(positions.max()) + 1)
        _C.rope(
            N, H, D // 2, backend.DTYPES[x.dtype], (x.data_ptr(), x.stride(0), x.stride(1)), positions.data_ptr(),
            cosines.data_ptr(), sines.data_ptr(), cosines.shape[0], inverse, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return out


_op = backend.define(
    "rope(Tensor x, Tensor positions, float base, bool inverse) -> Tensor",
    _cpu,
    lambda x, positions, base, inverse: x.new_empty(x.shape),
)
