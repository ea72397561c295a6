"""Attention's CUDA kernels, run by the emulator: their memory, their tiles and what surrounds a sequence. What is expected of any
attention (test_attention.py) is asked here of fp32 and of every variant of bf16."""

import math

import pytest
import torch

import emulated
from nanorlhf.ops import attention
from nanorlhf.ops.attention import attention_reference
from oracle import assert_earned, values_and_gradients

CODES = {torch.float32: 0, torch.bfloat16: 1}
KINDS = ["float32", "portable", "sm90"]  # of the kernels: of fp32, and variants on bf16


@pytest.fixture(params=KINDS)
def dtype(request):
    """The element type of what is tested, with its kernels forced."""
    if request.param == "float32":
        yield torch.float32
        return
    module = emulated.module()
    if request.param not in module.attention_variants():
        pytest.skip("not compiled in")
    before = module.attention_variant(request.param)
    yield torch.bfloat16
    module.attention_variant(before)


def rows(x):
    return x.data_ptr(), x.stride(0), x.stride(1)


def poisoned(shape, dtype):
    return torch.full(shape, math.nan, dtype=dtype)


def sizes(q, k, cu_seqlens):
    return cu_seqlens.numel() - 1, q.shape[0], q.shape[1], k.shape[1], q.shape[2]


def lane(bytes_needed):
    """No device, no stream, and a workspace full of NaN (kept by the caller)."""
    workspace = torch.full((bytes_needed,), 255, dtype=torch.uint8)
    return (0, 0, workspace.data_ptr(), bytes_needed), workspace


class Kernels(torch.autograd.Function):
    """The kernels as they are, on results full of NaN."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, causal, scale):
        module, of = emulated.module(), (*sizes(q, k, cu_seqlens), CODES[q.dtype])
        out, lse = poisoned(q.shape, q.dtype), poisoned(q.shape[:2], torch.float64)
        where, _workspace = lane(module.attention_workspace(*of))
        module.attention_forward(
            cu_seqlens.data_ptr(), *of[:-1], causal, scale, of[-1], rows(q), rows(k), rows(v), rows(out), lse.data_ptr(), where
        )
        ctx.save_for_backward(q, k, v, cu_seqlens, out, lse)
        ctx.causal, ctx.scale = causal, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
        module, of = emulated.module(), (*sizes(q, k, cu_seqlens), CODES[q.dtype])
        dq, dk, dv = (poisoned(x.shape, x.dtype) for x in (q, k, v))
        where, _workspace = lane(module.attention_backward_workspace(*of))
        module.attention_backward(
            cu_seqlens.data_ptr(), *of[:-1], ctx.causal, ctx.scale, of[-1], rows(q), rows(k), rows(v), rows(out), lse.data_ptr(),
            rows(dout), rows(dq), rows(dk), rows(dv), where,
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def attend(q, k, v, cu_seqlens, causal=True, scale=None):
    return Kernels.apply(q, k, v, cu_seqlens, causal, 1 / math.sqrt(q.shape[2]) if scale is None else scale)[0]


def ragged(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def random_qkv(lengths, H, Hkv, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(lengths), heads, D, generator=generator) for heads in (H, Hkv, Hkv)]


def check(lengths, H, Hkv, D, causal, dtype, scale=None, roundings=4):
    cu_seqlens = ragged(*lengths)
    assert_earned(
        lambda q, k, v: attend(q, k, v, cu_seqlens, causal, scale),
        lambda q, k, v: attention_reference(q, k, v, cu_seqlens, causal, scale),
        random_qkv(lengths, H, Hkv, D),
        dtype,
        roundings=roundings,
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths", [(1,), (15, 16, 17), (0, 5, 0), (31, 1, 33), (63, 64, 65), (127, 128, 129), (192, 193), (300,), (530, 2)]
)
def test_lengths_around_the_tiles_match_the_oracle(lengths, causal, dtype):
    check(lengths, 2, 1, 64, causal, dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", [1, 3, 16, 20, 32, 64, 80, 96, 128, 160, 192, 255, 256])
def test_every_head_size_matches_the_oracle(D, causal, dtype):
    check((19, 0, 140), 2, 1, D, causal, dtype)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("H", "Hkv"), [(1, 1), (4, 4), (4, 2), (6, 1)])
def test_query_groups_match_the_oracle(H, Hkv, D, dtype):
    check((37, 130), H, Hkv, D, True, dtype)


@pytest.mark.parametrize("D", [16, 64, 128])
@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-35, 3.0])
def test_any_scale_matches_the_oracle(scale, D, dtype):
    check((37, 70), 2, 1, D, True, dtype, scale)


def test_more_sequences_than_threads_that_sort_them(dtype):
    check([i % 7 if i % 50 == 9 or i > 1095 else 0 for i in range(1100)], 1, 1, 64, True, dtype, roundings=8)


@pytest.mark.parametrize("D", [40, 64, 128])
def test_the_log_of_the_sum_is_that_of_the_scores(D, dtype):
    q, k, v = (x.to(dtype) for x in random_qkv((150, 3), 2, 1, D))
    lse = Kernels.apply(q, k, v, ragged(150, 3), True, 0.5)[1]
    scores = 0.5 * torch.einsum("ihd,jd->hij", q[:150].double(), k[:150, 0].double())
    exact = scores.masked_fill(torch.ones(150, 150, dtype=torch.bool).triu(1), -math.inf).logsumexp(-1).T
    # In bf16 the weights that are added up are rounded, each by at most 2^-9 of itself.
    torch.testing.assert_close(lse[:150], exact, rtol=0, atol=2**-8 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("D", [36, 64, 128, 256])
def test_neighbours_full_of_nan_change_nothing(D, dtype):
    lengths, mine = (70, 90, 45), slice(70, 160)
    leaves = [x.to(dtype) for x in random_qkv(lengths, 4, 2, D)]
    alone = values_and_gradients(lambda *x: attend(*x, ragged(90)), [x[mine] for x in leaves], dtype)
    for x in leaves:
        x[:70], x[160:] = math.nan, math.inf
    leaves = [x.requires_grad_() for x in leaves]
    out = attend(*leaves, ragged(*lengths))
    upstream = torch.full(out.shape, math.nan, dtype=dtype)
    upstream[mine] = torch.randn(90, 4, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    together = [x[mine] for x in (out.detach(), *torch.autograd.grad(out, leaves, upstream))]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_a_sequence_does_not_depend_on_what_it_is_packed_with(causal, dtype):
    inputs = random_qkv((9, 133, 40), 2, 1, 64)
    out = attend(*(x.to(dtype) for x in inputs), ragged(9, 133, 40), causal)
    alone = attend(*(x[9:142].to(dtype) for x in inputs), ragged(133), causal)
    assert torch.equal(out[9:142], alone)


def test_future_tokens_cannot_change_past_outputs(dtype):
    q, k, v = (x.to(dtype) for x in random_qkv((140,), 2, 2, 64))
    before = attend(q, k, v, ragged(140))
    for x in (q, k, v):
        x[75:] = 1e3
    assert torch.equal(attend(q, k, v, ragged(140))[:75], before[:75])


@pytest.mark.parametrize("D", [64, 128])
def test_the_gradient_has_the_same_bits_on_every_run(D, dtype):
    inputs, cu_seqlens, runs = random_qkv((50, 200, 7), 4, 2, D), ragged(50, 200, 7), []
    for seed in (1, 2, 3):
        emulated.module().seed(seed)  # another order of threads, blocks and copies
        runs.append(values_and_gradients(lambda *x: attend(*x, cu_seqlens), inputs, dtype))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(("D", "extra"), [(64, 0), (128, 0), (64, 1), (20, 0)])
def test_strided_inputs_need_no_copy(D, extra, dtype):
    """q, k and v are columns of one product; with one more column no address is a multiple of 16 bytes."""
    product = torch.randn(75, 4 * D + extra, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = (product[:, extra + a * D : extra + b * D].unflatten(1, (b - a, D)) for a, b in ((0, 2), (2, 3), (3, 4)))
    ours = values_and_gradients(lambda q, k, v: attend(q, k, v, ragged(75)), (q, k, v), dtype)
    strided = attend(q, k, v, ragged(75))
    assert q.stride() != ours[0].stride()
    torch.testing.assert_close(strided, ours[0], rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-5)
    exact = attention_reference(q.double(), k.double(), v.double(), ragged(75))
    torch.testing.assert_close(strided.double(), exact, rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-5)


def test_a_row_of_nan_is_its_own(dtype):
    q, k, v = (x.to(dtype) for x in random_qkv((140,), 1, 1, 64))
    before = attend(q, k, v, ragged(140), False)
    q[33] = math.nan
    out = attend(q, k, v, ragged(140), False)
    assert out[33].isnan().all()
    assert torch.equal(out[torch.arange(140) != 33], before[torch.arange(140) != 33])


def test_large_scores_stay_finite_and_right(dtype):
    inputs = random_qkv((150,), 1, 1, 64)
    inputs[0] *= 1e4
    inputs = [x.to(dtype).float() for x in inputs]
    ours = values_and_gradients(lambda *x: attend(*x, ragged(150)), inputs, dtype)
    exact = values_and_gradients(lambda *x: attention_reference(*x, ragged(150)), inputs, torch.float64)
    assert all(x.isfinite().all() for x in ours)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=0, atol=0.03 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("bounds", [(1, 70), (0, 69), (0, 71), (0, 50, 30, 70), (0, -5, 70), (0, 10**9, 70), (0, 70, 0, 70, 0, 70)])
def test_bounds_that_do_not_rise_from_0_to_n_give_nan_and_nothing_else(bounds, dtype):
    """They cannot be read before the kernels run, so they are no error, but no address outside the tensors comes of them: what
    is checked are the guards on all sides of the results."""
    q, k, v = (x.to(dtype) for x in random_qkv((70,), 2, 2, 64))
    guarded = [torch.ones(170, 2, 64, dtype=dtype) for _ in range(4)]
    out, dq, dk, dv = (x[50:120] for x in guarded)
    lse, cu_seqlens = torch.ones(170, 2, dtype=torch.float64), torch.tensor(bounds, dtype=torch.int32)
    module, of = emulated.module(), (*sizes(q, k, cu_seqlens), CODES[dtype])
    common = (cu_seqlens.data_ptr(), *of[:-1], True, 0.1, of[-1], rows(q), rows(k), rows(v), rows(out), lse[50:120].data_ptr())
    where, _first = lane(module.attention_workspace(*of))
    module.attention_forward(*common, where)
    where, _second = lane(module.attention_backward_workspace(*of))
    module.attention_backward(*common, rows(q), rows(dq), rows(dk), rows(dv), where)
    for x in (*guarded, lse):
        assert x[50:120].isnan().all()
        assert x[:50].eq(1).all() and x[120:].eq(1).all()


def test_variants_and_workspaces_are_checked():
    module = emulated.module()
    assert module.attention_variant("portable") == "auto"
    assert module.attention_variant("auto") == "portable"
    with pytest.raises(ValueError, match="attention_variant: expected auto, portable or, where it is compiled in, sm90, got fast"):
        module.attention_variant("fast")
    q, cu_seqlens = torch.zeros(5, 1, 8), ragged(5)
    lse = torch.zeros(5, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="attention: expected a workspace of .* bytes, got 0"):
        module.attention_forward(
            cu_seqlens.data_ptr(), *sizes(q, q, cu_seqlens), True, 1.0, 0, rows(q), rows(q), rows(q), rows(q), lse.data_ptr(),
            (0, 0, 0, 0),
        )  # fmt: skip


def test_an_empty_batch_is_empty(dtype):
    q = torch.empty(0, 2, 64, dtype=dtype)
    assert attend(q, q, q, ragged(0)).shape == (0, 2, 64)
    assert attend(q, q, q, torch.zeros(1, dtype=torch.int32)).shape == (0, 2, 64)


@pytest.mark.skipif(not hasattr(emulated.backend, "emulate"), reason="the ops cannot take another module yet")
def test_the_op_runs_these_kernels(dtype):
    inputs, cu_seqlens = random_qkv((37, 70), 4, 2, 64), ragged(37, 70)
    direct = values_and_gradients(lambda *x: attend(*x, cu_seqlens), inputs, dtype)
    with emulated.kernels():
        through = values_and_gradients(lambda *x: attention(*x, cu_seqlens), inputs, dtype)
    assert all(torch.equal(a, b) for a, b in zip(direct, through, strict=True))
