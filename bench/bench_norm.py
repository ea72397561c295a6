"""RMSNorm, alone and with a residual, forward with backward, against torch's kernel as it is and compiled.

Alone it reads x, then x and dy, and writes y, then dx: five arrays. A residual adds the reads of itself and of the sum's gradient
and the write of the sum: eight.
"""

import pytest
import torch
import torch.nn.functional as F

from nanorlhf.ops import add_rms_norm, rms_norm
from timing import report, trained

SHAPES = [(4096, 192), (4096, 2048), (16384, 1024)]  # (N, C); with a residual and without
SHAPES = [(*shape, residual) for shape in SHAPES for residual in (False, True)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plain(x, weight):
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), 1e-5)  # torch's kernel takes one dtype


def added(x, residual, weight):
    total = x + residual
    return plain(total, weight), total


def case(shape, dtype):
    *size, residual = shape
    x, other, dy, dtotal = (torch.randn(size).to(DTYPES[dtype]) for _ in range(4))
    weight = torch.rand(size[1])
    if residual:
        ways = {"nanorlhf": add_rms_norm, "torch": added}
        inputs, gradients = (x, other, weight), (dy, dtotal)
    else:
        ways, inputs, gradients = {"nanorlhf": rms_norm, "torch": plain}, (x, weight), (dy,)
    inputs = [t.requires_grad_() for t in inputs]
    name = f"{size[0]} x {size[1]} {dtype}" + " + residual" * residual
    return trained(name, (8 if residual else 5) * x.nbytes, ways, inputs, gradients)


@pytest.mark.parametrize("contender", ["nanorlhf", "torch", "torch compiled", "copy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(benchmark, shape, dtype, contender):
    benchmark(case(shape, dtype)[2][contender])


if __name__ == "__main__":
    report((case(shape, dtype) for shape in SHAPES for dtype in DTYPES), "GB/s", repeats=15)
