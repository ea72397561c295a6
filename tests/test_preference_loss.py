"""train/loss.py, the part on KL, groups and pairs: by hand, by enumeration of a small categorical, by finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from nanorlhf.train.loss import (AdaptiveKL, dpo_loss, full_kl, grpo_advantages, ipo_loss, kl_loss, pairwise_loss, policy_terms,
                                 rloo_advantages, sum_by_sequence)
from nanorlhf.train.objective import importance_weights, sampler_kl

LOGITS = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
REF = torch.tensor([-0.5, 0.2, 0.4, 0.9], dtype=torch.float64).log_softmax(-1)


def expected_gradient(kind):
    """Over the policy's own samples: Σ_a π(a) ∇ loss(a), π held still, as it is where the samples were drawn."""
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    (logp.detach().exp() * kl_loss(logp, REF, kind)).sum().backward()
    return logits.grad


def test_the_gradient_of_k1_is_zero_whatever_the_policy():
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_gradient_of_k2_is_that_of_the_enumerated_reverse_kl():
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    (logp.exp() * (logp - REF)).sum().backward()  # the samples' own dependence on the policy included
    torch.testing.assert_close(expected_gradient("k2"), logits.grad, atol=1e-12, rtol=0)
    assert logits.grad.abs().max() > 0.05


def test_the_gradient_of_k3_is_that_of_the_forward_kl():
    """KL(reference ‖ policy) = Σ π_ref (log π_ref − log π)."""
    logits = LOGITS.clone().requires_grad_()
    (REF.exp() * (REF - logits.log_softmax(-1))).sum().backward()
    torch.testing.assert_close(expected_gradient("k3"), logits.grad, atol=1e-12, rtol=0)


def test_as_numbers_k1_and_k3_average_to_the_kl_and_k2_does_not():
    logp = LOGITS.log_softmax(-1)
    mean = lambda kind: float((logp.exp() * kl_loss(logp, REF, kind)).sum())
    exact = float((logp.exp() * (logp - REF)).sum())
    assert mean("k1") == pytest.approx(exact) and mean("k3") == pytest.approx(exact)
    assert abs(mean("k2") - exact) > 0.005
    assert bool((kl_loss(logp, REF, "k3") >= 0).all())


def test_another_estimator_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="kl_loss: unknown estimator 'k4'; there are k1, k2 and k3"):
        kl_loss(LOGITS, REF, "k4")


def test_the_full_kl_of_many_states_is_each_ones_sum():
    """More states than are taken at a time."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2500, 3, generator=generator) for _ in range(2))
    v, w = (torch.randn(5, 3, generator=generator) for _ in range(2))
    found = full_kl(a, v, b, w, 0.7)
    for i in (0, 2047, 2048, 2499):
        p, q = ((x[i].double() @ y.double().T / 0.7).softmax(-1) for x, y in ((a, v), (b, w)))
        assert float(found[i]) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-5)
    assert torch.equal(full_kl(a, v, a, v), torch.zeros(2500)) and full_kl(a[:0], v, b[:0], w).shape == (0,)


def test_group_advantages_by_hand():
    """Groups (1, 2, 6) and (4, 4, 4). RLOO: 1 − 4, 2 − 3.5, 6 − 1.5. GRPO: less the mean 3, over √(14/2) = √7."""
    rewards = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    assert rloo_advantages(rewards, 3).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]
    scaled = [x / math.sqrt(7) for x in (-2, -1, 3)] + [0.0] * 3
    assert grpo_advantages(rewards, 3).tolist() == pytest.approx(scaled, abs=1e-3)
    assert grpo_advantages(rewards, 3, std_norm=False).tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]


def test_a_groups_advantages_do_not_depend_on_other_groups():
    rewards = torch.tensor([1.0, 2.0, 6.0, 4.0, 40.0, -4.0])
    for f in (rloo_advantages, grpo_advantages):
        assert torch.equal(f(rewards, 3)[:3], f(rewards[:3], 3))
        with pytest.raises(ValueError, match="a group needs at least 2 samples to compare, got 1"):
            f(rewards, 1)
        with pytest.raises(ValueError, match="6 rewards are no whole number of groups of 4"):
            f(rewards, 4)


def test_equal_rewards_are_no_advantage_whatever_their_size():
    """1000.1 in float32 is not the float32 mean of three of itself, and what is left is divided by nearly itself."""
    for value, samples in ((1000.1, 3), (12345.678, 7), (0.1, 3)):
        rewards = torch.full((samples,), value)
        assert grpo_advantages(rewards, samples).tolist() == rloo_advantages(rewards, samples).tolist() == [0.0] * samples


@pytest.mark.parametrize("call, sentence", [
    (lambda: grpo_advantages(torch.tensor([1.0, math.nan]), 2), "grpo: expected finite rewards, got nan"),
    (lambda: rloo_advantages(torch.tensor([1.0, math.inf]), 2), "rloo: expected finite rewards, got inf"),
    (lambda: kl_loss(torch.zeros(3), torch.zeros(3, 1), "k2"), r"kl_loss: expected tensors of one shape, got \(3,\), \(3, 1\)"),
    (lambda: policy_terms(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1), 0.2), "policy_terms: expected tensors of one shape"),
    (lambda: pairwise_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2, 1)), "pairwise_loss: expected tensors of one shape"),
    (lambda: sum_by_sequence(torch.ones(3), torch.tensor([0, 2])), "sum_by_sequence: expected x of shape"),
    (lambda: importance_weights(torch.zeros(2), torch.zeros(2, 1), 1.0), "importance_weights: expected tensors of one shape"),
    (lambda: sampler_kl(torch.zeros(2), torch.zeros(2, 1)), "sampler_kl: expected tensors of one shape"),
])  # fmt: skip
def test_what_would_be_spread_over_a_square_or_poison_a_group_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_policy_terms_for_every_side_of_the_ratio():
    """ε = 0.2, ratios ½ and 2, advantages ±1: max(−A r, −A clip r)."""
    logprobs = torch.tensor([0.5, 2.0, 0.5, 2.0]).log()
    terms, facts = policy_terms(logprobs, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2)
    assert terms.tolist() == pytest.approx([-0.5, -1.2, 0.8, 2.0])
    assert facts["clip_fraction"] == 0.5 and facts["ratio_max"] == pytest.approx(2.0)
    assert facts["approx_kl"] == pytest.approx(0.5 * math.log(2) ** 2)


def test_pairs_by_hand_and_their_gradient():
    """−log σ(1 − ½) = ln(1 + e^−½); at margin 0 the loss is ln 2; the gradient in the better score is −σ(−(gap − margin))."""
    better, worse = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0.0, 3.0])
    loss = pairwise_loss(better, worse, torch.tensor([0.5, 0.0]))
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-0.5)), math.log(2)])
    loss.sum().backward()
    assert better.grad.tolist() == pytest.approx([-1 / (1 + math.exp(0.5)), -0.5])
    assert pairwise_loss(torch.tensor([-1e4]), torch.tensor([1e4])).tolist() == [2e4]
    with pytest.raises(ValueError, match=r"pairwise_loss: expected tensors of one shape, got \(2,\), \(1,\)"):
        pairwise_loss(better, worse[:1])


def test_the_dpo_loss_by_hand():
    """β = 0.1: margin 0 gives ln 2; margin 10, log-odds 1, gives ln(1 + 1/e); a label that is wrong one time in five mixes both
    sides. The gradient in the margin is −β σ(−β m)."""
    margin = torch.tensor([0.0, 10.0], requires_grad=True)
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert dpo_loss(margin, 0.1).tolist() == pytest.approx([math.log(2), right])
    assert dpo_loss(margin, 0.1, 0.2).tolist() == pytest.approx([math.log(2), 0.8 * right + 0.2 * wrong])
    dpo_loss(margin, 0.1).sum().backward()
    assert margin.grad.tolist() == pytest.approx([-0.05, -0.1 / (1 + math.exp(1))])


def test_the_smoothed_loss_is_least_where_the_log_odds_are_those_of_the_labels():
    """ε = 0.2: σ(β m) = 0.8."""
    margin = torch.tensor([math.log(4) / 0.3], dtype=torch.float64, requires_grad=True)
    dpo_loss(margin, 0.3, 0.2).sum().backward()
    assert float(margin.grad) == pytest.approx(0, abs=1e-9)


def test_ipo_is_least_at_its_margin_and_losses_differentiate():
    assert ipo_loss(torch.tensor([5.0, 7.0, 3.0]), 0.1).tolist() == [0.0, 4.0, 4.0]
    margin = torch.tensor([0.3, -2.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda m: ipo_loss(m, 0.2), margin) and gradcheck(lambda m: dpo_loss(m, 0.2, 0.1), margin)


def test_a_target_of_zero_leaves_the_coefficient_alone():
    controller = AdaptiveKL(0.1, target=0.0, horizon=10)
    controller.update(50.0, 100)
    assert controller.beta == 0.1
