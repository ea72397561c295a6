"""Beyond the 54: preferences without a reward model, groups without a value model, REINFORCE. All are judged on any adapter that has
the method. Sources: DPO = Rafailov et al. 2023, IPO = Azar et al. 2023, RLOO = Ahmadian et al. 2024, GRPO = Shao et al. 2024."""

import math

import pytest
import torch

from .contract import assert_close, gradient, mask_of, need, tensor

CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = tensor(-10, -3), tensor(-12, -2), tensor(-11, -3), tensor(-9, -4)  # margins 4, −2


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_is_the_log_sigmoid_of_the_difference_of_log_ratios(adapter, smoothing):
    """DPO eq. 7. Margins (−10 + 11) − (−12 + 9) = 4 and (−3 + 3) − (−2 + 4) = −2, β = ½; a label is wrong with chance ε."""
    found = need(adapter, "dpo_loss")(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.5, smoothing)
    assert_close(found, [-(1 - smoothing) * log_sigmoid(m) - smoothing * log_sigmoid(-m) for m in (2.0, -1.0)])


def test_dpo_pulls_the_two_responses_apart_alike(adapter):
    """Where policy and reference agree the loss is ln 2, the pull −β/2 and β/2."""
    loss, grad = gradient(lambda x: need(adapter, "dpo_loss")(x[:1], x[1:], tensor(-3), tensor(-4), 0.1, 0.0).sum(), tensor(-3, -4))
    assert_close(loss, math.log(2))
    assert_close(grad, [-0.05, 0.05])


def test_ipo_draws_the_margin_to_half_over_beta(adapter):
    """IPO eq. 17, β = ¼: (4 − 2)² and (−2 − 2)²."""
    assert_close(need(adapter, "ipo_loss")(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.25), [4.0, 16.0])


def test_leave_one_out_compares_a_reward_with_the_mean_of_the_others(adapter):
    """RLOO eq. 8. 1, 2, 6: 1 − 4, 2 − 3.5, 6 − 1.5; equal rewards: 0."""
    assert_close(need(adapter, "rloo_advantages")(tensor([1, 2, 6], [5, 5, 5])), [[-3, -1.5, 4.5], [0, 0, 0]])


def test_a_group_is_compared_with_its_mean_over_its_deviation_or_not(adapter):
    """GRPO §4.1.2; Dr. GRPO without the deviation. 1, 2, 6: −2, −1, 3 over √7 (n − 1) or √(14/3) (n): their ratios are −2 : −1 : 3."""
    advantages = need(adapter, "grpo_advantages")
    assert_close(advantages(tensor([1, 2, 6]), False), [[-2, -1, 3]])
    found = advantages(tensor([1, 2, 6], [4, 4, 4]), True)
    assert_close(found[1], [0, 0, 0])
    assert_close(found[0] / found[0, 2], [-2 / 3, -1 / 3, 1])
    assert min(abs(float(found[0, 2]) - 3 / d) for d in (7**0.5, (14 / 3) ** 0.5)) < 1e-3


def group_terms():
    """Two responses of 2 and 1 tokens: log-ratios to the old policy ln 1.5, 0 | ln 0.5; to the reference 0, ln 2 | 0; advantages 1, −1."""
    mask = mask_of([2, 1], 3)
    fill = lambda *values: torch.zeros(2, 3, dtype=torch.float64).masked_scatter(mask, tensor(*values))
    return fill(math.log(1.5) - 2, -2, math.log(0.5) - 2), fill(-2, -2, -2), fill(math.log(1.5) - 2, -2 - math.log(2), math.log(0.5) - 2), mask


@pytest.mark.parametrize("length_norm, expected", [
    (True, ((-1.2 + -1.0 + 0.1 * (math.log(2) - 0.5)) / 2 + 0.8) / 2),  # each response's own mean
    (False, (-1.2 - 1.0 + 0.1 * (math.log(2) - 0.5) + 0.8) / (2 * 5)),  # over a constant length of 5
])  # fmt: skip
def test_the_group_loss_by_hand(adapter, length_norm, expected):
    """GRPO eq. 3 with k3 of eq. 4, ε = 0.2, β = 0.1: terms −1.2 (clipped), −1 + 0.1·(½ − 1 + ln 2) | 0.8 (clipped)."""
    logprobs, old, ref, mask = group_terms()
    found = need(adapter, "grpo_loss")(logprobs, old, ref, tensor(1, -1), mask, 0.2, 0.1, length_norm, 5)
    assert_close(found, expected, 1e-6)


def test_reinforce_is_the_language_model_loss_weighted_by_the_reward(adapter):
    """Williams 1992; the talk. log π −1, −2 | −3, rewards 2 and −1, baseline ½: −(1.5·(−3) − 1.5·(−3))/2 = 0, pulls −0.75, −0.75 | 0.75."""
    mask = mask_of([2, 1], 3)
    logprobs = torch.zeros(2, 3, dtype=torch.float64).masked_scatter(mask, tensor(-1, -2, -3))
    loss, grad = gradient(lambda x: need(adapter, "reinforce_loss")(x, tensor(2, -1), mask, 0.5), logprobs)
    assert_close(loss, 0.0)
    assert_close(grad, [[-0.75, -0.75, 0], [0.75, 0, 0]])
