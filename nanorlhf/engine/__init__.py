"""Batched decoding with a key/value cache."""

from .generate import Completion, generate
from .sample import SamplingConfig

__all__ = ["Completion", "SamplingConfig", "generate"]
