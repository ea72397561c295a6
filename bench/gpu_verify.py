"""How bench/gpu.py checks kernels against their references in fp64, with nothing kind in memory: workspaces and outputs hold NaN
before a call, and every input lies in the middle of NaN, on a multiple of 16 bytes and off it. The checks themselves are in
gpu_checks*.py; the tests run them on the emulator, ``small``."""

import math
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nanorlhf.ops import backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from oracle import assert_earned  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
CHECKS = {}  # name: function of a Place; gpu_checks*.py fill it
SANITIZED = ("softmax", "norm", "loss", "attention portable", "attention sm90", "decode", "gae", "embedding")  # under compute-sanitizer


class Skipped(Exception):
    """A check that cannot be made here."""


@dataclass(frozen=True)
class Place:
    """Where kernels are checked: a device, and whether sizes have to be small there. ``runs``: how often the bits are compared."""

    device: str
    small: bool = False
    runs: int = 100
    module: object = None  # the kernels' module, for the choice between variants of attention
    avoid: frozenset = frozenset()  # variants that are known to be wrong

    def randn(self, *shape, seed=0):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def randint(self, high, *shape, seed=0):
        return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def bounds(self, lengths):
        return torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)

    def some(self, *sizes):
        """The sizes to try: where they have to be small, those that are."""
        return [s for s in sizes if not self.small or math.prod(s if isinstance(s, tuple) else (s,)) <= 40_000]


def check(name):
    def add(function):
        CHECKS[name] = function
        return function

    return add


@contextmanager
def poisoned():
    """Within it torch.empty and its kin give memory full of NaN (255 in bytes)."""
    before, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)
            torch.utils.deterministic.fill_uninitialized_memory = filled


def boxed(x, off):
    """A copy of x with 64 NaN or more before it and behind; ``off``: from a multiple of 16 bytes, in elements."""
    box = x.new_full((x.numel() + 128 + off,), math.nan)
    inside = box[64 + off : 64 + off + x.numel()]
    inside.copy_(x.reshape(-1))
    return inside.view(x.shape)


def earned(op, reference, inputs, dtype=F32, **limits):
    for off in (0, 1):
        with poisoned():
            assert_earned(lambda *xs: op(*(boxed(x, off) for x in xs)), reference, inputs, dtype, **limits)


def close(ours, exact, dtype=F32, roundings=8):
    """Within a few roundings of the largest value; for ops without gradients."""
    assert ours.shape == exact.shape, f"{tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if exact.numel():
        error, largest = (ours.double() - exact.double()).abs().max(), exact.double().abs().max()
        assert error <= roundings * torch.finfo(dtype).eps * max(largest, 1e-30), f"error {error:.3g} of {largest:.3g}"


def same(ours, expected, what):
    assert torch.equal(ours, expected), f"{what}: {int((ours != expected).sum())} of {ours.numel()} differ"


def variants(place):
    """The kernels that bf16 attention can be run by here."""
    names = place.module.attention_variants() if hasattr(place.module, "attention_variants") else ["portable"]
    hopper = place.device != "cuda" or torch.cuda.get_device_capability()[0] == 9
    return [name for name in names if name not in place.avoid and (hopper or name != "sm90")]


@contextmanager
def variant(place, name):
    choose = None if name == "auto" else getattr(place.module, "attention_variant", None)
    before = choose(name) if choose else None
    try:
        yield
    finally:
        if choose:
            choose(before)


def checks():
    """All there are, {name: function}, in the order in which they are made."""
    import gpu_checks
    import gpu_checks_attention  # noqa: F401

    return CHECKS


def run_checks(place, names=None, deadline=math.inf, note=print):
    """[{name, verdict, detail, seconds}] of the checks of these names; verdict: ok, FAILED, or skipped with the reason."""
    rows = []
    for name, function in checks().items():
        if names is not None and name not in names:
            continue
        began, verdict, detail = time.monotonic(), "ok", ""
        try:
            if began > deadline:
                raise Skipped("no time left")
            function(place)
            if place.device == "cuda":
                torch.cuda.synchronize()
        except Skipped as error:
            verdict, detail = "skipped", str(error)
        except Exception as error:  # a check that breaks in any way is a row of the table
            verdict, detail = "FAILED", f"{type(error).__name__}: {error}".strip()
        rows.append({"name": name, "verdict": verdict, "detail": detail[:500], "seconds": round(time.monotonic() - began, 2)})
        note(f"{verdict:8} {name:16} {rows[-1]['seconds']:7.1f} s  {detail[:300]}")
    return rows


def native_module(device):
    """The module whose kernels run on tensors of this device."""
    return backend.native(torch.empty(0, device=device))[0] if hasattr(backend, "native") else None
