"""Rows of a weight by token id, and the sum of each row's gradients. Native on CPUs and GPUs (csrc/embedding.h)."""

import torch

from nanorlhf.ops import backend


def embedding(ids, weight, dtype=None):
    """weight[ids] in ``dtype`` (the weight's unless given).

    ids: (N,) integers in [0, V); weight: (V, C), fp32 or bf16. Returns (N, C). Differentiable in weight: a row's gradients
    are added in fp32 in the order of their tokens, so it is the same on every run and with any number of threads.
    Raises ValueError for shapes that do not fit or an id out of range.

    >>> embedding(torch.tensor([2, 0]), torch.tensor([[1.0], [2.0], [3.0]]), torch.bfloat16)
    tensor([[3.],
            [1.]], dtype=torch.bfloat16)
    """
    if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"embedding: expected ids of shape (N,) in int64 and weight of shape (V, C), got {tuple(ids.shape)} in {ids.dtype} "
            f"and {tuple(weight.shape)} in {weight.dtype}"
        )
    dtype = dtype or weight.dtype
    if not backend.use_native("embedding", weight) or dtype not in backend.DTYPES:
        return embedding_reference(ids, weight, dtype)
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Embedding.apply(ids, weight, dtype)
    return _forward_op(ids, weight, dtype)


def embedding_reference(ids, weight, dtype=None):
    """The same in plain torch."""
    if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < weight.shape[0]):
        raise ValueError(f"embedding: expected ids in [0, V = {weight.shape[0]})")
    return torch.nn.functional.embedding(ids, weight).to(dtype or weight.dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, dtype):
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return _forward_op(ids, weight, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        return None, _backward_op(dout, ctx.saved_tensors[0], ctx.rows).to(ctx.dtype), None


def _call(is_backward, ids, rows, source, out):
    ids, source = ids.long().contiguous(), source.contiguous()
    module, lane = backend.native(source, lambda m: m.embedding_workspace(len(ids), rows) if is_backward else 0)
    module.embedding(
        is_backward, len(ids), rows, source.shape[1], ids.data_ptr(), source.data_ptr(), backend.DTYPES[source.dtype],
        out.data_ptr(), backend.DTYPES[out.dtype], lane,
    )  # fmt: skip
    return out


_forward_op = backend.define(
    "embedding_forward(Tensor ids, Tensor weight, ScalarType dtype) -> Tensor",
    lambda ids, weight, dtype: _call(False, ids, weight.shape[0], weight, weight.new_empty(len(ids), weight.shape[1], dtype=dtype)),
    lambda ids, weight, dtype: weight.new_empty(len(ids), weight.shape[1], dtype=dtype),
)
_backward_op = backend.define(
    "embedding_backward(Tensor dout, Tensor ids, int rows) -> Tensor",
    lambda dout, ids, rows: _call(True, ids, rows, dout, dout.new_empty(rows, dout.shape[1], dtype=torch.float32)),
    lambda dout, ids, rows: dout.new_empty(rows, dout.shape[1], dtype=torch.float32),
)
