"""How bench/gpu.py times: CUDA events, contenders in turns, the L2 cache emptied before each run; and what a row of its table is."""

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Callable, Optional

import torch

OURS = "nanorlhf"


@dataclass(frozen=True)
class Case:
    """What is built for a row: contenders that do the same, and how much work one run is."""

    contenders: dict  # name: callable, OURS first; what the others return is compared with what the first returns, unless None
    work: float  # TFLOP or GB
    unit: str  # "TFLOP/s" or "GB/s"
    tolerance: float = 0.03  # of the comparison, relative to the largest value
    compared: bool = True
    numbers: dict = field(default_factory=dict)  # anything else that was measured while building


@dataclass(frozen=True)
class Row:
    """One line of the table. Its ratio: how many times as fast as the fastest of ``against`` the first contender is; "copy" moves as
    many bytes as the work needs."""

    name: str
    build: Callable  # (device, tiny) -> Case
    against: tuple = ()
    must: Optional[float] = None
    aim: Optional[float] = None
    needs: tuple = ()  # checks of gpu_verify that must have passed
    quick: bool = False  # also with --quick
    ratio: Optional[Callable] = None  # Case -> number, in place of the ratio of times
    patience: float = 60  # seconds that it may take, compilation included


class Events:
    """A stopwatch of the device. Before each run the L2 cache is filled with other data, and a spell of idling lets the host come
    ahead, so that what it takes to launch is not in the time."""

    def __init__(self, cache_bytes=256 << 20, idle_cycles=200_000):
        self.cache, self.idle_cycles = torch.empty(cache_bytes, dtype=torch.int8, device="cuda"), idle_cycles

    def measure(self, runs):
        """The milliseconds of each of these callables, run one after the other."""
        pairs = []
        for run in runs:
            self.cache.zero_()
            torch.cuda._sleep(self.idle_cycles)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


class HostClock:
    """The same by the host's clock, for machines without a GPU."""

    def measure(self, runs):
        times = []
        for run in runs:
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
        return times


def interleaved(contenders, watch, repeats=30, warmups=5, seconds=math.inf):
    """{name: (median, distance of the quartiles)} in milliseconds, of runs in turns. After ``seconds`` it leaves it at what it
    has, five of each at least."""
    for _ in range(warmups):
        watch.measure(contenders.values())
    samples, began = {name: [] for name in contenders}, time.monotonic()
    for done in range(repeats):
        if done >= 5 and time.monotonic() - began > seconds:
            break
        for name, ms in zip(contenders, watch.measure(contenders.values()), strict=True):
            samples[name].append(ms)
    result = {}
    for name, values in samples.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        result[name] = (middle, high - low)
    return result


def _tensors(x):
    return [y.detach() for y in (x if isinstance(x, (tuple, list)) else [x]) if isinstance(y, torch.Tensor)]


def disagreement(ours, theirs, tolerance):
    """One sentence where two results differ, else ""."""
    for i, (a, b) in enumerate(zip(_tensors(ours), _tensors(theirs), strict=False)):
        if a.numel() != b.numel():
            return f"output {i} has {b.numel()} elements, ours {a.numel()}"
        a, b = a.float(), b.reshape(a.shape).float()
        error, largest = float((a - b).abs().max()), float(b.abs().max())
        if not error <= tolerance * largest:
            return f"output {i} differs by {error:.3g} of {largest:.3g}"
    return ""


def tried(case):
    """(contenders that run, {name: what is wrong} of those that do not and of those that disagree with the first). The first itself
    has to run."""
    first, *others = case.contenders
    ours, good, errors = case.contenders[first](), {first: case.contenders[first]}, {}
    for name in others:
        try:
            theirs = case.contenders[name]()
            wrong = disagreement(ours, theirs, case.tolerance) if case.compared else ""
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:  # a peer that this torch does not have, or that refuses the shape
            errors[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
            continue
        good[name] = case.contenders[name]
        if wrong:
            errors[name] = f"disagrees: {wrong}"
    return good, errors


def measured(row, watch, device="cuda", tiny=False, **turns):
    """A row's result: {name, ours, ms: {contender: [median, spread]}, rate, unit, errors, ratio, against, must, aim, numbers}."""
    case = row.build(device, tiny)
    good, errors = tried(case)
    times = interleaved(good, watch, **turns)
    ours = next(iter(good))
    result = {
        "name": row.name, "ours": ours, "ms": {name: list(x) for name, x in times.items()}, "unit": case.unit, "errors": errors,
        "rate": {name: case.work / (x[0] / 1e3) for name, x in times.items()}, "must": row.must, "aim": row.aim, "numbers": case.numbers,
    }  # fmt: skip
    if row.ratio is not None:
        return result | {"ratio": row.ratio(case), "against": row.against[0]}
    peers = {name: times[name][0] for name in row.against if name in times}
    best = min(peers, key=peers.get) if peers else None
    return result | {"ratio": peers[best] / times[ours][0] if peers else None, "against": best}


def verdict(result, failed=()):
    """aim, must, SHORT; "-" without a bar; "no peer" where none of those that it is measured by ran; unverified: where a check of
    the kernel failed, whatever the time.

    >>> verdict({"ratio": 0.9, "must": 0.8, "aim": 1.0})
    'must'
    """
    if failed:
        return "unverified"
    if result.get("must") is None:
        return "-"
    if result.get("ratio") is None:
        return "no peer"
    return "aim" if result["ratio"] >= (result["aim"] or math.inf) else "must" if result["ratio"] >= result["must"] else "SHORT"
