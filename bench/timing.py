"""The only stopwatch: warm-up, interleaving, median and spread, and a line that names the machine."""

import json
import os
import platform
import statistics
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


def interleaved(contenders, repeats=9, warmups=2):
    """Times {name: callable} in turns, so that a busy moment hits all alike. Returns {name: (median, spread)} in
    milliseconds; the spread is the distance between the quartiles."""
    for _ in range(warmups):
        for run in contenders.values():
            run()
    samples = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            samples[name].append(1e3 * (time.perf_counter() - start))
    result = {}
    for name, values in samples.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = (middle, high - low)
    return result


def report(cases, work_unit="GFLOP/s", **turns):
    """Prints one line for each (shape, work, contenders); with --json FILE also writes them. work: 1e9 units; turns: of
    ``interleaved``."""
    rows = []
    print(json.dumps(machine()))
    for shape, work, contenders in cases:
        for name, (median, spread) in interleaved(contenders, **turns).items():
            rate = work / (median / 1e3)
            rows.append({"shape": shape, "name": name, "ms": median, "spread_ms": spread, work_unit: rate})
            print(f"{shape:40} {name:24} {median:9.2f} ms ± {spread:7.2f} {rate:8.1f} {work_unit}", flush=True)
    if "--json" in sys.argv:
        with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
            json.dump({"machine": machine(), "rows": rows}, file, indent=1)
