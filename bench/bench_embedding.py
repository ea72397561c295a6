"""Token embedding, forward and with its gradient, against F.embedding and a cast; ids as skewed as words are."""

import pytest
import torch
import torch.nn.functional as F

from nanorlhf.ops import embedding
from timing import report

SHAPES = [(N, V, C, dtype) for N, V, C in [(4096, 4096, 256), (16384, 32768, 512)] for dtype in (torch.float32, torch.bfloat16)]


def case(N, V, C, dtype, backward=True):
    g = torch.Generator().manual_seed(0)
    ids = torch.multinomial(1 / torch.arange(1.0, V + 1), N, replacement=True, generator=g)
    weight = torch.randn(V, C, generator=g).requires_grad_()
    dout = torch.randn(N, C, generator=g).to(dtype)
    ops = {"nanorlhf": lambda: embedding(ids, weight, dtype), "torch": lambda: F.embedding(ids, weight).to(dtype)}
    assert torch.equal(ops["nanorlhf"](), ops["torch"]())
    grads = [torch.autograd.grad(op(), weight, dout)[0] for op in ops.values()]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    if backward:
        ops = {name: lambda op=op: torch.autograd.grad(op(), weight, dout) for name, op in ops.items()}
    size = dout.element_size()
    gigabytes = (N * C * (4 + size) + backward * C * (N * size + 4 * V)) / 1e9
    return f"{N} of {V} x {C} {str(dtype)[6:]}{', backward too' if backward else ''}", gigabytes, ops


@pytest.mark.parametrize("contender", ["nanorlhf", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embedding(benchmark, shape, contender):
    benchmark(case(*shape)[2][contender])


if __name__ == "__main__":
    report([case(*shape, backward) for shape in SHAPES for backward in (False, True)], "GB/s")
