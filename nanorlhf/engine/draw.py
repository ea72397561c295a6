"""From logits to the next token of each row, with what is reported about it."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from .. import ops
from ..model import Model
from ..ops import sample
from . import batch as columns
from .batch import Batch


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """(R, V) of hidden states (R, C); fp32, as training's are."""
    return ops.matmul(hidden, head, dtype=torch.float32) if ops.backend.is_deterministic() else hidden.float() @ head.float().T


def draw(model: Model, logits: Tensor, hidden: Optional[Tensor], batch: Batch, low: int, high: int) -> Tuple[Tensor, Tensor, Optional[tuple]]:
    """The next tokens of rows low to high, of logits (R, V) and, where deterministic is on, hidden states (R, C): tokens (R,); marks
    (M, R) fp32, which are log-probs under what was drawn from, unfiltered ones, kept mass and, if a row asks for it, entropy; and
    the most probable tokens (log-probs, ids) (R, k)."""
    raw = logits
    settings = batch.settings if (low, high) == (0, batch.size) else batch.settings_of(low, high)
    seed, streams, *others = settings
    shaped = batch.flags & (columns.PENALISED | columns.BIASED)
    if shaped:
        logits = _shaped(raw, batch, low, high)
    mask = batch.mask(low, high) if batch.flags & columns.CONSTRAINED else None
    steps = batch.on_device(batch.ints[columns.STEP, low:high])
    tokens, logprobs, unfiltered, kept = sample(logits, seed, streams, steps, *others, mask)
    if shaped or batch.flags & (columns.ENTROPY | columns.TOP):
        divisor = batch.on_device(batch.reals[columns.TEMPERATURE, low:high].copy())[:, None].float()
        policy = (raw / divisor.masked_fill(divisor == 0, 1)).log_softmax(-1)
    if shaped:
        altered = batch.on_device(batch.ints[columns.FLAGS, low:high] & (columns.PENALISED | columns.BIASED)) > 0
        unfiltered = torch.where(altered, policy.gather(1, tokens[:, None]).squeeze(1), unfiltered)
    if ops.backend.is_deterministic():
        logprobs, unfiltered = _as_trained(model, hidden, batch, low, high, tokens, logprobs, unfiltered)
    marks, top = [logprobs, unfiltered, kept], None
    if batch.flags & columns.ENTROPY:
        marks.append(-(policy.exp() * policy.clamp(min=torch.finfo(policy.dtype).min)).sum(-1))
    if batch.flags & columns.TOP:
        top = policy.topk(min(max(h.request.top_logprobs for h in batch.handles[low:high]), policy.shape[1]))
    return tokens, torch.stack(marks), top


def _shaped(logits: Tensor, batch: Batch, low: int, high: int) -> Tensor:
    """Logits with each row's biases added, then its repetition penalty."""
    logits, flags = logits.clone(), batch.ints[columns.FLAGS, low:high]
    entries = [(r, *pair) for r in (flags & columns.BIASED).nonzero()[0].tolist() for pair in batch.handles[low + r].request.sampling.logit_bias]
    if entries:
        rows, ids, values = (torch.tensor(x, device=logits.device) for x in zip(*entries))
        logits.index_put_((rows, ids), values.to(logits.dtype), accumulate=True)
    rows = (flags & columns.PENALISED).nonzero()[0]
    if len(rows):
        seen = batch.seen[batch.on_device(batch.ints[columns.RECORD, low + rows])]
        penalty = batch.on_device(batch.reals[columns.PENALTY, low + rows])[:, None].to(logits.dtype)
        rows = batch.on_device(rows)
        own = logits[rows]
        logits[rows] = torch.where(seen, torch.where(own > 0, own / penalty, own * penalty), own)
    return logits


def _as_trained(model, hidden, batch: Batch, low: int, high: int, tokens, logprobs, unfiltered) -> Tuple[Tensor, Tensor]:
    """For rows that draw from the policy itself, to the last bit the log-probs that training will find."""
    ints, reals = batch.ints[:, low:high], batch.reals[:, low:high]
    altered = (ints[columns.FLAGS] & (columns.PENALISED | columns.BIASED | columns.CONSTRAINED)) | (ints[columns.TOP_K] > 0)
    temperature = reals[columns.TEMPERATURE]
    policy = (altered == 0) & (reals[columns.TOP_P] == 1) & (reals[columns.MIN_P] == 0) & (temperature > 0)
    for t in set(temperature[policy].tolist()):
        rows = batch.on_device((policy & (temperature == t)).nonzero()[0])
        logprobs[rows] = unfiltered[rows] = ops.token_logprobs(hidden[rows], model.head_weight, tokens[rows], t)[0]
    return logprobs, unfiltered
