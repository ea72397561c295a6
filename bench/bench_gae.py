"""GAE over ragged episodes against the vectorised torch loop and the loop over tokens that most trainers have."""

import pytest
import torch

from nanorlhf.ops import gae
from nanorlhf.ops.gae import gae_reference
from timing import report

SHAPES = [(64, 48), (512, 256), (64, 8192)]  # episodes of up to so many tokens


def token_loop(rewards, values, bounds, gamma, lam):
    advantages = torch.empty_like(values)
    for start, end in zip(bounds, bounds[1:]):
        carry = after = 0.0
        for t in reversed(range(start, end)):
            carry = rewards[t] + gamma * after - values[t] + gamma * lam * carry
            after = values[t]
            advantages[t] = carry
    return advantages, advantages + values


def case(episodes, length):
    lengths = torch.randint(length // 2, length + 1, (episodes,), generator=torch.Generator().manual_seed(0))
    bounds = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    tokens = int(bounds[-1])
    rewards, values = torch.randn(tokens), torch.randn(tokens)
    arguments = rewards, values, bounds, 1.0, 0.95
    torch.testing.assert_close(gae(*arguments), gae_reference(*arguments), rtol=1e-4, atol=1e-4)
    contenders = {"nanorlhf": lambda: gae(*arguments), "torch, a step of all": lambda: gae_reference(*arguments)}
    if tokens < 10_000:
        contenders["torch, a token a time"] = lambda: token_loop(rewards, values, bounds.tolist(), 1.0, 0.95)
    return f"{episodes} episodes, {tokens} tokens", 16 * tokens / 1e9, contenders


@pytest.mark.parametrize("contender", ["nanorlhf", "torch, a step of all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gae(benchmark, shape, contender):
    benchmark(case(*shape)[2][contender])


if __name__ == "__main__":
    report([case(*shape) for shape in SHAPES], "GB/s")
