"""The ops that the models and the training are made of: each one file with its contract, its torch reference, its
gradient and its dispatch. backend.py knows what can run here."""

from nanorlhf.ops import backend, optim
from nanorlhf.ops.attention import attention, attention_decode
from nanorlhf.ops.attention_paged import attention_paged
from nanorlhf.ops.decode_step import PackedDecoder, decode_run, decode_step
from nanorlhf.ops.divergence import token_divergence
from nanorlhf.ops.embedding import embedding
from nanorlhf.ops.gae import gae, reward_to_go
from nanorlhf.ops.linear import linear, recast, weights_held
from nanorlhf.ops.loss import cross_entropy, logits_logprobs, next_token_positions, token_logprobs
from nanorlhf.ops.matmul import matmul
from nanorlhf.ops.norm import add_rms_norm, rms_norm
from nanorlhf.ops.ppo_loss import ppo_policy_loss, ppo_value_loss
from nanorlhf.ops.rope import positions_from_cu_seqlens, rope, rope_qkv
from nanorlhf.ops.sample import sample
from nanorlhf.ops.softmax import softmax
from nanorlhf.ops.swiglu import swiglu

__all__ = [
    "PackedDecoder",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "attention_paged",
    "cross_entropy",
    "decode_run",
    "decode_step",
    "embedding",
    "gae",
    "linear",
    "logits_logprobs",
    "matmul",
    "next_token_positions",
    "positions_from_cu_seqlens",
    "ppo_policy_loss",
    "ppo_value_loss",
    "recast",
    "reward_to_go",
    "rms_norm",
    "rope",
    "rope_qkv",
    "sample",
    "softmax",
    "swiglu",
    "token_divergence",
    "token_logprobs",
    "weights_held",
]
