"""The keys and values of every layer for a batch of growing sequences."""

import torch
from torch import Tensor

from .. import ops
from ..model import Model


class KVCache:
    """prompt_k, prompt_v: (layers, N, Hkv, D), the prompts end to end, bounded by ``cu_seqlens``; sequence b goes on from
    prompt ``owner[b]``, however many do. k, v: (layers, B, tokens, Hkv, D), what each sequence has added, of which the
    first ``added`` tokens are filled. ``lengths (B,)`` int32 counts both."""

    def __init__(self, tokens: int):
        """tokens: the most that a sequence can add to its prompt."""
        self.tokens, self.added = tokens, 0

    def prefill(self, model: Model, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Run whole prompts, each the beginning of one sequence: tokens (N,) → hidden states (N, C)."""
        c = model.config
        self.prompt_k, self.prompt_v, self.k, self.v = (
            torch.empty(c.layers, *shape, c.kv_heads, c.head_size, dtype=model.compute_dtype, device=model.device)
            for shape in 2 * [(len(tokens),)] + 2 * [(len(cu_seqlens) - 1, self.tokens)])
        self.cu_seqlens, self.lengths = cu_seqlens, cu_seqlens.diff()
        self.owner = torch.arange(len(self.lengths), dtype=torch.int32, device=tokens.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.prompt_k[layer], self.prompt_v[layer] = k, v
            return ops.attention(q, k, v, cu_seqlens)

        return model.hidden(tokens, ops.positions_from_cu_seqlens(cu_seqlens), attend)

    def step(self, model: Model, tokens: Tensor) -> Tensor:
        """One more token of every sequence: tokens (B,) → hidden states (B, C)."""
        # A sequence may have ended at the end of the context and still ride along.
        positions = self.lengths.long().clamp(max=model.config.context - 1)
        self.added += 1
        self.lengths = self.lengths + 1
        added = torch.full_like(self.lengths, self.added)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer, :, self.added - 1], self.v[layer, :, self.added - 1] = k, v
            prefix = self.prompt_k[layer], self.prompt_v[layer], self.cu_seqlens, self.owner
            return ops.attention_decode(q, self.k[layer], self.v[layer], added, prefix=prefix)

        return model.hidden(tokens, positions, attend)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order; one named twice goes on as two. Prompts are not copied, and stay."""
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_empty(old.shape[0], len(rows), *old.shape[2:])
            new[:, :, :self.added] = old[:, rows, :self.added]
            setattr(self, name, new)
        self.lengths, self.owner = self.lengths[rows], self.owner[rows]
