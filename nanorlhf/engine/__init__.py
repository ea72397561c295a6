"""Batched decoding over a paged cache of keys and values."""

from .engine import Engine
from .generate import generate
from .request import Completion, Constraint, Handle, Request
from .sample import SamplingConfig

__all__ = ["Completion", "Constraint", "Engine", "Handle", "Request", "SamplingConfig", "generate"]
