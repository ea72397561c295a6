"""train/loss.py: the arithmetic of the stages, worked by hand and against plain loops in double precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.train.loss import AdaptiveKL, gae, kwise_loss, policy_loss, sum_by_sequence, value_loss, whiten


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# --- kwise_loss ----------------------------------------------------------------------------------------------------

def kwise_by_loops(scores, ranks, bounds):
    """−log σ(s_better − s_worse), mean over a group's pairs, then over the groups that have any."""
    groups, right, pairs = [], 0.0, 0
    for start, end in zip(bounds, bounds[1:]):
        losses = []
        for i in range(start, end):
            for j in range(start, end):
                if ranks[i] < ranks[j]:
                    losses.append(-math.log(sigmoid(scores[i] - scores[j])))
                    right += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
        if losses:
            groups.append(sum(losses) / len(losses))
        pairs += len(losses)
    return sum(groups) / len(groups), right / pairs


def test_two_completions_are_bradley_terry_and_its_gradient():
    """P(better wins) = σ(2 − 0.5) = σ(1.5): loss −log σ(1.5) = log(1 + e^−1.5); its derivative by the better score is
    σ(1.5) − 1, and by the worse one the opposite."""
    scores = tensor(0.5, 2.0).requires_grad_()
    loss, right = kwise_loss(scores, torch.tensor([1, 0]), torch.tensor([0, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-12)
    assert scores.grad.tolist() == pytest.approx([1 - sigmoid(1.5), sigmoid(1.5) - 1], abs=1e-12)
    assert float(right) == 1.0


def test_three_completions_by_hand():
    """Scores 1, 0, 3 of ranks 0, 1, 2: margins 1 (right), −2 and −3 (wrong); a third of the pairs is right."""
    loss, right = kwise_loss(tensor(1, 0, 3), torch.tensor([0, 1, 2]), torch.tensor([0, 3]))
    expected = sum(math.log1p(math.exp(-m)) for m in (1, -2, -3)) / 3
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert float(right) == pytest.approx(1 / 3)


GROUP = st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(GROUP, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_many_groups_equal_the_loop_over_pairs_in_any_order(groups, rng):
    groups = [[(2.0, 0), (1.0, 1)], *groups]  # at least one pair
    for _ in range(2):
        flat = [pair for group in groups for pair in group]
        scores, ranks = [s for s, _ in flat], [r for _, r in flat]
        bounds = [0]
        for group in groups:
            bounds.append(bounds[-1] + len(group))
        loss, right = kwise_loss(tensor(*scores), torch.tensor(ranks), torch.tensor(bounds))
        expected_loss, expected_right = kwise_by_loops(scores, ranks, bounds)
        assert loss.item() == pytest.approx(expected_loss, abs=1e-9)
        assert float(right) == pytest.approx(expected_right, abs=1e-6)
        rng.shuffle(groups)  # the loop is run again on another order of groups and of completions
        for group in groups:
            rng.shuffle(group)


def test_an_order_of_completions_within_a_group_changes_nothing():
    order = torch.tensor([3, 0, 2, 1])
    scores, ranks, bounds = tensor(1, -1, 0.3, 2), torch.tensor([2, 0, 1, 1]), torch.tensor([0, 4])
    one, other = kwise_loss(scores, ranks, bounds), kwise_loss(scores[order], ranks[order], bounds)
    assert float(one[0]) == pytest.approx(float(other[0]), abs=1e-12) and one[1] == other[1]


def test_equal_ranks_make_no_pair_and_equal_scores_count_one_half():
    """Ranks 0, 0, 1: pairs (0, 2) and (1, 2) only; the first is a tie of scores, the second is right."""
    loss, right = kwise_loss(tensor(1, 2, 1), torch.tensor([0, 0, 1]), torch.tensor([0, 3]))
    assert loss.item() == pytest.approx((math.log(2) + math.log1p(math.exp(-1))) / 2, abs=1e-12)
    assert float(right) == 0.75


def test_a_group_weighs_the_same_whatever_its_number_of_pairs():
    """A group of 3 pairs, all of margin 0, and one of a single pair of margin 2: (log 2 + log(1+e^−2)) / 2."""
    ranks = torch.tensor([0, 1, 2, 0, 1])
    loss, _ = kwise_loss(tensor(0, 0, 0, 2, 0), ranks, torch.tensor([0, 3, 5]))
    assert loss.item() == pytest.approx((math.log(2) + math.log1p(math.exp(-2))) / 2, abs=1e-12)


def test_no_pair_at_all_is_refused():
    with pytest.raises(ValueError, match="kwise_loss: no group holds two completions of different rank"):
        kwise_loss(tensor(1, 2, 3), torch.tensor([0, 0, 1]), torch.tensor([0, 2, 3]))


def test_far_scores_do_not_overflow():
    scores = tensor(-1e4, 1e4).requires_grad_()
    loss, _ = kwise_loss(scores, torch.tensor([0, 1]), torch.tensor([0, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4) and scores.grad.tolist() == [-1.0, 1.0]


# --- gae -----------------------------------------------------------------------------------------------------------

def gae_by_sums(rewards, values, bounds, gamma, lam):
    """A_t = Σ_l (γλ)^l (r_{t+l} + γ V_{t+l+1} − V_{t+l}), each episode alone, V = 0 after its end."""
    advantages = []
    for start, end in zip(bounds, bounds[1:]):
        for t in range(start, end):
            total = 0.0
            for l in range(end - t):
                after = values[t + l + 1] if t + l + 1 < end else 0.0
                total += (gamma * lam) ** l * (rewards[t + l] + gamma * after - values[t + l])
            advantages.append(total)
    return advantages


def test_a_score_on_the_last_of_five_actions_decays_by_lambda_from_there():
    """Values 0, λ = 0.95, a score of 1 on the end-of-turn action: δ is (0, 0, 0, 0, 1), so A_t = 0.95^(4−t). Code that
    puts the score one slot later gives 0.95 at that action instead of 1."""
    advantages, returns = gae(tensor(0, 0, 0, 0, 1), tensor(0, 0, 0, 0, 0), torch.tensor([0, 5]), 1.0, 0.95)
    assert [round(a, 4) for a in advantages.tolist()] == [0.8145, 0.8574, 0.9025, 0.95, 1.0]
    assert torch.equal(returns, advantages)


EPISODES = st.lists(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), max_size=7), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(EPISODES, st.floats(0, 1), st.floats(0, 1))
def test_ragged_episodes_equal_the_double_sum(episodes, gamma, lam):
    flat = [step for episode in episodes for step in episode]
    rewards, values, bounds = [r for r, _ in flat], [v for _, v in flat], [0]
    for episode in episodes:
        bounds.append(bounds[-1] + len(episode))
    advantages, returns = gae(tensor(*rewards), tensor(*values), torch.tensor(bounds), gamma, lam)
    expected = gae_by_sums(rewards, values, bounds, gamma, lam)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-9)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, values)], abs=1e-9)


def test_lambda_one_is_reward_to_go_minus_value_and_lambda_zero_one_step():
    """Rewards 1, 2, 4 with values 5, 6, 7 and γ = 1: to go 7, 6, 4. One step: 1+6−5, 2+7−6, 4+0−7."""
    rewards, values, bounds = tensor(1, 2, 4), tensor(5, 6, 7), torch.tensor([0, 3])
    assert gae(rewards, values, bounds, 1.0, 1.0)[0].tolist() == [2, 0, -3]
    assert gae(rewards, values, bounds, 1.0, 1.0)[1].tolist() == [7, 6, 4]
    assert gae(rewards, values, bounds, 1.0, 0.0)[0].tolist() == [2, 3, -3]


def test_no_episode_gives_no_advantage():
    advantages, returns = gae(tensor(), tensor(), torch.tensor([0]), 1.0, 0.95)
    assert advantages.shape == returns.shape == (0,)


# --- whiten --------------------------------------------------------------------------------------------------------

def test_whitening_removes_the_mean_of_the_published_example():
    """Rewards 1.2, 1.3, … 2.0: mean 1.6, population variance 0.0667. Ziegler's code keeps the mean for rewards, where
    the published values are .0508 … 3.1492; for advantages, as here, it removes it: the same values less 1.6."""
    published = [0.0508, 0.4381, 0.8254, 1.2127, 1.6, 1.9873, 2.3746, 2.7619, 3.1492]
    x = tensor(1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)
    assert (whiten(x) + 1.6).tolist() == pytest.approx(published, abs=5e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30).filter(lambda x: max(x) - min(x) > 0.1))
def test_whitened_numbers_have_mean_0_and_variance_1(values):
    y = whiten(tensor(*values))
    assert float(y.mean()) == pytest.approx(0, abs=1e-9) and float(y.var(unbiased=False)) == pytest.approx(1, abs=1e-4)


def test_equal_numbers_whiten_to_zero():
    assert whiten(tensor(3, 3, 3)).tolist() == [0, 0, 0] and whiten(tensor(3)).tolist() == [0]


def test_rewards_are_scaled_and_not_moved():
    """Ziegler's code keeps the mean of rewards: the published example, 1.2 … 2.0, gives .0508 … 3.1492."""
    published = [0.0508, 0.4381, 0.8254, 1.2127, 1.6, 1.9873, 2.3746, 2.7619, 3.1492]
    assert whiten(tensor(1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0), shift_mean=False).tolist() == pytest.approx(published, abs=5e-5)
    assert whiten(tensor(3, 3), shift_mean=False).tolist() == [3, 3]


# --- policy_loss and value_loss ------------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio, advantage, loss, gradient, clipped", [
    (0.5, 1.0, -0.5, -0.5, 0),  # a good action made rarer: pull it back
    (1.0, 1.0, -1.0, -1.0, 0),
    (1.1, 1.0, -1.1, -1.1, 0),  # inside the bounds nothing is cut
    (1.5, 1.0, -1.2, 0.0, 1),  # a good action, made more frequent enough
    (0.5, -1.0, 0.8, 0.0, 1),  # a bad action, made rarer enough
    (0.9, -1.0, 0.9, 0.9, 0),
    (1.0, -1.0, 1.0, 1.0, 0),
    (1.5, -1.0, 1.5, 1.5, 0),  # a bad action made more frequent: push it down
    (1.5, 0.0, 0.0, 0.0, 0),
])  # fmt: skip
def test_the_clipped_objective_for_every_side_of_ratio_and_sign_of_advantage(ratio, advantage, loss, gradient, clipped):
    """ε = 0.2: max(−A·r, −A·clip(r, 0.8, 1.2)); where the free branch is taken dL/d(log π) = −A·r, else 0."""
    logprobs = tensor(math.log(ratio) - 2).requires_grad_()
    got, share = policy_loss(logprobs, tensor(-2), tensor(advantage), 0.2)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12) and float(share) == clipped
    assert logprobs.grad.tolist() == pytest.approx([gradient], abs=1e-12)


def test_the_policy_loss_is_the_mean_over_tokens():
    """Tokens of ratio 1.5 and advantages 1 and −1: (−1.2 + 1.5) / 2, half of them clipped."""
    loss, share = policy_loss(tensor(math.log(1.5), math.log(1.5)), tensor(0, 0), tensor(1, -1), 0.2)
    assert loss.item() == pytest.approx(0.15, abs=1e-12) and float(share) == 0.5


@pytest.mark.parametrize("value, loss, gradient", [
    (0.1, 0.405, -0.9),  # within 0.2 of the old value: ½ 0.9²
    (0.5, 0.32, 0.0),  # moved toward the return beyond the bound: ½ (0.2 − 1)², no more pull
    (1.5, 0.32, 0.0),  # past the return: the clipped error is still the larger
    (3.0, 2.0, 2.0),  # far past it: ½ 2², pulled back
    (-0.5, 1.125, -1.5),  # moved away: the free error ½ 1.5² is the larger
])  # fmt: skip
def test_the_clipped_value_loss_around_an_old_value_of_0_for_a_return_of_1(value, loss, gradient):
    values = tensor(value).requires_grad_()
    got = value_loss(values, tensor(0), tensor(1), 0.2)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-12)
    assert values.grad.tolist() == pytest.approx([gradient], abs=1e-12)


# --- sums and the controller ---------------------------------------------------------------------------------------

def test_sums_by_sequence_skip_no_sequence_and_keep_an_empty_one_at_zero():
    x = torch.arange(6.0)
    assert sum_by_sequence(x, torch.tensor([0, 1, 1, 4, 6], dtype=torch.int32)).tolist() == [0, 0, 6, 9]


def test_the_kl_coefficient_follows_its_published_rule():
    """β₀ = 0.15, target 6, horizon 10,000, 512 episodes a step. KL 12: error clipped to 0.2, × 1.01024. KL 6.6: error
    0.1, × 1.00512. KL 6: unchanged. KL 0 and KL −3: error clipped to −0.2, × 0.98976 each."""
    controller, betas = AdaptiveKL(0.15, target=6.0, horizon=10_000), []
    for kl in (12.0, 6.6, 6.0, 0.0, -3.0):
        controller.update(kl, 512)
        betas.append(controller.beta)
    factors = [1.01024, 1.00512, 1.0, 0.98976, 0.98976]
    expected, beta = [], 0.15
    for factor in factors:
        beta *= factor
        expected.append(beta)
    assert betas == pytest.approx(expected, rel=1e-12)
