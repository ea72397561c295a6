"""RMSNorm. Native on the CPU (csrc/norm.h). Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4."""

import torch

from nanorlhf import _C
from nanorlhf.ops import backend


def rms_norm(x, weight, eps=1e-5):
    """x / √(mean(x²) + eps) · weight over the last dimension.

    x: (..., C), fp32 or bf16; weight: (C,). Sums are fp32; returns x's shape and dtype. Differentiable in both.
    Raises ValueError for shapes that do not fit.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=0.0).square().mean().item()
    1.0
    """
    if x.dim() < 1 or weight.shape != x.shape[-1:] or not x.is_floating_point():
        raise ValueError(
            f"rms_norm: expected x of shape (..., C) and weight of shape (C,), got {tuple(x.shape)} in {x.dtype} "
            f"and {tuple(weight.shape)}"
        )
    if not backend.use_native("rms_norm", x) or weight.dtype not in backend.DTYPES:
        return rms_norm_reference(x, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RmsNorm.apply(x, weight, eps)
    return _forward_op(x, weight, eps)[0]


def rms_norm_reference(x, weight, eps=1e-5):
    """The same in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale = _forward_op(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, dy):
        return (*_backward_op(dy, *ctx.saved_tensors), None)


def _forward_cpu(x, weight, eps):
    x, weight = x.contiguous(), weight.detach().float().contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    scale = torch.empty(x.shape[:-1])
    if x.numel():
        _C.norm(
            False, scale.numel(), x.shape[-1], backend.DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(), eps,
            y.data_ptr(), scale.data_ptr(), 0, 0, 0, torch.get_num_threads(),
        )  # fmt: skip
    return y, scale


def _backward_cpu(dy, x, weight, scale):
    dy, x, wide = dy.contiguous(), x.contiguous(), weight.detach().float().contiguous()
    dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.zeros(weight.shape)
    if x.numel():
        _C.norm(
            True, scale.numel(), x.shape[-1], backend.DTYPES[x.dtype], x.data_ptr(), wide.data_ptr(), 0.0,
            0, scale.data_ptr(), dy.data_ptr(), dx.data_ptr(), dweight.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return dx, dweight.to(weight.dtype)


_forward_op = backend.define(
    "rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _forward_cpu,
    lambda x, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)),
)
_backward_op = backend.define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor scale) -> (Tensor, Tensor)",
    _backward_cpu,
    lambda dy, x, weight, scale: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
