"""The ops that the models and the training are made of: each one file with its contract, its torch reference, its
gradient and its dispatch. backend.py knows what can run here."""

from nanorlhf.ops import backend
from nanorlhf.ops.attention import attention, attention_decode
from nanorlhf.ops.loss import logits_logprobs, next_token_positions, token_logprobs
from nanorlhf.ops.norm import add_rms_norm, rms_norm
from nanorlhf.ops.rope import positions_from_cu_seqlens, rope, rope_qkv
from nanorlhf.ops.softmax import softmax
from nanorlhf.ops.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "attention",
    "attention_decode",
    "logits_logprobs",
    "next_token_positions",
    "positions_from_cu_seqlens",
    "rms_norm",
    "rope",
    "rope_qkv",
    "softmax",
    "swiglu",
    "token_logprobs",
]
