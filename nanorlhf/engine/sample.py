"""From logits to a token, and the log-probability under the distribution that it was really drawn from."""

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 1.0  # 0 takes the most probable token
    top_k: int = 0  # keep the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # then keep the smallest set of tokens with at least this probability

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"sampling: temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"sampling: top_k must be 0 or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: top_p must be above 0 and at most 1, got {self.top_p}")


def _signed(x: int) -> int:
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (Steele et al. 2014, §5): products wrap, shifts are logical."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))
        if factor is not None:
            x = x * _signed(factor)
    return x


def uniforms(seed: int, requests: Tensor, step: Tensor) -> Tensor:
    """Counter-based random numbers in [0, 1), float64 (B,): a pure function of (seed, request, step), so a request
    draws the same numbers whatever batch it is in.

    >>> one, three = torch.tensor([7]), torch.tensor([2, 7, 9])
    >>> bool(uniforms(0, one, one)[0] == uniforms(0, three, torch.tensor([5, 7, 1]))[1])
    True
    """
    golden = 0x9E3779B97F4A7C15
    state = _mix(requests + _signed((seed + 1) * golden))
    state = _mix(state + (step + 1) * _signed(golden))
    return ((state >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def _filtered(logits: Tensor, config: SamplingConfig) -> Tensor:
    """(B, V) log-probabilities after temperature, top-k and top-p; −inf where a token is cut."""
    logprobs = torch.log_softmax(logits.float() / config.temperature, dim=-1)
    V = logits.shape[-1]
    if (0 < config.top_k < V) or config.top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(ordered, dtype=torch.bool)
        if 0 < config.top_k < V:
            keep[:, config.top_k:] = False
            ordered = torch.log_softmax(ordered.masked_fill(~keep, -torch.inf), dim=-1)
        if config.top_p < 1:  # a token stays while the mass before it is below top_p; the first always does
            p = ordered.exp()
            keep &= p.cumsum(-1) - p < config.top_p
        mask = torch.zeros_like(keep).scatter(-1, order, keep)
        logprobs = torch.log_softmax(logprobs.masked_fill(~mask, -torch.inf), dim=-1)
    return logprobs


def sample(logits: Tensor, u: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """logits (B, V) and uniform numbers u (B,) → tokens (B,) and their float32 log-probabilities (B,) under the
    filtered distribution, by inversion of its cumulative sum."""
    if config.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros(len(tokens), device=logits.device)
    logprobs = _filtered(logits, config)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64 if logits.shape[-1] > 65536 else None)
    point = (u.to(cumulative) * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, point, right=True).squeeze(-1)
    # When rounding puts the point at the very end, the last token that has any probability is meant.
    last = logits.shape[-1] - 1 - (logprobs > -torch.inf).flip(-1).to(torch.uint8).argmax(-1)
    tokens = torch.minimum(tokens, last)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)
