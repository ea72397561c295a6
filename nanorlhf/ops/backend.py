"""What can run an op here and, if not, why.

``NANORLHF_BACKEND`` is read once: ``auto`` (the default) takes the native kernel where it can run, else the torch
reference; ``cpu``, ``cuda`` and ``reference`` force one, and a forced backend that cannot run raises its reason.
"""

import os

import torch

from nanorlhf import _C

BACKENDS = ("auto", "cpu", "cuda", "reference")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # the native code's names for them
LIBRARY = torch.library.Library("nanorlhf", "FRAGMENT")

# Large arrays come and go with every step: fresh from the system, each would have its pages zeroed again, which costs a row
# softmax four fifths of its time, and torch's own ops as much. It holds for the whole process, so who has set malloc is heeded.
if not {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
    _C.keep_freed_memory()

_C.isa()  # an NANORLHF_ISA that cannot be had is an error now, not in the middle of a run

_forced, _deterministic = "auto", False


def force(name):
    """Use one backend from now on, as ``NANORLHF_BACKEND`` does; returns the one in use before.

    >>> before = force("reference")
    >>> runnable("reference", torch.device("cpu"), torch.float64)
    (True, 'plain torch runs everywhere')
    >>> _ = force(before)
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"NANORLHF_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    before, _forced = _forced, name
    return before


force(os.environ.get("NANORLHF_BACKEND") or "auto")


def deterministic(on):
    """Whether a token's log-prob has to be the same bits in prefill, decode and training, whatever the batch around it and
    whatever the number of threads, for the whole process; returns the setting before.

    While it is on, products forward are ops.matmul's and decoding attends as training does; with no filter the engine reports
    the log-probs that ops.token_logprobs gives. The promise is for one instruction set, and for forward passes: gradients are
    torch's products. An op that has no CPU kernel for its input raises ValueError.

    Cost on a 2-core Granite Rapids (AMX), the main run's model, in time (python bench/bench_matmul.py --model), bf16 and fp32:
    a forward pass 1.15-1.2 and 1.3, forward and backward 1.1 and 1.1-1.15, generation of 64 together 1.15 and 1.4, of one alone
    1.05 and 1.9 times what it takes without.

    >>> before = deterministic(True)
    >>> deterministic(before), is_deterministic() == before
    (True, True)
    """
    global _deterministic
    before, _deterministic = _deterministic, bool(on)
    return before


def is_deterministic():
    return _deterministic


def runnable(backend, device, dtype):
    """(ok, reason) for a backend on tensors of this device and dtype.

    >>> runnable("cpu", torch.device("cpu"), torch.float64)
    (False, 'the CPU kernels take float32 and bfloat16, not torch.float64')
    """
    if backend == "reference":
        return True, "plain torch runs everywhere"
    if backend == "cuda":
        return False, "no CUDA kernel was built"
    if device.type != "cpu":
        return False, f"the CPU kernels cannot read memory on {device}"
    if dtype not in DTYPES:
        return False, f"the CPU kernels take float32 and bfloat16, not {dtype}"
    return True, "CPU kernels, instruction set " + _C.isa()


def use_native(op, x):
    """Whether ``op`` on a tensor like ``x`` runs natively (else its torch reference).

    Raises ValueError if a forced backend cannot run, or the reference would where ``deterministic`` is on.
    """
    if _deterministic:
        ok, reason = (False, "NANORLHF_BACKEND=reference") if _forced == "reference" else runnable("cpu", x.device, x.dtype)
        if not ok:
            raise ValueError(f"{op}: deterministic needs the CPU kernels, and they cannot run here: {reason}")
    if _forced == "auto":
        return x.device.type == "cpu" and x.dtype in DTYPES
    if _forced == "reference":
        return False
    ok, reason = runnable(_forced, x.device, x.dtype)
    if not ok:
        raise ValueError(f"{op}: NANORLHF_BACKEND={_forced} cannot run here: {reason}")
    return True


def use_native_fp32(op, *tensors):
    """The same for a kernel that takes fp32 alone: narrower and wider tensors are the reference's."""
    return all(use_native(op, x) and x.dtype == torch.float32 for x in tensors)


def define(schema, cpu, fake):
    """Register a native op with torch and return its callable. ``fake`` computes shapes only, for torch.compile."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"nanorlhf::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.nanorlhf, name).default


def table():
    """Rows (backend, device, dtype, ok, reason): what ``nanorlhf doctor`` prints."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    return [
        (backend, str(device), str(dtype).removeprefix("torch."), *runnable(backend, device, dtype))
        for device in devices
        for backend in BACKENDS[1:]
        for dtype in DTYPES
    ]


def cpu_features():
    """{name: whether this CPU has it}, for the instruction sets that a choice here depends on.

    >>> "avx512_bf16" in cpu_features()
    True
    """
    return dict(_C.cpu_features())
