"""Both halves of the PPO loss with gradients and estimates against the same in torch calls."""

import pytest
import torch

from nanorlhf.ops import ppo_policy_loss, ppo_value_loss
from nanorlhf.ops.ppo_loss import ppo_policy_loss_reference, ppo_value_loss_reference
from timing import report

SIZES = [1000, 16_000, 500_000]


def step(policy, value, logprobs, values, old, advantages, returns):
    """As an update does: two losses, two gradients, and what is logged as numbers."""
    logprobs.grad = values.grad = None
    p = policy(logprobs, old, advantages, 0.2)
    p.loss.backward()
    v = value(values, returns - 0.1, returns, 0.2)
    v.loss.backward()
    return [float(x.detach()) for x in (*p[:6], v.loss)]


def case(M):
    old, advantages, returns = (torch.randn(M) for _ in range(3))
    logprobs, values = (old + 0.1 * torch.randn(M)).requires_grad_(), torch.randn(M).requires_grad_()
    rest = logprobs, values, old, advantages, returns
    ours, torchs = (ppo_policy_loss, ppo_value_loss), (ppo_policy_loss_reference, ppo_value_loss_reference)
    torch.testing.assert_close(step(*ours, *rest), step(*torchs, *rest), rtol=1e-3, atol=1e-5)
    return f"{M} tokens", 4 * 9 * M / 1e9, {"nanorlhf": lambda: step(*ours, *rest), "torch": lambda: step(*torchs, *rest)}


@pytest.mark.parametrize("contender", ["nanorlhf", "torch"])
@pytest.mark.parametrize("size", SIZES)
def test_ppo_loss(benchmark, size, contender):
    benchmark(case(size)[2][contender])


if __name__ == "__main__":
    report([case(size) for size in SIZES], "GB/s")
