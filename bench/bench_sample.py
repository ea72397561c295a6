"""Sampling against the same in torch (softmax, sort, cumulative sum), from logits of a peaked and of a flat distribution."""

import pytest
import torch

from nanorlhf.ops import sample
from nanorlhf.ops.sample import sample_reference
from timing import report

FILTERS = {
    "none": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "all": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}
CASES = [(B, V, spread, name) for V in (4096, 50257) for B in (1, 32, 384) for spread in (1, 3) for name in FILTERS]


def case(B, V, spread, name):
    """spread: the logits' standard deviation. At 1 most of the vocabulary matters, at 3 a small part of it."""
    logits = spread * torch.randn(B, V, generator=torch.Generator().manual_seed(0))
    given = (0, torch.arange(B), torch.zeros(B, dtype=torch.int64))
    assert sample(logits, *given, **FILTERS[name])[0].equal(sample_reference(logits, *given, **FILTERS[name])[0])
    contenders = {"nanorlhf": lambda: sample(logits, *given, **FILTERS[name])}
    contenders["torch"] = lambda: sample_reference(logits, *given, **FILTERS[name])
    return f"{B} x {V}, spread {spread}, {name}", 4 * B * V / 1e9, contenders  # one read


@pytest.mark.parametrize("contender", ["nanorlhf", "torch"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_sample(benchmark, shape, contender):
    benchmark(case(*shape)[2][contender])


if __name__ == "__main__":
    report((case(*shape) for shape in CASES), "GB/s")
