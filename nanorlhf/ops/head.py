"""The loss head's passes over logits: the native reduction of some (csrc/loss.h), and on a GPU the whole head, from hidden states
and the output weight, a block of logits at a time.

Forward goes by rows, which have to be whole; backward goes by columns of the vocabulary: with each row's log-sum-exp and entropy
known its columns are independent, so a block's gradient of the weight is written once and no fp32 sum of it is held, which
for 131,072 words of 4096 would be 2 GiB. Products of bf16 are fp32 and only the gradient of the logits is rounded to bf16.
"""

import math

import torch

from nanorlhf.ops import backend
from nanorlhf.ops.matmul import fill

BLOCK_BYTES = 256 << 20  # fp32 logits held at a time on a GPU
KEPT_BYTES = 128 << 20  # kept for the gradient up to this size


def reduce_logits(is_backward, logits, targets, temperature, logprobs, entropy, lse, grads):
    """One native pass over contiguous logits. All vectors are contiguous slices of (N,)."""
    whole = is_backward or backend.is_deterministic()  # else few rows are cut up, and then round otherwise than many
    module, lane = backend.native(logits, None if whole else lambda m: m.loss_workspace(*logits.shape))
    module.loss(
        is_backward, logits.shape[0], logits.shape[1], logits.stride(0), backend.DTYPES[logits.dtype],
        logits.data_ptr(), targets.data_ptr(), temperature, logprobs.data_ptr(), entropy.data_ptr(), lse.data_ptr(),
        *(g.data_ptr() for g in grads), lane,
    )  # fmt: skip


def rows_like(x):
    """Room for log-probs, entropies and log-sum-exps of x's rows; the last in fp64, as the gradient takes it for exact."""
    return tuple(x.new_empty(x.shape[:1], dtype=d) for d in (torch.float32, torch.float32, torch.float64))


def forward(hidden, weight, targets, temperature, keep):
    """(log-probs, entropy, log-sum-exp, logits), the last (N, V) where they are to be kept, else (0, V)."""
    N, V = hidden.shape[0], weight.shape[0]
    hidden, weight = _operands(hidden, weight)
    logprobs, entropy, lse = rows_like(hidden)
    rows = N if keep else min(N, BLOCK_BYTES // (4 * V))
    logits = None
    for start in range(0, N, max(rows, 1)):
        at = slice(start, start + max(rows, 1))
        logits = None  # its memory is the next block's
        logits = _logits(hidden[at], weight)
        reduce_logits(False, logits, targets[at].contiguous(), temperature, logprobs[at], entropy[at], lse[at], (lse,) * 3)
    return logprobs, entropy, lse, logits if keep and N else hidden.new_empty(0, V, dtype=torch.float32)


def backward(logprob_grad, entropy_grad, lse_grad, hidden, weight, targets, entropy, lse, kept, temperature):
    """(gradient of hidden, gradient of weight), each in the dtype of what it belongs to."""
    N, V, dtypes = hidden.shape[0], weight.shape[0], (hidden.dtype, weight.dtype)
    hidden, weight = _operands(hidden, weight)
    if not N:
        return torch.zeros_like(hidden, dtype=dtypes[0]), torch.zeros_like(weight, dtype=dtypes[1])
    # log p = z_target / T - log-sum-exp: the kernel does the second term and the entropy, of whatever columns it is given; the first
    # is added here where the target's column is among them. A target that is no column makes its row NaN, as in the forward pass.
    logprob_grad = logprob_grad.where((targets >= 0) & (targets < V), math.nan)
    grads = torch.zeros_like(lse_grad), entropy_grad.contiguous(), lse_grad - logprob_grad
    none = torch.zeros_like(targets)
    dhidden, dweight = hidden.new_zeros(hidden.shape, dtype=torch.float32), weight.new_empty(weight.shape, dtype=dtypes[1])
    columns = max(128, BLOCK_BYTES // (4 * N) // 128 * 128)
    for start in range(0, V, columns):
        words = weight[start : start + columns]
        slopes = kept[:, start : start + columns].clone(memory_format=torch.contiguous_format) if len(kept) else _product(hidden, words.T)
        reduce_logits(True, slopes, none, temperature, lse, entropy, lse, grads)
        at = (targets - start)[:, None]
        column = at.clamp(0, len(words) - 1)
        slopes.scatter_(1, column, slopes.gather(1, column) + (logprob_grad[:, None] / temperature).where(at == column, 0))
        slopes = slopes.to(hidden.dtype)
        dhidden += _product(slopes, words)
        dweight[start : start + columns] = _product(slopes.T, hidden)
        del slopes  # before the next block is made
    return dhidden.to(dtypes[0]), dweight


def _operands(hidden, weight):
    """Both in bf16 where the hidden states are, else in fp32."""
    dtype = torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32
    return hidden.detach().to(dtype), weight.detach().to(dtype)


def _logits(hidden, words):
    if backend.is_deterministic() and backend.use_native("matmul", hidden):
        return fill(hidden.new_empty(len(hidden), len(words), dtype=torch.float32), hidden, words)
    return _product(hidden, words.T)


def _product(a, b):
    """a · b in fp32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())
