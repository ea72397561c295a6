"""Ragged attention: every sequence of a packed batch attends to itself alone.

Native on CPUs and GPUs (csrc/attention.h, csrc/gpu.h); the torch reference is below. Both keep every sum in fp32 or better, and a
sequence's result does not depend on what it is packed with.
Source: Vaswani et al., arXiv 1706.03762, eq. 1; grouped queries: Ainslie et al., arXiv 2305.13245.
"""

import math

import torch
from torch.nn.utils.rnn import pad_sequence

from nanorlhf.ops import backend

MAX_HEAD_DIM = 256


def attention(q, k, v, cu_seqlens, causal=True, scale=None):
    """softmax(scale · q kᵀ) v within each sequence.

    q: (N, H, D); k, v: (N, Hkv, D) with H a multiple of Hkv; query head h reads key/value head h // (H / Hkv).
    cu_seqlens: (B+1,) int32 on the same device, from 0 to N. scale: 1/√D unless given.
    Returns (N, H, D) in q's dtype. Differentiable in q, k and v; the gradient is the same on every run.
    Raises ValueError for shapes, dtypes or cu_seqlens that do not fit together.

    >>> q = torch.randn(5, 2, 16)
    >>> out = attention(q, q, q, torch.tensor([0, 1, 5], dtype=torch.int32))
    >>> torch.allclose(out[0], q[0])  # the first sequence has one token, which sees only itself
    True
    """
    _validate(q, k, v, cu_seqlens)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    if not backend.use_native("attention", q):
        return attention_reference(q, k, v, cu_seqlens, causal, scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, cu_seqlens, causal, scale)
    return _forward_op(q, k, v, cu_seqlens, causal, scale)[0]


def attention_reference(q, k, v, cu_seqlens, causal=True, scale=None):
    """The same in plain torch, one sequence after the other, materialising each (H, T, T)."""
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    bounds = cu_seqlens.tolist()
    _check_bounds(bounds, q.shape[0])
    parts = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        queries = q[start:end].to(wide).transpose(0, 1)  # (H, T, D)
        keys = k[start:end].to(wide).transpose(0, 1).repeat_interleave(group, 0)
        values = v[start:end].to(wide).transpose(0, 1).repeat_interleave(group, 0)
        scores = scale * (queries @ keys.transpose(1, 2))  # (H, T, T)
        if causal:
            future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        parts.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts).to(q.dtype) if parts else q.clone()


def attention_decode(q, k_cache, v_cache, lengths, scale=None, prefix=None):
    """Attention of one new query per sequence over a cache of keys and values.

    q: (B, H, D). k_cache, v_cache: (B, Tmax, Hkv, D), any stride but the last. lengths: (B,) int32, how many keys of
    the cache are valid; a sequence with none gets zeros. Returns (B, H, D). No gradient.
    With backend.deterministic the bits are those of ``attention`` (and each sequence gets a copy of its prefix).
    prefix: (k, v, cu_seqlens, owner): k, v (N, Hkv, D) and cu_seqlens (P+1,) int32 hold P ragged prefixes; sequence b
    sees the keys of prefix owner[b], (B,) int32, before its own. A prefix is read once for all that share it.
    Raises ValueError for shapes or dtypes that do not fit together, or lengths, bounds or owners out of range.

    >>> cache = torch.randn(2, 8, 1, 4)
    >>> out = attention_decode(torch.randn(2, 3, 4), cache, cache, torch.tensor([1, 8], dtype=torch.int32))
    >>> torch.allclose(out[0, 2], cache[0, 0, 0])
    True
    """
    _validate_decode(q, k_cache, v_cache, lengths, prefix)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    if not backend.use_native("attention_decode", q):
        return attention_decode_reference(q, k_cache, v_cache, lengths, scale, prefix)
    if prefix is not None and len(q) and backend.is_deterministic():
        k_cache, v_cache, lengths = _unshared(k_cache, v_cache, lengths, *prefix)
        prefix = None
    return _decode_op(q.detach(), k_cache.detach(), v_cache.detach(), lengths, scale, [x.detach() for x in prefix or ()])


def attention_decode_reference(q, k_cache, v_cache, lengths, scale=None, prefix=None):
    """The same in plain torch, over the whole cache with a mask; each sequence gets a copy of its prefix."""
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    _check_lengths(lengths, k_cache)
    if prefix is not None and len(q):
        k_cache, v_cache, lengths = _unshared(k_cache, v_cache, lengths, *prefix)
    group = q.shape[1] // k_cache.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    seen = torch.arange(k_cache.shape[1], device=q.device) < lengths[:, None]  # (B, Tmax)
    # What lies behind a sequence's end may be anything, NaN included.
    keys = k_cache.to(wide).masked_fill(~seen[:, :, None, None], 0).repeat_interleave(group, 2)
    values = v_cache.to(wide).masked_fill(~seen[:, :, None, None], 0).repeat_interleave(group, 2)
    scores = scale * torch.einsum("bhd,bthd->bht", q.to(wide), keys)
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bht,bthd->bhd", weights, values).to(q.dtype)


def _unshared(k_cache, v_cache, lengths, k, v, cu_seqlens, owner):
    """Caches and lengths in which each sequence has a copy of its prefix before its own keys and values."""
    bounds = cu_seqlens.tolist()
    _check_bounds(bounds, len(k), "attention_decode")
    _check_lengths(lengths, k_cache)
    if not 0 <= int(owner.min()) <= int(owner.max()) < len(bounds) - 1:
        raise ValueError(f"attention_decode: expected owner in [0, P - 1 = {len(bounds) - 2}]")
    whole = (
        pad_sequence([torch.cat((x[bounds[i] : bounds[i + 1]], c)) for i, c in zip(owner.tolist(), cache, strict=True)], True)
        for x, cache in ((k, k_cache), (v, v_cache))
    )
    return *whole, lengths + cu_seqlens.diff()[owner]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, causal, scale):
        out, lse = _forward_op(q, k, v, cu_seqlens, causal, scale)
        ctx.save_for_backward(q, k, v, cu_seqlens, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
        dq, dk, dv = _backward_op(dout, q, k, v, out, lse, cu_seqlens, ctx.causal, ctx.scale)
        return dq, dk, dv, None, None, None


def _rows(x):
    """What the native code takes for (N, heads, D): address, token stride, head stride."""
    return x.data_ptr(), *x.stride()[:2]


def _unit_stride(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(q, k, cu_seqlens):
    return cu_seqlens.data_ptr(), cu_seqlens.numel() - 1, q.shape[0], q.shape[1], k.shape[1], q.shape[2]


def _forward(q, k, v, cu_seqlens, causal, scale):
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    cu_seqlens = cu_seqlens.contiguous()
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float64)
    sizes, dtype = _sizes(q, k, cu_seqlens), backend.DTYPES[q.dtype]
    module, lane = backend.native(q, lambda m: m.attention_workspace(*sizes[1:], dtype))
    module.attention_forward(
        *sizes, causal, scale, dtype, _rows(q), _rows(k), _rows(v), _rows(out), lse.data_ptr(), lane,
    )  # fmt: skip
    return out, lse


def _backward(dout, q, k, v, out, lse, cu_seqlens, causal, scale):
    q, k, v, dout = _unit_stride(q), _unit_stride(k), _unit_stride(v), _unit_stride(dout)
    cu_seqlens = cu_seqlens.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    sizes, dtype = _sizes(q, k, cu_seqlens), backend.DTYPES[q.dtype]
    module, lane = backend.native(q, lambda m: m.attention_backward_workspace(*sizes[1:], dtype))
    module.attention_backward(
        *sizes, causal, scale, dtype, _rows(q), _rows(k), _rows(v), _rows(out), lse.data_ptr(),
        _rows(dout), _rows(dq), _rows(dk), _rows(dv), lane,
    )  # fmt: skip
    return dq, dk, dv


def _decode(q, k_cache, v_cache, lengths, scale, prefix):
    q, k_cache, v_cache = _unit_stride(q), _unit_stride(k_cache), _unit_stride(v_cache)
    lengths = lengths.contiguous()
    out = backend.empty_like(q)
    shared = (0, 0, 0, 0, (0, 0, 0), (0, 0, 0))
    if prefix:
        k, v, cu_seqlens, owner = *map(_unit_stride, prefix[:2]), prefix[2].contiguous(), prefix[3].contiguous()
        shared = cu_seqlens.numel() - 1, cu_seqlens.data_ptr(), k.shape[0], owner.data_ptr(), _rows(k), _rows(v)
    sizes = q.shape[0], q.shape[1], k_cache.shape[2], q.shape[2], k_cache.shape[1]
    module, lane = backend.native(q, lambda m: m.attention_decode_workspace(*sizes, shared[0], shared[2]))
    module.attention_decode(
        *sizes, lengths.data_ptr(), scale, backend.DTYPES[q.dtype], _rows(q), _rows(out), (k_cache.data_ptr(), *k_cache.stride()[:3]),
        (v_cache.data_ptr(), *v_cache.stride()[:3]), *shared, backend.is_deterministic(), lane,
    )  # fmt: skip
    return out


def _check_lengths(lengths, k_cache):
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= k_cache.shape[1]:
        raise ValueError(f"attention_decode: expected lengths in [0, Tmax = {k_cache.shape[1]}]")


def _check_bounds(bounds, tokens, op="attention"):
    rises = all(a <= b for a, b in zip(bounds, bounds[1:], strict=False))
    if bounds[0] != 0 or bounds[-1] != tokens or not rises:
        raise ValueError(f"{op}: expected cu_seqlens to rise from 0 to N = {tokens}")


def _validate(q, k, v, cu_seqlens):
    if q.dim() != 3 or not 1 <= q.shape[2] <= MAX_HEAD_DIM or q.shape[1] < 1:
        raise ValueError(f"attention: expected q of shape (N, H, D) with D in 1..256, got {_shape(q)}")
    N, H, D = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[0] != N or x.shape[2] != D or x.shape[1] < 1 or x.shape[1] != k.shape[1]:
            Hkv = "Hkv" if name == "k" or k.dim() != 3 else k.shape[1]
            raise ValueError(f"attention: expected {name} of shape ({N}, {Hkv}, {D}), got {_shape(x)}")
    if H % k.shape[1]:
        raise ValueError(f"attention: expected H to be a multiple of Hkv, got {H} and {k.shape[1]}")
    _validate_kind("attention", q, (k, v))
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"attention: expected cu_seqlens of shape (B+1,) in int32, got {_shape(cu_seqlens)} in {cu_seqlens.dtype}"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"attention: expected cu_seqlens on {q.device}, got {cu_seqlens.device}")


def _validate_decode(q, k_cache, v_cache, lengths, prefix):
    shape = q.shape
    if len(shape) != 3 or not 1 <= shape[2] <= MAX_HEAD_DIM or shape[1] < 1:
        raise ValueError(f"attention_decode: expected q of shape (B, H, D) with D in 1..256, got {_shape(q)}")
    B, H, D = shape
    cache = k_cache.shape
    for name, x in (("k_cache", cache), ("v_cache", v_cache.shape)):
        if x != cache or len(x) != 4 or x[0] != B or x[3] != D or x[2] < 1 or H % x[2]:
            raise ValueError(
                f"attention_decode: expected {name} of shape ({B}, Tmax, Hkv, {D}), Hkv dividing {H}, got {tuple(x)}"
            )
    _validate_kind("attention_decode", q, (k_cache, v_cache, *(prefix or ())[:2]))
    indices = [("lengths", lengths, B)]
    if prefix is not None:
        k, v, cu_seqlens, owner = prefix
        for name, x in (("k", k.shape), ("v", v.shape)):
            if len(x) != 3 or x != k.shape or x[1:] != cache[2:]:
                raise ValueError(f"attention_decode: expected prefix {name} of shape (N, {cache[2]}, {D}), got {tuple(x)}")
        indices += [("owner", owner, B), ("cu_seqlens", cu_seqlens, max(cu_seqlens.numel(), 1))]
    for name, x, size in indices:
        if x.shape != (size,) or x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"attention_decode: expected {name} of shape ({size},) in int32 on {q.device}, "
                f"got {_shape(x)} in {x.dtype} on {x.device}"
            )


def _validate_kind(op, q, others):
    for x in others:
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{op}: expected q, k and v alike, got {q.dtype} on {q.device}, {x.dtype} on {x.device}")


def _shape(x):
    return str(tuple(x.shape))


_forward_op = backend.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool causal, float scale) -> (Tensor, Tensor)",
    _forward,
    lambda q, k, v, cu_seqlens, causal, scale: (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:2], dtype=torch.float64),
    ),
)
_backward_op = backend.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens, "
    "bool causal, float scale) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dout, q, k, v, out, lse, cu_seqlens, causal, scale: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)
_decode_op = backend.define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float scale, "
    "Tensor[] prefix) -> Tensor",
    _decode,
    lambda q, k_cache, v_cache, lengths, scale, prefix: q.new_empty(q.shape),
)
