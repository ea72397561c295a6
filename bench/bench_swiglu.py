"""SwiGLU's elementwise part, forward with backward, against plain torch as it is and compiled.

It reads gate and up and writes their product, then reads both and the gradient and writes two: eight arrays.
"""

import pytest
import torch
import torch.nn.functional as F

from nanorlhf.ops import swiglu
from timing import report, trained

SHAPES = [(4096, 512), (4096, 2048), (8192, 4096)]  # (N, F)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def case(shape, dtype):
    gate, up, dout = (torch.randn(shape).to(DTYPES[dtype]) for _ in range(3))
    ways = {"nanorlhf": swiglu, "torch": lambda gate, up: F.silu(gate) * up}
    inputs = [t.requires_grad_() for t in (gate, up)]
    return trained(f"{shape[0]} x {shape[1]} {dtype}", 8 * dout.nbytes, ways, inputs, (dout,))


@pytest.mark.parametrize("contender", ["nanorlhf", "torch", "torch compiled", "copy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(benchmark, shape, dtype, contender):
    benchmark(case(shape, dtype)[2][contender])


if __name__ == "__main__":
    report((case(shape, dtype) for shape in SHAPES for dtype in DTYPES), "GB/s", repeats=15)
