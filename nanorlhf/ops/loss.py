"""The log-probability of a token: the only place where it is formed.

From hidden states and the output weight, the logits exist a chunk of rows at a time; neither pass holds (N, V),
unless a gradient is wanted and all logits are few: then keeping them costs less than computing them again.
The reduction of a chunk and its gradient are native (csrc/loss.h); the products are torch's, but forward ops.matmul's where
backend.deterministic is on. Where the CPU multiplies bf16 and the hidden states are bf16, all of it is native and only tiles
of logits exist (csrc/head.h). On a GPU: head.py.
"""

import math

import torch

from nanorlhf import _C
from nanorlhf.ops import backend, head
from nanorlhf.ops.head import reduce_logits, rows_like
from nanorlhf.ops.matmul import fill

KEEP_BYTES = 64 << 20  # logits kept for the gradient up to this size: saves one product of four
CHUNK_BYTES = 32 << 20  # logits held at a time: enough rows that the gradient of the weight is seldom read and written


def next_token_positions(cu_seqlens):
    """Every position whose successor is in the same sequence, (M,) int64: hidden[i] predicts tokens[i + 1].

    cu_seqlens: (B+1,) int32. This is the only place that shifts by one.

    >>> next_token_positions(torch.tensor([0, 3, 3, 5], dtype=torch.int32)).tolist()
    [0, 1, 3]
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"next_token_positions: expected cu_seqlens of shape (B+1,), got {tuple(cu_seqlens.shape)}")
    bounds = cu_seqlens.long()
    has_next = torch.ones(int(bounds[-1]), dtype=torch.bool, device=cu_seqlens.device)
    has_next[bounds[1:][bounds[1:] > bounds[:-1]] - 1] = False  # the last of each sequence that is not empty
    return has_next.nonzero().squeeze(1)


def token_logprobs(hidden, weight, targets, temperature=1.0):
    """log softmax(hidden · weightᵀ / temperature) at the targets, and the entropy of that distribution.

    hidden: (N, C); weight: (V, C); targets: (N,) int64 in [0, V). bf16 or fp32; products and sums are fp32. With bf16 hidden
    states a GPU, and with C a multiple of 32 a CPU that multiplies bf16, takes the weight rounded to bf16, and the logits' gradient.
    Returns (logprobs (N,), entropy (N,)) in fp32 and nats (fp64 for fp64 input), both differentiable in hidden and
    weight. Raises ValueError for shapes that do not fit, targets out of range, or temperature ≤ 0.

    >>> hidden, weight = torch.randn(3, 8), torch.zeros(4, 8)  # all four tokens equally likely
    >>> logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1, 3]))
    >>> bool(((logprobs + math.log(4)).abs() < 1e-6).all() and ((entropy - math.log(4)).abs() < 1e-6).all())
    True
    """
    validate_head("token_logprobs", hidden, weight)
    validate("token_logprobs", hidden, targets, temperature)
    return _head_outputs(hidden, weight, targets, temperature)[:2]


def cross_entropy(hidden, weight, targets, z_loss=0.0, ignore_index=-100):
    """The language-model loss: the mean over the counted tokens of −log p + z_loss · log² Z, with Z the softmax's denominator.

    hidden: (N, C); weight: (V, C); targets: (N,) int64, ``ignore_index`` where a token does not count: such rows are left out
    before the product. Returns a scalar, differentiable in hidden and weight. Source of the z-loss: Chowdhery et al.,
    arXiv 2204.02311, §5. Raises ValueError as token_logprobs does, and when no token counts.

    >>> round(cross_entropy(torch.ones(2, 8), torch.zeros(4, 8), torch.tensor([1, -100]), z_loss=0.1).item(), 4)
    1.5785
    """
    validate_head("cross_entropy", hidden, weight)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"cross_entropy: expected targets of shape ({hidden.shape[0]},), got {tuple(targets.shape)}")
    counted = targets != ignore_index
    if not counted.any():
        raise ValueError("cross_entropy: expected at least one target that counts, got none")
    if not counted.all():
        hidden, targets = hidden[counted], targets[counted]
    validate("cross_entropy", hidden, targets, 1.0)
    logprobs, _, lse = _head_outputs(hidden, weight, targets, 1.0)
    return (z_loss * lse.square() - logprobs).mean() if z_loss else -logprobs.mean()


def _head_outputs(hidden, weight, targets, temperature):
    """(log-probs, entropy, log-sum-exp), each (N,)."""
    if not (backend.use_native("token_logprobs", hidden) and backend.use_native("token_logprobs", weight)):
        wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        logits = hidden.to(wide) @ weight.to(wide).T
        return *logits_logprobs_reference(logits, targets, temperature), (logits / temperature).logsumexp(-1)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _TokenLogprobs.apply(hidden, weight, targets, temperature)
    return _forward_op(hidden, weight, targets, temperature, False)[:3]


def logits_logprobs(logits, targets, temperature=1.0):
    """The same from logits (N, V) that exist already. Differentiable in the logits.

    >>> logprobs, entropy = logits_logprobs(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]))
    >>> logprobs.item(), entropy.item()
    (0.0, 0.0)
    """
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits_logprobs: expected logits of shape (N, V), got {tuple(logits.shape)}")
    validate("logits_logprobs", logits, targets, temperature)
    if not backend.use_native("logits_logprobs", logits):
        return logits_logprobs_reference(logits, targets, temperature)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _LogitsLogprobs.apply(logits, targets, temperature)
    return _logits_forward_op(logits, targets, temperature)[:2]


def logits_logprobs_reference(logits, targets, temperature=1.0):
    """The same in plain torch."""
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ValueError(f"token_logprobs: expected targets in [0, V = {logits.shape[1]})")
    logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    finite = logp.masked_fill(logp == -math.inf, 0)  # 0 · log 0 = 0
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * finite).sum(-1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        most = KEEP_BYTES if backend.on_cpu(hidden) else head.KEPT_BYTES
        keep = 4 * hidden.shape[0] * weight.shape[0] <= most and not fused(hidden)
        logprobs, entropy, lse, logits = _forward_op(hidden, weight, targets, temperature, keep)
        ctx.save_for_backward(hidden, weight, targets, entropy, lse, logits)
        ctx.temperature = temperature
        return logprobs, entropy, lse.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        dhidden, dweight = _backward_op(*grads, *ctx.saved_tensors, ctx.temperature)
        return dhidden, dweight, None, None


class _LogitsLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature):
        logprobs, entropy, lse = _logits_forward_op(logits, targets, temperature)
        ctx.save_for_backward(logits, targets, entropy, lse)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, logprob_grad, entropy_grad):
        return _logits_backward_op(logprob_grad, entropy_grad, *ctx.saved_tensors, ctx.temperature), None, None


def row_chunks(N, V):
    """(rows of a chunk, its slices)."""
    rows = max(1, min(N, CHUNK_BYTES // (4 * V) or 1))
    return rows, [slice(i, min(i + rows, N)) for i in range(0, N, rows)]


def fused(hidden):
    """Whether the kernels that never form the logits take it: bf16, on a CPU that multiplies bf16."""
    return backend.on_cpu(hidden) and hidden.dtype == torch.bfloat16 and hidden.shape[1] and hidden.shape[1] % 32 == 0 and _C.has_head()


def _head(is_backward, hidden, weight, targets, temperature, logprobs, entropy, lse, grads, results):
    hidden, weight = (x.detach().to(torch.bfloat16).contiguous() for x in (hidden, weight))
    _C.head(
        is_backward, *hidden.shape[:1], *weight.shape, hidden.data_ptr(), weight.data_ptr(), targets.data_ptr(), temperature,
        logprobs.data_ptr(), entropy.data_ptr(), lse.data_ptr(), *(x.data_ptr() for x in (*grads, *results)), torch.get_num_threads(),
    )  # fmt: skip


def chunk_logits(hidden, weight, out):
    return fill(out, hidden, weight) if backend.is_deterministic() else torch.mm(hidden, weight.T, out=out)


def _forward(hidden, weight, targets, temperature, keep):
    if not backend.on_cpu(hidden):
        return head.forward(hidden, weight, targets, temperature, keep)
    if fused(hidden):
        logprobs, entropy, lse = rows_like(hidden)
        _head(False, hidden, weight, targets.contiguous(), temperature, logprobs, entropy, lse, (lse,) * 3, (lse,) * 2)
        return logprobs, entropy, lse, logprobs.new_empty(0, weight.shape[0])
    hidden, weight, targets = hidden.detach().float(), weight.detach().float(), targets.contiguous()
    logprobs, entropy, lse = rows_like(hidden)
    rows, chunks = row_chunks(hidden.shape[0], weight.shape[0])
    kept = hidden.new_empty(hidden.shape[0] if keep else 0, weight.shape[0])
    buffer = None if keep else hidden.new_empty(rows, weight.shape[0])
    for at in chunks:
        logits = chunk_logits(hidden[at], weight, kept[at] if keep else buffer[: at.stop - at.start])
        reduce_logits(False, logits, targets[at], temperature, logprobs[at], entropy[at], lse[at], (lse,) * 3)
    return logprobs, entropy, lse, kept


def _backward(logprob_grad, entropy_grad, lse_grad, hidden, weight, targets, entropy, lse, kept, temperature):
    if not backend.on_cpu(hidden):
        return head.backward(logprob_grad, entropy_grad, lse_grad, hidden, weight, targets, entropy, lse, kept, temperature)
    grads = [g.contiguous() for g in (logprob_grad, entropy_grad, lse_grad)]
    targets, dtypes = targets.contiguous(), (hidden.dtype, weight.dtype)
    if fused(hidden):
        N, C = hidden.shape
        dhidden, dweight = (hidden.new_empty(shape, dtype=torch.float32) for shape in ((-(-N // 128) * 128, C), weight.shape))
        _head(True, hidden, weight, targets, temperature, lse, entropy, lse, grads, (dhidden, dweight))
        return dhidden[:N].to(dtypes[0]), dweight.to(dtypes[1])
    hidden, weight = hidden.detach().float(), weight.detach().float()
    dhidden, dweight = hidden.new_empty(hidden.shape), weight.new_zeros(weight.shape)
    rows, chunks = row_chunks(hidden.shape[0], weight.shape[0])
    buffer = hidden.new_empty(rows, weight.shape[0])
    for at in chunks:
        logits = buffer[: at.stop - at.start]
        # A copy in the cache, so that a second backward finds the logits as they were.
        logits.copy_(kept[at]) if kept.shape[0] else chunk_logits(hidden[at], weight, logits)
        reduce_logits(True, logits, targets[at], temperature, lse, entropy[at], lse[at], [g[at] for g in grads])
        torch.mm(logits, weight, out=dhidden[at])  # the logits are their gradient now
        dweight.addmm_(logits.T, hidden[at])
    return dhidden.to(dtypes[0]), dweight.to(dtypes[1])


def _logits_forward(logits, targets, temperature):
    logits, targets = logits.contiguous(), targets.contiguous()
    logprobs, entropy, lse = rows_like(logits)
    reduce_logits(False, logits, targets, temperature, logprobs, entropy, lse, (lse,) * 3)
    return logprobs, entropy, lse


def _logits_backward(logprob_grad, entropy_grad, logits, targets, entropy, lse, temperature):
    grad = logits.clone(memory_format=torch.contiguous_format)
    grads = logprob_grad.contiguous(), entropy_grad.contiguous(), torch.zeros_like(logprob_grad)
    reduce_logits(True, grad, targets.contiguous(), temperature, lse, entropy, lse, grads)
    return grad


def validate_head(op, hidden, weight):
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] < 1:
        raise ValueError(
            f"{op}: expected hidden of shape (N, C) and weight of shape (V, C), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )


def validate(op, rows, targets, temperature):
    if targets.shape != rows.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"{op}: expected targets of shape ({rows.shape[0]},) in int64, got {tuple(targets.shape)} in {targets.dtype}"
        )
    if not rows.is_floating_point():
        raise ValueError(f"{op}: expected floating point, got {rows.dtype}")
    if not temperature > 0:
        raise ValueError(f"{op}: expected temperature > 0, got {temperature}")


_forward_op = backend.define(
    "token_logprobs_forward(Tensor hidden, Tensor weight, Tensor targets, float temperature, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    lambda hidden, weight, targets, temperature, keep: (
        *rows_like(hidden),
        hidden.new_empty(hidden.shape[0] if keep else 0, weight.shape[0], dtype=torch.float32),
    ),
)
_backward_op = backend.define(
    "token_logprobs_backward(Tensor logprob_grad, Tensor entropy_grad, Tensor lse_grad, Tensor hidden, Tensor weight, Tensor targets, "
    "Tensor entropy, Tensor lse, Tensor kept, float temperature) -> (Tensor, Tensor)",
    _backward,
    lambda logprob_grad, entropy_grad, lse_grad, hidden, weight, targets, entropy, lse, kept, temperature: (
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
    ),
)
_logits_forward_op = backend.define(
    "logits_logprobs_forward(Tensor logits, Tensor targets, float temperature) -> (Tensor, Tensor, Tensor)",
    _logits_forward,
    lambda logits, targets, temperature: rows_like(logits),
)
_logits_backward_op = backend.define(
    "logits_logprobs_backward(Tensor logprob_grad, Tensor entropy_grad, Tensor logits, Tensor targets, "
    "Tensor entropy, Tensor lse, float temperature) -> Tensor",
    _logits_backward,
    lambda logprob_grad, entropy_grad, logits, targets, entropy, lse, temperature: logits.new_empty(logits.shape),
)
