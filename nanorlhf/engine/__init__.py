"""Batched decoding with a key/value cache."""

from .filters import LogitFilter
from .generate import Completion, generate
from .sample import Sampler, SamplingConfig, entropy, top_logprobs

__all__ = ["Completion", "LogitFilter", "Sampler", "SamplingConfig", "entropy", "generate", "top_logprobs"]
