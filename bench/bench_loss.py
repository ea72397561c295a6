"""The loss head against linear + cross_entropy, which keeps (N, V) logits and gives no entropy, in fp32 and bf16.

torch runs twice: in this process, where importing nanorlhf lets malloc keep freed memory, and in one of its own, as it is
installed, where the logits come fresh from the system each time. --memory gives the peak of resident memory of one forward and
backward pass above what was there before it, gradients included, each in a process of its own.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from nanorlhf.ops import token_logprobs
from timing import AsInstalled, report

SHAPES = [(4096, 256, 4096), (4096, 256, 32768)]  # (N, C, V)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def case(shape, dtype):
    N, C, V = shape
    hidden = torch.randn(N, C).to(DTYPES[dtype]).requires_grad_()
    weight = (C**-0.5 * torch.randn(V, C)).to(DTYPES[dtype]).requires_grad_()
    targets = torch.randint(0, V, (N,))
    losses = {
        "nanorlhf": lambda: -token_logprobs(hidden, weight, targets)[0].mean(),
        "torch cross_entropy": lambda: F.cross_entropy(F.linear(hidden, weight), targets),
    }
    gradients = [torch.autograd.grad(f(), (hidden, weight)) for f in losses.values()]
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).float().abs().max() / b.float().abs().max()) < (0.05 if dtype == "bf16" else 1e-3)
    installed = f"""
import torch.nn.functional as F
hidden, weight = (x.to({DTYPES[dtype]}).requires_grad_() for x in (torch.randn({N}, {C}), {C}**-0.5 * torch.randn({V}, {C})))
targets = torch.randint(0, {V}, ({N},))
run = lambda: torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), targets), (hidden, weight))
"""
    both = {name: (lambda f=f: torch.autograd.grad(f(), (hidden, weight))) for name, f in losses.items()}
    both["torch as installed"] = AsInstalled(installed)
    return f"N{N} C{C} V{V} {dtype}", 6 * N * C * V / 1e9, both  # the recomputed logits are not counted as work


MEMORY = """
import sys
import torch, torch.nn.functional as F
from nanorlhf.ops import token_logprobs
from nanorlhf.run import peak_memory
ours, N, C, V = sys.argv[1] == "nanorlhf", *map(int, sys.argv[2:])
hidden, weight, targets = torch.randn(N, C).bfloat16().requires_grad_(), torch.randn(V, C).bfloat16().requires_grad_(), torch.randint(0, V, (N,))
loss = lambda h, t: -token_logprobs(h, weight, t)[0].mean() if ours else F.cross_entropy(F.linear(h, weight), t)
torch.autograd.grad(loss(hidden[:64], targets[:64]), (hidden, weight))
before = peak_memory(restart=True)
torch.autograd.grad(loss(hidden, targets), (hidden, weight))
print(peak_memory() - before)
"""


def memory():
    for shape in SHAPES:
        for name in ("nanorlhf", "torch"):
            found = float(subprocess.check_output([sys.executable, "-c", MEMORY, name, *map(str, shape)]))
            print(f"{str(shape):24} {name:12} {found:8.0f} MiB; logits in fp32 {shape[0] * shape[2] / 2**18:.0f} MiB", flush=True)


@pytest.mark.parametrize("contender", ["nanorlhf", "torch cross_entropy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss(benchmark, shape, dtype, contender):
    benchmark(case(shape, dtype)[2][contender])


if __name__ == "__main__":
    if "--memory" in sys.argv:
        memory()
        sys.exit()
    report([case(shape, dtype) for shape in SHAPES for dtype in DTYPES])
