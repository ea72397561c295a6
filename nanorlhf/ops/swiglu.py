"""SwiGLU's elementwise part. Native on CPUs and GPUs (csrc/swiglu.h). Source: Shazeer, arXiv 2002.05202, eq. 6."""

import torch

from nanorlhf.ops import backend


def swiglu(gate, up):
    """silu(gate) · up, with silu(g) = g / (1 + e⁻ᵍ).

    gate, up: (N, F), fp32 or bf16, alike; they may be the halves of one product. Returns (N, F). Differentiable in
    both; the gradient recomputes the sigmoid, nothing is kept but the inputs, and its two halves
    are those of one (N, 2F) array. Raises ValueError unless they are alike.

    >>> swiglu(torch.zeros(1, 2), torch.ones(1, 2)).tolist()
    [[0.0, 0.0]]
    """
    if gate.dim() != 2 or up.shape != gate.shape or up.dtype != gate.dtype or not gate.is_floating_point():
        raise ValueError(
            "swiglu: expected gate and up of one shape (N, F) and dtype, "
            f"got {tuple(gate.shape)} in {gate.dtype} and {tuple(up.shape)} in {up.dtype}"
        )
    if not backend.use_native("swiglu", gate):
        return swiglu_reference(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Swiglu.apply(gate, up)
    return _forward_op(gate, up)


def swiglu_reference(gate, up):
    """The same in plain torch."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _forward_op(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return _backward_op(dout, *ctx.saved_tensors).chunk(2, 1)


def _rows(x):
    return x if x.stride(1) == 1 else x.contiguous()


def _call(is_backward, gate, up, dout, out, dgate, dup, gradient_stride):
    gate, up = _rows(gate), _rows(up)
    module, lane = backend.native(gate)
    module.swiglu(
        is_backward, *gate.shape, backend.DTYPES[gate.dtype], gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0),
        dout, out, dgate, dup, gradient_stride, lane,
    )  # fmt: skip


def _forward(gate, up):
    out = backend.empty_like(gate)
    _call(False, gate, up, 0, out.data_ptr(), 0, 0, 0)
    return out


def _backward(dout, gate, up):
    N, F = gate.shape
    packed, dout = gate.new_empty((N, 2 * F)), dout.contiguous()
    dgate, dup = packed.chunk(2, 1)
    _call(True, gate, up, dout.data_ptr(), 0, dgate.data_ptr(), dup.data_ptr(), 2 * F)
    return packed


_forward_op = backend.define(
    "swiglu_forward(Tensor gate, Tensor up) -> Tensor", _forward, lambda gate, up: gate.new_empty(gate.shape)
)
_backward_op = backend.define(
    "swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> Tensor",
    _backward,
    lambda dout, gate, up: gate.new_empty((gate.shape[0], 2 * gate.shape[1])),
)
