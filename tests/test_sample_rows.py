"""ops.sample with masks, and with settings that each row has of its own: against Hugging Face's warpers in fp64, against rows
drawn alone, and against masked logits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings as how
from hypothesis import strategies as st

from nanorlhf.ops import sample
from nanorlhf.ops.sample import DEFAULTS, ROW_DTYPES, filtered_logprobs, uniforms
from test_sample import CHI2, LOGITS, SETTINGS, bits, either, numbers, warped  # noqa: F401 (either is a fixture)

AWKWARD = [1, 31, 32, 33, 511, 4097]
MASKS = {"all": lambda at: at >= 0, "half": lambda at: at % 2 == 0, "the last": lambda at: at == at.amax(), "few": lambda at: at % 61 == 0,
         "a block": lambda at: at // 512 == at.amax() // 512, "all but the best": lambda at: at > 0}  # fmt: skip


def own_of(rows):
    """Settings a row -> a tensor of each."""
    return {name: torch.tensor([row.get(name, default) for row in rows], dtype=ROW_DTYPES[name]) for name, default in DEFAULTS.items()}


def survivors(logits, allowed, settings):
    """Scores (B, V) in fp64, -inf where mask or warpers cut; those of equal logits stay together, as ops.sample documents."""
    given = {**settings, "top_k": min(settings.get("top_k", 0), logits.shape[1])}
    masked = logits.double().masked_fill(~allowed, -math.inf)
    least = masked.masked_fill(warped(masked, **given) == -math.inf, math.inf).amin(-1, keepdim=True)
    return (masked / settings.get("temperature", 1.0)).masked_fill(masked < least, -math.inf)


# --- frequencies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0b11111111, 0b01111110, 0b10110100, 0b00100001])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_masked_tokens_come_as_often_as_the_filtered_softmax_says(settings, mask, either):  # noqa: F811
    """Pearson's χ² of 20,000 draws against the expected counts, below the point that chance passes once in 1,000."""
    allowed = torch.tensor([[bool(mask >> j & 1) for j in range(8)]])
    words = torch.tensor([[mask]], dtype=torch.int32).expand(20_000, -1)
    tokens, _, _, kept = sample(LOGITS.expand(20_000, -1), *numbers(20_000, first=10**6), **settings, mask=words)
    counts = np.bincount(tokens.numpy(), minlength=8)
    expected = 20_000 * survivors(LOGITS[None], allowed, settings).softmax(-1)[0].numpy()
    live = expected > 0
    assert counts[~live].sum() == 0
    assert live.sum() == 1 or ((counts[live] - expected[live]) ** 2 / expected[live]).sum() < CHI2[live.sum() - 1]
    share = (LOGITS.double() / settings.get("temperature", 1.0)).softmax(-1)[allowed[0]].sum()
    torch.testing.assert_close(kept, share.float().expand(20_000), rtol=1e-6, atol=0)


def test_rows_of_one_batch_each_come_as_often_as_their_own_settings_say(either):  # noqa: F811
    each = 8_000
    own = {name: x.repeat_interleave(each) for name, x in own_of(SETTINGS).items()}
    seed, requests, steps = own.pop("seed"), *numbers(each * len(SETTINGS))[1:]
    tokens = sample(LOGITS.expand(len(requests), -1), seed, requests, steps, **own)[0].view(-1, each)
    for drawn, settings in zip(tokens, SETTINGS, strict=True):
        counts, expected = np.bincount(drawn.numpy(), minlength=8), each * warped(LOGITS[None], **settings).softmax(-1)[0].numpy()
        live = expected > 0
        assert counts[~live].sum() == 0
        assert ((counts[live] - expected[live]) ** 2 / expected[live]).sum() < CHI2[live.sum() - 1]


# --- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [*SETTINGS, {"temperature": 0.02}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.999}, {"top_k": 700}], ids=str)
@pytest.mark.parametrize("V", AWKWARD)
def test_token_and_logprobs_under_a_mask_are_those_of_the_oracle(V, settings, dtype):
    """The random point lies in the token's share of the cumulative sum in fp64; both log-probabilities and the mask's share are at
    most twice as far from fp64 as torch in fp32. "All but the best": the first token is far above all others, so far in the
    last row that beside it no other has any weight in fp32."""
    spread = torch.tensor([0.1, 1.0, 3.0, 10.0])[:, None]
    logits = spread * torch.randn(4, V, generator=torch.Generator().manual_seed(V)) - 20
    logits[:, 0] = torch.tensor([-20.0, 0.0, 20.0, 400.0])
    logits = logits.to(dtype)
    scores, at_all = logits.double() / settings.get("temperature", 1.0), torch.arange(V)
    for name in MASKS if V > 1 else ["all"]:
        allowed = MASKS[name](at_all).expand(4, -1)
        tokens, logprobs, unfiltered, kept = sample(logits, *numbers(4), **settings, mask=bits(allowed))
        left = survivors(logits, allowed, settings)
        cumulative, at, u = left.softmax(-1).cumsum(-1), tokens[:, None], uniforms(*numbers(4))[:, None]
        assert (left.gather(1, at) > -math.inf).all()
        assert (cumulative.gather(1, at) > u - 1e-6).all()
        assert (cumulative.gather(1, at) - left.softmax(-1).gather(1, at) < u + 1e-6).all()
        for ours, exact in ((logprobs, left), (unfiltered, scores)):
            right, naive = (x.log_softmax(-1).gather(1, at).squeeze(1).double() for x in (exact, exact.float()))
            floor = 4 * torch.finfo(torch.float32).eps * max(1, right.abs().max())
            assert (ours.double() - right).abs().max() <= 2 * (naive - right).abs().max() + floor
        exact = scores.log_softmax(-1).masked_fill(~allowed, -math.inf).logsumexp(-1)
        assert (kept.double() - exact.exp() <= 1e-5 * exact.exp() + 1e-45).all()
        assert name != "all" or kept.tolist() == [1] * 4


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("V", [33, 4097])
def test_a_mask_draws_what_logits_of_minus_infinity_draw(V, name):
    """To the last bit."""
    logits = 2 * torch.randn(300, V, generator=torch.Generator().manual_seed(V))
    allowed = MASKS[name](torch.arange(V)).expand(300, -1)
    for settings in ({}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0}, {"temperature": 0.03, "top_p": 0.9}):
        tokens, logprobs, _, _ = sample(logits, *numbers(300), **settings, mask=bits(allowed))
        others, theirs, _, _ = sample(logits.masked_fill(~allowed, -math.inf), *numbers(300), **settings)
        assert tokens.equal(others) and logprobs.equal(theirs)


@given(st.integers(1, 9), st.sampled_from([*AWKWARD, 700]), st.integers(0, 2**31), st.data())
@how(max_examples=60, deadline=None)
def test_rows_with_their_own_settings_and_masks_are_drawn_as_if_alone(B, V, seed, data):
    """Bit for bit, given to each row as numbers, and in the reference too."""
    g = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(B, V, generator=g)
    rows = [{"seed": data.draw(st.integers(-(2**63), 2**63 - 1)), "temperature": data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])),
             "top_k": data.draw(st.sampled_from([0, 1, 7, 10**6])), "top_p": data.draw(st.sampled_from([1e-9, 0.5, 0.95, 1.0])),
             "min_p": data.draw(st.sampled_from([0.0, 0.1, 1.0]))} for _ in range(B)]  # fmt: skip
    allowed = torch.rand(B, V, generator=g) < data.draw(st.sampled_from([0.01, 0.5, 1.0]))
    allowed[torch.arange(B), torch.randint(0, V, (B,), generator=g)] = True
    mask = data.draw(st.sampled_from([None, bits(allowed)]))
    _, requests, steps = numbers(B)
    own = own_of(rows)
    together = sample(logits, own.pop("seed"), requests, steps, **own, mask=mask)
    distribution = filtered_logprobs(logits, **own, mask=mask)
    for i, row in enumerate(rows):
        one = slice(i, i + 1)
        alone = sample(logits[one], row.pop("seed"), requests[one], steps[one], **row, mask=mask if mask is None else mask[one])
        assert all(a[one].equal(b) for a, b in zip(together, alone, strict=True))
        for a, b in zip(distribution, filtered_logprobs(logits[one], **row, mask=mask if mask is None else mask[one]), strict=True):
            assert a[one].equal(b)
        assert alone[1].item() == pytest.approx(distribution[0][i, alone[0]].item(), abs=1e-4)


def test_one_mask_for_all_rows_needs_no_copies():
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    mask = bits(torch.arange(100)[None] % 3 == 0)
    for a, b in zip(sample(logits, *numbers(6), mask=mask.expand(6, -1)), sample(logits, *numbers(6), mask=mask.repeat(6, 1)), strict=True):
        assert a.equal(b)


# --- by hand, and errors -------------------------------------------------------------------------------------------


def test_masks_by_hand(either):  # noqa: F811
    """Probabilities ½, ¼, ⅛, ⅛: the last two are allowed, half each of a kept quarter; then the last three with top_k 1."""
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125])).expand(100, -1)
    mask = torch.full((100, 1), 0b1100, dtype=torch.int32)
    u = uniforms(*numbers(100))
    tokens, logprobs, unfiltered, kept = sample(logits, *numbers(100), mask=mask)
    assert tokens.tolist() == [2 if x < 0.5 else 3 for x in u.tolist()]
    assert logprobs.exp().tolist() == pytest.approx([0.5] * 100) and unfiltered.exp().tolist() == pytest.approx([0.125] * 100)
    assert kept.tolist() == pytest.approx([0.25] * 100)
    tokens, logprobs, _, kept = sample(logits, *numbers(100), top_k=1, mask=mask | 0b0010)
    assert tokens.unique().tolist() == [1] and logprobs.tolist() == [0] * 100 and kept.tolist() == pytest.approx([0.5] * 100)
    tokens, logprobs, unfiltered, kept = sample(logits, *numbers(100), temperature=0, mask=mask)
    assert tokens.unique().tolist() == [2] and logprobs.tolist() == [0] * 100
    assert unfiltered.exp().tolist() == pytest.approx([0.125] * 100) and kept.tolist() == pytest.approx([0.25] * 100)


def test_a_mask_may_keep_what_has_no_share_at_all(either):  # noqa: F811
    """e^-60 of the best, then e^-3000: drawn for certain all the same, and the second's share is 0 in any float."""
    for far, share in ((-60.0, math.exp(-60)), (-3000.0, 0.0)):
        logits = torch.full((1, 600), -5000.0)
        logits[0, 0], logits[0, 599] = 0.0, far
        tokens, logprobs, unfiltered, kept = sample(logits, *numbers(1), mask=bits(torch.arange(600)[None] > 300))
        assert tokens.tolist() == [599] and logprobs.tolist() == [0] and unfiltered.tolist() == pytest.approx([far])
        assert kept.tolist() == pytest.approx([share], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 2}])
def test_a_mask_that_allows_nothing_is_named(settings, either):  # noqa: F811
    mask = bits(torch.ones(3, 40).bool())
    mask[1] = 0
    mask[1, 1] = -(2**31)  # a bit beyond V allows nothing
    logits = torch.zeros(3, 40)
    sentence = "sample: expected a mask that allows a token above -inf, got none in row "
    with pytest.raises(ValueError, match=sentence + "1"):
        sample(logits, *numbers(3), **settings, mask=mask)
    mask[1, 0] = 0b100
    logits[1, 2] = -math.inf  # and what it allows has no probability
    with pytest.raises(ValueError, match=sentence + "1"):
        sample(logits, *numbers(3), **settings, mask=mask)
    logits[2, 7] = math.nan  # where the mask forbids it, too
    mask[2] = 1
    mask[1, 0] = 1
    with pytest.raises(ValueError, match="got row 2 that is NaN"):
        sample(logits, *numbers(3), **settings, mask=mask)


@pytest.mark.parametrize("name, value, sentence", [
    ("temperature", -1.0, "a finite temperature of 0 or more, got -1"), ("temperature", math.nan, "a finite temperature of 0 or more, got nan"),
    ("temperature", math.inf, "a finite temperature of 0 or more, got inf"), ("top_k", -2, "top_k of 0 or more, got -2"),
    ("top_p", 0.0, "top_p above 0 and at most 1, got 0"), ("top_p", 1.5, "top_p above 0 and at most 1, got 1.5"),
    ("min_p", -0.5, "min_p from 0 to 1, got -0.5"), ("min_p", math.nan, "min_p from 0 to 1, got nan"),
])  # fmt: skip
def test_a_rows_own_setting_out_of_range_is_named(name, value, sentence, either):  # noqa: F811
    own = own_of([{}, {name: value}])
    with pytest.raises(ValueError, match=rf"^sample: expected {sentence}(\.0)? in row 1$"):
        sample(torch.zeros(2, 5), *numbers(2), **{name: own[name]})


def test_settings_and_masks_that_do_not_fit_are_named():
    logits = torch.zeros(2, 33)
    with pytest.raises(ValueError, match=r"sample: expected top_p of shape \(2,\) in float64 on cpu, got \(2,\) in float32 on cpu"):
        sample(logits, *numbers(2), top_p=torch.ones(2))
    with pytest.raises(ValueError, match=r"sample: expected seed of shape \(2,\) in int64 on cpu, got \(3,\) in int64 on cpu"):
        sample(logits, torch.zeros(3, dtype=torch.int64), *numbers(2)[1:])
    with pytest.raises(ValueError, match=r"sample: expected mask of shape \(2, 2\) in int32 on cpu, got \(2, 1\) in int32 on cpu"):
        sample(logits, *numbers(2), mask=torch.ones(2, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"sample: expected mask of shape \(2, 2\) in int32 on cpu, got \(2, 2\) in bool on cpu"):
        sample(logits, *numbers(2), mask=torch.ones(2, 2).bool())


def test_no_rows_are_no_tokens(either):  # noqa: F811
    own = own_of([])
    results = sample(torch.zeros(0, 40), own.pop("seed"), *numbers(0)[1:], **own, mask=torch.zeros(0, 2, dtype=torch.int32))
    assert [len(x) for x in results] == [0] * 4
