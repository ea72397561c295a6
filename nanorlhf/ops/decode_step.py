"""One token of every row of a batch through a whole decoder: what the engine does once per token. Native on CPUs (csrc/decode_step.h);
elsewhere the model's own layers do it, op by op.
"""

import math

import torch

from nanorlhf import _C
from nanorlhf.ops import backend
from nanorlhf.ops.attention import MAX_HEAD_DIM
from nanorlhf.ops.rope import _table

# The weights of a layer, by shape: norms (C,) or (D,), the others (columns, depth).
NORMS, LINEAR = ("input_norm", "q_norm", "k_norm", "post_norm"), (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def why_not(dtype, weights, head_dim):
    """None where PackedDecoder can have these weights with activations in ``dtype``; else the reason, in one sentence.

    >>> why_not(torch.float64, [torch.ones(2)], 8)
    'decode_step: takes float32 and bfloat16, not torch.float64'
    """
    device = weights[0].device
    if backend._forced not in ("auto", "cpu") or not backend.on_cpu(weights[0]) or device.type != "cpu":
        return f"decode_step: runs on the CPU's kernels, and here run others, on {device}"
    if backend.is_deterministic():
        return "decode_step: sums in another order than the forward pass of a training step, so not where deterministic is on"
    if dtype not in backend.DTYPES:
        return f"decode_step: takes float32 and bfloat16, not {dtype}"
    if any(w.dtype != torch.float32 or not w.is_contiguous() for w in weights):
        return "decode_step: takes contiguous float32 weights"
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        return f"decode_step: takes an even head size of at most {MAX_HEAD_DIM}, not {head_dim}"
    return None


class PackedDecoder:
    """A decoder's weights in the order in which ``decode_step`` reads them, and cast to ``dtype``.

    layers: a dict each, of the names in NORMS and LINEAR; q_norm and k_norm may be None. embedding, head: (V, C); norm: (C,). All are
    fp32 and contiguous, and that of ``why_not`` holds. The embedding and the norms are read where they are. ``pack`` takes what
    was changed since.
    """

    def __init__(self, layers, embedding, norm, head, head_dim, context, eps, rope_base, dtype):
        self.layers, self.embedding, self.norm, self.head = layers, embedding, norm, head
        first = layers[0]
        (V, C), inner = embedding.shape, first["gate"].shape[0]
        self.shape = len(layers), C, inner, V, first["q"].shape[0] // head_dim, first["k"].shape[0] // head_dim, head_dim
        self.dtype, self.eps, self.context, self.base = dtype, eps, context, rope_base
        room = lambda weights: torch.zeros(_C.packed_elements(sum(w.shape[0] for w in weights), weights[0].shape[1]), dtype=dtype)
        self._packed = [[room([layer[name] for name in names]) for names in LINEAR] for layer in layers]
        self._head = room([head])
        self.table = torch.tensor([[*(0 if layer[n] is None else layer[n].data_ptr() for n in NORMS), *(x.data_ptr() for x in packed)]
                                   for layer, packed in zip(layers, self._packed)])  # fmt: skip
        self.turns = _table(rope_base, head_dim, context)  # cosines and sines
        self.addresses = tuple(x.data_ptr() for x in (embedding, self.table, norm, self._head, *self.turns))
        self.pack()

    def pack(self):
        for layer, packed in zip(self.layers, self._packed):
            for names, to in zip(LINEAR, packed):
                _pack([layer[name] for name in names], to)
        _pack([self.head], self._head)


def far_apart(x):
    """``x``, a new tensor that will be read in small pieces: in large pages where the system has them."""
    if x.device.type == "cpu":
        _C.prefer_large_pages(x.data_ptr(), x.nbytes)
    return x


def _pack(weights, packed):
    column = 0
    for w in weights:
        _C.decode_pack(*w.shape, column, backend.DTYPES[packed.dtype], w.data_ptr(), packed.data_ptr(), torch.get_num_threads())
        column += w.shape[0]


def decode_step(decoder, tokens, positions, slots, k_pages, v_pages, pages, lengths, prefix=None):
    """The logits (B, V), fp32, of what follows ``tokens``, whose keys and values it puts into their slots of every layer.

    tokens, positions, slots: (B,) int64, slot = page · page_size + offset. k_pages, v_pages: (layers, P, page_size, Hkv, D) in the
    decoder's dtype. pages, lengths and prefix are those of ``attention_paged``, the token's own key counted; no row sees another's
    slot. A row's logits have the same bits whatever the others and the number of threads, unless it has a prefix with others.
    Raises ValueError for shapes and dtypes that do not fit, and for indices out of range.
    """
    B, (layers, C, inner, V, H, kv_heads, D) = len(tokens), decoder.shape
    wanted = (layers, *k_pages.shape[1:3], kv_heads, D)
    fits = k_pages.shape == v_pages.shape == wanted and k_pages.dtype == v_pages.dtype == decoder.dtype
    if not fits or not k_pages.stride(4) == v_pages.stride(4) == 1:
        raise ValueError(f"decode_step: expected k_pages and v_pages of shape ({layers}, P, page_size, {kv_heads}, {D}) in {decoder.dtype}, a key's "
                         f"elements side by side, got {tuple(k_pages.shape)} and {tuple(v_pages.shape)} in {k_pages.dtype} and {v_pages.dtype}, "
                         f"strides {k_pages.stride()} and {v_pages.stride()}")
    given = [(x, (B,), torch.int64) for x in (tokens, positions, slots)]
    given += [(pages, (B, pages.shape[-1]), torch.int32), (lengths, (B,), torch.int32)]
    if prefix is not None:
        G = len(prefix[1])
        given += zip(prefix, ((G, prefix[0].shape[-1]), (G,), (B,)), (torch.int32,) * 3)
    if any(x.shape != shape or x.dtype != dtype or not x.is_contiguous() for x, shape, dtype in given):
        raise ValueError(f"decode_step: expected tokens, positions and slots (B,) in int64 and the arrays of attention_paged, all contiguous, "
                         f"got {', '.join(f'{tuple(x.shape)} in {x.dtype}' for x, *_ in given)}")
    logits = torch.empty(B, V)
    at = lambda x: (x.data_ptr(), *x.stride()[1:4])
    prefixes, prefix_width = prefix[0].shape if prefix else (0, 0)
    _C.decode_step(
        decoder.shape, backend.DTYPES[decoder.dtype], decoder.eps, 1 / math.sqrt(D), decoder.addresses, decoder.context, B, tokens.data_ptr(),
        positions.data_ptr(), slots.data_ptr(), at(k_pages), at(v_pages), k_pages.stride(0), v_pages.stride(0), k_pages.shape[2],
        k_pages.shape[1], pages.shape[1], pages.data_ptr(), lengths.data_ptr(), prefixes, prefix_width,
        *((x.data_ptr() for x in prefix) if prefix else (0, 0, 0)), logits.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return logits
