"""ops/sample.py and engine/sample.py: frequencies, survivors and log-probabilities against Hugging Face's warpers in fp64, and
counter-based random numbers against Python's integers."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nanorlhf.engine import SamplingConfig
from nanorlhf.ops import backend, sample
from nanorlhf.ops.sample import uniforms
from test_backend import ISAS

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, 0.25])
# The upper 0.1 % point of χ² for 1 to 7 degrees of freedom (Abramowitz & Stegun, table 26.8).
CHI2 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}
SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"top_k": 6, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 5, "min_p": 0.1},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.2},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.95, "min_p": 0.05},
]
LARGE = [*SETTINGS, {"top_k": 1}, {"top_k": 50}, {"top_k": 700}, {"top_k": 10**6}, {"top_p": 0.999}, {"top_p": 1e-9},
         {"min_p": 1.0}, {"top_k": 700, "top_p": 0.5}]  # fmt: skip


@pytest.fixture(params=["auto", "reference"])
def either(request):
    before = backend.force(request.param)
    yield request.param
    backend.force(before)


def numbers(count, first=0):
    """seed, requests and steps for so many rows."""
    return 0, torch.arange(first, first + count), torch.full((count,), 3)


def bits(allowed):
    """allowed (B, V) bool as ops.sample's mask: bit j % 32 of word j // 32, in int32; bits beyond V are set."""
    words = np.ones((len(allowed), -(-allowed.shape[1] // 32) * 32), dtype=bool)
    words[:, : allowed.shape[1]] = allowed
    return torch.from_numpy(np.packbits(words, axis=1, bitorder="little").view(np.int32))


def draws(logits, count=20_000, **settings):
    return sample(logits.expand(count, -1), *numbers(count), **settings)


def warped(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Logits in fp64, -inf where Hugging Face cuts them: its warpers in the order in which generate() applies them."""
    steps = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [MinPLogitsWarper(min_p)] if min_p > 0 else []
    scores = logits.double()
    for step in steps:
        scores = step(None, scores)
    return scores


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_come_as_often_as_the_filtered_softmax_says(settings, either):
    """Pearson's χ² of 20,000 draws against the expected counts, below the point that chance passes once in 1,000."""
    counts = np.bincount(draws(LOGITS, **settings)[0].numpy(), minlength=8)
    expected = 20_000 * warped(LOGITS[None], **settings).softmax(-1)[0].numpy()
    live = expected > 0
    assert counts[~live].sum() == 0
    assert ((counts[live] - expected[live]) ** 2 / expected[live]).sum() < CHI2[live.sum() - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", LARGE, ids=str)
@pytest.mark.parametrize("V", [1, 2, 15, 17, 511, 513, 5000, 70_001])
def test_token_and_logprobs_are_those_of_the_oracle(V, settings, dtype):
    """The random point lies in the token's share of the cumulative sum in fp64, and both log-probabilities are at most twice as
    far from fp64 as torch in fp32; the one shows that exactly the oracle's tokens survived. (In bf16 many logits are equal
    and the oracle's top-p cuts within a level: there its survivors are extended to their whole level.)"""
    spread = torch.tensor([0.1, 1.0, 3.0, 10.0])[:, None]
    logits = (spread * torch.randn(4, V, generator=torch.Generator().manual_seed(V)) - 20).to(dtype)
    tokens, logprobs, unfiltered, kept = sample(logits, *numbers(4), **settings)
    assert kept.tolist() == [1] * 4
    survivors = warped(logits, **{"top_k": 0, **settings, "top_k": min(settings.get("top_k", 0), V)})
    least = logits.double().masked_fill(survivors == -math.inf, math.inf).amin(-1, keepdim=True)
    scores = logits.double() / settings.get("temperature", 1.0)
    kept = scores.masked_fill(logits.double() < least, -math.inf)
    cumulative = kept.softmax(-1).cumsum(-1)
    at, u = tokens[:, None], uniforms(*numbers(4))[:, None]
    assert (kept.gather(1, at) > -math.inf).all()
    assert (cumulative.gather(1, at) > u - 1e-6).all()
    assert (cumulative.gather(1, at) - kept.softmax(-1).gather(1, at) < u + 1e-6).all()
    for ours, exact in ((logprobs, kept), (unfiltered, scores)):
        right, naive = (x.log_softmax(-1).gather(1, at).squeeze(1).double() for x in (exact, exact.float()))
        floor = 4 * torch.finfo(torch.float32).eps * max(1, right.abs().max())
        assert (ours.double() - right).abs().max() <= 2 * (naive - right).abs().max() + floor
        assert ours.dtype == torch.float32


def test_inversion_by_hand(either):
    """Probabilities ½, ¼, ¼: u in [0, ½) is token 0, [½, ¾) token 1, [¾, 1) token 2. min_p = 1 leaves only the first."""
    logits = torch.log(torch.tensor([0.5, 0.25, 0.25]))
    u = uniforms(*numbers(1000))
    tokens, logprobs, unfiltered, _ = draws(logits, 1000)
    assert tokens.tolist() == [0 if x < 0.5 else 1 if x < 0.75 else 2 for x in u.tolist()]
    assert logprobs.exp().tolist() == pytest.approx([0.5 if t == 0 else 0.25 for t in tokens.tolist()])
    assert logprobs.equal(unfiltered)
    tokens, logprobs, unfiltered, _ = draws(logits, 10, min_p=1.0)
    assert tokens.tolist() == [0] * 10 and logprobs.tolist() == [0.0] * 10
    assert unfiltered.exp().tolist() == pytest.approx([0.5] * 10)


def test_the_ends_of_the_unit_interval_never_draw_a_token_without_probability(either):
    """The request whose number is 0, or 1 - 2^-53, by running SplitMix64 backwards."""
    logits = torch.tensor([[-math.inf, 3.0, 3.0, -200.0, -math.inf]])
    for target, token in ((0, 1), (2**64 - 1, 2)):
        request = splitmix_back((splitmix_back(target) - GOLDEN) % 2**64) - GOLDEN
        request = (request + 2**63) % 2**64 - 2**63
        given = (0, torch.tensor([request]), torch.tensor([0]))
        assert float(uniforms(*given)) == (target >> 11) / 2**53
        assert sample(logits, *given)[0].tolist() == [token]


def test_temperature_zero_takes_the_first_of_the_most_probable_tokens_for_certain(either):
    logits = torch.stack([LOGITS, torch.tensor([-1.0, 3.0, 0.0, 3.0, 3.0, -math.inf, 1.0, 2.0])])
    tokens, logprobs, unfiltered, _ = sample(logits, *numbers(2), temperature=0, top_k=3, top_p=0.5)
    assert tokens.tolist() == [0, 1] and logprobs.tolist() == [0, 0]
    torch.testing.assert_close(unfiltered, logits.double().log_softmax(-1)[[0, 1], tokens].float())


def test_equal_tokens_stay_or_go_together_and_the_first_always_stays(either):
    assert draws(LOGITS, 50, top_p=1e-9)[0].unique().tolist() == [0]
    assert draws(torch.zeros(6), 200, top_k=2)[0].unique().tolist() == [0, 1, 2, 3, 4, 5]  # as Hugging Face's
    assert draws(torch.tensor([0.0, 1.0, 0.0, -1.0]), 200, top_p=0.6)[0].unique().tolist() == [0, 1, 2]
    assert draws(torch.tensor([-0.0, 0.0, -1.0]), 200, top_k=1)[0].unique().tolist() == [0, 1]
    far = torch.arange(5000) * -1e-6
    far[0] = -0.0
    assert draws(far, 200, top_k=1)[0].unique().tolist() == draws(far, 200, top_p=1e-9)[0].unique().tolist() == [0]


@pytest.mark.parametrize("settings", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 2, "top_p": 0.9}])
def test_masked_and_far_logits_are_never_drawn(settings, either):
    logits = torch.full((5000,), -math.inf)
    logits[[7, 600, 4999]] = 2.0
    tokens, logprobs, *_ = draws(logits, 200, **settings)
    assert tokens.unique().tolist() == [7, 600, 4999]
    assert logprobs.exp().tolist() == pytest.approx([1 / 3] * 200)
    assert draws(torch.tensor([-1e30, 1e30, -torch.inf]), 9, **settings)[0].unique().tolist() == [1]
    assert draws(torch.tensor([-3e38, 3e38]), 9, temperature=1e-40, **settings)[0].unique().tolist() == [1]


def test_a_row_draws_the_same_in_any_batch_of_any_layout():
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0))
    whole = sample(logits, *numbers(40), top_p=0.9)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    seed, requests, steps = numbers(40)
    layouts = [logits.T.contiguous().T, torch.stack([logits, logits], 1)[:, -1], torch.stack([logits, logits], -1)[..., 0]]
    for again in (*layouts, logits.requires_grad_()):
        for a, b in zip(sample(again, seed, requests, steps, top_p=0.9), whole):
            assert a.equal(b) and not a.requires_grad
    for a, b in zip(sample(logits[order], seed, requests[order], steps[order], top_p=0.9), whole):
        assert a.equal(b[order])
    alone = [sample(logits[i : i + 1], seed, requests[i : i + 1], steps[i : i + 1], top_p=0.9)[0].item() for i in range(40)]
    assert alone == whole[0].tolist()


EVERY_SETTING = """
import hashlib, sys, torch
sys.path.insert(0, "tests")
from nanorlhf.ops import sample
from test_sample import LARGE, bits, numbers
digest = hashlib.sha256()
for threads in (1, 2):
    torch.set_num_threads(threads)
    for V in (1, 17, 33, 513, 4097, 40_000):
        for dtype in (torch.float32, torch.bfloat16):
            logits = (2 * torch.randn(8, V, generator=torch.Generator().manual_seed(V))).to(dtype)
            for settings in LARGE:
                for mask in (None, bits(torch.arange(V) % torch.arange(1, 9)[:, None] == 0)):
                    for x in sample(logits, *numbers(8), **settings, mask=mask):
                        digest.update(x.numpy().tobytes())
    print(digest.hexdigest())
    digest = hashlib.sha256()
"""


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits():
    """Memory is handed out full of bytes that are 3e38 as floats."""
    results = set()
    for isa in ISAS:
        environment = os.environ | {"NANORLHF_ISA": isa, "MALLOC_PERTURB_": "128"}
        done = subprocess.run([sys.executable, "-c", EVERY_SETTING], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results |= set(done.stdout.split())
    assert len(results) == 1


def test_no_rows_are_no_tokens_and_fp64_keeps_its_precision(either):
    for dtype, wide in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        for B in (0, 2):
            results = sample(torch.zeros(B, 5, dtype=dtype), *numbers(B), top_k=2, top_p=0.5)
            assert [x.shape for x in results] == [(B,)] * 4
            assert [x.dtype for x in results] == [torch.int64, wide, wide, wide]


@pytest.mark.parametrize("row", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_that_is_no_distribution_is_named(row, temperature, either):
    logits = torch.nn.functional.pad(torch.tensor([[1.0, 2.0, 3.0], row]), (0, 61), value=-math.inf)
    with pytest.raises(ValueError, match="sample: expected logits below inf and not all -inf, got row 1 that is NaN"):
        sample(logits, *numbers(2), temperature=temperature)
    if math.isnan(row[1]):  # a NaN that carries bits
        logits.view(torch.int32)[1, 1] |= 3
        with pytest.raises(ValueError, match="got row 1 that is NaN"):
            sample(logits, *numbers(2), temperature=temperature)


@pytest.mark.parametrize("settings, sentence", [
    (dict(temperature=-1.0), "sample: expected a finite temperature of 0 or more, got -1.0"),
    (dict(temperature=float("nan")), "sample: expected a finite temperature of 0 or more, got nan"),
    (dict(temperature=float("inf")), "sample: expected a finite temperature of 0 or more, got inf"),
    (dict(top_k=-2), "sample: expected top_k of 0 or more, got -2"),
    (dict(top_p=0.0), "sample: expected top_p above 0 and at most 1, got 0.0"),
    (dict(top_p=1.5), "sample: expected top_p above 0 and at most 1, got 1.5"),
    (dict(min_p=-0.1), "sample: expected min_p from 0 to 1, got -0.1"),
    (dict(min_p=1.5), "sample: expected min_p from 0 to 1, got 1.5"),
])  # fmt: skip
def test_settings_out_of_range_are_refused_in_one_sentence(settings, sentence):
    for call in (SamplingConfig, lambda **settings: sample(LOGITS[None], *numbers(1), **settings)):
        with pytest.raises(ValueError, match=sentence):
            call(**settings)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"sample: expected logits of shape \(B, V\) in floating point, got \(8,\)"):
        sample(LOGITS, *numbers(8))
    with pytest.raises(ValueError, match=r"sample: expected logits of shape \(B, V\) in floating point, got \(2, 0\)"):
        sample(torch.zeros(2, 0), *numbers(2))
    with pytest.raises(ValueError, match=r"sample: expected requests of shape \(1,\) in int64, got \(2,\)"):
        sample(LOGITS[None], *numbers(2))
    with pytest.raises(ValueError, match=r"sample: expected steps of shape \(1,\) in int64, got \(1,\) in torch.int32"):
        sample(LOGITS[None], 0, torch.tensor([1]), torch.tensor([1]).int())


def test_the_op_is_a_good_citizen_of_torch():
    own = [torch.tensor([5]), None, torch.tensor([3]), None, torch.tensor([0.1], dtype=torch.float64)]
    for last in (([], None), (own, torch.tensor([[0b1011]], dtype=torch.int32))):
        torch.library.opcheck(torch.ops.nanorlhf.sample.default, (LOGITS[None], *numbers(1), 1.0, 3, 0.9, 0.1, *last))


# --- random numbers ------------------------------------------------------------------------------------------------

GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def splitmix(x):
    """SplitMix64's finaliser on Python integers."""
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * FACTORS[0]) & mask
    x = ((x ^ (x >> 27)) * FACTORS[1]) & mask
    return x ^ (x >> 31)


def splitmix_back(x):
    """Its inverse: x ^ (x >> s) is undone by all of its shifts by multiples of s, a product by the inverse modulo 2^64."""
    x ^= x >> 31 ^ x >> 62
    x = x * pow(FACTORS[1], -1, 2**64) % 2**64
    x ^= x >> 27 ^ x >> 54
    x = x * pow(FACTORS[0], -1, 2**64) % 2**64
    return x ^ x >> 30 ^ x >> 60


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7, -3, 2**64 - 1])
def test_uniforms_equal_the_same_rule_on_python_integers(seed, either):
    """Of 2^16 equally probable tokens, the one drawn is the number's first 16 bits."""
    mask, requests, steps, expected = (1 << 64) - 1, [0, 1, 5, 10**6, -1], [0, 3, 511, 7, 2], []
    for r, s in zip(requests, steps):
        state = splitmix((r + (seed + 1) * GOLDEN) & mask)
        expected.append((splitmix((state + (s + 1) * GOLDEN) & mask) >> 11) / 2**53)
    requests, steps = torch.tensor(requests), torch.tensor(steps)
    assert uniforms(seed, requests, steps).tolist() == expected
    tokens = sample(torch.zeros(1, 2**16).expand(5, -1), seed, requests, steps)[0]
    assert tokens.tolist() == pytest.approx([int(u * 2**16) for u in expected], abs=either == "reference")


def test_uniforms_are_uniform_and_unrelated_along_requests_steps_and_seeds():
    """40,000 numbers: 16 bins within the 0.1 % point of χ² with 15 degrees of freedom, 37.70; correlation of
    neighbours within 4 standard errors, 4/√n, along each of the three arguments."""
    n = 200
    requests, steps = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    grid = uniforms(3, requests, steps).view(n, n)
    assert 0 <= float(grid.min()) and float(grid.max()) < 1
    counts = torch.histc(grid.float(), 16, 0, 1)
    assert float(((counts - n * n / 16) ** 2 / (n * n / 16)).sum()) < 37.70
    other = uniforms(4, requests, steps).view(n, n)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid, other)):
        correlation = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(a.numel())
