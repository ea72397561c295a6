"""Row softmax against torch's, in fp32 and bf16, and against a copy of as many bytes.

torch runs twice: in this process, where importing nanorlhf lets malloc keep freed memory, and in one of its own, as it is
installed, where each large result comes fresh from the system.
"""

import pytest
import torch

from nanorlhf.ops import softmax
from timing import AsInstalled, copying, report

SHAPES = [(4096, 256), (2048, 4096), (2048, 32768)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def case(shape, dtype):
    x = torch.randn(shape).to(DTYPES[dtype])
    close = {"rtol": 1e-2, "atol": 1e-6} if dtype == "bf16" else {}
    torch.testing.assert_close(softmax(x), x.softmax(-1), **close)
    contenders = {
        "nanorlhf": lambda: softmax(x),
        "torch": lambda: x.softmax(-1),
        "torch as installed": AsInstalled(f"x = torch.randn({shape}).to({DTYPES[dtype]})\nrun = lambda: x.softmax(-1)"),
        "copy": copying(2 * x.nbytes),
    }
    return f"{shape[0]} x {shape[1]} {dtype}", 2 * x.nbytes / 1e9, contenders


@pytest.mark.parametrize("contender", ["nanorlhf", "torch", "copy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(benchmark, shape, dtype, contender):
    benchmark(case(shape, dtype)[2][contender])


if __name__ == "__main__":
    report((case(shape, dtype) for shape in SHAPES for dtype in DTYPES), "GB/s", repeats=15)
