"""Decoding against Hugging Face's ``generate``: the same 5-million-parameter model, prompts and number of new tokens.

Cases: ``batch1``, one prompt of 64 tokens; ``batch32``, 32 prompts of 16 to 128 tokens, ragged here and padded on the left there;
``samples64``, 64 samples of one prompt of 512 tokens (there ``num_return_sequences``). Nothing ends a text early. Greedy, and sampled
at temperature 1 from the whole softmax; ours also gives the log-prob of every token. A prompt's own pass is in the time.

    python bench/bench_engine.py [--cases batch1,batch32,samples64] [--dtype fp32,bf16] [--modes greedy,sampled] [--new 64]
                                 [--peers dynamic,static,compiled] [--repeats 7] [--memory] [--json FILE]
    python bench/bench_engine.py --profile samples64 --dtype bf16 --modes sampled

Each contender is a process of its own, Hugging Face's without nanorlhf (so with malloc as torch is installed), and they are asked in
turns. Before that their logits are compared, and in fp32 the greedy tokens. "Times faster" is the median over the turns of the ratio
within a turn, beside the ratio of the shortest times; the bar is meant against the faster of ``dynamic`` and ``static``, generate as it
is called. ``compiled`` has its forward pass under torch.compile, which takes minutes for each new shape (the first, untimed call).
--memory: the peak of resident memory (VmHWM, set back before) while the case is decoded, above what was resident before it, in a
fresh process that has decoded 8 tokens.

On a busy machine: ``--threads 1 --clock cpu``, which counts the seconds that the contender's process had of its core.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from child import CLOCKS, Child, Watch, reset_peak, resident, serve
from nanorlhf.checkpoint import load_model, save_model
from nanorlhf.config import ModelConfig
from nanorlhf.engine import SamplingConfig, generate
from nanorlhf.engine.generate import ragged
from nanorlhf.model import Model
from timing import in_turns, machine, middle_and_spread

HERE = Path(__file__).parent
CONFIG = ModelConfig(layers=10, context=1024)  # the main run's model, deep enough for 5 million parameters
NEW = 64  # tokens for each sequence, unless said otherwise: as in a step of RLOO in bench_rl_step.py
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CASES = {"batch1": (1, 64, 64, 1), "batch32": (32, 16, 128, 1), "samples64": (1, 512, 512, 64)}  # prompts, their lengths, samples of each
BARS = {"batch1": (5, 10), "batch32": (8, 15), "samples64": (10, 30)}  # times faster: demanded, aimed at
MEMORY_BAR = 8  # times less memory for samples64
CLOSE = {"fp32": 1e-4, "bf16": 0.05}  # of the largest logit
SAME_ROWS = 0.9  # of fp32's greedy texts: a tie in the last bit may end one


def prompts_of(case):
    count, shortest, longest, _ = CASES[case]
    draw = random.Random(case)
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    return [[draw.randrange(1, CONFIG.vocab_size) for _ in range(n)] for n in lengths]


def request(case, mode, new):
    return {"prompts": prompts_of(case), "n": CASES[case][3], "new": new, "sampled": mode == "sampled"}


def contender(folder, dtype, threads):
    """answer(prompts, …) of ours, as peer_hf.py has it."""
    torch.set_num_threads(int(threads))
    model = load_model(folder, dtype)

    def answer(prompts, n=1, new=0, sampled=False, memory=False):
        if not new:
            with torch.no_grad():
                tokens, cu_seqlens = ragged(prompts)
                last = model(tokens, cu_seqlens)[cu_seqlens[1:].long() - 1]
                return {"logits": (last.float() @ model.head_weight.T).tolist()}
        if memory:
            reset_peak()
        before, watch = resident("VmRSS"), Watch()
        out = generate(model, prompts, new, n, sampling=SamplingConfig(temperature=float(sampled)))
        return {**watch.read(), "MiB": resident("VmHWM") - before, "ids": [c.ids for c in out]}

    return answer


def children(folder, dtype, peers):
    threads = torch.get_num_threads()
    theirs = {f"HF {p}": Child(HERE / "peer_hf.py", folder, DTYPES[dtype], p, threads) for p in peers}
    return {"nanorlhf": Child(__file__, "--serve", folder, DTYPES[dtype], threads), **theirs}


def check(asked, dtype):
    """The largest difference of logits, as a share of the largest logit. AssertionError where it is no rounding."""
    logits = {name: torch.tensor(child.ask(prompts=prompts_of("batch32"))["logits"]) for name, child in asked.items()}
    ours = logits.pop("nanorlhf")
    apart = max(float((theirs - ours).abs().max() / ours.abs().max()) for theirs in logits.values())
    assert apart < CLOSE[dtype], f"the logits in {dtype} are {apart:.1e} of the largest apart"
    return apart


def same_texts(asked, case, dtype, new):
    """The share of greedy texts that are Hugging Face's; AssertionError if too small for fp32."""
    ids = [child.ask(**request(case, "greedy", new))["ids"] for child in list(asked.values())[:2]]
    assert all(len(row) == new for rows in ids for row in rows)
    same = statistics.mean(a == b for a, b in zip(*ids, strict=True))
    assert dtype != "fp32" or same >= SAME_ROWS, f"{case}: {same:.0%} of the greedy texts agree"
    return same


def compare(asked, case, dtype, mode, given):
    """One row for each contender, and one for the ratio to each peer."""
    wanted, tokens = request(case, mode, given.new), CASES[case][0] * CASES[case][3] * given.new
    took = in_turns({name: lambda child=child: child.ask(**wanted)[given.clock] for name, child in asked.items()}, given.repeats, warmups=1)
    rows = []
    for name, ms in took.items():
        middle, spread = middle_and_spread(ms)
        rows.append({"case": case, "dtype": dtype, "mode": mode, "name": name, "ms": middle, "spread_ms": spread, "least_ms": min(ms),
                     "tokens/s": 1e3 * tokens / middle, "samples_ms": ms})
        print(f"{case:10} {dtype} {mode:8} {name:12} {middle:9.1f} ms ± {spread:7.1f}  least {min(ms):9.1f}  {1e3 * tokens / middle:9.0f} tokens/s", flush=True)
    return rows, [faster(took, name, {"case": case, "dtype": dtype, "mode": mode}) for name in took if name != "nanorlhf"]


def faster(took, peer, where):
    """The row of the ratio to one peer."""
    middle, spread = middle_and_spread([theirs / mine for theirs, mine in zip(took[peer], took["nanorlhf"])])
    bar, aim = BARS[where["case"]]
    of_least = min(took[peer]) / min(took["nanorlhf"])
    print(f"{' '.join(where.values())}: {middle:.1f} ± {spread:.1f} times faster than {peer} (of the least times {of_least:.1f}); bar {bar}, aim {aim}", flush=True)
    return {**where, "peer": peer, "times_faster": middle, "spread": spread, "of_least": of_least, "bar": bar, "aim": aim}


def memory(folder, dtype, mode, peers, new, case="samples64"):
    """MiB of each contender, and ours against the least peer's."""
    asked = children(folder, dtype, peers)
    found = {}
    for name, child in asked.items():
        with child:
            child.ask(**request("batch1", mode, new=8))
            found[name] = child.ask(**request(case, mode, new), memory=True)["MiB"]
    less = min(MiB for name, MiB in found.items() if name != "nanorlhf") / found["nanorlhf"]
    print(f"{case:10} {dtype} {mode:8} memory: " + ", ".join(f"{name} {MiB:.0f} MiB" for name, MiB in found.items())
          + f"; {less:.1f} times less, bar {MEMORY_BAR}", flush=True)
    return {"case": case, "dtype": dtype, "mode": mode, "MiB": found, "times_less": less, "bar": MEMORY_BAR}


def every_case(given):
    found = {"machine": machine(), "config": CONFIG.__dict__, "new": given.new, "clock": given.clock, "rows": [], "ratios": [], "memory": [], "agreement": []}
    print(json.dumps(found["machine"]))
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), Model(CONFIG))
        for dtype in given.dtype:
            asked = children(folder, dtype, given.peers)
            apart = check(asked, dtype)
            for case in given.cases:
                same = same_texts(asked, case, dtype, given.new)
                found["agreement"].append({"case": case, "dtype": dtype, "logits_apart": apart, "same_greedy_texts": same})
                print(f"{case:10} {dtype} logits at most {apart:.1e} of the largest apart; {same:.0%} of greedy texts the same", flush=True)
                for mode in given.modes:
                    rows, ratios = compare(asked, case, dtype, mode, given)
                    found["rows"] += rows
                    found["ratios"] += ratios
            for child in asked.values():
                child.close()
            if given.memory:
                found["memory"] += [memory(folder, dtype, mode, given.peers, given.new) for mode in given.modes]
    return found


def profile(case, dtype, mode, new, rounds=3):
    """Where the time of ours goes, by operator and by Python line of the call."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), Model(CONFIG))
        answer = contender(folder, DTYPES[dtype], torch.get_num_threads())
    for _ in range(2):
        ms = answer(**request(case, mode, new))["wall"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(rounds):
            slow = answer(**request(case, mode, new))["wall"]
    print(f"{case} {dtype} {mode}: {ms:.1f} ms, {ms / new:.3f} ms a token; {slow:.1f} ms under the profiler")
    for row in sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)[:30]:
        print(f"{row.self_cpu_time_total / rounds / 1e3:9.2f} ms {row.count / rounds:7.0f} calls  {row.key}")


@pytest.mark.parametrize("name", ["nanorlhf", "HF dynamic"])
@pytest.mark.parametrize("case", CASES)
def test_engine(benchmark, tmp_path, case, name):
    save_model(tmp_path, Model(CONFIG))
    with children(tmp_path, "fp32", ["dynamic"] if name != "nanorlhf" else [])[name] as child:
        benchmark.pedantic(child.ask, kwargs=request(case, "greedy", NEW), rounds=3, warmup_rounds=1)


def chosen(names):
    """A parser of comma-separated names."""

    def parse(text):
        wrong = [n for n in text.split(",") if n not in names]
        if wrong:
            raise argparse.ArgumentTypeError(f"there is no {wrong[0]!r}; there are {', '.join(names)}")
        return text.split(",")

    return parse


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(contender(*sys.argv[2:])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=chosen(CASES), default=list(CASES))
    parser.add_argument("--dtype", type=chosen(DTYPES), default=list(DTYPES))
    parser.add_argument("--modes", type=chosen(["greedy", "sampled"]), default=["greedy", "sampled"])
    parser.add_argument("--peers", type=chosen(["dynamic", "static", "compiled"]), default=["dynamic", "static"])
    parser.add_argument("--new", type=int, default=NEW)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--profile", choices=list(CASES))
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.profile:
        profile(given.profile, given.dtype[0], given.modes[0], given.new)
    else:
        found = every_case(given)
        if given.json:
            with open(given.json, "w") as file:
                json.dump(found, file, indent=1)
