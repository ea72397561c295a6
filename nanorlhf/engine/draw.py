"""From logits to the next token of each row, with what is reported about it."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from .. import ops
from ..model import Model
from .batch import CONSTRAINED, ENTROPY, FLAGS, STEP, TOP, Batch
from .sample import Sampler, entropy, top_logprobs


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """(R, V) fp32, as training's are, of hidden states (R, C); head: (V, C) in their type where deterministic is on, else in fp32."""
    return ops.matmul(hidden, head, dtype=torch.float32) if ops.backend.is_deterministic() else hidden.float() @ head.T


def draw(model: Model, logits: Tensor, hidden: Optional[Tensor], batch: Batch, low: int) -> Tuple[Tensor, Tensor, Optional[tuple]]:
    """The next tokens of the rows from ``low`` on, of logits (R, V) and, where deterministic is on, hidden states (R, C): tokens (R,);
    marks (M, R) fp32, which are log-probs under what was drawn from, unfiltered ones, kept mass and, if a row asks for it, entropy; and the most probable tokens, if a row asks
    for them, (ids, log-probs) (R, k). The latter two are of softmax(logits / temperature), and at temperature 0 of softmax(logits)."""
    sampler, streams = batch.sampler_from(low)
    steps, more, top = batch.on_device(batch.ints[STEP, low:batch.size]), [], None
    if batch.flags & (ENTROPY | TOP):
        temperature = sampler.settings.get("temperature", 1.0)
        policy = temperature.masked_fill(temperature == 0, 1) if isinstance(temperature, Tensor) else temperature or 1.0
        if batch.flags & ENTROPY:
            more.append(entropy(logits, temperature=policy))
        if batch.flags & TOP:
            most = max(h.request.top_logprobs for h in batch.handles[low:])
            top = top_logprobs(logits, min(most, batch.vocab_size), temperature=policy) if most else None
    drawn = sampler.draw(logits, streams, steps, batch.mask(low) if batch.flags & CONSTRAINED else None)
    if ops.backend.is_deterministic():
        _as_trained(model, hidden, batch, low, sampler, drawn)
    return drawn.tokens, torch.stack((drawn.logprobs, drawn.unfiltered, drawn.kept, *more)), top


def _as_trained(model: Model, hidden: Tensor, batch: Batch, low: int, sampler: Sampler, drawn) -> None:
    """For rows that draw from the policy itself, to the last bit the log-probs that training will find."""
    rows: dict[float, list] = {}
    for r, handle in enumerate(batch.handles[low:]):
        s = handle.request.sampling
        whole = (s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.logit_bias) == (0, 1, 0, 1, ())
        if whole and s.temperature > 0 and handle.request.constraint is None:
            rows.setdefault(s.temperature, []).append(r)
    for temperature, own in rows.items():
        i = slice(None) if len(own) == len(hidden) else torch.tensor(own, device=hidden.device)
        drawn.logprobs[i] = drawn.unfiltered[i] = ops.token_logprobs(hidden[i], model.head_weight, drawn.tokens[i], temperature)[0]
