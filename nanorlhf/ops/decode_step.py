"""New tokens through a whole decoder in one call: what the engine does once per token, and for prompts. Native on CPUs
(csrc/decode_step.h); elsewhere the model's own layers do it, op by op.
"""

import math

import torch

from nanorlhf import _C
from nanorlhf.ops import backend
from nanorlhf.ops.attention import MAX_HEAD_DIM
from nanorlhf.ops.rope import _table
from nanorlhf.ops.sample import apart, check_sampling, signed

# The weights of a layer, by shape: norms (C,) or (D,), the others (columns, depth).
NORMS, LINEAR = ("input_norm", "q_norm", "k_norm", "post_norm"), (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def why_not(dtype, weights, head_dim):
    """None where PackedDecoder can have these weights with activations in ``dtype``; else the reason, in one sentence.

    >>> why_not(torch.float64, [torch.ones(2)], 8)
    'decode_step: takes float32 and bfloat16, not torch.float64'
    """
    device = weights[0].device
    if backend.forced() not in ("auto", "cpu") or not backend.on_cpu(weights[0]) or device.type != "cpu":
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
        heads, kv_heads = (first[name].shape[0] // head_dim for name in ("q", "k"))
        self.shape = len(layers), C, inner, V, heads, kv_heads, head_dim
        _check_shapes(layers, norm, head, *self.shape[1:])
        self.dtype = dtype
        self._packed = [[_room([layer[name] for name in names], dtype) for names in LINEAR] for layer in layers]
        self._head = _room([head], dtype)
        self.table = torch.tensor([[*(0 if layer[n] is None else layer[n].data_ptr() for n in NORMS), *(x.data_ptr() for x in packed)]
                                   for layer, packed in zip(layers, self._packed)], device="cpu")  # fmt: skip
        self.turns = _table(rope_base, head_dim, context)  # cosines and sines
        addresses = tuple(x.data_ptr() for x in (embedding, self.table, norm, self._head, *self.turns))
        self.described = self.shape, backend.DTYPES[dtype], eps, 1 / math.sqrt(head_dim), addresses, context  # as _C takes it
        self.pack()

    def pack(self):
        for layer, packed in zip(self.layers, self._packed):
            for names, to in zip(LINEAR, packed):
                _pack([layer[name] for name in names], to)
        _pack([self.head], self._head)


def _check_shapes(layers, norm, head, hidden, inner, vocab_size, heads, kv_heads, head_dim):
    """ValueError for a weight that is none of a decoder of these sizes: nobody looks at them again."""
    own, shared = (heads * head_dim, hidden), (kv_heads * head_dim, hidden)
    expected = {"q": own, "k": shared, "v": shared, "o": own[::-1], "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
                "input_norm": (hidden,), "post_norm": (hidden,), "q_norm": (head_dim,), "k_norm": (head_dim,)}  # fmt: skip
    every = [(name, w, expected[name]) for layer in layers for name, w in layer.items() if w is not None]
    for name, w, shape in (*every, ("norm", norm, (hidden,)), ("head", head, (vocab_size, hidden))):
        if w.shape != shape:
            raise ValueError(f"decode_step: expected {name} of shape {shape}, got {tuple(w.shape)}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"decode_step: expected heads that are a multiple of the key heads, got {heads} and {kv_heads}")


def far_apart(x):
    """``x``, a new tensor that will be read in small pieces: in large pages where the system has them."""
    if x.device.type == "cpu":
        _C.prefer_large_pages(x.data_ptr(), x.nbytes)
    return x


def _room(weights, dtype):
    """For these, side by side, packed; what stays free has to be 0."""
    columns, depth = sum(w.shape[0] for w in weights), weights[0].shape[1]
    elements = _C.packed_elements(columns, depth)
    return (torch.empty if elements == columns * depth else torch.zeros)(elements, dtype=dtype, device="cpu")


def _pack(weights, packed):
    column = 0
    for w in weights:
        _C.decode_pack(*w.shape, column, backend.DTYPES[packed.dtype], w.data_ptr(), packed.data_ptr(), torch.get_num_threads())
        column += w.shape[0]


def decode_step(decoder, tokens, positions, slots, k_pages, v_pages, pages=None, lengths=None, prefix=None, cu_seqlens=None, last=None):
    """The logits (N, V), fp32, of what follows ``tokens``, whose keys and values it puts into their slots of every layer.

    tokens, positions, slots: (N,) int64, slot = page · page_size + offset. k_pages, v_pages: (layers, P, page_size, Hkv, D) in the
    decoder's dtype. cu_seqlens: (sequences + 1,) int32, if the first tokens are whole sequences with these bounds. The others are rows, B
    of them, whose pages, lengths and prefix are those of ``attention_paged``, the token's own key counted; all keys of a layer are
    in their slots before any is read. last: (R,) int64, the tokens whose logits are wanted; then (R, V) are returned.

    The logits have the same bits whatever the other rows and the number of threads, unless a row has a prefix with others. Raises
    ValueError for shapes and dtypes that do not fit, and for indices out of range.
    """
    N, V = len(tokens), decoder.shape[3]
    rows, tables, given = _tables("decode_step", decoder, k_pages, v_pages, pages, lengths, prefix)
    sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    given += [(x, (N,), torch.int64) for x in (tokens, positions, slots)]
    if cu_seqlens is not None:
        given.append((cu_seqlens, (sequences + 1,), torch.int32))
    if last is not None:
        given.append((last, (len(last),), torch.int64))
    if not _fit(given) or sequences < (rows != N):
        raise ValueError(f"decode_step: expected tokens, positions, slots and last in int64 and the arrays of attention_paged and cu_seqlens in int32, "
                         f"all contiguous, on the CPU, for as many tokens, got {_told(given)}")
    logits = _empty(N if last is None else len(last), V)
    _C.decode_step(
        decoder.described, N, tokens.data_ptr(), positions.data_ptr(), slots.data_ptr(), sequences, _at(cu_seqlens), _pool(k_pages, v_pages),
        tables, len(logits), _at(last), logits.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return logits


def decode_run(decoder, tokens, positions, k_pages, v_pages, pages, lengths, prefix, streams, steps, most, stops, stop_of,
               seed=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, constraints=None):  # fmt: skip
    """Up to ``most`` times ``decode_step`` and ``sample`` in turns: the tokens drawn, which are the next step's, as (K, B) int64;
    their logprobs, unfiltered and kept, as of ``sample``, as (3, K, B) fp32; and the nodes that constraints have come to.

    tokens to prefix: as of the first decode_step, of rows alone, whose slots are their pages' for their lengths; the tables have pages for
    most - 1 tokens more. streams: (B,) int64, the requests of ``sample``, steps: (B,) int64, of the first draw; the settings are those
    of ``sample``. stops: (S, V) bool, stop_of: (B,) int64: the row's row of it. K is less than ``most`` where a token in
    ``stops`` was drawn, which the last step then has, or where logits were no distribution, if not the first: for these it raises.
    constraints: of each row (ops.token_mask.Masks, node), or None; K is also less where after a step one of them allows nothing.
    """
    B, V = len(tokens), decoder.shape[3]
    rows, tables, given = _tables("decode_run", decoder, k_pages, v_pages, pages, lengths, prefix)
    given += [(x, (B,), torch.int64) for x in (tokens, positions, streams, steps, stop_of)] + [(stops, (len(stops), V), torch.bool)]
    settings = seed, temperature, top_k, top_p, min_p
    (seed, temperature, top_k, top_p, min_p), own = apart("decode_run", B, tokens.device, settings)
    given += [(x, x.shape, x.dtype) for x in own if x is not None]
    if not _fit(given) or rows != B or most < 1 or B < 1 or not 0 <= int(stop_of.min()) <= int(stop_of.max()) < len(stops):
        raise ValueError(f"decode_run: expected most of 1 or more, tokens, positions, streams, steps and stop_of (B,) in int64, stops (S, V) in bool, and "
                         f"the arrays of attention_paged in int32, all contiguous, on the CPU, got {most} and {_told(given)}")
    check_sampling(temperature, top_k, top_p, min_p)
    drawn, marks = _empty(most, B, dtype=torch.int64), _empty(3, most, B)
    masks, nodes = zip(*(c or (None, 0) for c in constraints)) if constraints else ((), ())
    if len(masks) not in (0, B):
        raise ValueError(f"decode_run: expected a constraint or None for each of {B} rows, got {len(masks)}")
    made, nodes = _C.decode_run(
        decoder.described, B, tokens.data_ptr(), positions.data_ptr(), _pool(k_pages, v_pages), tables, most, stops.data_ptr(), stop_of.data_ptr(),
        streams.data_ptr(), steps.data_ptr(), signed(seed), temperature, top_k, top_p, min_p, tuple(map(_at, own or (None,) * 5)),
        (drawn.data_ptr(), *(x.data_ptr() for x in marks)), (masks, nodes), torch.get_num_threads(),
    )  # fmt: skip
    return drawn[:made], marks[:, :made], nodes


def _at(x):
    return 0 if x is None else x.data_ptr()


def _empty(*shape, dtype=torch.float32):
    """To be filled natively, so whatever torch's default type and device are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _fit(given):
    """Whether these tensors have these shapes and dtypes, and are contiguous and on the CPU."""
    return all([x.shape == shape and x.dtype == dtype and x.is_contiguous() and x.is_cpu for x, shape, dtype in given])


def _told(given):
    return ", ".join(f"{tuple(x.shape)} in {x.dtype} on {x.device}" for x, *_ in given)


def _pool(k_pages, v_pages):
    k, v = ((x.data_ptr(), *x.stride()[1:4]) for x in (k_pages, v_pages))
    return k, v, k_pages.stride(0), v_pages.stride(0), k_pages.shape[2], k_pages.shape[1]


def _tables(op, decoder, k_pages, v_pages, pages, lengths, prefix):
    """How many rows these are, their tables as _C takes them, and the tensors to be checked. ValueError for pools that are not the decoder's."""
    layers, kv_heads, D = decoder.shape[0], *decoder.shape[5:]
    shape, dtype = k_pages.shape, decoder.dtype
    fits = len(shape) == 5 and v_pages.shape == shape == (layers, *shape[1:3], kv_heads, D) and k_pages.dtype == v_pages.dtype == dtype
    if not fits or not k_pages.stride(4) == v_pages.stride(4) == 1 or not (k_pages.is_cpu and v_pages.is_cpu):
        raise ValueError(f"{op}: expected k_pages and v_pages of shape ({layers}, P, page_size, {kv_heads}, {D}) in {dtype} on the CPU, a key's "
                         f"elements side by side, got {tuple(shape)} and {tuple(v_pages.shape)} in {k_pages.dtype} and {v_pages.dtype}, strides "
                         f"{k_pages.stride()} and {v_pages.stride()}")
    if pages is None:
        return 0, (0,) * 9, []
    B, width = pages.shape
    given = [(pages, (B, width), torch.int32), (lengths, (B,), torch.int32)]
    if prefix is None:
        return B, (B, width, pages.data_ptr(), lengths.data_ptr(), 0, 0, 0, 0, 0), given
    G, prefix_width = prefix[0].shape
    given += zip(prefix, ((G, prefix_width), (G,), (B,)), (torch.int32,) * 3)
    return B, (B, width, pages.data_ptr(), lengths.data_ptr(), G, prefix_width, *map(_at, prefix)), given
