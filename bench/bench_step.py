"""One whole training step of a 5-million-parameter model, forward to optimiser, against the same model in plain torch.

A step is the forward pass, the loss, the backward pass, the clip of the gradient's norm and the update, on 16 rows of 256 tokens.
Both sides follow one recipe, in either of two forms: ``muon`` (the package's own: Muon for the matrices of the blocks, AdamW for
the rest) or ``adamw`` (AdamW for all). torch's side has its own ``torch.optim.Muon`` and fused AdamW. All start from the same
weights, and their losses of the first steps are compared before anything is timed.

    python bench/bench_step.py [--optimizer muon|adamw] [--memory] [--profile] [--json FILE]

--memory gives the peak of resident memory over a step instead, above what is resident before the first, each in a process of its
own; --profile, where the time of our step goes.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanorlhf.config import ModelConfig, OptimConfig
from nanorlhf.model import Model
from nanorlhf.optim import Optimizer, is_hidden_matrix
from timing import machine, report

CONFIG = ModelConfig(layers=10)  # the main run's model, deep enough for 5 million parameters
ROWS, T, COMPARED = 16, 256, 3
RECIPES = {"muon": OptimConfig(warmup=0.0, decay=1e-9), "adamw": OptimConfig(warmup=0.0, decay=1e-9, muon_lr=0.0)}
CONTENDERS = {  # name: (ours, compute type, compiled)
    "nanorlhf bf16": (True, torch.bfloat16, False),
    "nanorlhf fp32": (True, torch.float32, False),
    "torch eager fp32": (False, torch.float32, False),
    "torch eager bf16": (False, torch.bfloat16, False),
    "torch compiled fp32": (False, torch.float32, True),
    "torch compiled bf16": (False, torch.bfloat16, True),
}


class PlainNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)  # torch's kernel takes one dtype


class PlainAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(c.hidden_size, c.hidden_size, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = (PlainNorm(c.head_size, eps=c.norm_eps) for _ in range(2))
        self.heads = c.heads

    def forward(self, x, cosines, sines):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (turn(norm(y), cosines, sines).transpose(1, 2) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v.transpose(1, 2), is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def turn(x, cosines, sines):
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), -1)


class PlainMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(c.hidden_size, c.intermediate_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = PlainAttention(c), PlainMLP(c)
        self.input_layernorm, self.post_attention_layernorm = (PlainNorm(c.hidden_size, eps=c.norm_eps) for _ in range(2))

    def forward(self, x, cosines, sines):
        x = x + self.self_attn(self.input_layernorm(x), cosines, sines)
        return x + self.mlp(self.post_attention_layernorm(x))


class Plain(nn.Module):
    """nanorlhf.model.Model of one shape without anything of nanorlhf; its parameters have the same names."""

    def __init__(self, c):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(PlainBlock(c) for _ in range(c.layers))
        self.model.norm = PlainNorm(c.hidden_size, eps=c.norm_eps)
        angles = torch.arange(T)[:, None] * c.rope_base ** (-torch.arange(0, c.head_size, 2) / c.head_size)
        self.register_buffer("cosines", angles.cos()[:, None], persistent=False)
        self.register_buffer("sines", angles.sin()[:, None], persistent=False)

    def forward(self, tokens):
        """tokens (B, T) → mean loss of all tokens but the first of each row."""
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, self.cosines, self.sines)
        logits = F.linear(self.model.norm(x[:, :-1]), self.model.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class PlainOptimizer:
    """The recipe of nanorlhf.optim.Optimizer with torch's own optimisers."""

    def __init__(self, model, config):
        self.params, self.clip = list(model.parameters()), config.clip
        hidden = [p for n, p in model.named_parameters() if config.muon_lr > 0 and is_hidden_matrix(n, p)]
        taken = {id(p) for p in hidden}
        rest = [p for p in self.params if id(p) not in taken]
        groups = [{"params": [p for p in rest if p.ndim >= 2]}, {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
        self.parts = [torch.optim.AdamW(groups, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)]
        if hidden:
            self.parts.append(torch.optim.Muon(hidden, config.muon_lr, config.weight_decay, config.momentum))

    def step(self):
        nn.utils.clip_grad_norm_(self.params, self.clip)
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)


def batch():
    """Tokens with a Zipf-like spread of frequencies, so that there is something to learn in a few steps."""
    generator = torch.Generator().manual_seed(1)
    return (CONFIG.vocab_size ** torch.rand(ROWS, T, generator=generator)).long() - 1


def our_step(dtype, recipe):
    model, tokens = Model(CONFIG, dtype=dtype), batch().flatten()
    cu_seqlens = torch.arange(0, ROWS * T + 1, T, dtype=torch.int32)
    optimizer = Optimizer(model, RECIPES[recipe], 10**9)

    def run():
        loss = -model.logprobs(tokens, cu_seqlens)[0].mean()
        loss.backward()
        optimizer.step(0)
        return loss.detach()

    return run


def plain_step(dtype, compiled, recipe):
    model, tokens = Plain(CONFIG), batch()
    model.load_state_dict(Model(CONFIG).state_dict())
    optimizer, forward = PlainOptimizer(model, RECIPES[recipe]), torch.compile(model) if compiled else model

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = forward(tokens)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def contender(name, recipe):
    ours, dtype, compiled = CONTENDERS[name]
    return our_step(dtype, recipe) if ours else plain_step(dtype, compiled, recipe)


def case(recipe, names=tuple(CONTENDERS)):
    """(shape, GFLOP, contenders), after the losses of their first steps agreed."""
    steps = {name: contender(name, recipe) for name in names}
    reference = steps.get("torch eager fp32") or contender("torch eager fp32", recipe)
    exact = [float(reference()) for _ in range(COMPARED)]
    for name, run in steps.items():
        losses = exact if run is reference else [float(run()) for _ in range(COMPARED)]
        torch.testing.assert_close(losses, exact, rtol=0, atol=0.01, msg=lambda m, name=name: f"{name}: {m}")
    return f"{parameters() / 1e6:.2f} M, {ROWS} x {T}, {recipe}", gigaflops(), steps


def parameters():
    return sum(p.numel() for p in Model(CONFIG).parameters())


def gigaflops():
    """Of the model's products alone: 6 a parameter and token (the embedding once, as the output) and causal attention, whose
    backward is 2.5 forwards. The optimiser's are not counted."""
    attention = 3.5 * CONFIG.layers * 2 * CONFIG.hidden_size * T * (T + 1) * ROWS
    return (6 * parameters() * ROWS * T + attention) / 1e9


def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def memory_of(name, recipe):
    run = contender(name, recipe)
    before = resident("VmRSS")
    for _ in range(3):
        run()
    return resident("VmHWM") - before


def memory(recipe):
    """Peak of resident memory over the first three steps above what was there before them, in MiB; gradients and the optimiser's
    state are in it, and with compiled contenders the compiler."""
    rows = []
    for name in CONTENDERS:
        command = [sys.executable, __file__, "--optimizer", recipe, "--memory-of", name]
        rows.append({"name": name, "optimizer": recipe, "MiB": float(subprocess.check_output(command))})
        print(f"{name:24} {rows[-1]['MiB']:8.0f} MiB", flush=True)
    return {"machine": machine(), "config": asdict(CONFIG), "rows": rows}


def profile(recipe, steps=10):
    run = contender("nanorlhf bf16", recipe)
    for _ in range(3):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            run()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)
    for row in rows[:40]:
        print(f"{row.self_cpu_time_total / steps / 1e3:9.2f} ms {row.count / steps:7.0f} calls  {row.key}")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["nanorlhf bf16", "nanorlhf fp32", "torch eager fp32", "torch eager bf16"])
def test_step(benchmark, name, recipe):
    benchmark(case(recipe, [name])[2][name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=list(RECIPES), default="muon")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-of", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    if given.memory_of:
        print(memory_of(given.memory_of, given.optimizer))
    elif given.memory:
        found = memory(given.optimizer)
        if given.json:
            with open(given.json, "w") as file:
                json.dump(found, file, indent=1)
    elif given.profile:
        profile(given.optimizer)
    else:
        report([case(given.optimizer)], warmups=1, repeats=7)
