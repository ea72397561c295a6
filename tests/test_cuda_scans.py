"""csrc/{gae,ppo_loss,optim,sample,matmul}.cu on the emulator, called as the ops call them, with workspaces full of NaN."""

import math

import numpy as np
import pytest
import torch

from emulated import module
from nanorlhf import _C
from nanorlhf.ops import backend
from nanorlhf.ops.gae import gae_reference
from nanorlhf.ops.matmul import matmul_reference
from nanorlhf.ops.ppo_loss import ppo_policy_loss_reference, ppo_value_loss_reference
from nanorlhf.ops.sample import DEFAULTS, ROW_DTYPES, sample_reference
from test_gae import LENGTHS, batch
from test_sample import CHI2, LARGE, LOGITS, SETTINGS, bits, numbers, warped

SEEDS = [1, 2, 3]


def on_lane(call, *arguments, workspace=0, seed=1):
    """``call`` with a lane whose workspace has so many bytes; returns the workspace."""
    module().seed(seed)
    room = torch.full(((workspace + 7) // 8 + 4,), math.nan, dtype=torch.float64)
    call(*arguments, (0, 0, room.data_ptr(), workspace))
    assert room[(workspace + 7) // 8 :].isnan().all()
    return room


def address(x):
    return 0 if x is None else x.data_ptr()


def off_by_one(x):
    """The same values at an address that is no multiple of 16 bytes."""
    moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return moved.copy_(x)


# --- gae -----------------------------------------------------------------------------------------------------------


def gae(rewards, values, bounds, gamma, lam, seed=1):
    advantages, returns = torch.full((2, len(rewards)), 7.0)
    on_lane(module().gae, address(bounds), len(bounds) - 1, len(rewards), gamma, lam, address(rewards), address(values),
            address(advantages), address(returns), seed=seed)  # fmt: skip
    return advantages, returns


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5), (0.9, 0.97)])
@pytest.mark.parametrize("lengths", [*LENGTHS, [127, 128, 129, 256, 0, 385]], ids=lambda x: f"{len(x)}x{sum(x)}")
def test_advantages_are_within_one_rounding_of_fp64(lengths, gamma, lam):
    rewards, values, bounds = batch(lengths)
    exact = gae_reference(rewards.double(), values.double(), bounds, gamma, lam)
    for seed in SEEDS:
        for x, z in zip(gae(rewards, values, bounds, gamma, lam, seed), exact, strict=True):
            torch.testing.assert_close(x.double(), z, rtol=2**-24, atol=1e-12)


def test_an_episode_has_the_same_bits_wherever_it_lies_and_whatever_is_beside_it():
    rewards, values, bounds = batch([30, 500, 20])
    whole = gae(rewards, values, bounds, 0.99, 0.95)
    alone = gae(rewards[30:530].clone(), values[30:530].clone(), torch.tensor([0, 500]).int(), 0.99, 0.95)
    rewards[:30], values[530:] = math.nan, math.inf
    beside = gae(rewards, values, bounds, 0.99, 0.95)
    for a, b, c in zip(whole, alone, beside):
        assert torch.equal(a[30:530], b) and torch.equal(a[30:530], c[30:530])


@pytest.mark.parametrize("bounds, left_out", [([0, 2], [2, 3]), ([1, 4], [0]), ([0, 2, 9], []), ([-5, 1, 2], [2, 3]), ([0], [0, 1, 2, 3])])
def test_bounds_that_do_not_fit_stay_in_memory_and_show_as_nan(bounds, left_out):
    for x in gae(torch.ones(4), torch.ones(4), torch.tensor(bounds).int(), 1.0, 1.0):
        assert x.isnan().nonzero().flatten().tolist() == left_out


# --- ppo_loss ------------------------------------------------------------------------------------------------------


def ppo(value, x, old, target, ref=None, clip=0.2, seed=1):
    terms, grad = torch.full((8,), math.nan), torch.full(x.shape, math.nan)
    on_lane(module().ppo_loss, value, len(x), clip, *map(address, (x, old, target, ref, grad, terms)),
            workspace=module().ppo_loss_workspace(len(x)), seed=seed)  # fmt: skip
    return terms, grad


@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("M", [1, 31, 33, 255, 1023, 1025, 5000])
def test_both_halves_of_the_loss_match_the_oracle(M, scale):
    g = torch.Generator().manual_seed(M)
    x, old, ref, target = (scale * torch.randn(M, generator=g) for _ in range(4))
    wide = [t.double() for t in (old, target)]
    for seed in SEEDS[:2]:
        leaf = x.double().requires_grad_()
        exact = ppo_policy_loss_reference(leaf, *wide, 0.2, ref.double())
        exact.loss.backward()
        terms, grad = ppo(False, x, old, target, ref, seed=seed)
        torch.testing.assert_close(terms.double(), torch.stack(list(exact)).detach(), rtol=2e-5, atol=2e-7)
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=2e-6, atol=1e-12)
        leaf = x.double().requires_grad_()
        exact = ppo_value_loss_reference(leaf, *wide, 0.2)
        exact.loss.backward()
        terms, grad = ppo(True, x, old, target, seed=seed)
        torch.testing.assert_close(terms[:2].double(), torch.stack(list(exact)).detach(), rtol=2e-6, atol=0)
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=2e-5, atol=1e-6 / M)


def test_the_loss_treats_ends_and_nan_as_the_cpu_does():
    cases = [([200.0, 0.0], [0.0, 0.0], [-1.0, 1.0]), ([-math.inf, 0.0], [0.0, 0.0], [1.0, 1.0]), ([0.0, math.nan], [0.0, 0.0], [1.0, 1.0]),
             ([0.0, 0.0], [0.0, math.nan], [1.0, 1.0]), ([1e-4] * 50, [0.0] * 50, [1.0] * 50), ([5.0] * 3, [5.0] * 3, [0.0] * 3),
             ([0.0, 1.0], [0.0, 0.0], [math.nan, 1.0]), ([200.0, 0.0], [0.0, 0.0], [0.0, 1.0])]  # fmt: skip
    for case in cases:
        x, old, target = map(torch.tensor, case)
        for value in (False, True):
            terms, grad = torch.empty(8), torch.empty(len(x))
            _C.ppo_loss(value, len(x), 0.2, *map(address, (x, old, target)), address(target), address(grad), address(terms), 1)
            ours = ppo(value, x, old, target, target)
            torch.testing.assert_close(ours, (terms, grad), rtol=1e-5, atol=1e-9, equal_nan=True)


# --- optim ---------------------------------------------------------------------------------------------------------

SIZES = [0, 1, 3, 15, 4095, 4096, 4097, 20_001]
NORM, ADAMW, MOMENTUM, APPLY = range(4)


def optim(kind, columns, sizes, dtype=torch.float32, scale=1.0, keep=1.0, rate=0.0, beta1=0.0, beta2=0.0, root=1.0, eps=0.0, seed=1):
    spans = torch.tensor([[0] * len(sizes) if c is None else [address(t) for t in c] for c in columns] + [sizes]).T.contiguous()
    room = on_lane(module().optim, kind, backend.DTYPES[dtype], address(spans), len(sizes), scale, keep, rate, beta1, beta2, root, eps,
                   workspace=module().optim_workspace(len(sizes)), seed=seed)  # fmt: skip
    return float(room[0])


def arrays(sizes, seed, dtype=torch.float32, place=torch.clone):
    g = torch.Generator().manual_seed(seed)
    return [place(torch.randn(n, generator=g).to(dtype)) for n in sizes]


@pytest.mark.parametrize("place", [torch.clone, off_by_one])
def test_the_norm_is_exact_and_has_the_same_bits_wherever_the_gradients_lie(place):
    gradients = arrays(SIZES, 0, place=place)
    exact = sum(float(x.double().square().sum()) for x in gradients)
    got = {optim(NORM, (None, gradients, None, None, None), SIZES, seed=seed) for seed in SEEDS}
    assert got == {optim(NORM, (None, arrays(SIZES, 0), None, None, None), SIZES)}
    assert got.pop() == pytest.approx(exact, rel=1e-6)
    assert optim(NORM, (None, [], None, None, None), []) == 0
    gradients[-1][20_000] = math.nan
    assert math.isnan(optim(NORM, (None, gradients, None, None, None), SIZES))


def test_more_spans_than_a_block_looks_at_together():
    sizes = [n % 7 for n in range(600)] + [9000]
    gradients = arrays(sizes, 1)
    params, updates = arrays(sizes, 2), arrays(sizes, 3)
    exact = sum(float(x.double().square().sum()) for x in gradients)
    assert optim(NORM, (None, gradients, None, None, None), sizes) == pytest.approx(exact, rel=1e-6)
    expected = [0.5 * p - 0.25 * u for p, u in zip(params, updates)]
    optim(APPLY, (params, None, None, None, updates), sizes, keep=0.5, rate=0.25)
    torch.testing.assert_close(params, expected)


@pytest.mark.parametrize("place", [torch.clone, off_by_one])
def test_adamw_is_as_exact_as_torch(place):
    params, gradients, first = (arrays(SIZES, s, place=place) for s in range(3))
    second = [place(x.square()) for x in arrays(SIZES, 3)]
    given = dict(scale=0.5, keep=0.99, rate=0.05, beta1=0.9, beta2=0.95, root=2.0, eps=1e-8)
    results = []
    for dtype in (torch.float64, torch.float32):
        p, g, m, v = ([x.to(dtype) for x in xs] for xs in (params, gradients, first, second))
        g = [0.5 * x for x in g]
        m = [a + (1 - 0.9) * (b - a) for a, b in zip(m, g)]
        v = [0.95 * a + (1 - 0.95) * b * b for a, b in zip(v, g)]
        p = [0.99 * a - 0.05 * b / (c.sqrt() * 2 + 1e-8) for a, b, c in zip(p, m, v)]
        results.append([*p, *m, *v])
    optim(ADAMW, (params, gradients, first, second, None), SIZES, **given)
    for exact, naive, ours in zip(*results, (*params, *first, *second), strict=True):
        if exact.numel():
            assert (ours - exact).abs().max() <= 2 * (naive - exact).abs().max() + 4e-7


@pytest.mark.parametrize("place", [torch.clone, off_by_one])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_and_its_application(dtype, place):
    gradients, momenta, params = (arrays(SIZES, s, place=place) for s in range(3))
    updates = arrays(SIZES, 3, dtype, place)
    m = [a + (1 - 0.9) * (0.5 * g - a) for a, g in zip(momenta, gradients)]
    u = [(0.5 * g + 0.9 * (a - 0.5 * g)).to(dtype) for a, g in zip(m, gradients)]
    optim(MOMENTUM, (None, gradients, momenta, None, updates), SIZES, dtype, scale=0.5, beta1=0.9)
    torch.testing.assert_close(momenta, m)
    torch.testing.assert_close(updates, u)
    p = [0.5 * x - 0.25 * y.float() for x, y in zip(params, updates)]
    optim(APPLY, (params, None, None, None, updates), SIZES, dtype, keep=0.5, rate=0.25)
    torch.testing.assert_close(params, p)


# --- sample --------------------------------------------------------------------------------------------------------


def run_sample(call, last, logits, seed, requests, steps, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, mask=None):
    tokens, *results = torch.full_like(requests, -7), *(torch.full((len(logits),), 7.0) for _ in range(3))
    settings = seed, temperature, top_k, top_p, min_p
    own = tuple(address(x) if isinstance(x, torch.Tensor) else 0 for x in settings)
    numbers = [default if isinstance(x, torch.Tensor) else x for x, default in zip(settings, (0, 1.0, 0, 1.0, 0.0), strict=True)]
    arguments = (*logits.shape, logits.stride(0), backend.DTYPES[logits.dtype], address(logits), numbers[0], address(requests), address(steps),
                 *numbers[1:], own, address(mask), 0 if mask is None else mask.stride(0), address(tokens), *map(address, results))  # fmt: skip
    call(*arguments, *last)
    return tokens, *results


def sample(logits, *arguments, order=1, **settings):
    def call(*given):
        on_lane(module().sample, *given, workspace=module().sample_workspace(*logits.shape), seed=order)

    return run_sample(call, (), logits, *arguments, **settings)


def sample_cpu(logits, *arguments, **settings):
    return run_sample(_C.sample, (1,), logits, *arguments, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [*LARGE, {"temperature": 0, "top_k": 3}], ids=str)
@pytest.mark.parametrize("V", [1, 2, 17, 511, 513, 5000, 20_001])
def test_tokens_and_logprobs_are_the_cpus(V, settings, dtype):
    """The weights are the same bits, so a token differs only where a random point lies within rounding of a border."""
    spread = torch.tensor([0.1, 1.0, 3.0, 10.0])[:, None]
    logits = (spread * torch.randn(4, V, generator=torch.Generator().manual_seed(V)) - 20).to(dtype)
    for order, given in ((1, logits), (2, torch.stack([logits, logits], 1)[:, 1])):
        tokens, *results = sample(given, *numbers(4), order=order, **settings)
        expected = sample_cpu(logits, *numbers(4), **settings)
        assert tokens.equal(expected[0])
        torch.testing.assert_close(results, [*expected[1:]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 9000, "min_p": 0.01}])
def test_many_rows_draw_what_few_do(settings):
    """Beyond 64 rows a row's block makes its sums itself."""
    logits = 2 * torch.randn(66, 9000, generator=torch.Generator().manual_seed(0))
    seed, requests, steps = numbers(66)
    many, few = sample(logits, seed, requests, steps, **settings), sample(logits[60:], seed, requests[60:], steps[60:], **settings)
    for a, b, c in zip(many, few, sample_cpu(logits, seed, requests, steps, **settings)):
        assert torch.equal(a[60:], b)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_come_as_often_as_the_filtered_softmax_says(settings):
    draws = 600
    counts = np.bincount(sample(LOGITS.expand(draws, -1), *numbers(draws), **settings)[0].numpy(), minlength=8)
    expected = draws * warped(LOGITS[None], **settings).softmax(-1)[0].numpy()
    live = expected > 0
    assert counts[~live].sum() == 0
    assert ((counts[live] - expected[live]) ** 2 / expected[live]).sum() < CHI2[live.sum() - 1]


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_k": 50}, {"top_p": 0.9}, {"top_p": 1e-9}, {"min_p": 0.1}, {"temperature": 0},
                                      {"temperature": 1e-40}])  # fmt: skip
def test_ties_masked_and_far_logits(settings):
    masked = torch.full((5000,), -math.inf)
    masked[[7, 600, 4999]] = 2.0
    far = torch.arange(5000) * -1e-6
    far[0] = -0.0
    rows = [masked, torch.zeros(5000), far, torch.full((5000,), -1e30), torch.full((5000,), 3e38).neg()]
    rows[3][1], rows[4][4999] = 1e30, 3e38
    logits, given = torch.stack(rows).repeat(4, 1), numbers(20)
    for a, b in zip(sample(logits, *given, **settings), sample_cpu(logits, *given, **settings)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("columns", [3, 9001])
def test_a_row_that_is_no_distribution_has_token_minus_one_and_disturbs_no_other(columns, temperature):
    logits = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    clean = sample(logits, *numbers(5), temperature=temperature, top_p=0.9)
    logits[1, columns - 1], logits[2, 1], logits[3] = math.nan, math.inf, -math.inf
    tokens, *results = sample(logits, *numbers(5), temperature=temperature, top_p=0.9)
    assert tokens[1:4].tolist() == [-1] * 3 and all(x[1:4].isnan().all() for x in results)
    assert all(torch.equal(a[[0, 4]], b[[0, 4]]) for a, b in zip((tokens, *results), clean))


MASKS = {"all": lambda at: at >= 0, "half": lambda at: at % 2 == 0, "the last": lambda at: at == at.amax(), "a block": lambda at: at // 512 == 1,
         "a few": lambda at: at % 997 == 3}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 0.02, "top_k": 50, "top_p": 0.9}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("rows, V", [(5, 1000), (5, 9001), (70, 9001)])
def test_masks_and_settings_of_their_own_are_the_cpus(rows, V, settings, dtype):
    """Rows of five masks and spreads; then the same settings as one number a row, with rows between them that have others."""
    spread = torch.tensor([0.1, 1.0, 3.0, 10.0, 30.0]).repeat(rows // 5)[:, None]
    logits = (spread * torch.randn(rows, V, generator=torch.Generator().manual_seed(V))).to(dtype)
    mask = bits(torch.stack([f(torch.arange(V)) for f in MASKS.values()] * (rows // 5)))
    seed, requests, steps = numbers(rows)
    tokens, *results = sample(logits, seed, requests, steps, mask=mask, **settings)
    expected = sample_cpu(logits, seed, requests, steps, mask=mask, **settings)
    assert tokens.equal(expected[0])
    torch.testing.assert_close(results, [*expected[1:]], rtol=1e-6, atol=1e-6)
    own = {name: torch.full((rows,), settings.get(name, DEFAULTS[name]), dtype=ROW_DTYPES[name]) for name in DEFAULTS}
    own["temperature"][1::2], own["top_k"][1::2], own["seed"][1::2] = 2.0, 3, 9
    for a, b in zip(sample(logits, own.pop("seed"), requests, steps, mask=mask, **own), (tokens, *results), strict=True):
        assert a[::2].equal(b[::2]) and not a[1::2].equal(b[1::2])


def test_an_empty_mask_and_settings_out_of_range_give_token_minus_one():
    mask = bits(torch.ones(6, 9001).bool())
    mask[1] = 0
    given = torch.tensor([1.0, 1.0, -1.0, math.nan, 1.0, 1.0]).double(), torch.tensor([0, 0, 0, 0, -2, 0])
    logits = torch.randn(6, 9001, generator=torch.Generator().manual_seed(0))
    tokens, *results = sample(logits, *numbers(6), *given, mask=mask)
    assert tokens.lt(0).tolist() == [False, True, True, True, True, False]
    assert all(x.isnan().tolist() == tokens.lt(0).tolist() for x in results) and float(results[2][0]) == 1


def test_no_rows_are_no_tokens():
    assert [x.shape for x in sample(torch.zeros(0, 5), *numbers(0))] == [(0,)] * 4


def test_the_reference_agrees():
    logits = 3 * torch.randn(16, 3000, generator=torch.Generator().manual_seed(5))
    ours, theirs = (f(logits, *numbers(16), top_p=0.9) for f in (sample, sample_reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- matmul --------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (1, 33, 16), (2, 17, 31), (17, 64, 33), (32, 15, 264), (63, 40, 64), (65, 129, 32), (129, 70, 96), (70, 65, 500),
          (5, 100, 1600), (33, 31, 1000)]  # fmt: skip
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


def matmul(x, weight, bias=None, out=None, seed=1):
    result = torch.full((len(x), len(weight)), 7.0, dtype=out or x.dtype)
    on_lane(module().matmul, len(x), *weight.shape, backend.DTYPES[x.dtype], backend.DTYPES[result.dtype],
            *map(address, (x, weight, bias, result)), seed=seed)  # fmt: skip
    return result


def operands(N, R, C, dtype):
    g = torch.Generator().manual_seed(N + R + C)
    bias = torch.randn(R, generator=g) if R % 2 else None
    return torch.randn(N, C, generator=g).to(dtype), torch.randn(R, C, generator=g).to(dtype), bias


@pytest.mark.parametrize("dtype, out", DTYPES, ids=str)
@pytest.mark.parametrize("N, R, C", SHAPES)
def test_products_are_as_exact_as_torchs_and_a_batch_is_its_rows_to_the_last_bit(N, R, C, dtype, out):
    x, weight, bias = operands(N, R, C, dtype)
    exact = matmul_reference(x.double(), weight.double(), bias)
    naive = matmul_reference(x, weight, bias, out).double() - exact
    got = matmul(x, weight, bias, out)
    assert (got.double() - exact).abs().max() <= 2 * naive.abs().max() + 4 * torch.finfo(out).eps * exact.abs().max()
    assert torch.equal(matmul(x, weight, bias, out, seed=2), got)
    assert torch.equal(matmul(off_by_one(x), off_by_one(weight), bias, out), got)
    for rows in (slice(0, 1), slice(N // 2, N), slice(N // 3, N // 3 + 20)):
        assert torch.equal(matmul(x[rows].clone(), weight, bias, out), got[rows])
    half = None if bias is None else bias[R // 2 :].clone()
    assert torch.equal(matmul(x, weight[R // 2 :].clone(), half, out), got[:, R // 2 :])


@pytest.mark.parametrize("dtype, out", DTYPES, ids=str)
def test_large_tiles_give_the_bits_of_small_ones(dtype, out):
    """More than 100 tiles of 128 by 128; depths of a part of a run, and of one and a half passes."""
    for N, R, C in ((1300, 1170, 40), (700, 1290, 384)) if dtype == torch.float32 else ((1300, 1170, 40), (1290, 1290, 136)):
        x, weight, bias = operands(N, R, C, dtype)
        got = matmul(x, weight, bias, out)
        exact = matmul_reference(x.double(), weight.double(), bias)
        assert (got.double() - exact).abs().max() <= 8 * torch.finfo(out).eps * exact.abs().max()
        for rows in (slice(0, 16), slice(N - 50, N), slice(600, 603)):
            assert torch.equal(matmul(x[rows].clone(), weight, bias, out), got[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_in_their_row(dtype):
    x, weight, _ = operands(40, 20, 50, dtype)
    clean = matmul(x, weight)
    x[3, 7], x[20, 0] = math.nan, math.inf
    dirty, others = matmul(x, weight), [i for i in range(40) if i not in (3, 20)]
    assert dirty[3].isnan().all() and dirty[20].isinf().all() and torch.equal(dirty[others], clean[others])


def test_nothing_to_multiply():
    assert matmul(torch.zeros(0, 8), torch.zeros(3, 8)).shape == (0, 3)
    assert matmul(torch.zeros(3, 8), torch.zeros(0, 8)).shape == (3, 0)
