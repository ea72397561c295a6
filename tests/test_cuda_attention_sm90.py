"""The Hopper kernels of attention, run by the emulator, where they differ from others: several items of work a block, warpgroups that
sit out a block of keys or queries, rows behind a sequence's end that come along, a softmax that rescales only now and then."""

import math

import pytest
import torch

import emulated
from nanorlhf.ops.attention import attention_reference
from oracle import values_and_gradients
from test_cuda_attention import Kernels, attend, check, ragged, random_qkv

pytestmark = pytest.mark.skipif("sm90" not in emulated.module().attention_variants(), reason="not compiled in")
both_sizes = pytest.mark.parametrize("D", [64, 128])
both_masks = pytest.mark.parametrize("causal", [True, False])


@pytest.fixture(autouse=True)
def hopper():
    before = emulated.module().attention_variant("sm90")
    yield emulated.module()
    emulated.module().attention_variant(before)


@both_sizes
@both_masks
@pytest.mark.parametrize("lengths", [(64,), (65, 128), (191, 0, 192), (193, 63), (257, 1), (385,), (0, 0, 448)])
def test_lengths_around_the_tiles_match_the_oracle(lengths, causal, D):
    check(lengths, 2, 1, D, causal, torch.bfloat16)


@both_sizes
@pytest.mark.parametrize(("H", "Hkv"), [(8, 1), (5, 5), (6, 2)])
def test_query_groups_match_the_oracle(H, Hkv, D):
    check((150, 70), H, Hkv, D, True, torch.bfloat16)


@both_sizes
@both_masks
def test_many_items_a_block_have_the_same_bits_under_every_order(hopper, causal, D):
    """The emulated device has 8 multiprocessors; here are 3 to 6 times as many tiles, short ones, long ones and empty ones."""
    lengths = (5, 200, 0, 64, 1, 130, 33, 17, 90, 2, 128, 0)
    inputs, cu_seqlens = random_qkv(lengths, 3, 1, D), ragged(*lengths)
    runs = []
    for seed in (1, 2, 3):
        hopper.seed(seed)
        runs.append(values_and_gradients(lambda *x: attend(*x, cu_seqlens, causal), inputs, torch.bfloat16))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    check(lengths, 3, 1, D, causal, torch.bfloat16)


@both_sizes
@both_masks
@pytest.mark.parametrize("lengths", [(1, 129, 60), (70, 200, 3), (120, 64, 200)])
def test_neighbours_full_of_nan_change_nothing(lengths, causal, D):
    mine = slice(lengths[0], lengths[0] + lengths[1])
    product = torch.randn(sum(lengths), 10, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    dout = product[:, 6:]

    def run(rows, lengths):
        leaves = [x.detach().requires_grad_() for x in (product[rows, :4], product[rows, 4:5], product[rows, 5:6])]
        out = attend(*leaves, ragged(*lengths), causal)
        return out.detach(), *torch.autograd.grad(out, leaves, dout[rows])

    alone = run(mine, lengths[1:2])
    product[: mine.start], product[mine.stop :] = math.nan, math.inf
    together = run(slice(None), lengths)
    assert all(torch.equal(a[mine], b) and b.isfinite().all() for a, b in zip(together, alone, strict=True))


@both_sizes
def test_the_log_of_the_sum_is_exact_to_a_few_roundings_of_fp32(D):
    """500 keys: some exponentials of D = 64 are polynomials, whose error of 3e-6 is all that is allowed beside fp32's."""
    q, k, v = (x.bfloat16() for x in random_qkv((500,), 1, 1, D))
    lse = Kernels.apply(q, k, v, ragged(500), False, 0.3)[1]
    exact = (0.3 * q[:, 0].double() @ k[:, 0].double().T).logsumexp(-1)
    torch.testing.assert_close(lse[:, 0], exact, rtol=0, atol=1e-5)


@both_sizes
@pytest.mark.parametrize("growth", [3.0, 40.0])
def test_a_maximum_that_grows_from_block_to_block_is_followed(growth, D):
    """Blocks are visited from the last to the first, and the scores rise that way, by less or more than what goes unrescaled."""
    q, k, v = random_qkv((512,), 1, 1, D)
    q[..., 0], k[..., 0] = 1, growth * (3 - torch.arange(512)[:, None] // 128)
    exact = attention_reference(*(x.bfloat16().double() for x in (q, k, v)), ragged(512), False, 1.0)
    out = attend(*(x.bfloat16() for x in (q, k, v)), ragged(512), False, 1.0)
    naive = attention_reference(*(x.bfloat16() for x in (q, k, v)), ragged(512), False, 1.0)
    error, allowed = ((x.double() - exact).abs().max() for x in (out, naive))
    assert error <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps


@both_sizes
def test_a_key_of_nan_reaches_all_that_see_it(D):
    q, k, v = (x.bfloat16() for x in random_qkv((300,), 2, 1, D))
    before = attend(q, k, v, ragged(300))
    k[100, 0, 7] = math.nan
    out = attend(q, k, v, ragged(300))
    assert out[100:].isnan().all() and torch.equal(out[:100], before[:100])
