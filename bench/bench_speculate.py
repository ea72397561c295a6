"""Speculative decoding against the engine's plain decoding of the same target, one text at a time.

The target is bench_engine.py's 5-million-parameter model, trained here for ``--steps`` steps on the bytes of Python's own library (or a
model of bytes saved before: ``--target FOLDER``). The drafts: ``layers``, the target's own first layers, its norm and its output matrix, as they
are; ``distilled``, the same after ``--distil`` steps that bring its distribution to the target's on the same bytes; ``self``, the target,
whose guesses are right but for rounding: the most that speculation can accept, at a draft that costs as much as the target.

    python bench/bench_speculate.py [--drafts layers,distilled,self] [--ahead 1,2,4,8] [--modes greedy,sampled] [--dtype fp32]
                                    [--draft-layers 2] [--steps 400] [--distil 200] [--prompts 2] [--new 96] [--repeats 5]
                                    [--target FOLDER] [--json FILE]

Prompts are of files that training did not see. Greedy, and at temperature 1 from the whole softmax. A pass is one of the target.
"Times as fast" is the median over the turns of the ratio within a turn to the engine's time; below 1, speculation does not pay. The
draft's own speed in the engine is there to compare with. Greedy texts of a model so little trained repeat themselves, which any draft
guesses: the sampled acceptance says more. Where greedy texts differ by a tie in the last bit, it is said.
"""

import argparse
import json
import statistics
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench_engine import CONFIG, DTYPES, chosen
from nanorlhf import ops
from nanorlhf.checkpoint import load_model
from nanorlhf.engine import SamplingConfig, generate
from nanorlhf.engine.speculate import speculate
from nanorlhf.model import Model, compute_dtype
from timing import in_turns, machine, middle_and_spread

DRAFTS, MODES, AHEAD = ("layers", "distilled", "self"), ("greedy", "sampled"), (1, 2, 4, 8)
BATCH, LENGTH, PROMPT = 8, 128, 64  # sequences of a training step, their tokens, tokens of a prompt
SAMPLING = {"greedy": SamplingConfig(temperature=0), "sampled": SamplingConfig()}


def library():
    """(bytes to train on, bytes held out) of Python's own modules, int64."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [b"".join(f.read_bytes() for f in some) for some in (files[: -len(files) // 8], files[-len(files) // 8 :])]
    return [torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts]


def fit(model, text, steps, teacher=None, lr=2e-3):
    """Train on random pieces of the text: to the next byte or, with a teacher, to its distribution of that. Returns the last loss. Products
    are in the type that is fastest here, whatever the model decodes in."""
    decodes_in = model.compute_dtype
    model.compute_dtype = compute_dtype("auto", model.device)
    optimiser, draw, loss = torch.optim.AdamW(model.parameters(), lr), torch.Generator().manual_seed(0), torch.zeros(())
    bounds = torch.arange(BATCH + 1, dtype=torch.int32) * LENGTH
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10) * (1 - step / steps)
        pieces = text.unfold(0, LENGTH + 1, 1)[torch.randint(len(text) - LENGTH, (BATCH,), generator=draw)]
        tokens = pieces[:, :-1].flatten()
        hidden = model(tokens, bounds)
        if teacher is None:
            loss = ops.cross_entropy(hidden, model.head_weight, pieces[:, 1:].flatten())
        else:
            with torch.no_grad():
                wanted = logprobs(teacher, teacher(tokens, bounds)).exp()
            loss = -(wanted * logprobs(model, hidden)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.compute_dtype = decodes_in
    return float(loss.detach())


def logprobs(model, hidden):
    return (hidden.float() @ model.head_weight.T).log_softmax(-1)


def first_layers(target, count):
    """A model of the target's first layers, with copies of their weights."""
    draft = Model(replace(target.config, layers=count), dtype=target.compute_dtype)
    weights = target.state_dict()
    draft.load_state_dict({name: weights[name] for name in draft.state_dict()})
    return draft


def models(given, dtype):
    """(target, {name: draft}, prompts, what is known of the training)."""
    text, held_out = library()
    target = load_model(given.target, DTYPES[dtype]) if given.target else Model(CONFIG, dtype=getattr(torch, DTYPES[dtype]))
    known = {} if given.target else {"target_loss": fit(target, text, given.steps)}
    drafts = {name: target if name == "self" else first_layers(target, given.draft_layers) for name in given.drafts}
    if "distilled" in drafts:
        known["distilled_loss"] = fit(drafts["distilled"], text, given.distil, teacher=target)
    starts = torch.linspace(0, len(held_out) - PROMPT, given.prompts).long().tolist()
    return target, drafts, [held_out[i : i + PROMPT].tolist() for i in starts], known


def plain(model, prompts, new, mode):
    return [generate(model, [p], new, sampling=SAMPLING[mode])[0].ids for p in prompts]


def speculated(target, draft, prompts, new, mode, ahead):
    return [speculate(target, draft, [p], new, sampling=SAMPLING[mode], ahead=ahead) for p in prompts]


def counted(found, ids, mode):
    """What does not depend on the clock: tokens a pass, acceptance and, where greedy, the share of texts that are the engine's."""
    tokens, proposed = sum(len(s.completions[0].ids) for s in found), sum(s.proposed for s in found)
    same = statistics.mean(s.completions[0].ids == i for s, i in zip(found, ids)) if mode == "greedy" else None
    return {"tokens_a_pass": tokens / sum(s.passes for s in found), "acceptance": sum(s.accepted for s in found) / max(proposed, 1), "same_texts": same}


def compare(given, dtype, mode, target, drafts, prompts):
    """A row for each contender, asked in turns."""
    ids, rows = plain(target, prompts, given.new, mode), []
    contenders = {("engine", 0): lambda: plain(target, prompts, given.new, mode)}
    for name, draft in drafts.items():
        if name != "self":
            contenders[f"engine, {name} alone", 0] = lambda draft=draft: plain(draft, prompts, given.new, mode)
        for ahead in given.ahead:
            contenders[name, ahead] = lambda draft=draft, ahead=ahead: speculated(target, draft, prompts, given.new, mode, ahead)
    took = in_turns(contenders, given.repeats, warmups=1)
    for (name, ahead), ms in took.items():
        middle, spread = middle_and_spread(ms)
        times, times_spread = middle_and_spread([theirs / mine for theirs, mine in zip(took["engine", 0], ms)])
        row = {"dtype": dtype, "mode": mode, "draft": name, "ahead": ahead, "ms": middle, "spread_ms": spread, "samples_ms": ms,
               "tokens/s": 1e3 * sum(map(len, ids)) / middle, "times_as_fast": times, "spread": times_spread}
        said = f"{dtype} {mode:8} {name:24} ahead {ahead}  {row['tokens/s']:8.0f} tokens/s  {times:5.2f} ± {times_spread:4.2f} times as fast"
        if ahead:
            row |= counted(contenders[name, ahead](), ids, mode)
            same = "" if row["same_texts"] is None else f", {row['same_texts']:.0%} of texts the same"
            said += f", {'pays' if times > 1 else 'does not pay'}: {row['tokens_a_pass']:.2f} tokens a pass, {row['acceptance']:.0%} accepted{same}"
        rows.append(row)
        print(said, flush=True)
    return rows


def parser():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--drafts", type=chosen(DRAFTS), default=list(DRAFTS))
    parse.add_argument("--ahead", type=lambda text: [int(k) for k in text.split(",")], default=list(AHEAD))
    parse.add_argument("--modes", type=chosen(MODES), default=list(MODES))
    parse.add_argument("--dtype", type=chosen(DTYPES), default=["fp32"])
    for name, value in (("--draft-layers", 2), ("--steps", 400), ("--distil", 200), ("--prompts", 2), ("--new", 96), ("--repeats", 5)):
        parse.add_argument(name, type=int, default=value)
    parse.add_argument("--target", type=Path, metavar="FOLDER")
    parse.add_argument("--json", metavar="FILE")
    return parse


def every_case(given):
    found = {"machine": machine(), "training": [], "rows": []}
    print(json.dumps(found["machine"]))
    for dtype in given.dtype:
        target, drafts, prompts, known = models(given, dtype)
        found["training"].append({"dtype": dtype, **known})
        print(json.dumps(found["training"][-1]), flush=True)
        for mode in given.modes:
            found["rows"] += compare(given, dtype, mode, target, drafts, prompts)
    return found


@pytest.mark.parametrize("contender", ["engine", *DRAFTS])
@pytest.mark.parametrize("mode", MODES)
def test_speculate(benchmark, mode, contender):
    given = parser().parse_args(["--steps", "20", "--distil", "20", "--prompts", "1"])
    target, drafts, prompts, _ = models(given, "fp32")
    run = plain if contender == "engine" else lambda *args: speculated(target, drafts[contender], *args[1:], 4)
    benchmark.pedantic(run, (target, prompts, given.new, mode), rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    given = parser().parse_args()
    found = every_case(given)
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
