"""The decoder: pre-norm, RMSNorm, rotary positions, grouped-query attention, SwiGLU; or GPT-2's variant.

Parameters carry the names and shapes of Hugging Face's Llama (Qwen3 with ``qk_norm``), so a saved model is one of
theirs. A batch is ragged: ``tokens (N,)`` of B sequences end to end and ``cu_seqlens (B+1,)``.
Source: Touvron et al. 2023 (LLaMA) §2.2; Radford et al. 2019 (GPT-2) §2.3.
"""

import math
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .config import ModelConfig

# attend(layer, q (N,H,D), k (N,Hkv,D), v (N,Hkv,D)) -> (N,H,D). Training attends within the batch; decoding, to a cache.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Linear(nn.Linear):
    """A linear map whose fp32 master weight is cast to the input's type for the product."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self)[0]


def linear(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Several linear maps of one input, as one product."""
    return ops.linear(x, [l.weight for l in layers], [l.bias for l in layers if l.bias is not None])


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        return self.with_sum(x, residual)[0]

    def with_sum(self, x: Tensor, residual: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum."""
        if residual is None:
            return ops.rms_norm(x, self.weight, self.eps), x
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        return self.with_sum(x, residual)[0]

    def with_sum(self, x: Tensor, residual: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        x = x if residual is None else x + residual
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype), x


def _norm(config: ModelConfig) -> nn.Module:
    kind = LayerNorm if config.variant == "gpt2" else RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, D, bias = config.hidden_size, config.head_size, config.variant == "gpt2"
        self.layer, self.heads, self.kv_heads, self.head_size = layer, config.heads, config.kv_heads, D
        self.q_proj = Linear(C, config.heads * D, bias=bias)
        self.k_proj = Linear(C, config.kv_heads * D, bias=bias)
        self.v_proj = Linear(C, config.kv_heads * D, bias=bias)
        self.o_proj = Linear(config.heads * D, C, bias=bias)
        self.rope_base = config.rope_base if config.variant == "llama" else None
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        q, k, v = (y.view(len(y), y.shape[1] // self.head_size, self.head_size) for y in linear(x, self.q_proj, self.k_proj, self.v_proj))
        if self.rope_base is not None:
            weights = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.q_norm is not None else ()
            q, k, v = ops.rope_qkv(q, k, v, positions, self.rope_base, *weights)
        elif self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))


class SwiGLU(nn.Module):
    """Shazeer 2020, eq. 6: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, M = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, M, bias=False)
        self.up_proj = Linear(C, M, bias=False)
        self.down_proj = Linear(M, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(*linear(x, self.gate_proj, self.up_proj)))


class GELU(nn.Module):
    """GPT-2's MLP, with the tanh form of GELU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gelu(self.up_proj(x)))


def gelu(x: Tensor) -> Tensor:
    """GELU's tanh form. torch's kernel rounds an element by where it stands in the batch, so the deterministic one is x · σ(z) with
    z = x · slope, as SwiGLU's silu(z) / slope."""
    if not ops.backend.is_deterministic():
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    slope = math.sqrt(8 / math.pi) * (1 + 0.044715 * wide * wide)
    return ops.swiglu(wide * slope, 1 / slope).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = _norm(config)
        self.mlp = GELU(config) if config.variant == "gpt2" else SwiGLU(config)

    def forward(self, x: Tensor, residual: Optional[Tensor], positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """(x, residual) → the same two after this block; their sum, the residual stream, is formed by the next norm."""
        x, residual = self.input_layernorm.with_sum(x, residual)
        x, residual = self.post_attention_layernorm.with_sum(self.self_attn(x, positions, attend), residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.variant == "gpt2":
            self.embed_positions = nn.Embedding(config.context, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = _norm(config)


class Model(nn.Module):
    """A language model, with a scalar head beside the output when ``scalar_head`` is set (reward and value models).

    Errors: ValueError when a sequence is longer than ``config.context``.
    """

    def __init__(self, config: ModelConfig, scalar_head: bool = False, dtype: torch.dtype = torch.float32,
                 seed: int = 0):
        super().__init__()
        self.config, self.compute_dtype = config, dtype
        self.model = Decoder(config)
        if not config.tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if scalar_head:
            self.score = Linear(config.hidden_size, 1, bias=False)
        self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal of deviation 1/sqrt(fan-in) for matrices, with the two maps that write to the residual stream
        scaled by 1/sqrt(2 layers) (GPT-2 §2.3); 0.02 for embeddings; a scalar head starts at N(0, 1/(C+1))
        (Ziegler et al. 2019 §2.1)."""
        residual = 1 / math.sqrt(2 * self.config.layers)
        for name, p in self.named_parameters():
            if p.ndim < 2:
                if name.endswith("bias"):
                    p.zero_()
                continue
            if "embed" in name or name.startswith("lm_head"):
                deviation = 0.02
            elif name == "score.weight":
                deviation = 1 / math.sqrt(p.shape[1] + 1)
            else:
                deviation = 1 / math.sqrt(p.shape[1])
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    deviation *= residual
            p.copy_(torch.randn(p.shape, generator=generator) * deviation)

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the output matrix."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens (N,), positions (N,) → hidden states after the last norm (N, C), with the given attention."""
        x = ops.embedding(tokens, self.model.embed_tokens.weight, self.compute_dtype)
        if self.config.variant == "gpt2":
            x = x + ops.embedding(positions, self.model.embed_positions.weight, x.dtype)
        residual = None
        for block in self.model.layers:
            x, residual = block(x, residual, positions, attend)
        return self.model.norm(x, residual)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """tokens (N,), cu_seqlens (B+1,) → hidden states after the last norm (N, C); causal within each sequence."""
        check_lengths(cu_seqlens, self.config.context)
        positions = ops.positions_from_cu_seqlens(cu_seqlens)
        return self.hidden(tokens, positions, lambda _, q, k, v: ops.attention(q, k, v, cu_seqlens))

    def logprobs(self, tokens: Tensor, cu_seqlens: Tensor, where: Optional[Tensor] = None,
                 temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy, in nats, of each token after the first of its sequence.

        where: (M,) positions i whose *next* token is scored; default: every one there is
        (``ops.next_token_positions``). Returns two float32 (M,).
        """
        if where is None:
            where = ops.next_token_positions(cu_seqlens)
        hidden = self(tokens, cu_seqlens)[where]
        return ops.token_logprobs(hidden, self.head_weight, tokens[where + 1], temperature)

    def scores(self, tokens: Tensor, cu_seqlens: Tensor, where: Tensor) -> Tensor:
        """The scalar head at positions ``where (M,)``: float32 (M,)."""
        return self.score(self(tokens, cu_seqlens)[where]).float().squeeze(-1)


def check_lengths(cu_seqlens: Tensor, context: int) -> None:
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if len(cu_seqlens) > 1 else 0
    if longest > context:
        raise ValueError(f"model: a sequence of {longest} tokens is longer than the model's context of {context}")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type that "auto" means on this hardware: bfloat16 where it has matrix instructions for it.

    >>> compute_dtype("float32", torch.device("cpu"))
    torch.float32
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        has = ops.backend.cpu_features()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"unknown dtype {name!r}; there are auto, float32, bfloat16")
    return getattr(torch, name)
