"""nanorlhf: tokenizer, pretraining, supervised fine-tuning, reward model and PPO in one small package.

Shapes, everywhere:  B sequences, N tokens of all of them laid end to end, T tokens of one, C model width,
H query heads, Hkv key/value heads, D head width, V vocabulary. A batch is ragged: ``tokens (N,)`` with
``cu_seqlens (B+1,)``; there is no padding.
"""

import torch  # noqa: F401  before _C, so that both use torch's copy of OpenMP

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "nanorlhf's native module is not built here; build it with: pip install -e . (in the checkout)") from error

from . import ops
from .assistant import Assistant, load
from .tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["Assistant", "Tokenizer", "load", "ops"]
