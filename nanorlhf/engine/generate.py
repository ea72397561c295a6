"""Batched decoding: prompts in, sampled continuations out. Rollouts, evaluations and chat all come through here."""

from typing import Callable, List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from ..model import Model
from .engine import Engine
from .request import Completion, Request
from .sample import SamplingConfig

PAGE_SIZE = 16


def ragged(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Lists of token ids → tokens (N,) int64 and cu_seqlens (B+1,) int32.

    >>> ragged([[5, 6], [7]])
    (tensor([5, 6, 7]), tensor([0, 2, 3], dtype=torch.int32))
    """
    tokens = np.fromiter((t for s in sequences for t in s), dtype=np.int64)
    cu_seqlens = np.zeros(len(sequences) + 1, dtype=np.int32)
    np.cumsum([len(s) for s in sequences], out=cu_seqlens[1:])
    return torch.from_numpy(tokens).to(device), torch.from_numpy(cu_seqlens).to(device)


def generate(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, n: int = 1, stop: Sequence[int] = (),
             sampling: SamplingConfig = SamplingConfig(), seed: int = 0, batch: int = 384,
             on_token: Optional[Callable[[int, int], None]] = None, first_request: int = 0, engine: Optional[Engine] = None,
             **asked) -> List[Completion]:
    """n continuations of each prompt, in order: those of prompt i are at [i*n, (i+1)*n).

    max_new_tokens: most tokens sampled for one; it is cut where the model's context ends. stop: ids that end a
    continuation (the id is kept). seed: request i draws from stream (seed, first_request + i) whatever the batch. batch:
    most sequences decoded together. on_token(request, id) is called for each token as it is drawn. engine: of this model, with
    what it remembers of earlier prompts; one is made for the call, with as much cache as it can use, unless given. asked: more of
    Request's fields, for all alike.

    Errors: ValueError for an empty prompt, or one that leaves no room in the context.
    """
    context = model.config.context
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens; it needs 1 to {context - 1} "
                             f"for a context of {context}")
    if max_new_tokens < 1 or n < 1:
        raise ValueError(f"generate: max_new_tokens and n must be at least 1, got {max_new_tokens} and {n}")
    if not prompts:
        return []
    requests, stop = [], tuple(stop)
    for i, prompt in enumerate(p for p in prompts for _ in range(n)):
        said = None if on_token is None else lambda token, i=i: on_token(i, token)
        requests.append(Request(prompt, max_new_tokens, sampling, seed, first_request + i, stop, on_token=said, **asked))
    if engine is None:
        slots = min(batch, len(requests))
        engine = Engine(model, slots=slots, pool_tokens=_most_tokens(prompts, max_new_tokens, n, slots, context), page_size=PAGE_SIZE)
    return engine.run(requests)


def _most_tokens(prompts: Sequence[Sequence[int]], max_new_tokens: int, n: int, slots: int, context: int) -> int:
    """Of cache, that ``slots`` of these continuations can need at a time: full pages of a prompt once, the others each."""
    lengths = np.array([len(p) for p in prompts])
    full = lengths // PAGE_SIZE
    own = -(-(lengths + np.minimum(max_new_tokens, context - lengths) - 1) // PAGE_SIZE) - full
    together = min(len(prompts), -(-slots // n) + 1)  # prompts that can be in the slots at a time
    pages = np.sort(full)[::-1][:together].sum() + np.sort(np.repeat(own, n))[::-1][:slots].sum()
    return int(pages) * PAGE_SIZE
