"""Batched decoding over a paged cache of keys and values."""

from .engine import Engine
from .filters import LogitFilter
from .generate import generate
from .rank import Ranker, by_likelihood, by_score, by_vote
from .request import Completion, Constraint, Handle, Request
from .sample import Sampler, SamplingConfig, entropy, top_logprobs
from .speculate import Speculation, speculate

__all__ = ["Completion", "Constraint", "Engine", "Handle", "LogitFilter", "Ranker", "Request", "Sampler", "SamplingConfig", "Speculation",
           "by_likelihood", "by_score", "by_vote", "entropy", "generate", "speculate", "top_logprobs"]
