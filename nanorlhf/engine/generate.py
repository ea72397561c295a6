"""Batched decoding: prompts in, sampled continuations out. Rollouts, evaluations and chat all come through here."""

from dataclasses import dataclass, field
from typing import Callable, List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..model import Model
from .cache import KVCache
from .sample import Sampler, SamplingConfig


@dataclass
class Completion:
    """One continuation. ``ids`` ends in the stop token when ``finished``; ``logprobs`` are those of the sampler."""

    ids: List[int] = field(default_factory=list)
    logprobs: List[float] = field(default_factory=list)
    finished: bool = False


def ragged(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Lists of token ids → tokens (N,) int64 and cu_seqlens (B+1,) int32.

    >>> ragged([[5, 6], [7]])
    (tensor([5, 6, 7]), tensor([0, 2, 3], dtype=torch.int32))
    """
    tokens = np.fromiter((t for s in sequences for t in s), dtype=np.int64)
    cu_seqlens = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum([len(s) for s in sequences], out=cu_seqlens[1:])
    return torch.from_numpy(tokens).to(device), torch.from_numpy(cu_seqlens).to(device)


@torch.no_grad()
@ops.weights_held()
def generate(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, n: int = 1, stop: Sequence[int] = (),
             sampling: SamplingConfig = SamplingConfig(), seed: int = 0, batch: int = 384,
             on_token: Optional[Callable[[int, int], None]] = None, first_request: int = 0) -> List[Completion]:
    """n continuations of each prompt, in order: those of prompt i are at [i*n, (i+1)*n).

    max_new_tokens: most tokens sampled for one; it is cut where the model's context ends. stop: ids that end a
    continuation (the id is kept). seed: request i draws from stream (seed, first_request + i) whatever the batch. batch:
    most sequences decoded together. on_token(request, id) is called for each token as it is drawn.

    Errors: ValueError for an empty prompt, or one that leaves no room in the context.
    """
    context = model.config.context
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens; it needs 1 to {context - 1} "
                             f"for a context of {context}")
    if max_new_tokens < 1 or n < 1:
        raise ValueError(f"generate: max_new_tokens and n must be at least 1, got {max_new_tokens} and {n}")
    results = [Completion() for _ in range(len(prompts) * n)]
    size = max(1, batch // n)
    for first in range(0, len(prompts), size):
        _decode(model, prompts[first:first + size], first * n, results, max_new_tokens, n, set(stop), sampling, seed,
                on_token, first_request)
    return results


def _decode(model: Model, prompts, first: int, results: List[Completion], max_new_tokens: int, n: int, stop: set,
            sampling: SamplingConfig, seed: int, on_token, stream: int) -> None:
    """Decode the requests of these prompts; the first of them is request ``first``."""
    tokens, cu_seqlens = ragged(prompts, model.device)
    room = [min(max_new_tokens, model.config.context - len(p)) for p in prompts for _ in range(n)]
    cache = KVCache(max(room))
    hidden = cache.prefill(model, tokens, cu_seqlens)[cu_seqlens[1:].long() - 1]
    requests = torch.arange(len(prompts) * n, device=model.device)
    if n > 1:  # the prompt is run once for all of its continuations, and its keys and values are kept once
        cache.select(requests // n)
        hidden = hidden[requests // n]
    fixed = ops.backend.is_deterministic()
    policy = fixed and sampling.temperature > 0 and sampling == SamplingConfig(sampling.temperature)  # no filter
    weight = model.head_weight.to(hidden.dtype)  # logits in fp32, as the training's loss has them
    weight = weight if fixed else weight.float()
    sampler = None
    for step in range(max_new_tokens):
        if sampler is None:
            seen = [[*prompts[r // n], *results[first + r].ids] for r in requests.tolist()] if sampling.repetition_penalty != 1 else None
            sampler = Sampler([sampling] * len(requests), seed, len(weight), seen, model.device)
        logits = ops.matmul(hidden, weight, dtype=torch.float32) if fixed else hidden.float() @ weight.T
        drawn, logprobs, *_ = sampler.draw(logits, requests + first + stream, torch.full_like(requests, step))
        if policy:  # to the last bit what training will find
            logprobs = ops.token_logprobs(hidden, model.head_weight, drawn, sampling.temperature)[0]
        alive = _record(results, room, first, requests.tolist(), drawn.tolist(), logprobs.tolist(), stop, on_token)
        if not alive:
            return
        if len(alive) < len(requests) and (len(alive) <= 0.8 * len(requests) or len(requests) <= 8):
            rows = torch.tensor(alive, device=model.device)
            requests, drawn, sampler = requests[rows], drawn[rows], None
            cache.select(rows)
        hidden = cache.step(model, drawn)


def _record(results: List[Completion], room: List[int], first: int, requests: List[int], drawn: List[int],
            logprobs: List[float], stop: set, on_token) -> List[int]:
    """Append each live request's token; return the rows whose request goes on."""
    alive = []
    for row, (request, token, logprob) in enumerate(zip(requests, drawn, logprobs)):
        result = results[first + request]
        if result.finished or len(result.ids) >= room[request]:
            continue
        result.ids.append(token)
        result.logprobs.append(logprob)
        if on_token is not None:
            on_token(first + request, token)
        result.finished = token in stop
        if not result.finished and len(result.ids) < room[request]:
            alive.append(row)
    return alive
