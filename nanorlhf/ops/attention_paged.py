"""Attention of one new query per sequence over keys and values that lie in pages of a pool.

Native on CPUs and GPUs, by the kernels of attention_decode, which read the pages where they are (csrc/attention.h).
Source: PagedAttention, Kwon et al., arXiv 2309.06180.
"""

import math

import torch

from nanorlhf.ops import backend
from nanorlhf.ops.attention import MAX_HEAD_DIM, _unit_stride, attention_decode_reference


def attention_paged(q, k_pages, v_pages, pages, lengths, scale=None, prefix=None):
    """softmax(scale · q kᵀ) v of each sequence's query over its keys and values.

    q: (B, H, D). k_pages, v_pages: (P, page_size, Hkv, D), any stride but the last, H a multiple of Hkv. pages: (B, Pmax) int32,
    each sequence's pages in order; lengths: (B,) int32, how many tokens it has there; what its table or its last page holds
    beyond them is not read. A sequence with none gets zeros. scale: 1/√D unless given. Returns (B, H, D). No gradient.
    prefix: (pages, lengths, owner): (G, Pg), (G,) and (B,) int32: G prefixes in the same pool; sequence b sees the keys of prefix
    owner[b], if that is not -1, before its own. A prefix is read once for all that share it, but with backend.deterministic, where
    the bits are those of ``attention``.
    Raises ValueError for shapes or dtypes that do not fit together. Lengths, pages or owners out of range are an error on the
    CPU; on a GPU, where it would have to be waited for, the sequences concerned become NaN.

    >>> pool, lengths = torch.randn(3, 4, 1, 8), torch.tensor([1, 6], dtype=torch.int32)
    >>> pages = torch.tensor([[2, -1], [0, 1]], dtype=torch.int32)  # the first sequence needs one page
    >>> out = attention_paged(torch.randn(2, 2, 8), pool, pool, pages, lengths)
    >>> torch.allclose(out[0, 1], pool[2, 0, 0])
    True
    """
    _validate(q, k_pages, v_pages, pages, lengths, prefix)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    if not backend.use_native("attention_paged", q):
        return attention_paged_reference(q, k_pages, v_pages, pages, lengths, scale, prefix)
    return _paged_op(q.detach(), k_pages.detach(), v_pages.detach(), pages, lengths, scale, list(prefix or ()))


def attention_paged_reference(q, k_pages, v_pages, pages, lengths, scale=None, prefix=None):
    """The same in plain torch: the pages are gathered."""
    return attention_decode_reference(q, *_gathered(k_pages, v_pages, pages, lengths), scale,
                                      _gathered_prefix(k_pages, v_pages, *prefix) if prefix else None)  # fmt: skip


def _gathered(k_pages, v_pages, pages, lengths):
    """Keys and values as attention_decode takes them, no longer than the longest sequence, and lengths."""
    size = k_pages.shape[1]
    _check(lengths, 0, pages.shape[1] * size, "lengths", "Pmax * page_size")
    most = -(-int(lengths.max()) // size) if lengths.numel() else 0
    seen = torch.arange(most, device=pages.device) * size < lengths[:, None]
    needed = pages[:, :most].masked_fill(~seen, 0).long()
    if needed.numel() and most:
        _check(needed, 0, len(k_pages) - 1, "pages", "P - 1")
    return *(x[needed].flatten(1, 2) for x in (k_pages, v_pages)), lengths


def _gathered_prefix(k_pages, v_pages, pages, lengths, owner):
    """(k, v, cu_seqlens, owner) as attention_decode takes them; whose owner is -1 sees one more prefix, which is empty."""
    size = k_pages.shape[1]
    _check(lengths, 0, pages.shape[1] * size, "prefix lengths", "Pg * page_size")
    _check(owner, -1, len(lengths) - 1, "owner", "G - 1")
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 1))
    bounds[-1] = bounds[-2]
    prefix = torch.arange(len(lengths), device=pages.device).repeat_interleave(lengths)  # of every token
    token = torch.arange(len(prefix), device=pages.device) - bounds[prefix]
    page, slot = pages[prefix, token // size].long(), token % size
    _check(page, 0, len(k_pages) - 1, "prefix pages", "P - 1")
    return k_pages[page, slot], v_pages[page, slot], bounds.int(), torch.where(owner < 0, len(lengths), owner)


def _check(x, low, high, name, bound):
    if x.numel() and not low <= int(x.min()) <= int(x.max()) <= high:
        raise ValueError(f"attention_paged: expected {name} in [{low}, {bound} = {high}]")


def _cache(x):
    return x.data_ptr(), *x.stride()[:3]


def _paged(q, k_pages, v_pages, pages, lengths, scale, prefix):
    q, k_pages, v_pages = _unit_stride(q), _unit_stride(k_pages), _unit_stride(v_pages)
    pages, lengths, prefix = pages.contiguous(), lengths.contiguous(), [x.contiguous() for x in prefix]
    out = backend.empty_like(q)
    (count, size, kv_heads, _), width = k_pages.shape, pages.shape[1]
    prefixes, prefix_width = prefix[0].shape if prefix else (0, 0)
    sizes = *q.shape[:2], kv_heads, q.shape[2]
    module, lane = backend.native(q, lambda m: m.attention_decode_workspace(*sizes, width * size, prefixes, prefix_width * size))
    module.attention_paged(
        *sizes, size, count, width, pages.data_ptr(), lengths.data_ptr(), scale, backend.DTYPES[q.dtype],
        (q.data_ptr(), *q.stride()[:2]), (out.data_ptr(), *out.stride()[:2]), _cache(k_pages), _cache(v_pages),
        prefixes, prefix_width, *([x.data_ptr() for x in prefix] or (0, 0, 0)), backend.is_deterministic(), lane,
    )  # fmt: skip
    return out


def _validate(q, k_pages, v_pages, pages, lengths, prefix):
    shape, pool, device = q.shape, k_pages.shape, q.device
    if len(shape) != 3 or not 1 <= shape[2] <= MAX_HEAD_DIM or shape[1] < 1:
        raise ValueError(f"attention_paged: expected q of shape (B, H, D) with D in 1..256, got {tuple(shape)}")
    B, H, D = shape
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        if x.shape != pool or len(pool) != 4 or pool[3] != D or pool[1] < 1 or pool[2] < 1 or H % pool[2]:
            raise ValueError(f"attention_paged: expected {name} of shape (P, page_size, Hkv, {D}), Hkv dividing {H}, got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != device:
            raise ValueError(f"attention_paged: expected q, k_pages and v_pages alike, got {q.dtype} on {device}, {x.dtype} on {x.device}")
    indices = [("pages", pages, (B, "Pmax")), ("lengths", lengths, (B,))]
    if prefix is not None:
        G = prefix[1].numel()
        indices += zip(("prefix pages", "prefix lengths", "owner"), prefix, ((G, "Pg"), (G,), (B,)), strict=True)
    for name, x, shape in indices:
        given = x.shape
        if len(given) != len(shape) or given[0] != shape[0] or x.dtype != torch.int32 or x.device != device:
            wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
            raise ValueError(f"attention_paged: expected {name} of shape ({wanted}) in int32 on {device}, "
                             f"got {tuple(x.shape)} in {x.dtype} on {x.device}")  # fmt: skip


_paged_op = backend.define(
    "attention_paged(Tensor q, Tensor k_pages, Tensor v_pages, Tensor pages, Tensor lengths, float scale, "
    "Tensor[] prefix) -> Tensor",
    _paged,
    lambda q, k_pages, v_pages, pages, lengths, scale, prefix: q.new_empty(q.shape),
)
