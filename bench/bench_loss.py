"""The loss head against linear + cross_entropy, which keeps (N, V) logits and gives no entropy, in fp32 and bf16."""

import pytest
import torch
import torch.nn.functional as F

from nanorlhf.ops import token_logprobs
from timing import report

SHAPES = [(4096, 256, 4096), (4096, 256, 32768)]  # (N, C, V)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def case(shape, dtype):
    N, C, V = shape
    hidden = torch.randn(N, C).to(DTYPES[dtype]).requires_grad_()
    weight = (C**-0.5 * torch.randn(V, C)).to(DTYPES[dtype]).requires_grad_()
    targets = torch.randint(0, V, (N,))
    losses = {
        "nanorlhf": lambda: -token_logprobs(hidden, weight, targets)[0].mean(),
        "torch cross_entropy": lambda: F.cross_entropy(F.linear(hidden, weight), targets),
    }
    gradients = [torch.autograd.grad(f(), (hidden, weight)) for f in losses.values()]
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).float().abs().max() / b.float().abs().max()) < (0.05 if dtype == "bf16" else 1e-3)
    both = {name: (lambda f=f: torch.autograd.grad(f(), (hidden, weight))) for name, f in losses.items()}
    return f"N{N} C{C} V{V} {dtype}", 6 * N * C * V / 1e9, both  # the recomputed logits are not counted as work


@pytest.mark.parametrize("contender", ["nanorlhf", "torch cross_entropy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss(benchmark, shape, dtype, contender):
    benchmark(case(shape, dtype)[2][contender])


if __name__ == "__main__":
    report([case(shape, dtype) for shape in SHAPES for dtype in DTYPES])
