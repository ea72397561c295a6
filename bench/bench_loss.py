"""The loss head against linear + cross_entropy, which keeps (N, V) logits and gives no entropy."""

import pytest
import torch
import torch.nn.functional as F

from nanorlhf.ops import token_logprobs
from timing import report

SHAPES = [(4096, 256, 4096), (1024, 256, 16384)]  # (N, C, V)


def case(N, C, V):
    hidden = torch.randn(N, C, requires_grad=True)
    weight = (C**-0.5 * torch.randn(V, C)).requires_grad_()
    targets = torch.randint(0, V, (N,))
    losses = {
        "nanorlhf": lambda: -token_logprobs(hidden, weight, targets)[0].mean(),
        "torch cross_entropy": lambda: F.cross_entropy(F.linear(hidden, weight), targets),
    }
    gradients = [torch.autograd.grad(f(), (hidden, weight)) for f in losses.values()]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    both = {name: (lambda f=f: torch.autograd.grad(f(), (hidden, weight))) for name, f in losses.items()}
    return f"N{N} C{C} V{V}", 6 * N * C * V / 1e9, both  # the recomputed logits are not counted as work


@pytest.mark.parametrize("contender", ["nanorlhf", "torch cross_entropy"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss(benchmark, shape, contender):
    benchmark(case(*shape)[2][contender])


if __name__ == "__main__":
    report([case(*shape) for shape in SHAPES])
