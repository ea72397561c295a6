"""Decode attention, one query per sequence, against torch's SDPA and against the speed at which memory is copied; then 64 samples
of one prompt, whose keys and values are read once or once each. In pages: the same tokens, page after page at random in a pool.

torch gets what suits it best: a dense call where all sequences are of one length. Every contender is compared with fp64 first.
"""

import pytest
import torch
import torch.nn.functional as F

from nanorlhf.ops import attention_decode, attention_paged
from timing import report

HEADS, DIM, TOKENS, ADDED, PAGE = 4, 64, 512, 16, 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [(B, Hkv, dtype) for B in (1, 32, 256) for Hkv in (4, 1) for dtype in DTYPES]


def sdpa(q, k, v):
    shared = q.shape[1] // k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if shared == HEADS:  # the heads of the only group as queries: torch reads each key once
        return F.scaled_dot_product_attention(q[:, None], k, v)[:, 0]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=shared > 1)[:, :, 0]


def in_pages(*caches):
    """The caches' tokens (sequences, T, Hkv, D), one after the other, as (k_pages, v_pages, [table of each])."""
    tokens = [torch.cat([x.flatten(0, 1) for x in both]).unflatten(0, (-1, PAGE)) for both in zip(*caches)]
    places = torch.randperm(len(tokens[0]), generator=torch.Generator().manual_seed(0))
    counts = [len(k) * k.shape[1] // PAGE for k, _ in caches]
    tables = [part.view(len(k), -1).int() for part, (k, _) in zip(places.split(counts), caches)]
    return *(torch.empty_like(x).index_copy_(0, places, x) for x in tokens), tables


def plain(B, Hkv, dtype):
    """(shape, GB of keys and values, contenders)"""
    q, k, v = (torch.randn(B, *shape, DIM).to(DTYPES[dtype]) for shape in ((HEADS,), (TOKENS, Hkv), (TOKENS, Hkv)))
    lengths = torch.full((B,), TOKENS, dtype=torch.int32)
    half = k.flatten()  # a copy reads and writes: half the bytes of k and v are read by it, half written
    other = torch.empty_like(half)
    *pools, (pages,) = in_pages((k, v))
    ways = {"nanorlhf": lambda: attention_decode(q, k, v, lengths), "nanorlhf paged": lambda: attention_paged(q, *pools, pages, lengths),
            "torch sdpa": lambda: sdpa(q, k, v)}
    check(ways, sdpa(q.double(), k.double(), v.double()))
    return f"B{B} Hkv{Hkv} T{TOKENS} {dtype}", 2 * k.nbytes / 1e9, {**ways, "copy of as many bytes": lambda: other.copy_(half)}


def samples(Hkv, dtype, n=64):
    """n samples of one prompt of TOKENS, ADDED tokens on: GB if nothing were shared."""
    q, k, v, pk, pv = (torch.randn(*shape, DIM).to(DTYPES[dtype]) for shape in (
        (n, HEADS), (n, ADDED, Hkv), (n, ADDED, Hkv), (TOKENS, Hkv), (TOKENS, Hkv)))
    lengths, whole = torch.full((n,), ADDED, dtype=torch.int32), [torch.cat([p.expand(n, *p.shape), x], 1) for p, x in ((pk, k), (pv, v))]
    prefix = (pk, pv, torch.tensor([0, TOKENS]).int(), torch.zeros(n).int())
    *pools, (pages, prompt) = in_pages((k, v), (pk[None], pv[None]))
    paged_prefix = prompt, torch.tensor([TOKENS]).int(), torch.zeros(n).int()
    ways = {"nanorlhf shared": lambda: attention_decode(q, k, v, lengths, prefix=prefix),
            "nanorlhf shared, paged": lambda: attention_paged(q, *pools, pages, lengths, prefix=paged_prefix),
            "nanorlhf copied": lambda: attention_decode(q, *whole, lengths + TOKENS),
            "torch sdpa, copied": lambda: sdpa(q, *whole)}
    check(ways, sdpa(q.double(), *(x.double() for x in whole)))
    return f"{n} samples of T{TOKENS} Hkv{Hkv} {dtype}", 2 * whole[0].nbytes / 1e9, ways


def check(ways, exact):
    for way in ways.values():
        torch.testing.assert_close(way().double(), exact, rtol=0, atol=4e-3 if way().dtype == torch.bfloat16 else 1e-5)


def every_case():
    return [plain(*c) for c in CASES] + [samples(Hkv, dtype) for Hkv in (4, 1) for dtype in DTYPES]


@pytest.mark.parametrize("contender", range(4))
@pytest.mark.parametrize("row", range(len(CASES) + 4))
def test_decode(benchmark, row, contender):
    benchmark(list(every_case()[row][2].values())[contender])


if __name__ == "__main__":
    report(every_case(), "GB/s", repeats=25)
