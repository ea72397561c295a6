"""ops.attention_decode: one query per sequence against its own keys and those of a prefix that it shares."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.ops import attention, attention_decode
from nanorlhf.ops.attention import attention_decode_reference
from test_backend import ISAS

HERE = Path(__file__).parent
DTYPES = [torch.float32, torch.bfloat16]


def case(lengths, prefixes, owner, H=4, Hkv=2, D=32, dtype=torch.float32, seed=0):
    """Random (q, k, v, lengths, prefix); what lies behind a sequence's end is NaN."""
    g = torch.Generator().manual_seed(seed)
    T = max(lengths, default=0) + 3
    q, k, v = (torch.randn(len(lengths), *shape, D, generator=g).to(dtype) for shape in ((H,), (T, Hkv), (T, Hkv)))
    for b, n in enumerate(lengths):
        k[b, n:] = v[b, n:] = math.nan
    shared = [torch.randn(sum(prefixes), Hkv, D, generator=g).to(dtype) for _ in range(2)]
    bounds = torch.tensor([0, *prefixes]).cumsum(0).int()
    return q, k, v, torch.tensor(lengths, dtype=torch.int32), (*shared, bounds, torch.tensor(owner, dtype=torch.int32))


def by_hand(q, k, v, lengths, prefix, scale=None):
    """fp64, one head of one sequence after the other."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, n in enumerate(lengths.tolist()):
        begin, end = prefix[2][prefix[3][b]:][:2].tolist()
        for h in range(q.shape[1]):
            kv = h * k.shape[2] // q.shape[1]
            keys, values = (torch.cat([p[begin:end, kv], c[b, :n, kv]]).double() for p, c in ((prefix[0], k), (prefix[1], v)))
            if len(keys):
                out[b, h] = (keys @ q[b, h].double() * (scale or q.shape[2] ** -0.5)).softmax(0) @ values
    return out


def check(inputs, scale=None):
    *x, prefix = inputs
    ours, naive = (op(*x, scale, prefix) for op in (attention_decode, attention_decode_reference))
    exact = by_hand(*x, prefix, scale)
    assert ours.dtype == x[0].dtype and ours.shape == exact.shape
    if not exact.numel():
        return
    error, allowed = (ours.double() - exact).abs().max(), (naive.double() - exact).abs().max()
    assert error <= 2 * allowed + 4 * torch.finfo(ours.dtype).eps * exact.abs().max(), (error, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 3, 16, 20, 32, 48, 64, 100, 128, 255, 256])
def test_every_head_size_matches_the_oracle(D, dtype):
    check(case([3, 0, 17, 5] * 3, [40, 7], [0, 1, 0, 0] * 3, D=D, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 70])
def test_every_group_size_matches_the_oracle(size, dtype):
    check(case([i % 5 for i in range(size)], [150], [0] * size, H=2, Hkv=2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "Hkv"), [(1, 1), (4, 4), (4, 1), (6, 2), (12, 3), (5, 1)])
def test_query_groups_match_the_oracle(H, Hkv, dtype):
    check(case([20, 1, 0, 33], [17, 130], [0, 1, 1, 1], H, Hkv, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 127, 128, 129, 256, 300, 700])
def test_every_prefix_length_matches_the_oracle(length, dtype):
    check(case([4] * 12, [5, length, 0], [0, 1, 1, 2] + [1] * 8, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.7, 1e-35, 3.0])
def test_any_scale_matches_the_oracle(scale, dtype):
    check(case([9, 2, 0], [50], [0, 0, 0], H=8, dtype=dtype), scale)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), max_size=40), st.integers(1, 70), st.integers(0, 9))
def test_any_mixture_matches_the_oracle(sequences, D, seed):
    lengths, owner = [n for n, _ in sequences], [i for _, i in sequences]
    check(case(lengths, [seed * 20, 1, 0, 37], owner, D=D, seed=seed))


def test_two_keys_worked_by_hand():
    """Scores 0 (the prefix's key) and ln 3 (its own): weights 1/4 and 3/4 of the values 4 and 8 give 7."""
    one = torch.ones(1, 1, 1)
    prefix = (0 * one, 4 * one, torch.tensor([0, 1]).int(), torch.tensor([0]).int())
    out = attention_decode(math.log(3) * one, one[None], 8 * one[None], torch.tensor([1]).int(), 1.0, prefix)
    torch.testing.assert_close(out, 7 * one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shared_prefix_is_the_prefix_before_every_sequence(dtype):
    q, k, v, lengths, prefix = case([6, 0, 30] * 8, [200], [0] * 24, dtype=dtype)
    whole = [torch.cat([p[None].expand(24, -1, -1, -1), c], 1) for p, c in ((prefix[0], k), (prefix[1], v))]
    together = attention_decode(q, k, v, lengths, prefix=prefix)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(together, attention_decode(q, *whole, lengths + 200), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_company_and_threads_change_no_bit(dtype):
    q, k, v, lengths, prefix = case([6, 0, 30] * 8, [500, 90], [0, 0, 1] * 8, H=8, dtype=dtype)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(attention_decode(q, k, v, lengths, prefix=prefix))
    finally:
        torch.set_num_threads(threads)
    rows = torch.arange(23, -1, -1)
    turned = attention_decode(q[rows], k[rows], v[rows], lengths[rows], prefix=(*prefix[:3], prefix[3][rows]))
    assert all(torch.equal(runs[0], other) for other in (*runs[1:], turned[rows]))


def test_strides_are_read_as_they_are():
    q, k, v, lengths, prefix = case([6, 20, 1], [50, 3], [0, 1, 0], D=16)
    plain = attention_decode(q, k, v, lengths, prefix=prefix)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    packed = torch.stack(prefix[:2], 1).unbind(1)
    turned = q.transpose(0, 2).contiguous().transpose(0, 2)  # the last stride is not one
    assert torch.equal(attention_decode(turned, *heads_first, lengths, prefix=(*packed, *prefix[2:])), plain)


def test_large_scores_and_nan_stay_where_they_are():
    q, k, v, lengths, prefix = case([6, 20, 1, 0] * 3, [50, 30], [0, 1, 0, 1] * 3)
    torch.testing.assert_close(attention_decode(1e3 * q, k, v, lengths, None, prefix).double(),
                               by_hand(1e3 * q, k, v, lengths, prefix), rtol=0, atol=1e-3)
    prefix[1][60] = math.nan
    out = attention_decode(q, k, v, lengths, prefix=prefix)
    assert out[1::2].isnan().all() and out[::2].isfinite().all()


def test_nothing_to_see_gives_zeros():
    q, k, v, lengths, prefix = case([0, 0, 2], [0, 0], [0, 1, 1])
    out = attention_decode(q, k, v, lengths, prefix=prefix)
    assert out[:2].eq(0).all() and out[2].ne(0).all()
    assert attention_decode(q[:0], k[:0], v[:0], lengths[:0], prefix=(*prefix[:3], prefix[3][:0])).shape == (0, 4, 32)


def test_decode_continues_what_attention_began():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(33, heads, 32, generator=g) for heads in (4, 2, 2))
    prefix = (k[:30], v[:30], torch.tensor([0, 30]).int(), torch.tensor([0]).int())
    last = attention_decode(q[-1:], k[None, 30:], v[None, 30:], torch.tensor([3]).int(), prefix=prefix)
    whole = attention(q, k, v, torch.tensor([0, 33]).int())[-1:]
    torch.testing.assert_close(last, whole, rtol=1e-5, atol=1e-6)


def test_inputs_that_do_not_fit_are_named():
    q, k, v, lengths, (pk, pv, bounds, owner) = case([2, 1], [3, 4], [0, 1])
    for prefix, message in (
        ((pk[:, :1], pv[:, :1], bounds, owner), r"expected prefix k of shape \(N, 2, 32\), got \(7, 1, 32\)"),
        ((pk, pv[1:], bounds, owner), r"expected prefix v of shape"),
        ((pk.double(), pv.double(), bounds, owner), "expected q, k and v alike"),
        ((pk, pv, bounds.long(), owner), r"expected cu_seqlens of shape \(3,\) in int32"),
        ((pk, pv, bounds[:0], owner), r"expected cu_seqlens of shape \(1,\)"),
        ((pk, pv, bounds, owner[:1]), r"expected owner of shape \(2,\) in int32"),
        ((pk, pv, bounds + 1, owner), "expected cu_seqlens to rise from 0 to N = 7"),
        ((pk, pv, bounds, owner + 1), r"expected owner in \[0, P - 1 = 1\]"),
    ):
        for op in (attention_decode, lambda *x: attention_decode(*(y.double() for y in x[:3]), *x[3:5], (*(y.double() for y in x[5][:2]), *x[5][2:]))):
            if "alike" not in message or op is attention_decode:
                with pytest.raises(ValueError, match="attention_decode: " + message):
                    op(q, k, v, lengths, None, prefix)


def test_it_is_a_good_citizen_of_torch():
    q, k, v, lengths, prefix = case([2, 1], [3, 4], [0, 1])
    torch.library.opcheck(torch.ops.nanorlhf.attention_decode.default, (q, k, v, lengths, 0.3, list(prefix)))
    compiled = torch.compile(lambda *x: attention_decode(*x, prefix=prefix), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, lengths), attention_decode(q, k, v, lengths, prefix=prefix))


EVERY_SHAPE = """
import sys
sys.path[:0] = sys.argv[1:]
import test_attention_decode as t
for dtype in t.DTYPES:
    for D in (1, 20, 64, 160):
        t.check(t.case([3, 0, 17, 5] * 6, [140, 7], [0, 1, 0, 0] * 6, D=D, dtype=dtype))
        t.check(t.case([3, 0, 17, 5], [140, 7], [0, 1, 0, 0], 8, 2, D=D, dtype=dtype))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_matches_the_oracle(isa):
    done = subprocess.run([sys.executable, "-c", EVERY_SHAPE, str(HERE.parent), str(HERE)], env={**os.environ, "NANORLHF_ISA": isa},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
