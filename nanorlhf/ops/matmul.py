"""Matrix products with one order of summation, whatever the batch. Native on CPUs and GPUs (csrc/matmul.h); and the product that
gives the gradient of a weight, by AMX (csrc/outer.h)."""

import torch

from nanorlhf import _C
from nanorlhf.ops import backend


def matmul(x, weight, bias=None, dtype=None):
    """x · weightᵀ + bias; a row of x gives the same bits whatever rows are beside it and whatever the number of threads.

    x: (..., C); weight: (R, C) in x's dtype; bias: (R,). Sums are fp32. Returns (..., R) in ``dtype`` (x's unless given), without
    gradient: ops.linear has one. Raises ValueError for shapes and dtypes that do not fit.

    >>> matmul(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([0.5]))
    tensor([[11.5000]])
    """
    fits = x.dim() > 0 and weight.dim() == 2 and weight.shape[1:] == x.shape[-1:] and x.shape[-1] > 0 and weight.dtype == x.dtype
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"matmul: expected x of shape (..., C), weight of shape (R, C) in its dtype and bias of shape (R,), got {tuple(x.shape)} "
            f"in {x.dtype}, {tuple(weight.shape)} in {weight.dtype} and {None if bias is None else tuple(bias.shape)}"
        )
    dtype = dtype or x.dtype
    run = _op if backend.use_native("matmul", x) and dtype in backend.DTYPES else matmul_reference
    return run(x.detach(), weight.detach(), None if bias is None else bias.detach(), dtype)


def matmul_reference(x, weight, bias=None, dtype=None):
    """The same in plain torch, but for the order."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(dtype or x.dtype)


def outer(x, y):
    """xᵀ · y in fp32, without gradient: x (N, R) and y (N, C) → (R, C), for what ``has_outer`` says is so; any stride between rows."""
    return _outer_op(x.detach(), y.detach())


def has_outer(x, y):
    """Whether ``outer`` takes these: bf16, on a CPU with AMX, the elements of a row side by side."""
    fits = all(t.dtype == torch.bfloat16 and backend.on_cpu(t) and t.dim() == 2 and t.stride(1) == 1 for t in (x, y))
    return fits and len(x) == len(y) and _C.has_outer()


def _outer(x, y):
    out = x.new_empty((x.shape[1], y.shape[1]), dtype=torch.float32)
    _C.outer(*x.shape, y.shape[1], x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), out.data_ptr(), torch.get_num_threads())
    return out


def fill(out, x, weight, bias=None):
    """The native product into ``out``, contiguous; returns it."""
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.float().contiguous()
    module, lane = backend.native(x)
    module.matmul(
        x.numel() // x.shape[-1], *weight.shape, backend.DTYPES[x.dtype], backend.DTYPES[out.dtype], x.data_ptr(), weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), out.data_ptr(), lane,
    )  # fmt: skip
    return out


_op = backend.define(
    "matmul(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype) -> Tensor",
    lambda x, weight, bias, dtype: fill(x.new_empty(*x.shape[:-1], len(weight), dtype=dtype), x, weight, bias),
    lambda x, weight, bias, dtype: x.new_empty(*x.shape[:-1], len(weight), dtype=dtype),
)
_outer_op = backend.define(
    "outer(Tensor x, Tensor y) -> Tensor", _outer, lambda x, y: x.new_empty(x.shape[1], y.shape[1], dtype=torch.float32)
)
