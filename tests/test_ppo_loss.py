"""ops/ppo_loss.py; the two references are worked by hand in test_train_loss.py."""

import math

import pytest
import torch

from nanorlhf.ops import ppo_policy_loss, ppo_value_loss
from nanorlhf.ops.ppo_loss import ppo_policy_loss_reference, ppo_value_loss_reference
from oracle import assert_earned

SIZES = [1, 15, 16, 17, 1023, 1025, 5000]


def tensors(count, M, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(M, generator=g) for _ in range(count)]


@pytest.mark.parametrize("ratio, advantage, loss, gradient, clipped", [
    (0.5, 1.0, -0.5, -0.5, 0), (1.0, 1.0, -1.0, -1.0, 0), (1.1, 1.0, -1.1, -1.1, 0), (1.5, 1.0, -1.2, 0.0, 1),
    (0.5, -1.0, 0.8, 0.0, 1), (0.9, -1.0, 0.9, 0.9, 0), (1.0, -1.0, 1.0, 1.0, 0), (1.5, -1.0, 1.5, 1.5, 0),
    (1.5, 0.0, 0.0, 0.0, 0),
])  # fmt: skip
def test_the_clipped_objective_for_every_side_of_ratio_and_sign_of_advantage(ratio, advantage, loss, gradient, clipped):
    """ε = 0.2: max(−A·r, −A·clip(r, 0.8, 1.2)); where the free branch is taken dL/d(log π) = −A·r, else 0."""
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    got = ppo_policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), 0.2)
    got.loss.backward()
    assert got.loss.item() == pytest.approx(loss, abs=1e-6) and got.clip_fraction.item() == clipped
    assert logprobs.grad.tolist() == pytest.approx([gradient], abs=1e-6)


def test_what_is_measured_worked_by_hand():
    """log r = log 2 and −log 4 (the reference: 0 and log 2 above this policy). kl1 = −½(log 2 − 2 log 2) = ½ log 2; kl2 =
    ¼(log² 2 + 4 log² 2); kl3 = ½((2 − 1 − log 2) + (¼ − 1 + 2 log 2)); ratio_max = 4. The reference over this policy is 1
    and 2: ref_kl1 = −½ log 2, ref_kl3 = ½(2 − 1 − log 2)."""
    log2 = math.log(2)
    logprobs = torch.tensor([-1.0, -3.0])
    got = ppo_policy_loss(logprobs, logprobs - torch.tensor([log2, -2 * log2]), torch.ones(2), 0.2,
                          ref=logprobs + torch.tensor([0.0, log2]))
    expected = [0.5 * log2, 1.25 * log2**2, 0.5 * (0.25 + log2), -0.5 * log2, 0.5 * (1 - log2)]
    assert got.ratio_max.item() == pytest.approx(4, rel=1e-6)
    assert [x.item() for x in got[3:]] == pytest.approx(expected, rel=1e-6)
    assert ppo_policy_loss(logprobs, logprobs, torch.ones(2), 0.2)[-2:] == (None, None)


def test_a_policy_that_has_not_moved_has_ratio_one_and_no_kl_to_the_last_bit():
    logprobs, advantages = tensors(2, 3000, scale=5)
    got = ppo_policy_loss(logprobs, logprobs, advantages, 0.2, ref=logprobs)
    assert got.ratio_max == 1 and got.clip_fraction == 0 and all(x == 0 for x in got[3:])


def test_a_small_kl3_is_not_lost_in_the_difference():
    """log r = 10⁻⁴: r − 1 − log r = ½ 10⁻⁸ (1 + 10⁻⁴/3 + …), of which an fp32 difference of numbers near 1 keeps nothing."""
    got = ppo_policy_loss(torch.full((100,), 1e-4), torch.zeros(100), torch.ones(100), 0.2)
    assert got.kl3.item() == pytest.approx(0.5e-8 * (1 + 1e-4 / 3), rel=1e-6)


def test_the_mean_of_kl3_and_of_kl1_over_samples_is_the_kl():
    """Four tokens, all equally likely when sampled, now 0.4, 0.3, 0.2, 0.1: KL = Σ ¼ log(¼ / p). Each token once."""
    now = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    exact = sum(0.25 * math.log(0.25 / p) for p in (0.4, 0.3, 0.2, 0.1))
    got = ppo_policy_loss(now, torch.full((4,), 0.25).log(), torch.zeros(4), 0.2)
    assert got.kl1.item() == pytest.approx(exact, rel=1e-6) and got.kl3.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("M", SIZES)
def test_the_policy_half_matches_the_oracle(M, scale):
    logprobs, old, ref, advantages = (*tensors(3, M, scale), *tensors(1, M, seed=1))
    # Advantages of one sign: where terms cancel, the naive sum is right by luck as often as not. Both signs follow below.
    for sign in (1, -1):
        assert_earned(lambda x: ppo_policy_loss(x, old.to(x), sign * advantages.abs().to(x), 0.2).loss,
                      lambda x: ppo_policy_loss_reference(x, old.to(x), sign * advantages.abs().to(x), 0.2).loss, (logprobs,))
    wide = [x.double() for x in (logprobs, old, advantages)]
    exact = ppo_policy_loss_reference(*wide, 0.2, ref.double())
    for ours, z in zip(ppo_policy_loss(logprobs, old, advantages, 0.2, ref), exact, strict=True):
        torch.testing.assert_close(ours.double(), z, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("M", SIZES)
def test_the_value_half_matches_the_oracle(M):
    values, moved, returns = tensors(3, M)
    old = values + 0.3 * moved
    assert_earned(lambda x: ppo_value_loss(x, old.to(x), returns.to(x), 0.2).loss,
                  lambda x: ppo_value_loss_reference(x, old.to(x), returns.to(x), 0.2).loss, (values,))
    wide = [x.double() for x in (values, old, returns)]
    ours, exact = ppo_value_loss(values, old, returns, 0.2), ppo_value_loss_reference(*wide, 0.2)
    torch.testing.assert_close(ours.clip_fraction.double(), exact.clip_fraction, rtol=1e-6, atol=0)


def test_micro_batches_weighted_by_their_tokens_make_the_whole():
    logprobs, old, advantages = tensors(3, 4000)
    logprobs.requires_grad_()
    ppo_policy_loss(logprobs, old, advantages, 0.2).loss.backward()
    whole = logprobs.grad.clone()
    logprobs.grad = None
    for part in (slice(0, 700), slice(700, 4000)):
        share = (part.stop - part.start) / 4000
        (share * ppo_policy_loss(logprobs[part], old[part], advantages[part], 0.2).loss).backward()
    torch.testing.assert_close(logprobs.grad, whole, rtol=1e-5, atol=1e-12)


def test_a_ratio_too_large_for_fp32_is_infinite_and_nan_shows():
    far = ppo_policy_loss(torch.tensor([200.0, 0.0]), torch.zeros(2), torch.tensor([-1.0, 1.0]), 0.2)
    assert far.loss == math.inf and far.ratio_max == math.inf and far.kl3 == math.inf and far.kl1 == -100
    gone = ppo_policy_loss(torch.tensor([-math.inf, 0.0]), torch.zeros(2), torch.ones(2), 0.2)
    assert gone.loss == -0.5 and gone.kl1 == math.inf
    for at in (0, 20):
        logprobs = torch.zeros(40)
        logprobs[at] = math.nan
        got = ppo_policy_loss(logprobs, torch.zeros(40), torch.ones(40), 0.2)
        assert all(x.isnan() for x in (got.loss, got.ratio_max, got.kl1, got.kl2, got.kl3))
        assert ppo_value_loss(logprobs, torch.zeros(40), torch.ones(40), 0.2).loss.isnan()


def test_threads_change_no_bit():
    logprobs, old, advantages = tensors(3, 100_001)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x = logprobs.clone().requires_grad_()
        terms = ppo_policy_loss(x, old, advantages, 0.2, ref=advantages)
        terms.loss.backward()
        results.append([*terms, x.grad])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("arguments", [(4, 4, 3), (0, 0, 0)])
def test_tensors_that_do_not_fit_and_no_token_at_all_are_refused(arguments):
    for op in (ppo_policy_loss, ppo_value_loss):
        with pytest.raises(ValueError, match=op.__name__ + r": expected tensors of one shape \(M,\), M at least 1"):
            op(*(torch.zeros(n) for n in arguments), 0.2)


def test_the_op_is_a_good_citizen_of_torch():
    for ref in (None, torch.ones(9)):
        torch.library.opcheck(torch.ops.nanorlhf.ppo_loss.default, (*tensors(3, 9), ref, 0.2, False, True))
