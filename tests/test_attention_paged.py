"""ops.attention_paged: one query per sequence against keys and values in pages of a pool, checked against them laid out one after
the other."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.ops import attention, attention_decode, attention_paged, backend
from nanorlhf.ops.attention_paged import attention_paged_reference
from test_attention_decode import DTYPES, HERE, by_hand, case
from test_backend import ISAS

BOTH = pytest.mark.parametrize("op", [attention_paged, attention_paged_reference], ids=["native", "reference"])


def paged_case(lengths, prefixes, owner, page_size=4, spare=2, **kinds):
    """The arguments of attention_paged and those of attention_decode for the same numbers. Pages lie in no order in a pool that is
    NaN wherever it holds no token; tables hold nonsense behind what is needed. An owner of -1 is a prefix of no tokens there."""
    q, k, v, n, (pk, pv, bounds, dense_owner) = case(lengths, [*prefixes, 0], [o % (len(prefixes) + 1) for o in owner], **kinds)
    rows = [(k[b, :length], v[b, :length]) for b, length in enumerate(lengths)]
    rows += [(pk[a:z], pv[a:z]) for a, z in zip(bounds[:-2].tolist(), bounds[1:-1].tolist())]
    counts = [-(-len(a) // page_size) for a, _ in rows]
    pools = torch.full((2, sum(counts) + spare, page_size, *k.shape[2:]), math.nan, dtype=k.dtype)
    places = torch.randperm(pools.shape[1], generator=torch.Generator().manual_seed(len(rows))).tolist()
    table = torch.full((len(rows), max(counts, default=0) + 1), -(10**9), dtype=torch.int32)
    for i, (tokens, count) in enumerate(zip(rows, counts)):
        for j in range(count):
            table[i, j] = place = places.pop()
            for pool, x in zip(pools, tokens):
                part = x[j * page_size : (j + 1) * page_size]
                pool[place, : len(part)] = part
    prefix = table[len(lengths) :], bounds.diff()[:-1], torch.tensor(owner, dtype=torch.int32)
    return (q, *pools, table[: len(lengths)], n, None, prefix), (q, k, v, n, (pk, pv, bounds, dense_owner))


def check(paged, dense, op=attention_paged):
    exact, naive, ours = by_hand(*dense), attention_paged_reference(*paged), op(*paged)
    assert ours.dtype == paged[0].dtype and ours.shape == exact.shape
    if exact.numel():
        error, allowed = (ours.double() - exact).abs().max(), (naive.double() - exact).abs().max()
        assert error <= 2 * allowed + 4 * torch.finfo(ours.dtype).eps * exact.abs().max(), (error, allowed)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 3, 4, 16, 64])
def test_pages_of_every_size_hold_what_a_cache_holds(page_size, dtype, op):
    check(*paged_case([3, 0, 17, 4, 1, 33], [40, 7], [0, 1, -1, 0, 1, -1], page_size, dtype=dtype), op)


@BOTH
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(-1, 3)), max_size=20), st.integers(1, 20), st.integers(1, 70))
def test_any_mixture_matches_the_oracle(op, sequences, page_size, D):
    check(*paged_case([n for n, _ in sequences], [page_size * 2, 1, 0, 37], [i for _, i in sequences], page_size, D=D), op)


@BOTH
def test_two_keys_worked_by_hand(op):
    """Scores 0 (the prefix's key) and ln 3 (its own): weights 1/4 and 3/4 of the values 4 and 8 give 7."""
    one, number = torch.ones(1, 1, 1), lambda *x: torch.tensor(x, dtype=torch.int32)
    keys, values = (torch.tensor(x).view(3, 1, 1, 1) for x in ([1.0, math.nan, 0.0], [8.0, math.nan, 4.0]))
    prefix = number(2)[None], number(1), number(0)
    torch.testing.assert_close(op(math.log(3) * one, keys, values, number(0)[None], number(1), 1.0, prefix), 7 * one)


@BOTH
def test_without_a_prefix_it_is_a_cache_in_pieces(op):
    paged, (q, k, v, lengths, _) = paged_case([6, 0, 30], [], [-1, -1, -1])
    ours = op(*paged[:5])
    torch.testing.assert_close(ours, attention_decode(q, k, v, lengths), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours, op(*paged)) and ours[1].eq(0).all()


@BOTH
def test_one_page_may_belong_to_many(op):
    """Two sequences that begin with the same page have no need of a prefix."""
    (q, k, v, *_), _ = paged_case([8, 8], [], [-1, -1])
    q, lengths = q[:1].expand(2, -1, -1), torch.tensor([8, 5], dtype=torch.int32)
    pages = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    k, v = k.nan_to_num(0.3), v.nan_to_num(0.7)
    torch.testing.assert_close(op(q, k, v, pages, lengths)[1:], op(q[1:], k[[0, 2]], v[[0, 2]], pages[:1], lengths[1:]))


@BOTH
def test_strides_are_read_as_they_are(op):
    (q, k, v, *rest), dense = paged_case([6, 20, 1], [50, 3], [0, 1, 0], D=16)
    k, v = torch.stack((k, v), 1).transpose(2, 3).contiguous().transpose(2, 3).unbind(1)  # one pool for both, heads first
    q = q.transpose(0, 2).contiguous().transpose(0, 2)
    check((q, k, v, *rest), dense, op)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_the_bits_are_those_of_a_cache_with_company_and_threads(page_size, dtype):
    """Where keys lie changes no bit, nor does who else is there: an owner of -1 is a prefix without tokens for attention_decode."""
    paged, dense = paged_case([6, 0, 30] * 8, [500, 90, 3], [0, -1, 1] * 8, page_size, H=8, D=24, dtype=dtype)
    q, k, v, pages, lengths, _, prefix = paged
    expected, threads = attention_decode(*dense[:4], None, dense[4]), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(attention_paged(*paged), expected)
    finally:
        torch.set_num_threads(threads)
    rows = torch.arange(23, 2, -1)
    assert torch.equal(attention_paged(q[rows], k, v, pages[rows], lengths[rows], None, (*prefix[:2], prefix[2][rows])), expected[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_deterministic_gives_the_bits_of_training(page_size, dtype):
    """Prefixes that end within a page, before keys of a sequence's own, across the edges of tiles (16, 32 keys) and passes (128, 256)."""
    (q, k, v, pages, lengths, _, prefix), (_, dk, dv, _, (pk, pv, bounds, owner)) = paged_case(
        [0, 1, 15, 33, 140, 7, 0], [120, 251, 1], [0, 0, 1, 1, 0, -1, -1], page_size, H=6, D=40, dtype=dtype)
    before = backend.deterministic(True)
    try:
        ours = attention_paged(q, k, v, pages, lengths, -0.3, prefix)
        for b, n in enumerate(lengths.tolist()):
            place = slice(*bounds[owner[b]:][:2].tolist())
            keys, values = (torch.cat((p[place], c[b, :n])) for p, c in ((pk, dk), (pv, dv)))
            queries = torch.cat((torch.randn(max(len(keys) - 1, 0), 6, 40).to(dtype), q[b : b + 1]))[: len(keys)]
            whole = attention(queries, keys, values, torch.tensor([0, len(keys)], dtype=torch.int32), scale=-0.3)
            assert torch.equal(ours[b], whole[-1] if len(keys) else torch.zeros_like(q[b]))
    finally:
        backend.deterministic(before)


EVERY_SHAPE = """
import sys
sys.path[:0] = sys.argv[1:]
import test_attention_paged as t
for dtype in t.DTYPES:
    for D in (1, 20, 64, 160):
        for heads in ((4, 2), (8, 2), (5, 1)):
            t.check(*t.paged_case([3, 0, 17, 70] * 6, [140, 7], [0, 1, 0, -1] * 6, 5, H=heads[0], Hkv=heads[1], D=D, dtype=dtype))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_matches_the_oracle(isa):
    done = subprocess.run([sys.executable, "-c", EVERY_SHAPE, str(HERE.parent), str(HERE)], env={**os.environ, "NANORLHF_ISA": isa},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@BOTH
def test_nothing_at_all_gives_nothing(op):
    paged, _ = paged_case([0, 0], [], [-1, -1], spare=0)
    assert paged[1].shape[0] == 0 and op(*paged).eq(0).all()
    paged, _ = paged_case([], [], [])
    assert op(*paged).shape == (0, 4, 32)


@BOTH
def test_inputs_that_do_not_fit_are_named(op):
    (q, k, v, pages, lengths, _, prefix), _ = paged_case([2, 5], [3, 4], [0, 1])
    with pytest.raises(ValueError, match=r"attention_paged: expected lengths in \[0, Pmax \* page_size = 12\]"):
        op(q, k, v, pages, lengths + 8)
    with pytest.raises(ValueError, match=r"attention_paged: expected pages in \[0, P - 1 = 6\]"):
        op(q, k, v, pages + 7, lengths)
    with pytest.raises(ValueError, match=r"attention_paged: expected owner in \[-1, G - 1 = 1\]"):
        op(q, k, v, pages, lengths, None, (*prefix[:2], prefix[2] + 1))
    with pytest.raises(ValueError, match=r"attention_paged: expected prefix lengths in"):
        op(q, k, v, pages, lengths, None, (prefix[0], -prefix[1], prefix[2]))
    with pytest.raises(ValueError, match=r"attention_paged: expected prefix pages in"):
        op(q, k, v, pages, lengths, None, (prefix[0] - 7, *prefix[1:]))


def test_shapes_that_do_not_fit_are_named():
    (q, k, v, pages, lengths, _, prefix), _ = paged_case([2, 5], [3, 4], [0, 1])
    for arguments, message in (
        ((q[0], k, v, pages, lengths), r"expected q of shape \(B, H, D\) with D in 1..256, got \(4, 32\)"),
        ((q[:, :3], k, v, pages, lengths), r"expected k_pages of shape \(P, page_size, Hkv, 32\), Hkv dividing 3"),
        ((q, k, v[1:], pages, lengths), r"expected v_pages of shape"),
        ((q, k.double(), v, pages, lengths), "expected q, k_pages and v_pages alike"),
        ((q, k, v, pages[:1], lengths), r"expected pages of shape \(2, Pmax\) in int32"),
        ((q, k, v, pages.long(), lengths), r"expected pages of shape .* in torch.int64"),
        ((q, k, v, pages, lengths[:1]), r"expected lengths of shape \(2,\) in int32"),
        ((q, k, v, pages, lengths, None, (prefix[0][:1], *prefix[1:])), r"expected prefix pages of shape \(2, Pg\)"),
        ((q, k, v, pages, lengths, None, (*prefix[:2], prefix[2][:1])), r"expected owner of shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match="attention_paged: " + message):
            attention_paged(*arguments)


def test_it_is_a_good_citizen_of_torch():
    (*x, _, prefix), _ = paged_case([2, 5], [3, 4], [0, 1])
    torch.library.opcheck(torch.ops.nanorlhf.attention_paged.default, (*x, 0.3, list(prefix)))
    compiled = torch.compile(lambda *x: attention_paged(*x, prefix=prefix), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*x), attention_paged(*x, prefix=prefix))


@BOTH
@pytest.mark.parametrize("deterministic", [False, True])
def test_tables_without_a_page_where_all_keys_are_in_prefixes(op, deterministic):
    (q, k, v, pages, lengths, scale, prefix), dense = paged_case([0, 0, 0], [7, 3], [0, 1, -1], D=8)
    before = backend.deterministic(deterministic)
    try:
        check((q, k, v, pages[:, :0].contiguous(), lengths, scale, prefix), dense, op)
    finally:
        backend.deterministic(before)
