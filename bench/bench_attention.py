"""Ragged attention against torch's SDPA called once per sequence, forward and forward with backward."""

import pytest
import torch
import torch.nn.functional as F

from nanorlhf.ops import attention
from timing import report

SHAPES = [  # (H, D, lengths): packed batches of 4096 tokens
    (4, 64, [64] * 64),
    (8, 32, [64] * 64),
    (4, 64, [256] * 16),
    (4, 64, [20, 40, 60, 100, 140, 180, 228, 256] * 4),
]


def sdpa_loop(q, k, v, bounds):
    parts = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        rows = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(*rows, is_causal=True)[0].transpose(0, 1))
    return torch.cat(parts)


def case(H, D, lengths):
    """Verifies, then gives (shape, {direction: (GFLOP, contenders)})."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (torch.randn(sum(lengths), H, D, requires_grad=True) for _ in range(3))
    g, bounds = torch.randn(sum(lengths), H, D), cu_seqlens.tolist()
    ours, torchs = (lambda: attention(q, k, v, cu_seqlens)), (lambda: sdpa_loop(q, k, v, bounds))
    for a, b in zip(*(torch.autograd.grad(f(), (q, k, v), g) for f in (ours, torchs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    work = sum(2 * H * D * T * (T + 1) for T in lengths) / 1e9  # causal: half of 4 H D T²
    shape = f"H{H} D{D} B{len(lengths)} T{min(lengths)}-{max(lengths)}"

    def inference(f):
        def run():
            with torch.no_grad():
                f()

        return run

    forward = {"nanorlhf": inference(ours), "torch sdpa": inference(torchs)}
    both = {
        "nanorlhf": lambda: torch.autograd.grad(ours(), (q, k, v), g),
        "torch sdpa": lambda: torch.autograd.grad(torchs(), (q, k, v), g),
    }
    return [(f"forward  {shape}", work, forward), (f"backward {shape}", 3.5 * work, both)]


@pytest.mark.parametrize("contender", ["nanorlhf", "torch sdpa"])
@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"H{s[0]}-D{s[1]}-B{len(s[2])}")
def test_attention(benchmark, shape, direction, contender):
    benchmark(case(*shape)[direction][2][contender])


if __name__ == "__main__":
    report([row for shape in SHAPES for row in case(*shape)])
