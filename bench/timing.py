"""The only stopwatch: warm-up, interleaving, median and spread, and a line that names the machine."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time

import torch

from nanorlhf import _C


def machine():
    """What a number is worth nothing without."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }


class AsInstalled:
    """A contender in a process of its own that never sees nanorlhf, so that malloc is as torch is installed. ``setup`` defines
    ``run``; a call gives the milliseconds of one."""

    LOOP = """
import sys, time
for line in sys.stdin:
    time.sleep(0.02)  # until the caller's threads no longer spin
    start = time.perf_counter()
    run()
    print(1e3 * (time.perf_counter() - start), flush=True)
"""

    def __init__(self, setup):
        code = f"import torch\ntorch.set_num_threads({torch.get_num_threads()})\n{setup}{self.LOOP}"
        self.child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self):
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        return float(self.child.stdout.readline())

    def __del__(self):
        self.child.stdin.close()
        self.child.wait()


def in_turns(contenders, repeats=9, warmups=2):
    """Times {name: callable} in turns, so that a busy moment hits all alike. Returns {name: milliseconds of each turn}; those of
    one turn may be compared with one another. A callable that returns a number has timed itself."""
    for _ in range(warmups):
        for run in contenders.values():
            run()
    samples = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            own = run()
            samples[name].append(own if isinstance(own, float) else 1e3 * (time.perf_counter() - start))
    return samples


def middle_and_spread(values):
    """The median, and the distance between the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, high - low


def interleaved(contenders, repeats=9, warmups=2):
    """{name: (median, spread)} in milliseconds of ``in_turns``."""
    return {name: middle_and_spread(values) for name, values in in_turns(contenders, repeats, warmups).items()}


def copying(nbytes):
    """A contender that reads and writes that many bytes in all."""
    source = torch.ones(nbytes // 8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def trained(shape, nbytes, ways, inputs, gradients):
    """A case of ``report``: forward with backward of each way, {name: function of inputs}, once they agree; what torch does also
    compiled; and a copy of as many bytes."""
    torch.compiler.reset()  # it gives up on a function that it has compiled eight times
    ways = {**ways, "torch compiled": torch.compile(ways["torch"], dynamic=False)}
    contenders = {name: lambda way=way: torch.autograd.grad(way(*inputs), inputs, gradients) for name, way in ways.items()}
    tolerance = 0.05 if inputs[0].dtype == torch.bfloat16 else 1e-4
    exact = contenders["nanorlhf"]()
    for name, run in contenders.items():
        for a, b in zip(run(), exact, strict=True):
            assert float((a - b).abs().max() / b.abs().max()) < tolerance, f"{name} is not nanorlhf in {shape}"
    return shape, nbytes / 1e9, {**contenders, "copy": copying(nbytes)}


def report(cases, work_unit="GFLOP/s", **turns):
    """Prints one line for each (shape, work, contenders); with --json FILE also writes them. work: 1e9 units; turns: of
    ``interleaved``. A contender called "copy" moves as many bytes as the work needs; the others are shown as a share of it."""
    rows = []
    print(json.dumps(machine()))
    for shape, work, contenders in cases:
        results = interleaved(contenders, **turns)
        for name, (median, spread) in results.items():
            rate = work / (median / 1e3)
            rows.append({"shape": shape, "name": name, "ms": median, "spread_ms": spread, work_unit: rate})
            share = ""
            if "copy" in results:
                rows[-1]["of_copy"] = results["copy"][0] / median
                share = f"{rows[-1]['of_copy']:6.0%} of copy"
            print(f"{shape:40} {name:24} {median:9.2f} ms ± {spread:7.2f} {rate:8.1f} {work_unit}{share}", flush=True)
    if "--json" in sys.argv:
        with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
            json.dump({"machine": machine(), "rows": rows}, file, indent=1)
