import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.ops import attention, attention_decode
from nanorlhf.ops.attention import attention_decode_reference, attention_reference
from oracle import assert_earned, values_and_gradients


def ragged(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def random_qkv(lengths, H, Hkv, D, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    return [torch.randn(N, heads, D, generator=generator).to(dtype) for heads in (H, Hkv, Hkv)]


def check(lengths, H, Hkv, D, causal, dtype=torch.float32, roundings=4):
    cu_seqlens = ragged(*lengths)
    assert_earned(
        lambda q, k, v: attention(q, k, v, cu_seqlens, causal),
        lambda q, k, v: attention_reference(q, k, v, cu_seqlens, causal),
        random_qkv(lengths, H, Hkv, D),
        dtype,
        roundings=roundings,
    )


def test_two_keys_worked_by_hand():
    """D = 1, scale = 1, q = (·, ln 3), k = (0, 1): the second token's scores are 0 and ln 3, so its weights are
    1/4 and 3/4, and with v = (4, 8) it gets 1 + 6 = 7. The first token sees itself only: 4."""
    q = torch.tensor([0.5, math.log(3)]).reshape(2, 1, 1)
    k = torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
    v = torch.tensor([4.0, 8.0]).reshape(2, 1, 1)
    out = attention(q, k, v, ragged(2), scale=1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([4.0, 7.0]))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths", [(1,), (15,), (16,), (17,), (0, 5, 0), (31, 1, 33), (64, 20, 129), (257,), (300,), (530, 2)]
)
def test_lengths_around_the_tile_match_the_oracle(lengths, causal):
    check(lengths, 2, 1, 32, causal)


@pytest.mark.parametrize("D", [1, 3, 16, 20, 32, 48, 64, 80, 96, 100, 128, 160, 255, 256])
def test_every_head_size_matches_the_oracle(D):
    check((19, 40), 2, 1, D, True)


@pytest.mark.parametrize(("H", "Hkv"), [(1, 1), (4, 4), (4, 2), (6, 1), (12, 3)])
def test_query_groups_match_the_oracle(H, Hkv):
    check((37, 16), H, Hkv, 16, True)


@pytest.mark.parametrize("causal", [True, False])
def test_bf16_matches_the_oracle(causal):
    check((70, 1, 33), 4, 2, 64, causal, torch.bfloat16)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(1,), (15, 16, 17), (0, 5, 0), (31, 1, 33), (64, 129), (300,), (530, 2)])
def test_bf16_lengths_around_the_tiles_match_the_oracle(lengths, causal):
    check(lengths, 2, 1, 32, causal, torch.bfloat16)


@pytest.mark.parametrize("D", [1, 3, 16, 20, 48, 64, 96, 100, 128, 255, 256])
def test_bf16_every_head_size_matches_the_oracle(D):
    check((19, 40), 4, 2, D, True, torch.bfloat16)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-35, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_scale_matches_the_oracle(scale, dtype):
    cu_seqlens = ragged(37, 5)
    assert_earned(
        lambda q, k, v: attention(q, k, v, cu_seqlens, True, scale),
        lambda q, k, v: attention_reference(q, k, v, cu_seqlens, True, scale),
        random_qkv((37, 5), 2, 1, 16),
        dtype,
    )


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(1, 40), st.booleans())
def test_any_packing_matches_the_oracle(lengths, D, causal):
    """The search finds the cases where the naive gradient is exact by luck (D = 1: one term a score), so some roundings more."""
    check(lengths, 2, 2, D, causal, roundings=8)


def test_future_tokens_cannot_change_past_outputs():
    q, k, v = random_qkv((40,), 2, 2, 32)
    before = attention(q, k, v, ragged(40))
    for x in (q, k, v):
        x[25:] = 1e3
    assert torch.equal(attention(q, k, v, ragged(40))[:25], before[:25])


def test_other_sequences_in_the_batch_change_nothing():
    q, k, v = random_qkv((9, 33, 300), 4, 2, 32)
    together = values_and_gradients(lambda *x: attention(*x, ragged(9, 33, 300)), (q, k, v), torch.float32)
    alone = attention(q[9:42], k[9:42], v[9:42], ragged(33))
    assert torch.equal(together[0][9:42], alone)


def test_gradients_are_the_same_on_every_run_and_thread_count():
    inputs, cu_seqlens = random_qkv((50, 300, 7, 90), 4, 2, 32), ragged(50, 300, 7, 90)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(values_and_gradients(lambda *x: attention(*x, cu_seqlens), inputs, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_large_logits_stay_finite_and_right():
    q, k, v = random_qkv((50,), 1, 1, 16)
    q *= 1e4
    ours = values_and_gradients(lambda *x: attention(*x, ragged(50)), (q, k, v), torch.float32)
    exact = values_and_gradients(lambda *x: attention_reference(*x, ragged(50)), (q, k, v), torch.float64)
    assert all(x.isfinite().all() for x in ours)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=0, atol=1e-3)


def test_equal_keys_average_the_values():
    v = torch.arange(20.0).reshape(20, 1, 1)
    out = attention(torch.randn(20, 1, 1), torch.ones(20, 1, 1), v, ragged(20))
    torch.testing.assert_close(out.flatten(), torch.arange(20) / 2)  # the mean of 0..i is i / 2


def test_strided_inputs_need_no_copy():
    packed = torch.randn(30, 3, 4, 16)
    q, k, v = packed.unbind(1)
    plain = attention(q.contiguous(), k.contiguous(), v.contiguous(), ragged(30))
    assert torch.equal(attention(q, k, v, ragged(30)), plain)
    turned = q.transpose(0, 2).contiguous().transpose(0, 2)  # the last stride is not one
    assert torch.equal(attention(turned, k, v, ragged(30)), plain)


def test_an_empty_batch_is_empty():
    assert attention(torch.empty(0, 2, 8), torch.empty(0, 2, 8), torch.empty(0, 2, 8), ragged(0)).shape == (0, 2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "Hkv", "D"), [(4, 2, 64), (1, 1, 1), (3, 1, 20), (2, 2, 256), (8, 2, 72)])
def test_decode_matches_the_reference_on_any_cache_stride(H, Hkv, D, dtype):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 15, 16, 17, 0, 40], dtype=torch.int32)
    store = torch.randn(9, 2, 50, Hkv, D, generator=generator).to(dtype)
    k, v = store[1:7, 0, :40], store[1:7, 1, :40]
    q = torch.randn(6, H, D, generator=generator).to(dtype)
    out = attention_decode(q, k, v, lengths)
    exact = attention_decode_reference(q.double(), k.double(), v.double(), lengths)
    naive = attention_decode_reference(q, k, v, lengths)
    error, allowed = (out.double() - exact).abs().max(), (naive.double() - exact).abs().max()
    assert error <= 2 * allowed + 1e-6
    assert out[4].eq(0).all()


def test_decode_never_reads_past_a_sequences_end():
    q, cache = torch.randn(1, 2, 16), torch.randn(1, 32, 2, 16)
    before = attention_decode(q, cache, cache, torch.tensor([5], dtype=torch.int32))
    cache[:, 5:] = math.nan
    assert torch.equal(attention_decode(q, cache, cache, torch.tensor([5], dtype=torch.int32)), before)


def test_decode_continues_what_attention_began():
    q, k, v = random_qkv((33,), 4, 2, 32)
    last = attention_decode(q[-1:], k[None], v[None], torch.tensor([33], dtype=torch.int32))
    torch.testing.assert_close(last[0], attention(q, k, v, ragged(33))[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "cu_seqlens", "message"),
    [
        (((6, 4, 8), (6, 2), (6, 2, 8)), ragged(6), r"expected k of shape \(6, Hkv, 8\), got \(6, 2\)"),
        (((6, 4, 8), (6, 2, 8), (6, 2, 9)), ragged(6), r"expected v of shape \(6, 2, 8\), got \(6, 2, 9\)"),
        (((6, 4, 8), (6, 3, 8), (6, 3, 8)), ragged(6), "expected H to be a multiple of Hkv, got 4 and 3"),
        (((6, 4, 257),) * 3, ragged(6), r"D in 1\.\.256, got \(6, 4, 257\)"),
        (((6, 4, 8),) * 3, ragged(5), "expected cu_seqlens to rise from 0 to N = 6"),
        (((6, 4, 8),) * 3, torch.tensor([0, 4, 3, 6]).int(), "expected cu_seqlens to rise from 0 to N = 6"),
        (((6, 4, 8),) * 3, torch.tensor([0, 6]), r"expected cu_seqlens of shape \(B\+1,\) in int32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(shapes, cu_seqlens, message):
    with pytest.raises(ValueError, match="attention: .*" + message):
        attention(*(torch.zeros(s) for s in shapes), cu_seqlens)


def test_mixed_dtypes_and_bad_decode_lengths_are_named():
    with pytest.raises(ValueError, match="expected q, k and v alike"):
        attention(torch.zeros(2, 1, 8), torch.zeros(2, 1, 8).bfloat16(), torch.zeros(2, 1, 8), ragged(2))
    cache = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"expected lengths in \[0, Tmax = 4\], got 5"):
        attention_decode(torch.zeros(1, 1, 8), cache, cache, torch.tensor([5], dtype=torch.int32))
    with pytest.raises(ValueError, match="attention_decode: expected v_cache of shape"):
        attention_decode(torch.zeros(1, 1, 8), cache, cache[..., :4], torch.tensor([4], dtype=torch.int32))


def test_the_ops_are_good_citizens_of_torch():
    cu_seqlens = ragged(5, 12)
    q, k, v = random_qkv((5, 12), 4, 2, 8)
    ops = torch.ops.nanorlhf
    torch.library.opcheck(ops.attention_forward.default, (q, k, v, cu_seqlens, True, 0.3))
    out, lse = ops.attention_forward(q, k, v, cu_seqlens, True, 0.3)
    torch.library.opcheck(ops.attention_backward.default, (out, q, k, v, out, lse, cu_seqlens, True, 0.3))
    lengths = torch.tensor([3], dtype=torch.int32)
    torch.library.opcheck(ops.attention_decode.default, (q[:1], k[None], v[None], lengths, 0.3, []))


def test_it_compiles_in_one_graph_with_its_gradient():
    inputs, cu_seqlens = random_qkv((5, 12), 4, 2, 8), ragged(5, 12)
    compiled = torch.compile(lambda *x: attention(*x, cu_seqlens), fullgraph=True, backend="aot_eager")
    ours = values_and_gradients(compiled, inputs, torch.float32)
    plain = values_and_gradients(lambda *x: attention(*x, cu_seqlens), inputs, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
