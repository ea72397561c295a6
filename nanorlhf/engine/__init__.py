"""Batched decoding over a paged cache of keys and values."""

from .engine import Engine
from .generate import generate
from .request import Completion, Handle, Request
from .sample import SamplingConfig

__all__ = ["Completion", "Engine", "Handle", "Request", "SamplingConfig", "generate"]
