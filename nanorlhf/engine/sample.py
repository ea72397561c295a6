"""How a token is drawn from the logits: a request's settings, checked once, and a batch's, stacked once while its rows stay."""

from dataclasses import dataclass
from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from .. import ops
from ..ops.sample import DEFAULTS, ROW_DTYPES, check_sampling, filtered_logprobs
from .filters import check_filters, filters_of


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 1.0  # 0 takes the most probable token
    top_k: int = 0  # keep the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # then keep the smallest set of tokens with at least this probability
    min_p: float = 0.0  # then keep those with at least this share of the most probable one's probability
    repetition_penalty: float = 1.0  # before all that: how much less of tokens that prompt or output have; 1: no less
    logit_bias: tuple[tuple[int, float], ...] = ()  # before that: (id, what is added to its logit), -inf bans it

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        check_filters(self.repetition_penalty, self.logit_bias)


class Drawn(NamedTuple):
    tokens: Tensor  # (B,) int64
    logprobs: Tensor  # (B,) under what they were drawn from, nats
    unfiltered: Tensor  # (B,) under softmax(logits / temperature) before any filter or mask; temperature 1 where it is 0
    kept: Tensor  # (B,) the share of probability that the mask allows, after bias and penalty
    top: Optional[tuple[Tensor, Tensor]] = None  # (ids, logprobs), (B, k) each, of what they were drawn from
    entropy: Optional[Tensor] = None  # (B,) of what they were drawn from, nats


class Sampler:
    """Draws a token for each row of a batch. To be made anew when other rows make up the batch, not every step.

    configs: (B,). seeds: one for all, or (B,), of which a row's random numbers are made with its request and step. seen: (B,)
    of the ids of prompt and output so far; asked for only if there is a repetition penalty, and kept up from then on.

    >>> sampler = Sampler([SamplingConfig(temperature=0), SamplingConfig(0, logit_bias=((1, 9.0),))], seeds=3, vocab_size=2)
    >>> sampler.settings
    {'temperature': 0}
    >>> sampler.draw(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([7, 8]), torch.tensor([0, 0])).tokens.tolist()
    [0, 1]
    """

    def __init__(self, configs: Sequence[SamplingConfig], seeds: int | Sequence[int], vocab_size: int,
                 seen: Optional[Sequence[Sequence[int]]] = None, device: torch.device | str = "cpu"):
        def stacked(name, values):  # a number where all agree, which costs least
            if all(x == values[0] for x in values):
                return values[0] if values else DEFAULTS[name]
            return torch.tensor(values, dtype=ROW_DTYPES[name], device=device)

        several = hasattr(seeds, "__len__")
        self.seed = stacked("seed", [(int(x) + 2**63) % 2**64 - 2**63 for x in seeds]) if several else seeds
        found = {name: stacked(name, [getattr(c, name) for c in configs]) for name in DEFAULTS if name != "seed"}
        # What ops.sample, top_logprobs and entropy take as keywords.
        self.settings = {name: x for name, x in found.items() if isinstance(x, Tensor) or x != DEFAULTS[name]}
        self.filters = filters_of([c.repetition_penalty for c in configs], [c.logit_bias for c in configs], seen, vocab_size, device)
        self._filtered = torch.cat([f.rows for f in self.filters]).unique() if self.filters else None

    def draw(self, logits: Tensor, requests: Tensor, steps: Tensor, mask: Optional[Tensor] = None, top: int = 0,
             with_entropy: bool = False) -> Drawn:
        """logits: (B, V), left as they are (bias and penalty are taken back); requests, steps: (B,) int64; mask: as ops.sample's.
        top: how many of the most probable tokens to return.

        Raises ValueError as ops.sample does."""
        logits = logits.detach()
        for f in self.filters:
            f.apply(logits)
        try:
            drawn = Drawn(*ops.sample(logits, self.seed, requests, steps, mask=mask, **self.settings))
            if top:
                drawn = drawn._replace(top=top_logprobs(logits, top, mask=mask, **self.settings))
            if with_entropy:
                drawn = drawn._replace(entropy=entropy(logits, mask=mask, **self.settings))
        finally:
            for f in reversed(self.filters):
                f.undo(logits)
        for f in self.filters:
            f.see(drawn.tokens)
        if self.filters:
            drawn.unfiltered[self._filtered] = self._policy(logits, drawn.tokens).to(drawn.unfiltered.dtype)
        return drawn

    def _policy(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Log-probs, under softmax(logits / temperature), of the tokens of the rows with filters."""
        temperature = self.settings.get("temperature", 1.0)
        alone = isinstance(temperature, Tensor)
        if len(self._filtered) < len(logits):  # those alone
            logits, tokens = logits[self._filtered], tokens[self._filtered]
            temperature = temperature[self._filtered] if alone else temperature
        temperature = temperature.masked_fill(temperature == 0, 1) if alone else temperature or 1.0
        return ops.logits_logprobs(*_scaled(logits, tokens.clamp(min=0), temperature))[0]


def _plain(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, mask=None) -> bool:
    """Whether these settings leave every token its share of softmax(logits / temperature)."""
    if mask is not None or any(isinstance(x, Tensor) for x in (top_k, top_p, min_p)) or (top_k, top_p, min_p) != (0, 1, 0):
        return False
    return bool((temperature > 0).all()) if isinstance(temperature, Tensor) else temperature > 0


def _scaled(logits: Tensor, targets: Tensor, temperature=1.0, **_):
    """The arguments of ops.logits_logprobs, which takes one temperature for all: logits are divided before, so that it makes no
    difference to a row's bits whether its temperature is all rows' or its own."""
    if not isinstance(temperature, Tensor):
        if temperature == 1:
            return logits, targets, 1.0
        temperature = torch.full_like(targets, temperature, dtype=torch.float64)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide) / temperature.to(wide)[:, None], targets, 1.0


def top_logprobs(logits: Tensor, k: int, **settings) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of the distribution that ops.sample draws from with these settings: (ids (B, k) int64,
    logprobs (B, k) in nats), the most probable first; where fewer are left, the other log-probs are -inf.

    >>> ids, logprobs = top_logprobs(torch.tensor([[0.0, 3.0, 1.0]]), 2, top_k=1)
    >>> ids[0, 0].item(), logprobs.tolist()
    (1, [[0.0, -inf]])
    """
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top_logprobs: expected k from 1 to V = {logits.shape[1]}, got {k}")
    if not _plain(**settings):
        logprobs, ids = filtered_logprobs(logits, **settings)[0].topk(k)
        return ids, logprobs
    values, ids = logits.topk(k)
    scaled, first, temperature = _scaled(logits, ids[:, 0], **settings)
    best = ops.logits_logprobs(scaled, first, temperature)[0]
    return ids, best[:, None] + (scaled.gather(1, ids) - scaled.gather(1, ids[:, :1])).to(best.dtype) / temperature


def entropy(logits: Tensor, **settings) -> Tensor:
    """Of the distribution that ops.sample draws from with these settings, nats, (B,).

    >>> round(float(entropy(torch.zeros(1, 8), top_k=8).exp()), 4)
    8.0
    """
    if _plain(**settings):
        return ops.logits_logprobs(*_scaled(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64), **settings))[1]
    return torch.special.entr(filtered_logprobs(logits, **settings)[0].exp()).sum(-1)
