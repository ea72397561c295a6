"""What it costs that a token's log-prob is the same bits whatever its batch (ops.backend.deterministic): products alone against
torch's, then, for the main run's model, a training forward, a forward and backward, and generation, on and off.

    python bench/bench_matmul.py [--model] [--json FILE]
"""

import sys

import pytest
import torch
import torch.nn.functional as F

from nanorlhf.config import ModelConfig
from nanorlhf.engine import generate
from nanorlhf.model import Model
from nanorlhf.ops import backend, matmul
from timing import report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(4096, 192, 576), (4096, 512, 192), (4096, 1600, 1600), (128, 192, 1024), (8, 512, 192), (1, 192, 4096)]  # N, C, R
B, T = 16, 256


def case(N, C, R, dtype):
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=g).to(DTYPES[dtype]) for shape in ((N, C), (R, C)))
    torch.testing.assert_close(matmul(x, weight).float(), F.linear(x.float(), weight.float()), rtol=0.01, atol=0.01 * C**0.5)
    repeats = max(1, 10**7 // (N * C * R))
    contenders = {"nanorlhf": lambda: matmul(x, weight), "torch": lambda: F.linear(x, weight)}
    many = {name: lambda run=run: [run() for _ in range(repeats)] for name, run in contenders.items()}
    return f"{repeats} x ({N}, {C}) · ({R}, {C}) {dtype}", 2e-9 * repeats * N * C * R, many


def switched(run):
    """The same with the switch off and on."""

    def with_switch(on):
        before = backend.deterministic(on)
        try:
            return run()
        finally:
            backend.deterministic(before)

    return {"off": lambda: with_switch(False), "on": lambda: with_switch(True)}


def model_cases(dtype):
    model = Model(ModelConfig(), dtype=DTYPES[dtype])
    tokens = torch.randint(0, model.config.vocab_size, (B * T,), generator=torch.Generator().manual_seed(1))
    cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    forward = torch.no_grad()(lambda: model.logprobs(tokens, cu_seqlens)[0])
    yield f"forward, {B} x {T} {dtype}", B * T, switched(forward)
    yield f"forward and backward {dtype}", B * T, switched(lambda: model.logprobs(tokens, cu_seqlens)[0].mean().backward())
    for sequences in (1, 64):
        prompts = [[i + 1] * 100 for i in range(sequences)]
        yield f"generate {sequences} x 24 after 100 {dtype}", 24 * sequences, switched(lambda prompts=prompts: generate(model, prompts, 24))


@pytest.mark.parametrize("contender", ["nanorlhf", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matmul(benchmark, shape, dtype, contender):
    benchmark(case(*shape, dtype)[2][contender])


if __name__ == "__main__":
    if "--model" in sys.argv:
        report([c for dtype in DTYPES for c in model_cases(dtype)], "token/s", warmups=1, repeats=7)
    else:
        report([case(*shape, dtype) for shape in SHAPES for dtype in DTYPES])
