"""The keys and values of every layer, in pages of one pool."""

from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .. import ops
from ..ops.decode_step import PackedDecoder, far_apart, why_not
from ..model import Block, Model


class Rows(NamedTuple):
    """Where the queries of some tokens find their keys, as ops.attention_paged takes it."""

    pages: Tensor  # (B, Pmax) int32
    lengths: Tensor  # (B,) int32, the token's own key included
    prefix: Optional[Tuple[Tensor, Tensor, Tensor]] = None  # leading pages that several share, and are read once


class PagedCache:
    """k_pages, v_pages: (layers, pages, page_size, Hkv, D) in the model's compute type. Who holds which page is not known here."""

    def __init__(self, model: Model, pages: int, page_size: int):
        c = model.config
        shape = c.layers, pages, page_size, c.kv_heads, c.head_size
        self.k_pages, self.v_pages = (far_apart(torch.empty(shape, dtype=model.compute_dtype, device=model.device)) for _ in range(2))
        self._layers = [(k, v, k.flatten(0, 1), v.flatten(0, 1)) for k, v in zip(self.k_pages, self.v_pages)]

    def forward(self, model: Model, tokens: Tensor, positions: Tensor, slots: Tensor, cu_seqlens: Optional[Tensor] = None,
                rows: Optional[Rows] = None) -> Tensor:
        """New tokens (N,) at ``positions`` of their sequences → hidden states (N, C). Their keys and values go to ``slots``
        (N,) int64, page · page_size + offset.

        cu_seqlens: the first tokens are whole sequences, with these bounds, which need nothing from the cache. rows: one
        for each token after them. All keys of a layer are written before any is read, so a token may attend to pages that the
        same call fills.
        """
        whole = 0 if cu_seqlens is None else len(tokens) if rows is None else len(tokens) - len(rows.lengths)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_pages, v_pages, k_slots, v_slots = self._layers[layer]
            k_slots.index_copy_(0, slots, k)
            v_slots.index_copy_(0, slots, v)
            if not whole:
                return ops.attention_paged(q, k_pages, v_pages, rows.pages, rows.lengths, prefix=rows.prefix)
            inside = ops.attention(q[:whole], k[:whole], v[:whole], cu_seqlens)
            if rows is None:
                return inside
            return torch.cat((inside, ops.attention_paged(q[whole:], k_pages, v_pages, rows.pages, rows.lengths, prefix=rows.prefix)))

        return model.hidden(tokens, positions, attend)

    def logits(self, decoder: PackedDecoder, tokens: Tensor, positions: Tensor, slots: Tensor, rows: Optional[Rows] = None,
               cu_seqlens: Optional[Tensor] = None, last: Optional[Tensor] = None) -> Tensor:
        """The same in one call, with the product with the output matrix: (N, V), or (R, V) for the tokens ``last`` (R,) int64."""
        return ops.decode_step(decoder, tokens, positions, slots, self.k_pages, self.v_pages, *(rows or ()), cu_seqlens=cu_seqlens, last=last)

    def run(self, decoder: PackedDecoder, tokens: Tensor, positions: Tensor, rows: Rows, *draws, **settings) -> Tuple[Tensor, Tensor, List[int]]:
        """The same for one token of each row, then a draw, several times: see ops.decode_run."""
        return ops.decode_run(decoder, tokens, positions, self.k_pages, self.v_pages, *rows, *draws, **settings)

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Whole pages (k,) int64 to others."""
        for pages in (self.k_pages, self.v_pages):
            pages[:, targets] = pages[:, sources]


def packed_decoder(model: Model) -> Optional[PackedDecoder]:
    """The model's weights for ``PagedCache.logits``; None where it has to go layer by layer, by ``forward``."""
    c, weights = model.config, [w.detach() for w in model.parameters()]
    if c.variant != "llama" or why_not(model.compute_dtype, weights, c.head_size) is not None:
        return None

    def named(block: Block) -> dict:
        a, m = block.self_attn, block.mlp
        modules = {"input_norm": block.input_layernorm, "q": a.q_proj, "k": a.k_proj, "v": a.v_proj, "q_norm": a.q_norm, "k_norm": a.k_norm,
                   "o": a.o_proj, "post_norm": block.post_attention_layernorm, "gate": m.gate_proj, "up": m.up_proj, "down": m.down_proj}
        return {name: None if module is None else module.weight.detach() for name, module in modules.items()}

    decoder = model.model
    return PackedDecoder([named(b) for b in decoder.layers], decoder.embed_tokens.weight.detach(), decoder.norm.weight.detach(),
                         model.head_weight.detach(), c.head_size, c.context, c.norm_eps, c.rope_base, model.compute_dtype)
