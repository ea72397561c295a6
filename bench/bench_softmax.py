"""Row softmax against torch's."""

import pytest
import torch

from nanorlhf.ops import softmax
from timing import report

SHAPES = [(4096, 256), (1024, 4096), (256, 32000)]


def case(rows, columns):
    x = torch.randn(rows, columns)
    torch.testing.assert_close(softmax(x), x.softmax(-1))
    gigabytes = 2 * 4 * rows * columns / 1e9  # one read, one write
    return f"{rows} x {columns}", gigabytes, {"nanorlhf": lambda: softmax(x), "torch": lambda: x.softmax(-1)}


@pytest.mark.parametrize("contender", ["nanorlhf", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(benchmark, shape, contender):
    benchmark(case(*shape)[2][contender])


if __name__ == "__main__":
    report([case(*shape) for shape in SHAPES], "GB/s")
