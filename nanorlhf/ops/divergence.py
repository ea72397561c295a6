"""Policy and reference side by side: the log-probs of both and the exact KL between them, from one product of each head.

A rollout asks for all of it. Where the CPU multiplies bf16 it is one native pass, of which only tiles of logits exist
(csrc/head.h); in fp32 the logits of both exist a chunk of rows at a time (csrc/loss.h). Elsewhere the KL is plain torch.
"""

import torch

from nanorlhf import _C
from nanorlhf.ops import backend, loss
from nanorlhf.ops.head import reduce_logits, rows_like

ROWS = 2048  # of logits that plain torch holds at a time


def token_divergence(hidden, weight, ref_hidden, ref_weight, targets, temperature=1.0):
    """token_logprobs of a policy and of a reference, and KL(policy ‖ reference) of each row, summed over the whole vocabulary.

    hidden: (N, C); weight: (V, C); ref_hidden: (N, C'); ref_weight: (V, C'); targets: (N,) int64 in [0, V). Logits are divided by
    the temperature. Returns (logprobs, entropy, ref_logprobs, kl), each (N,) in fp32 and nats (fp64 for fp64 input), without
    gradient; the first three are token_logprobs' own, bit for bit, and kl is exactly 0 where both have the same logits.
    Raises ValueError as token_logprobs does, and where policy and reference have not the same rows and words.

    >>> even, sure = torch.zeros(1, 2), torch.tensor([[1.0986, 0.0]])  # chances ½, ½ and ¾, ¼
    >>> round(float(token_divergence(even, torch.eye(2), sure, torch.eye(2), torch.tensor([0]))[3]), 3)  # ½ ln(½ / ¾) + ½ ln(½ / ¼)
    0.144
    """
    loss.validate_head("token_divergence", hidden, weight)
    loss.validate_head("token_divergence", ref_hidden, ref_weight)
    loss.validate("token_divergence", hidden, targets, temperature)
    if len(hidden) != len(ref_hidden) or len(weight) != len(ref_weight):
        raise ValueError(f"token_divergence: expected as many rows and words of the reference as of the policy, got {len(ref_hidden)} and "
                         f"{len(ref_weight)} beside {len(hidden)} and {len(weight)}")  # fmt: skip
    given = [x.detach() for x in (hidden, weight, ref_hidden, ref_weight)]
    native = all(backend.use_native("token_logprobs", x) for x in given)
    return (_op if native else _apart)(*given, targets, temperature)


def divergence_reference(hidden, weight, ref_hidden, ref_weight, temperature=1.0):
    """The KL alone in plain torch, some rows at a time."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    parts = []
    for one, other in zip(hidden.split(ROWS), ref_hidden.split(ROWS)):
        p, q = ((h.to(wide) @ w.to(wide).T / temperature).log_softmax(-1) for h, w in ((one, weight), (other, ref_weight)))
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)


def _apart(hidden, weight, ref_hidden, ref_weight, targets, temperature):
    logprobs, entropy = loss.token_logprobs(hidden, weight, targets, temperature)
    ref_logprobs = loss.token_logprobs(ref_hidden, ref_weight, targets, temperature)[0]
    return logprobs, entropy, ref_logprobs, divergence_reference(hidden, weight, ref_hidden, ref_weight, temperature)


def _run(hidden, weight, ref_hidden, ref_weight, targets, temperature):
    fused = [loss.fused(hidden), loss.fused(ref_hidden)]
    if not backend.on_cpu(hidden) or fused[0] != fused[1]:
        return _apart(hidden, weight, ref_hidden, ref_weight, targets, temperature)
    targets, found = targets.contiguous(), [rows_like(hidden), rows_like(hidden)]
    kl = hidden.new_empty(hidden.shape[:1], dtype=torch.float32)
    (_both if fused[0] else _chunks)((hidden, weight), (ref_hidden, ref_weight), targets, temperature, found, kl)
    return *found[0][:2], found[1][0], kl


def _both(policy, reference, targets, temperature, found, kl):
    given = [[x.to(torch.bfloat16).contiguous() for x in model] for model in (policy, reference)]
    models = [(h.shape[1], *(x.data_ptr() for x in (h, w, *rows))) for (h, w), rows in zip(given, found)]
    _C.head_divergence(len(kl), len(policy[1]), targets.data_ptr(), temperature, *models, kl.data_ptr(), torch.get_num_threads())


def _chunks(policy, reference, targets, temperature, found, kl):
    models = [[x.float() for x in model] for model in (policy, reference)]
    N, V = len(kl), len(policy[1])
    rows, chunks = loss.row_chunks(N, V)
    room = kl.new_empty(2, rows, V)
    for at in chunks:
        logits = [loss.chunk_logits(h[at], w, part[: at.stop - at.start]) for (h, w), part in zip(models, room)]
        for x, of in zip(logits, found):
            reduce_logits(False, x, targets[at], temperature, *(y[at] for y in of), (of[2],) * 3)
        lses = [of[2][at].data_ptr() for of in found]
        _C.divergence(len(logits[0]), V, *(x.data_ptr() for x in logits), temperature, *lses, kl[at].data_ptr(), torch.get_num_threads())


_op = backend.define(
    "token_divergence(Tensor hidden, Tensor weight, Tensor ref_hidden, Tensor ref_weight, Tensor targets, float temperature) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    lambda hidden, weight, ref_hidden, ref_weight, targets, temperature: tuple(
        hidden.new_empty(hidden.shape[:1], dtype=torch.float32) for _ in range(4)
    ),
)
