"""Sampling against the same in torch (softmax, sort, cumulative sum), from logits of a peaked and of a flat distribution; then with
settings of each row's own and with masks, against the same rows without."""

import numpy as np
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
MASKS = {
    "own settings": None, "mask of all": lambda at: at >= 0, "of every other": lambda at: at % 2 == 0,
    "of all but 100": lambda at: at >= 100, "of 50 far apart": lambda at: at % 997 == 0, "of 100 in a row": lambda at: at < 100,
}  # fmt: skip
MASKED = [(32, 49_152, 3, name, mask) for name in FILTERS for mask in MASKS]
CASES = [(B, V, spread, name) for V in (4096, 50257) for B in (1, 32, 384) for spread in (1, 3) for name in FILTERS]


def case(B, V, spread, name):
    """spread: the logits' standard deviation. At 1 most of the vocabulary matters, at 3 a small part of it."""
    logits = spread * torch.randn(B, V, generator=torch.Generator().manual_seed(0))
    given = (0, torch.arange(B), torch.zeros(B, dtype=torch.int64))
    assert sample(logits, *given, **FILTERS[name])[0].equal(sample_reference(logits, *given, **FILTERS[name])[0])
    contenders = {"nanorlhf": lambda: sample(logits, *given, **FILTERS[name])}
    contenders["torch"] = lambda: sample_reference(logits, *given, **FILTERS[name])
    return f"{B} x {V}, spread {spread}, {name}", 4 * B * V / 1e9, contenders  # one read


def masked(B, V, spread, name, mask):
    logits = spread * torch.randn(B, V, generator=torch.Generator().manual_seed(0))
    given, extra = (0, torch.arange(B), torch.zeros(B, dtype=torch.int64)), dict(FILTERS[name])
    if MASKS[mask] is None:
        extra = {k: torch.full((B,), x, dtype=torch.int64 if k == "top_k" else torch.float64) for k, x in {"temperature": 1.0, **extra}.items()}
    else:
        bits = np.packbits(MASKS[mask](np.arange(V)), bitorder="little").view(np.int32)
        extra["mask"] = torch.from_numpy(bits).expand(B, -1).contiguous()
    assert (sample(logits, *given, **extra)[0] == sample_reference(logits, *given, **extra)[0]).all()
    contenders = {"nanorlhf": lambda: sample(logits, *given, **extra), "without": lambda: sample(logits, *given, **FILTERS[name])}
    return f"{B} x {V}, spread {spread}, {name}, {mask}", 4 * B * V / 1e9, contenders


@pytest.mark.parametrize("contender", ["nanorlhf", "torch"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_sample(benchmark, shape, contender):
    benchmark(case(*shape)[2][contender])


if __name__ == "__main__":
    report((make(*shape) for make, shapes in ((case, CASES), (masked, MASKED)) for shape in shapes), "GB/s")
