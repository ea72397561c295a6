"""nanoGPT's CPU benchmark: wall time to a validation loss of 1.88 nats per character on the characters of tiny Shakespeare.

    python bench/bench_nanogpt.py --data FILE [--seeds 3] [--peers eager compiled] [--json FILE]

The peer is nanoGPT's own CPU configuration, restated below in plain torch: ``eager`` as it is run there, ``compiled`` with
torch.compile and fused AdamW on top. Ours is any GPT, tokenizer and optimiser of the package, on the same split: the first 90 % of
the characters train, tokenizer included, the rest validates. Both sides train for a fixed number of steps and are clocked over all of
them. Our loss after the last has to be at most the target with every seed; the peer's 2000 steps count as they are, though with some
seeds they end a little above it.

Clocked: all that depends on the data, from the text to the last step (vocabulary or tokenizer, encoding, training; on our side the
new model too). Not clocked, on either side: one forward and backward pass that compiles and warms up, and the evaluation. It is one
for both: the whole validation split in windows of the model's context laid end to end, as nanoGPT's own windows are; the first
starts from the last token of the train split, so that every character is predicted once; total nats over characters. With a BPE the
nats are those of the text's one encoding, which can only overstate them.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import statistics
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanorlhf.config import ModelConfig, OptimConfig
from nanorlhf.model import Model
from nanorlhf.optim import Optimizer
from nanorlhf.tokenizer import Tokenizer
from timing import machine

TARGET = 1.88  # nats per character
SHA256, VARIABLE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", "NANORLHF_SHAKESPEARE"

# Ours, found by experiment. It is no narrow optimum: 1 layer takes a quarter less time and 128 channels a quarter more, a vocabulary of
# 1024 or 3072 about as long; the high decay counts most, then the high rate of embedding and output, each with its own matrix.
STEPS, ROWS, T = 42, 32, 32  # T tokens are about 100 characters, the peer's context 64
CONFIG = ModelConfig(
    vocab_size=2048, hidden_size=96, layers=2, heads=3, kv_heads=3, head_size=32, intermediate_size=384, context=T + 1, tied=False
)
OPTIM = OptimConfig(lr=0.08, muon_lr=0.08, momentum=0.75, weight_decay=1.5, warmup=0.03, decay=1.0, final=0.1)
DTYPE = torch.bfloat16

# nanoGPT's, as its README gives them for a CPU; the rest are its defaults.
PEER_STEPS, PEER_ROWS, PEER_T, PEER_C, PEER_LAYERS, PEER_HEADS = 2000, 12, 64, 128, 4, 4
PEER_LR, PEER_MIN_LR, PEER_WARMUP, PEER_BETAS, PEER_DECAY, PEER_CLIP = 1e-3, 1e-4, 100, (0.9, 0.99), 0.1, 1.0


class PlainNorm(nn.Module):
    """LayerNorm without a bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(PEER_C))

    def forward(self, x):
        return F.layer_norm(x, (PEER_C,), self.weight)


class PlainBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.first_norm, self.second_norm = PlainNorm(), PlainNorm()
        self.qkv, self.out = nn.Linear(PEER_C, 3 * PEER_C, bias=False), nn.Linear(PEER_C, PEER_C, bias=False)
        self.up, self.down = nn.Linear(PEER_C, 4 * PEER_C, bias=False), nn.Linear(4 * PEER_C, PEER_C, bias=False)

    def forward(self, x):
        q, k, v = (y.unflatten(2, (PEER_HEADS, -1)).transpose(1, 2) for y in self.qkv(self.first_norm(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second_norm(x))))


class PlainGPT(nn.Module):
    def __init__(self, characters, seed):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, PEER_C), nn.Embedding(PEER_T, PEER_C)
        self.blocks, self.norm = nn.ModuleList(PlainBlock() for _ in range(PEER_LAYERS)), PlainNorm()
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = math.sqrt(2 * PEER_LAYERS) if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(p, 0, 0.02 / residual, generator)

    def forward(self, rows):
        """rows (B, up to PEER_T + 1) → mean loss of all tokens but the first of each row."""
        x = self.tokens(rows[:, :-1]) + self.positions.weight[: rows.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(F.linear(self.norm(x), self.tokens.weight).flatten(0, 1), rows[:, 1:].flatten())


def peer_rate(step):
    """Linear warm-up, then half a cosine to the smallest rate."""
    if step < PEER_WARMUP:
        return PEER_LR * (step + 1) / (PEER_WARMUP + 1)
    share = (step - PEER_WARMUP) / (PEER_STEPS - PEER_WARMUP)
    return PEER_MIN_LR + 0.5 * (1 + math.cos(math.pi * share)) * (PEER_LR - PEER_MIN_LR)


def peer_trainer(model, forward, fused):
    """step(number, rows): one update."""
    groups = [{"params": [p for p in model.parameters() if (p.ndim >= 2) == decayed], "weight_decay": PEER_DECAY * decayed}
              for decayed in (True, False)]
    optimizer = torch.optim.AdamW(groups, PEER_LR, PEER_BETAS, fused=fused)

    def update(step, rows):
        for group in optimizer.param_groups:
            group["lr"] = peer_rate(step)
        forward(rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), PEER_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def encode_characters(text):
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text])


def run_peer(train, valid, seed, compiled):
    """(seconds, loss) of 2000 steps of nanoGPT."""
    characters, generator = len(set(train + valid)), torch.Generator().manual_seed(seed)
    model = PlainGPT(characters, seed)
    forward = torch.compile(model) if compiled else model
    forward(torch.randint(characters, (PEER_ROWS, PEER_T + 1))).backward()
    model.zero_grad(set_to_none=True)

    start = time.perf_counter()
    tokens = encode_characters(train + valid)
    update, last = peer_trainer(model, forward, fused=compiled), len(train) - PEER_T
    for step in range(PEER_STEPS):
        update(step, torch.stack([tokens[i : i + PEER_T + 1] for i in torch.randint(last, (PEER_ROWS,), generator=generator)]))
    seconds = time.perf_counter() - start

    return seconds, validation_loss(lambda rows: model(rows) * rows[:, 1:].numel(), tokens[len(train) - 1 :], PEER_T, len(valid))


def nats(model, rows):
    """rows (B, up to T + 1) → summed loss of all tokens but the first of each row."""
    cu_seqlens = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=torch.int32)
    return -model.logprobs(rows.flatten(), cu_seqlens)[0].sum()


def our_trainer(model):
    optimizer = Optimizer(model, OPTIM, STEPS)

    def update(step, rows):
        (nats(model, rows) / rows[:, 1:].numel()).backward()
        optimizer.step(step)

    return update


def batches(tokens, seed):
    """STEPS batches (ROWS, T + 1), in random order, of windows that start at even distances: a part of the text, but of all of it."""
    starts = torch.arange(STEPS * ROWS) * (len(tokens) - T - 1) // (STEPS * ROWS)
    order = torch.randperm(STEPS * ROWS, generator=torch.Generator().manual_seed(seed))
    return tokens.unfold(0, T + 1, 1)[starts[order]].split(ROWS)


def run_ours(train, valid, seed):
    """(seconds, loss) of our configuration."""
    nats(Model(CONFIG, dtype=DTYPE), torch.randint(CONFIG.vocab_size, (ROWS, T + 1))).backward()

    start = time.perf_counter()
    tokenizer = Tokenizer.train([train], CONFIG.vocab_size)
    tokens = torch.from_numpy(tokenizer.encode_batch([train])[0]).long()
    model = Model(CONFIG, dtype=DTYPE, seed=seed)
    update = our_trainer(model)
    for step, rows in enumerate(batches(tokens, seed)):
        update(step, rows)
    seconds = time.perf_counter() - start

    held_out = torch.from_numpy(tokenizer.encode_batch([valid])[0]).long()
    assert tokenizer.decode(held_out.tolist()) == valid
    return seconds, validation_loss(functools.partial(nats, model), torch.cat((tokens[-1:], held_out)), T, len(valid))


@torch.no_grad()
def validation_loss(nats, tokens, context, characters):
    """nats(rows) → total of a batch; tokens (N,): one of the train split, then the validation split. Nats per character."""
    whole = (len(tokens) - 1) // context * context
    batches = [*tokens.unfold(0, context + 1, context).split(64), tokens[whole:][None]]
    return sum(float(nats(rows)) for rows in batches if rows.shape[1] > 1) / characters


def shakespeare(path):
    """The two parts of the text. Raises SystemExit with one sentence unless it is the file."""
    wanted = f"expected tiny Shakespeare, 1,115,394 bytes of sha256 {SHA256}, from --data FILE or ${VARIABLE}"
    if not path or not os.path.isfile(path):
        sys.exit(f"bench_nanogpt: {wanted}, got {path or 'neither'}")
    with open(path, "rb") as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"bench_nanogpt: {wanted}, got sha256 {hashlib.sha256(data).hexdigest()} in {path}")
    text = data.decode("ascii")
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


PEERS = {"eager": False, "compiled": True}


def compare(train, valid, seeds, peers):
    """Every side in turn with every seed: {"rows": [...], "ratio": of the median times, our side over the faster peer's}."""
    runs = {f"nanoGPT {name}": functools.partial(run_peer, compiled=PEERS[name]) for name in peers} | {"nanorlhf": run_ours}
    rows = []
    for seed in range(seeds):
        for name, run in runs.items():
            seconds, loss = run(train, valid, seed)
            rows.append({"name": name, "seed": seed, "seconds": seconds, "loss": loss, "reached": loss <= TARGET})
            print(f"{name:18} seed {seed}  {seconds:7.2f} s  {loss:.4f} nats per character", flush=True)
    median = {name: statistics.median(row["seconds"] for row in rows if row["name"] == name) for name in runs}
    best = min((name for name in runs if name != "nanorlhf"), key=median.get)
    ratio = median[best] / median["nanorlhf"]
    print(f"median {median['nanorlhf']:.2f} s against {median[best]:.2f} s of {best}: {ratio:.1f} times faster")
    return {"machine": machine(), "rows": rows, "median_s": median, "times_faster": ratio}


def step_of(name):
    """One step of a side on random tokens, for pytest."""
    if name == "nanorlhf":
        return functools.partial(our_trainer(Model(CONFIG, dtype=DTYPE)), 0, torch.randint(CONFIG.vocab_size, (ROWS, T + 1)))
    model = PlainGPT(65, 0)
    return functools.partial(peer_trainer(model, model, fused=False), 0, torch.randint(65, (PEER_ROWS, PEER_T + 1)))


@pytest.mark.parametrize("name", ["nanorlhf", "nanoGPT eager"])
def test_nanogpt_step(benchmark, name):
    benchmark(step_of(name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FILE", default=os.environ.get(VARIABLE))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    print(json.dumps(machine()))
    found = compare(*shakespeare(given.data), given.seeds, given.peers)
    if given.json:
        with open(given.json, "w") as file:
            json.dump(found, file, indent=1)
    missed = [row for row in found["rows"] if row["name"] == "nanorlhf" and not row["reached"]]
    if missed:
        sys.exit(f"bench_nanogpt: {len(missed)} of {given.seeds} seeds of ours ended above {TARGET}")
