"""RMSNorm. Native on CPUs and GPUs (csrc/norm.h). Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4."""

import torch

from nanorlhf.ops import backend


def rms_norm(x, weight, eps=1e-5):
    """x / √(mean(x²) + eps) · weight over the last dimension.

    x: (..., C), fp32 or bf16; weight: (C,). Sums are fp32; returns x's shape and dtype. Differentiable in both.
    Raises ValueError for shapes that do not fit.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=0.0).square().mean().item()
    1.0
    """
    _validate("rms_norm", x, weight)
    if not backend.use_native("rms_norm", x) or weight.dtype not in backend.DTYPES:
        return rms_norm_reference(x, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RmsNorm.apply(x, weight, eps, None)
    return _forward_op(x, weight, eps, None)[0]


def add_rms_norm(x, residual, weight, eps=1e-5):
    """(rms_norm(x + residual), x + residual): the norm at the head of a block, and the stream it leaves behind, in one pass.

    x, residual: (..., C) of one dtype, fp32 or bf16; weight: (C,). The sum is rounded to their dtype before it is normalised.
    Returns two of x's shape and dtype; differentiable in all three. Raises ValueError for shapes that do not fit.

    >>> y, total = add_rms_norm(torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 0.0]]), torch.ones(2), eps=0.0)
    >>> total.tolist(), y.square().mean().item()
    ([[3.0, 4.0]], 1.0)
    """
    _validate("add_rms_norm", x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: expected a residual like x, of shape {tuple(x.shape)} in {x.dtype}, "
            f"got {tuple(residual.shape)} in {residual.dtype}"
        )
    if not backend.use_native("add_rms_norm", x) or weight.dtype not in backend.DTYPES:
        return add_rms_norm_reference(x, residual, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad or weight.requires_grad):
        return _RmsNorm.apply(x, weight, eps, residual)
    return _forward_op(x, weight, eps, residual)[::2]


def add_rms_norm_reference(x, residual, weight, eps=1e-5):
    """The same in plain torch."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def rms_norm_reference(x, weight, eps=1e-5):
    """The same in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


def _validate(op, x, weight):
    if x.dim() < 1 or weight.shape != x.shape[-1:] or not x.is_floating_point():
        raise ValueError(
            f"{op}: expected x of shape (..., C) and weight of shape (C,), got {tuple(x.shape)} in {x.dtype} "
            f"and {tuple(weight.shape)}"
        )


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        y, scale, total = _forward_op(x, weight, eps, residual)
        ctx.set_materialize_grads(False)  # the stream after the last norm has no gradient
        ctx.save_for_backward(x if residual is None else total, weight, scale)
        return y if residual is None else (y, total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dtotal=None):
        x, weight, scale = ctx.saved_tensors
        if dy is None:
            return dtotal, None, None, dtotal
        dx, dweight = _backward_op(dy, x, weight, scale, dtotal)
        return dx, dweight, None, dx if ctx.needs_input_grad[3] else None


def _address(x):
    return 0 if x is None else x.data_ptr()


def _contiguous(x):
    return x if x is None else x.contiguous()


def _forward(x, weight, eps, residual):
    x, weight, residual = x.contiguous(), weight.detach().float().contiguous(), _contiguous(residual)
    y, scale = backend.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = x.new_empty(0) if residual is None else backend.empty_like(x)
    if x.numel():
        module, lane = backend.native(x)
        module.norm(
            False, scale.numel(), x.shape[-1], backend.DTYPES[x.dtype], x.data_ptr(), _address(residual), weight.data_ptr(), eps,
            y.data_ptr(), total.data_ptr(), scale.data_ptr(), 0, 0, 0, 0, lane,
        )  # fmt: skip
    return y, scale, total


def _backward(dy, x, weight, scale, dtotal):
    dy, x, wide, dtotal = dy.contiguous(), x.contiguous(), weight.detach().float().contiguous(), _contiguous(dtotal)
    dx, dweight = x.new_empty(x.shape), x.new_zeros(weight.shape, dtype=torch.float32)
    if x.numel():
        module, lane = backend.native(x, lambda m: m.norm_workspace(scale.numel(), x.shape[-1]))
        module.norm(
            True, scale.numel(), x.shape[-1], backend.DTYPES[x.dtype], x.data_ptr(), 0, wide.data_ptr(), 0.0, 0, 0,
            scale.data_ptr(), dy.data_ptr(), _address(dtotal), dx.data_ptr(), dweight.data_ptr(), lane,
        )  # fmt: skip
    return dx, dweight.to(weight.dtype)


_forward_op = backend.define(
    "rms_norm_forward(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor, Tensor, Tensor)",
    _forward,
    lambda x, weight, eps, residual: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty((0,) if residual is None else x.shape),
    ),
)
_backward_op = backend.define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor scale, Tensor? dtotal) -> (Tensor, Tensor)",
    _backward,
    lambda dy, x, weight, scale, dtotal: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
