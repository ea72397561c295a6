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

    def draw(self, logits: Tensor, requests: Tensor, steps: Tensor, mask: Optional[Tensor] = None) -> Drawn:
        """logits: (B, V), changed in place by bias and penalty; requests, steps: (B,) int64; mask: as ops.sample's.

        Raises ValueError as ops.sample does."""
        if not self.filters:
            return Drawn(*ops.sample(logits, self.seed, requests, steps, mask=mask, **self.settings))
        policy = logits[self._filtered]
        for f in self.filters:
            f.apply(logits)
        drawn = Drawn(*ops.sample(logits, self.seed, requests, steps, mask=mask, **self.settings))
        for f in self.filters:
            f.see(drawn.tokens)
        drawn.unfiltered[self._filtered] = self._logprobs(policy, drawn.tokens[self._filtered]).to(drawn.unfiltered.dtype)
        return drawn

    def _logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Of tokens that the rows with filters have drawn, under softmax(logits / temperature)."""
        temperature = self.settings.get("temperature", 1.0)
        if isinstance(temperature, Tensor):
            temperature = temperature[self._filtered, None]
            logits, temperature = logits.double() / temperature.masked_fill(temperature == 0, 1), 1.0
        return ops.logits_logprobs(logits, tokens.clamp(min=0), temperature or 1.0)[0]


def top_logprobs(logits: Tensor, k: int, **settings) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of the distribution that ops.sample draws from with these settings: (ids (B, k) int64,
    logprobs (B, k) in nats), the most probable first; where fewer are left, the other log-probs are -inf.

    >>> ids, logprobs = top_logprobs(torch.tensor([[0.0, 3.0, 1.0]]), 2, top_k=1)
    >>> ids[0, 0].item(), logprobs.tolist()
    (1, [[0.0, -inf]])
    """
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top_logprobs: expected k from 1 to V = {logits.shape[1]}, got {k}")
    logprobs, ids = filtered_logprobs(logits, **settings)[0].topk(k)
    return ids, logprobs


def entropy(logits: Tensor, **settings) -> Tensor:
    """Of the distribution that ops.sample draws from with these settings, nats, (B,).

    >>> round(float(entropy(torch.zeros(1, 8), top_k=8).exp()), 4)
    8.0
    """
    return torch.special.entr(filtered_logprobs(logits, **settings)[0].exp()).sum(-1)
