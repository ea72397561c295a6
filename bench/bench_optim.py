"""An optimiser's step on a model of 5 million parameters, with the clip of the gradient's norm: AdamW against torch's fused one, and
Muon, which torch.optim.Muon does in bf16 as ours does here."""

import pytest
import torch
from torch import nn

from nanorlhf.ops import optim
from nanorlhf.optim import AdamW, Muon
from timing import report

SHAPES = {"muon": [(192, 192)] * 40 + [(512, 192)] * 20 + [(192, 512)] * 10}
SHAPES["adamw"] = [(4096, 192), *SHAPES["muon"], *[(192,)] * 21]
CLIP = 1.0


def parameters(kind):
    """Parameters with gradients, the same each time."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES[kind]]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def ours(kind):
    params = parameters(kind)
    part = AdamW(params, lr=1e-3) if kind == "adamw" else Muon(params, 1e-3, weight_decay=0.01, dtype=torch.bfloat16)

    def run():
        norm = optim.gradient_norm([p.grad for p in params])
        part.step(scale=min(1.0, CLIP / (norm + 1e-6)))

    return params, run


def torchs(kind, **choice):
    params = parameters(kind)
    part = torch.optim.AdamW(params, lr=1e-3, **choice) if kind == "adamw" else torch.optim.Muon(params, 1e-3, weight_decay=0.01)

    def run():
        nn.utils.clip_grad_norm_(params, CLIP)
        part.step()

    return params, run


CONTENDERS = {
    "adamw": {"nanorlhf": (ours, {}), "torch fused": (torchs, {"fused": True}), "torch foreach": (torchs, {"foreach": True})},
    "muon": {"nanorlhf": (ours, {}), "torch.optim.Muon": (torchs, {})},
}


def case(kind):
    """(shape, millions of parameters, contenders), after one step of each agreed."""
    steps, first = {}, None
    for name, (make, choice) in CONTENDERS[kind].items():
        params, steps[name] = make(kind, **choice)
        steps[name]()
        first = first or params
        for a, b in zip(first, params, strict=True):  # Muon's two orders of rounding to bf16 differ by a few percent of a step
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5 if kind == "muon" else 1e-6)
    size = sum(p.numel() for p in first) / 1e6
    return f"{kind}, {size:.2f} M in {len(first)}", size, steps


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in CONTENDERS for name in CONTENDERS[kind]])
def test_optim(benchmark, kind, name):
    benchmark(case(kind)[2][name])


if __name__ == "__main__":
    report([case(kind) for kind in CONTENDERS], "M parameters/s")
