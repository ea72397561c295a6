"""Rotary positions of queries and keys, alone and after RMSNorm of each head, forward with backward, against the same in plain
torch (the halves' formula of Hugging Face's models) as it is and compiled.

Alone it reads and writes q and k, then their gradients: four arrays of both. The norm reads q and k again in backward: five.
"""

import pytest
import torch
import torch.nn.functional as F

from nanorlhf.ops import rope_qkv
from timing import report, trained

SHAPES = [(4096, 6, 6, 32), (4096, 16, 4, 64), (16384, 16, 4, 64)]  # (N, H, Hkv, D); with QK-norm and without
SHAPES = [(*shape, normed) for shape in SHAPES for normed in (False, True)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
T, BASE, EPS = 256, 1e4, 1e-5


def turn(x, cosines, sines):
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat((-second, first), -1) * sines


def case(shape, dtype):
    N, H, Hkv, D, normed = shape
    q, k, dq, dk = (torch.randn(N, heads, D).to(DTYPES[dtype]) for heads in (H, Hkv, H, Hkv))
    weights = [torch.rand(D) for _ in range(2 * normed)]
    positions = torch.arange(N) % T
    angles = (positions[:, None] * BASE ** (-torch.arange(0, D, 2) / D)).repeat(1, 2)[:, None]  # (N, 1, D)
    cosines, sines = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

    def ours(q, k, *weights):
        return rope_qkv(q, k, k.detach(), positions, BASE, *weights, eps=EPS)[:2]

    def theirs(q, k, *weights):
        if weights:
            q, k = (F.rms_norm(x, (D,), w.to(x.dtype), EPS) for x, w in zip((q, k), weights, strict=True))
        return turn(q, cosines, sines), turn(k, cosines, sines)

    inputs = [t.requires_grad_() for t in (q, k, *weights)]
    name = f"{N} tokens, {H} + {Hkv} heads of {D}, {dtype}" + ", QK-norm" * normed
    return trained(name, (5 if normed else 4) * (q.nbytes + k.nbytes), {"nanorlhf": ours, "torch": theirs}, inputs, (dq, dk))


@pytest.mark.parametrize("contender", ["nanorlhf", "torch", "torch compiled", "copy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope(benchmark, shape, dtype, contender):
    benchmark(case(shape, dtype)[2][contender])


if __name__ == "__main__":
    report((case(shape, dtype) for shape in SHAPES for dtype in DTYPES), "GB/s", repeats=15)
