"""One step of RLOO against TRL's RLOOTrainer: the same 5-million-parameter model, prompts, reward and optimiser steps.

A step is 64 prompts of 16 to 64 tokens, 4 samples of 64 new tokens for each at temperature 1, the reward (a line of Python: the share of
even tokens), the log-probs of the policy and of the reference, the KL off the reward, and ``--updates`` steps of AdamW with the
gradient's norm clipped. Ours is nanorlhf.train.rloo as the recipe runs it, with all that its row of metrics says.

    python bench/bench_rl_step.py [--dtype fp32,bf16] [--updates 4] [--steps 5] [--trl-python PYTHON] [--json FILE]
    python bench/bench_rl_step.py --profile --dtype bf16

TRL is of the extra ``conformance``; --trl-python names the interpreter of an environment that has it. Each side is a process of its
own, TRL's without nanorlhf, and they are asked for one step in turns, after one that warms up. The dtype is that of the products: the
weights are fp32 on both sides (TRL's bf16 is autocast). Memory is the process's peak (VmHWM) over all steps above what was
resident when the model was loaded: the reference's and the optimiser's are in it. On a busy machine: ``--threads 1 --clock cpu``.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from bench_engine import CONFIG, DTYPES, chosen
from child import CLOCKS, Child, Pace, resident
from nanorlhf.checkpoint import StageState, load_model, save_model
from nanorlhf.config import GroupConfig, OptimConfig
from nanorlhf.model import Model
from nanorlhf.train.rloo import rloo
from nanorlhf.train.rollout import Judge
from rl_task import reward
from timing import in_turns, machine, middle_and_spread

HERE = Path(__file__).parent
PROMPTS, SAMPLES, NEW, SHORTEST, LONGEST, MICRO = 64, 4, 64, 16, 64, 64
OPTIM = OptimConfig(lr=1e-5, muon_lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, warmup=0.0, decay=1e-9, clip=1.0)  # AdamW alone, as TRL has it
BETA, CLIP = 0.05, 0.2
BAR, AIM, MEMORY_BAR = 8, 12, 2  # times faster: demanded, aimed at; times less memory


def settings(dtype, given):
    """What both sides are told, as JSON holds it."""
    draw = random.Random(0)
    texts = [[draw.randrange(1, CONFIG.vocab_size) for _ in range(draw.randint(SHORTEST, LONGEST))] for _ in range(8 * PROMPTS)]
    return {"texts": texts, "dtype": DTYPES[dtype], "updates": given.updates, "threads": torch.get_num_threads(), "prompts": PROMPTS,
            "samples": SAMPLES, "new": NEW, "micro": MICRO, "lr": OPTIM.lr, "beta2": OPTIM.betas[1], "weight_decay": OPTIM.weight_decay,
            "clip_norm": OPTIM.clip, "beta": BETA, "clip": CLIP, "vocab_size": CONFIG.vocab_size, "checkpointing": given.checkpointing}


def train(folder, s, steps, each):
    """Our side: each(policy) where it is loaded, then each() before every step and after the last."""
    torch.set_num_threads(s["threads"])
    policy, ref = (load_model(folder, s["dtype"]) for _ in range(2))
    each(policy)
    judge = Judge(lambda conversations: torch.tensor([reward(ids[-s["new"]:]) for ids in conversations]), end=-1)
    config = GroupConfig(
        steps=steps, prompts=s["prompts"], samples=s["samples"], max_new_tokens=s["new"], temperature=1.0, kl_coef=s["beta"],
        kl_target=0.0, clip=s["clip"], minibatches=s["updates"], micro_episodes=s["micro"], missing_end="keep", optim=OPTIM)
    with tempfile.TemporaryDirectory() as held:
        each()
        rloo(policy, ref, judge, s["texts"], config, 0, StageState(Path(held) / "state.safetensors", every=1e9), lambda row: each())


def serve(folder, s):
    pace = Pace()
    train(folder, s, 10**6, lambda loaded=None: pace.turn() if loaded is None else pace.line.send(loaded_MiB=resident("VmRSS")))


def compare(folder, dtype, given):
    """Both sides in turns: rows with time and memory, and the ratios."""
    told = json.dumps(settings(dtype, given))
    asked = {"nanorlhf": Child(__file__, "--serve", folder, told), "TRL": Child(HERE / "peer_trl.py", folder, told, python=given.trl_python)}
    loaded = {name: child.hear()["loaded_MiB"] for name, child in asked.items()}
    peaks = {}

    def step(name):
        said = asked[name].ask()
        peaks[name] = said["peak_MiB"]
        return said[given.clock]

    took = in_turns({name: lambda name=name: step(name) for name in asked}, given.steps, warmups=1)
    for child in asked.values():
        child.close()
    rows = []
    for name, ms in took.items():
        middle, spread = middle_and_spread(ms)
        rows.append({"dtype": dtype, "name": name, "ms": middle, "spread_ms": spread, "least_ms": min(ms), "peak_MiB": peaks[name],
                     "above_loaded_MiB": peaks[name] - loaded[name], "samples_ms": ms})
        print(f"{dtype} {name:10} {middle:9.0f} ms ± {spread:6.0f}  least {min(ms):9.0f}  peak {peaks[name]:6.0f} MiB, {peaks[name] - loaded[name]:6.0f} "
              "above the loaded model", flush=True)
    faster, spread = middle_and_spread([theirs / mine for theirs, mine in zip(took["TRL"], took["nanorlhf"])])
    ratio = {"dtype": dtype, "times_faster": faster, "spread": spread, "of_least": min(took["TRL"]) / min(took["nanorlhf"]), "bar": BAR, "aim": AIM,
             "times_less": rows[1]["above_loaded_MiB"] / rows[0]["above_loaded_MiB"], "times_less_in_all": peaks["TRL"] / peaks["nanorlhf"]}
    print(f"{dtype} {faster:.1f} ± {spread:.1f} times faster (of the least times {ratio['of_least']:.1f}), bar {BAR}, aim {AIM}; "
          f"{ratio['times_less']:.1f} times less memory ({ratio['times_less_in_all']:.1f} with all that is imported), bar {MEMORY_BAR}", flush=True)
    return rows, ratio


@pytest.mark.parametrize("name", ["nanorlhf", "TRL"])
def test_rl_step(benchmark, tmp_path, name):
    if name == "TRL":
        pytest.importorskip("trl")
    save_model(tmp_path, Model(CONFIG))
    told = json.dumps(settings("bf16", argparse.Namespace(updates=4, checkpointing=False)))
    command = (__file__, "--serve") if name == "nanorlhf" else (HERE / "peer_trl.py",)
    with Child(*command, tmp_path, told) as child:
        child.hear()
        benchmark.pedantic(child.ask, rounds=3, warmup_rounds=1)


def profile(dtype, given, steps=3):
    """Where the time of our steps goes, by operator."""
    turns, seen = 0, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def each(loaded=None):
        nonlocal turns
        turns += loaded is None
        if turns == 2 and loaded is None:  # the first step has warmed up
            seen.start()

    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), Model(CONFIG))
        train(folder, settings(dtype, given), steps + 1, each)
    seen.stop()
    for row in sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)[:40]:
        print(f"{row.self_cpu_time_total / steps / 1e3:9.2f} ms {row.count / steps:7.0f} calls  {row.key}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(sys.argv[2], json.loads(sys.argv[3])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", type=chosen(DTYPES), default=list(DTYPES))
    parser.add_argument("--updates", type=int, default=4, choices=[1, 2, 4], help="optimiser steps for each rollout")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="TRL's gradient checkpointing, less memory and more time")
    parser.add_argument("--trl-python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.profile:
        profile(given.dtype[0], given)
        sys.exit()
    found = {"machine": machine(), "config": CONFIG.__dict__, "updates": given.updates, "clock": given.clock, "rows": [], "ratios": []}
    print(json.dumps(found["machine"]))
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), Model(CONFIG))
        for dtype in given.dtype:
            rows, ratio = compare(folder, dtype, given)
            found["rows"] += rows
            found["ratios"].append(ratio)
    if given.json:
        with open(given.json, "w") as file:
            json.dump(found, file, indent=1)
