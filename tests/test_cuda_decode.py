"""csrc/attention_decode.cu on the emulator, against the oracles of the ops, with workspaces full of NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import test_attention_decode
import test_attention_paged
from emulated import kernels, module
from nanorlhf.ops import attention_decode, attention_paged, backend
from nanorlhf.ops.attention import attention_decode_reference
from test_attention_decode import DTYPES, by_hand, case
from test_attention_paged import paged_case

HEAD_SIZES = [1, 3, 20, 64, 72, 100, 128, 136, 255, 256]
SEEDS = [1, 2, 3]


def check(dense, seed=1, scale=None):
    with kernels(seed):
        test_attention_decode.check(dense, scale)


def check_paged(both, seed=1):
    with kernels(seed):
        test_attention_paged.check(*both)


def check_alone(dense, seed=1):
    """Without the prefixes, which must be empty."""
    *x, prefix = dense
    exact, naive = by_hand(*x, prefix), attention_decode_reference(*x)
    with kernels(seed):
        ours = attention_decode(*x)
    error, allowed = (ours.double() - exact).abs().max(), (naive.double() - exact).abs().max()
    assert error <= 2 * allowed + 4 * torch.finfo(ours.dtype).eps * exact.abs().max(), (error, allowed)


def bits(op, *arguments, seed=1, **options):
    with kernels(seed):
        return op(*arguments, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_every_head_size_matches_the_oracle(D, dtype):
    for seed in SEEDS if D in (64, 128) else SEEDS[:1]:
        check_alone(case([3, 0, 70, 5], [0], [0] * 4, D=D, dtype=dtype), seed)
        check(case([3, 0, 70, 5], [40, 7], [0, 1, 0, 0], D=D, dtype=dtype), seed)
        check_paged(paged_case([3, 0, 70, 5], [40, 7], [0, 1, -1, 0], 16, D=D, dtype=dtype), seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 193, 257, 511, 512, 513, 1025])
def test_every_length_matches_the_oracle(length, dtype):
    """Around the edges of a warp's keys, of tiles, of rings of tiles and of parts."""
    for D in (64, 128):
        kinds = {"H": 2, "Hkv": 1, "D": D, "dtype": dtype}
        check_alone(case([length, 2], [0], [0, 0], **kinds))
        check(case([1, length], [5, length], [1, 0], **kinds))
        check_paged(paged_case([1, length], [5, length], [1, -1], 48, **kinds))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "D"), [*((n, 64) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 70)), (7, 128), (17, 128), (5, 256), (17, 256)])
def test_every_group_matches_the_oracle(group, D, dtype):
    check(case([20, 1, 0, 33], [17, 130], [0, 1, 1, 1], 2 * group, 2, D=D, dtype=dtype))
    check_alone(case([20, 1, 0, 33], [0], [0] * 4, 2 * group, 2, D=D, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharing", [1, 2, 3, 15, 16, 17, 33, 70])
def test_any_number_may_share_a_prefix(sharing, dtype):
    owner = [1] * sharing + [0, 3]
    check(case([i % 5 for i in range(len(owner))], [9, 150, 3, 0], owner, H=6, dtype=dtype))
    check_paged(paged_case([i % 5 for i in range(len(owner))], [9, 150, 3, 0], owner, 16, H=6, dtype=dtype))


def test_more_prefixes_and_sequences_than_threads():
    owner = [(7 * i) % 300 for i in range(400)]
    check(case([i % 3 for i in range(400)], [i % 4 for i in range(300)], owner, 2, 1, D=8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [7, 8])
def test_a_block_may_do_several_parts(dtype, D):
    """With so many rows of work there are fewer blocks than parts."""
    check_alone(case([1100, 0, 3, 1600] + [0] * 296, [0], [0] * 300, 2, 2, D=D, dtype=dtype), D)
    owner, prefixes = [(7 * i) % 360 for i in range(360)], [1100, *(i % 2 for i in range(358)), 700]
    check(case([i % 3 for i in range(360)], prefixes, owner, 3, 3, D=D, dtype=dtype), D)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_have_fewer_and_larger_parts(dtype):
    check_alone(case([66000, 3], [0], [0, 0], 1, 1, D=16, dtype=dtype))
    check(case([2, 1, 3], [3, 9000], [1, 1, 0], 1, 1, D=16, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-35, 3.0])
def test_any_scale_matches_the_oracle(scale, dtype):
    dense = case([9, 2, 0], [50], [0, 0, 0], H=8, dtype=dtype)
    check(dense, scale=scale or 1e-37)  # the oracle takes 0 for none
    if scale == 0:
        mean = torch.cat([dense[4][1], dense[2][0, :9]]).double().mean(0).repeat_interleave(4, 0)
        ours = bits(attention_decode, *dense[:4], 0.0, dense[4])[0].double()
        torch.testing.assert_close(ours, mean, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(-1, 3)), min_size=1, max_size=12), st.integers(1, 20), st.integers(1, 70),
       st.integers(0, 9), st.sampled_from(DTYPES))  # fmt: skip
def test_any_mixture_matches_the_oracle(sequences, page_size, D, seed, dtype):
    lengths, owner = [n for n, _ in sequences], [i for _, i in sequences]
    check_paged(paged_case(lengths, [seed * 20, 1, 0, 37], owner, page_size, D=D, seed=seed, dtype=dtype), seed + 1)
    check(case(lengths, [seed * 20, 1, 0, 37], [max(i, 0) for i in owner], D=D, seed=seed, dtype=dtype), seed + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [32, 128])
def test_company_changes_no_bit(D, dtype):
    """Alone, in another order, beside other prefixes, beside NaN, with more room and in other orders of threads."""
    q, k, v, lengths, prefix = case([6, 0, 130] * 8, [600, 90], [0, 0, 1] * 8, H=6, D=D, dtype=dtype)
    together = bits(attention_decode, q, k, v, lengths, prefix=prefix)
    rows = torch.arange(23, -1, -1)
    turned = bits(attention_decode, q[rows], k[rows], v[rows], lengths[rows], prefix=(*prefix[:3], prefix[3][rows]), seed=2)
    assert torch.equal(together, turned[rows])
    room = [torch.cat([x, torch.full((24, 1500, *x.shape[2:]), math.nan, dtype=dtype)], 1) for x in (k, v)]
    for i in (2, 3):
        own = slice(i, i + 1)
        alone = bits(attention_decode, q[own], k[own], v[own], lengths[own], prefix=(*prefix[:3], prefix[3][own]), seed=3)
        longer = bits(attention_decode, q[own], *(x[own] for x in room), lengths[own], prefix=(*prefix[:3], prefix[3][own]))
        assert torch.equal(together[own], alone) and torch.equal(alone, longer)
    spoilt = q.clone()
    spoilt[0], spoilt[4:] = math.nan, math.inf
    beside = bits(attention_decode, spoilt, k, v, lengths, prefix=prefix)
    assert torch.equal(together[1:4], beside[1:4]) and beside[0].isnan().all() and beside[4:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_are_a_cache_in_pieces_bit_for_bit(dtype):
    paged, dense = paged_case([6, 0, 700, 64], [600, 90], [0, 1, 0, 1], 16, H=8, D=64, dtype=dtype)
    assert torch.equal(bits(attention_paged, *paged), bits(attention_decode, *dense[:4], None, dense[4]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_are_read_as_they_are(dtype):
    q, k, v, lengths, prefix = case([6, 20, 1], [50, 3], [0, 1, 0], D=16, dtype=dtype)
    plain = bits(attention_decode, q, k, v, lengths, prefix=prefix)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    odd = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (k, v)]
    packed = torch.stack(prefix[:2], 1).unbind(1)
    turned = q.transpose(0, 2).contiguous().transpose(0, 2)  # the last stride is not one
    wide = torch.nn.functional.pad(q, (3, 0))[..., 3:]
    for queries, caches in ((turned, heads_first), (wide, odd)):
        assert torch.equal(bits(attention_decode, queries, *caches, lengths, prefix=(*packed, *prefix[2:])), plain)
    pieces = [torch.nn.functional.pad(x, (5, 0))[..., 5:] for x in prefix[:2]]
    assert torch.equal(bits(attention_decode, q, k, v, lengths, prefix=(*pieces, *prefix[2:])), plain)


def test_large_scores_and_nan_stay_where_they_are():
    q, k, v, lengths, prefix = case([6, 20, 1, 0] * 3, [50, 30], [0, 1, 0, 1] * 3)
    torch.testing.assert_close(bits(attention_decode, 1e3 * q, k, v, lengths, None, prefix).double(),
                               by_hand(1e3 * q, k, v, lengths, prefix), rtol=0, atol=1e-3)  # fmt: skip
    prefix[1][60] = math.nan
    out = bits(attention_decode, q, k, v, lengths, prefix=prefix)
    assert out[1::2].isnan().all() and out[::2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_out_of_range_spoils_its_own_sequences_alone(dtype):
    q, k, v, lengths, prefix = case([6, 20, 1, 600, 2], [50, 30], [0, 1, 0, 1, 0], dtype=dtype)
    good, alone = bits(attention_decode, q, k, v, lengths, prefix=prefix), bits(attention_decode, q, k, v, lengths)
    for bad in (-1, k.shape[1] + 1, 2**31 - 1):
        wrong = lengths.clone()
        wrong[1] = bad
        for out, right in ((bits(attention_decode, q, k, v, wrong, prefix=prefix), good), (bits(attention_decode, q, k, v, wrong), alone)):
            assert out[1].isnan().all() and torch.equal(out[[0, 2, 3, 4]], right[[0, 2, 3, 4]])
    for bad in (-1, 2, -(2**31)):
        owner = prefix[3].clone()
        owner[1] = bad
        out = bits(attention_decode, q, k, v, lengths, prefix=(*prefix[:3], owner))
        assert out[1].isnan().all() and torch.equal(out[[0, 2, 3, 4]], good[[0, 2, 3, 4]])
    out = bits(attention_decode, q, k, v, lengths, prefix=(*prefix[:2], torch.tensor([0, 50, 81]).int(), prefix[3]))
    assert out[1::2].isnan().all() and torch.equal(out[::2], good[::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [4, 40])
def test_a_page_out_of_range_spoils_its_own_sequences_alone(H, dtype):
    (q, k, v, pages, lengths, _, prefix), _ = paged_case([6, 600, 1, 3], [50, 30], [-1, 1, 0, 1], 16, H=H, dtype=dtype)
    good = bits(attention_paged, q, k, v, pages, lengths, None, prefix)
    for bad in (-1, len(k), 2**31 - 1):
        wrong, wrong_prefix = pages.clone(), prefix[0].clone()
        wrong[1, 20], wrong_prefix[0, 3] = bad, bad
        out = bits(attention_paged, q, k, v, wrong, lengths, None, prefix)
        assert out[1].isnan().all() and torch.equal(out[[0, 2, 3]], good[[0, 2, 3]])
        out = bits(attention_paged, q, k, v, pages, lengths, None, (wrong_prefix, *prefix[1:]))
        assert out[2].isnan().all() and torch.equal(out[[0, 1, 3]], good[[0, 1, 3]])
    out = bits(attention_paged, q, k, v, pages, lengths, None, (*prefix[:2], torch.tensor([-2, 1, 0, 2]).int()))
    assert out[[0, 3]].isnan().all() and torch.equal(out[1:3], good[1:3])


def test_nothing_at_all_gives_nothing():
    q, k, v, lengths, prefix = case([0, 0, 2], [0, 0], [0, 1, 1])
    out = bits(attention_decode, q, k, v, lengths, prefix=prefix)
    assert out[:2].eq(0).all() and out[2].ne(0).all()
    assert bits(attention_decode, q[:0], k[:0], v[:0], lengths[:0], prefix=(*prefix[:3], prefix[3][:0])).shape == (0, 4, 32)
    assert bits(attention_decode, q, k[:, :0], v[:, :0], 0 * lengths).eq(0).all()
    paged, _ = paged_case([0, 0], [], [-1, -1], spare=0)
    assert bits(attention_paged, *paged).eq(0).all() and bits(attention_paged, *paged[:5]).eq(0).all()


def test_where_there_is_no_prefix_an_owner_is_none_or_wrong():
    paged, dense = paged_case([6, 600, 3], [], [-1, -1, -1], 16)
    assert torch.equal(bits(attention_paged, *paged), bits(attention_decode, *dense[:4]))
    (pages, lengths, _), wrong = paged[6], torch.tensor([-1, 0, -2]).int()
    out = bits(attention_paged, *paged[:6], (pages, lengths, wrong))
    assert torch.equal(out[0], bits(attention_paged, *paged)[0]) and out[1:].isnan().all()
    k, bounds = dense[1][0, :0], torch.zeros(1, dtype=torch.int32)
    assert bits(attention_decode, *dense[:4], None, (k, k, bounds, wrong)).isnan().all()


def test_the_bits_of_training_are_not_to_be_had():
    before = backend.deterministic(True)
    try:
        with pytest.raises(ValueError, match="attention_decode: the CUDA kernels cannot give the bits of attention"):
            bits(attention_decode, *case([3], [0], [0])[:4])
    finally:
        backend.deterministic(before)


def test_a_workspace_that_is_too_small_is_refused():
    bytes_needed = module().attention_decode_workspace(2, 4, 2, 64, 600, 0, 0)
    assert bytes_needed >= 2 * 4 * 2 * 66 * 4 and module().attention_decode_workspace(2, 4, 2, 64, 512, 0, 0) == 0
    q, cache, lengths = torch.zeros(2, 4, 64), torch.zeros(2, 600, 2, 64), torch.zeros(2, dtype=torch.int32)
    rows, keys = (q.data_ptr(), *q.stride()[:2]), (cache.data_ptr(), *cache.stride()[:3])
    with pytest.raises(ValueError, match=f"attention_decode: expected a workspace of {bytes_needed} bytes, got 256"):
        module().attention_decode(2, 4, 2, 64, 600, lengths.data_ptr(), 1.0, 0, rows, rows, keys, keys, 0, 0, 0, 0, (0, 0, 0), (0, 0, 0),
                                  False, (0, 0, q.data_ptr(), 256))  # fmt: skip
