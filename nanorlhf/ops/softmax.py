"""Softmax over the last dimension, with sums in fp32. Native on CPUs and GPUs (csrc/softmax.h)."""

import torch

from nanorlhf.ops import backend


def softmax(x):
    """exp(x - max) / sum of the same, over the last dimension. x: (..., V) floating point; returns the same shape.

    A row of -inf only gives NaN, as in torch. Raises ValueError if x has no last dimension or is not floating point.

    >>> softmax(torch.zeros(2, 4)).tolist()[0]
    [0.25, 0.25, 0.25, 0.25]
    """
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"softmax: expected x of shape (..., V) in floating point, got {tuple(x.shape)} in {x.dtype}")
    if not backend.use_native("softmax", x):
        return softmax_reference(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Softmax.apply(x)
    return _forward_op(x)


def softmax_reference(x):
    """The same in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide).softmax(-1).to(x.dtype)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = _forward_op(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return _backward_op(ctx.saved_tensors[0], dy)


def _call(is_backward, x, dy):
    x, dy = x.contiguous(), dy.contiguous()
    out = x.new_empty(x.shape)
    if x.numel():
        size = x.numel() // x.shape[-1], x.shape[-1]
        module, lane = backend.native(x, None if is_backward else lambda m: m.softmax_workspace(*size))
        module.softmax(
            is_backward, *size, backend.DTYPES[x.dtype],
            x.data_ptr(), dy.data_ptr(), out.data_ptr(), lane,
        )  # fmt: skip
    return out


_forward_op = backend.define(
    "softmax_forward(Tensor x) -> Tensor", lambda x: _call(False, x, x), lambda x: x.new_empty(x.shape)
)
_backward_op = backend.define(
    "softmax_backward(Tensor y, Tensor dy) -> Tensor",
    lambda y, dy: _call(True, y, dy),
    lambda y, dy: y.new_empty(y.shape),
)
