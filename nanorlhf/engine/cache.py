"""The keys and values of every layer for a batch of growing sequences."""

import torch
from torch import Tensor

from .. import ops
from ..model import Model


class KVCache:
    """k, v: (layers, B, T, Hkv, D); ``lengths (B,)`` int32 says how many keys of a sequence are filled."""

    def __init__(self, model: Model, sequences: int, tokens: int):
        c = model.config
        shape = (c.layers, sequences, tokens, c.kv_heads, c.head_size)
        self.k = torch.empty(shape, dtype=model.compute_dtype, device=model.device)
        self.v = torch.empty_like(self.k)
        self.lengths = torch.zeros(sequences, dtype=torch.int32, device=model.device)

    def prefill(self, model: Model, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Run whole prompts, one for each sequence of the cache: tokens (N,) → hidden states (N, C)."""
        lengths = cu_seqlens[1:] - cu_seqlens[:-1]
        positions = ops.positions_from_cu_seqlens(cu_seqlens)
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), lengths)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer, rows, positions] = k
            self.v[layer, rows, positions] = v
            return ops.attention(q, k, v, cu_seqlens)

        hidden = model.hidden(tokens, positions, attend)
        self.lengths = lengths.to(torch.int32)
        return hidden

    def step(self, model: Model, tokens: Tensor) -> Tensor:
        """One more token of every sequence: tokens (B,) → hidden states (B, C)."""
        positions = self.lengths.long()
        rows = torch.arange(len(positions), device=tokens.device)
        lengths = self.lengths + 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer, rows, positions] = k
            self.v[layer, rows, positions] = v
            return ops.attention_decode(q, self.k[layer], self.v[layer], lengths)

        hidden = model.hidden(tokens, positions, attend)
        self.lengths = lengths
        return hidden

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; one named twice is copied."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.lengths = self.lengths[rows]
