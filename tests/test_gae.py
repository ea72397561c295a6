"""ops/gae.py; hand-worked episodes of gae itself are in test_train_loss.py, in fp64 and so of the reference."""

import pytest
import torch

from nanorlhf.ops import gae, reward_to_go
from nanorlhf.ops.gae import gae_reference

LENGTHS = [[1], [3, 0, 4, 5], [0, 0, 17, 0], [1] * 50, [5000], list(range(100)), [0], []]


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def batch(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return torch.randn(total, generator=g), 10 * torch.randn(total, generator=g), bounds_of(lengths)


def test_two_episodes_worked_by_hand():
    """γ = ½, λ = ½. Episode (r 1, 2; V 4, 2): δ = (1 + 1 − 4, 2 − 2) = (−2, 0), A = (−2 + 0/4, 0). Episode (r 3; V 1): A = 2."""
    rewards, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 2.0, 1.0])
    advantages, returns = gae(rewards, values, torch.tensor([0, 2, 2, 3]), 0.5, 0.5)
    assert advantages.tolist() == [-2, 0, 2] and returns.tolist() == [2, 2, 3]


def test_lambda_one_is_reward_to_go_minus_value():
    rewards, values, bounds = batch([3, 0, 40, 7])
    advantages, returns = gae(rewards, values, bounds, 0.9, 1.0)
    to_go = reward_to_go(rewards, bounds, 0.9)
    torch.testing.assert_close(returns, to_go, atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages, to_go - values, atol=1e-5, rtol=0)


def test_reward_to_go_at_gamma_one_counts_the_steps_left():
    assert reward_to_go(torch.ones(7), torch.tensor([0, 3, 3, 7])).tolist() == [3, 2, 1, 4, 3, 2, 1]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5), (0.9, 0.97)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)}x{sum(x)}")
def test_it_is_within_one_rounding_of_fp64(lengths, gamma, lam):
    """Tighter than twice the naive error: the sums are fp64, and only the result is rounded."""
    rewards, values, bounds = batch(lengths)
    exact = gae_reference(rewards.double(), values.double(), bounds, gamma, lam)
    exact = (*exact, reward_to_go(rewards.double(), bounds, gamma))
    for x, z in zip((*gae(rewards, values, bounds, gamma, lam), reward_to_go(rewards, bounds, gamma)), exact, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), z, rtol=2**-24, atol=1e-12)


def test_an_episode_does_not_see_its_neighbours():
    rewards, values, bounds = batch([30, 50, 20])
    advantages, returns = gae(rewards, values, bounds, 0.99, 0.95)
    rewards[:30], values[80:] = float("nan"), float("inf")
    again, returns_again = gae(rewards, values, bounds, 0.99, 0.95)
    assert torch.equal(advantages[30:80], again[30:80]) and torch.equal(returns[30:80], returns_again[30:80])


@pytest.mark.parametrize("lengths", [[100_000], [7] * 20_000, [60_000, 1, 0, 60_000]], ids=str)
def test_threads_change_no_bit(lengths):
    rewards, values, bounds = batch(lengths)
    several = gae(rewards, values, bounds, 0.99, 0.95)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = gae(rewards, values, bounds, 0.99, 0.95)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(several, alone, strict=True))


def test_strided_input_is_read_as_it_is():
    rewards, values, bounds = batch([5, 6])
    both = torch.stack((rewards, values), 1)
    assert torch.equal(gae(both[:, 0], both[:, 1], bounds, 0.9, 0.9)[0], gae(rewards, values, bounds, 0.9, 0.9)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bounds", [[0, 2], [1, 4], [0, 3, 2, 4]])
def test_bounds_that_do_not_rise_to_the_end_are_refused(bounds, dtype):
    with pytest.raises(ValueError, match="expected cu_seqlens to rise from 0 to N = 4"):
        gae(torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=dtype), torch.tensor(bounds), 1.0, 1.0)
    with pytest.raises(ValueError, match="expected cu_seqlens to rise from 0 to N = 4"):
        reward_to_go(torch.zeros(4, dtype=dtype), torch.tensor(bounds))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"gae: expected rewards and values of shape \(M,\) .* got \(4,\), \(3,\)"):
        gae(torch.zeros(4), torch.zeros(3), torch.tensor([0, 4]), 1.0, 1.0)


def test_the_ops_are_good_citizens_of_torch():
    rewards, values, bounds = batch([3, 4])
    torch.library.opcheck(torch.ops.nanorlhf.gae.default, (rewards, values, bounds, 0.9, 0.9))
