"""What can run an op here and, if not, why.

``NANORLHF_BACKEND`` is read once: ``auto`` (the default) takes the native kernel where it can run, else the torch
reference; ``cpu``, ``cuda`` and ``reference`` force one, and a forced backend that cannot run raises its reason. On a GPU
``auto`` takes a kernel only once it has agreed with the reference there (trust.py).
"""

import functools
import json
import os
from pathlib import Path

import torch

from nanorlhf import _C

try:
    from nanorlhf import _cuda
except ImportError as error:
    _cuda, _why_not = None, error

BACKENDS = ("auto", "cpu", "cuda", "reference")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # the native code's names for them
LIBRARY = torch.library.Library("nanorlhf", "FRAGMENT")
CAPABILITY = (8, 0)  # of the oldest GPU that the kernels are built for
# The functions of _cuda that the ops need; an op that is not here shares those of another, below. Those of linear are torch's.
KERNELS = {
    "attention": ("attention_forward", "attention_backward"), "attention_decode": ("attention_decode", "attention_paged"),
    "embedding": ("embedding",), "gae": ("gae",), "linear": (), "loss": ("loss",), "matmul": ("matmul",), "norm": ("norm",), "optim": ("optim",),
    "ppo_loss": ("ppo_loss",), "rope": ("rope",), "sample": ("sample",), "softmax": ("softmax",), "swiglu": ("swiglu",),
}  # fmt: skip
SHARED = {"attention_paged": "attention_decode", "token_logprobs": "loss", "logits_logprobs": "loss", "rms_norm": "norm",
          "add_rms_norm": "norm", "rope_qkv": "rope", "ppo_policy_loss": "ppo_loss", "ppo_value_loss": "ppo_loss"}  # fmt: skip

# Large arrays come and go with every step: fresh from the system, each would have its pages zeroed again, which costs a row
# softmax four fifths of its time, and torch's own ops as much. It holds for the whole process, so who has set malloc is heeded.
if not {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
    _C.keep_freed_memory()

_C.isa()  # an NANORLHF_ISA that cannot be had is an error now, not in the middle of a run

_forced, _deterministic, _emulated, _poisoned = "auto", False, None, False
_verdicts = {}  # (op, device, dtype) -> (ok, reason) of what ``auto`` has found out about the CUDA kernels


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
    torch's products. An op that has no CPU kernel for its input, or no CUDA kernel for a CUDA tensor, raises ValueError.

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


def forced():
    """The backend in use."""
    return _forced


def emulate(module):
    """From now on ``module``, a build of the CUDA kernels for the host, runs the ops that it has on CPU tensors, in
    workspaces full of NaN; None ends it. For the tests. Returns the one before."""
    global _emulated
    before, _emulated = _emulated, module
    return before


def poison(on):
    """Whether workspaces hold NaN, as they do where kernels are emulated; returns the setting before."""
    global _poisoned
    before, _poisoned = _poisoned, on
    return before


class Lane(tuple):
    """Where a call of _cuda runs: (device, stream, address and bytes of its workspace)."""

    workspace = None  # the tensor at that address, alive as long as the lane


def native(x, workspace=None):
    """(module, lane): the native module for tensors like ``x``, and what its functions take last: _C the number of threads,
    _cuda a Lane. workspace: how many bytes of the device's memory the call needs, or a function of _cuda that says so."""
    if on_cpu(x):
        return _C, torch.get_num_threads()
    module = native_module()
    size = workspace(module) if callable(workspace) else workspace or 0
    device, stream = (x.get_device(), torch.cuda.current_stream(x.device).cuda_stream) if x.is_cuda else (0, 0)
    memory = torch.empty(size, dtype=torch.uint8, device=x.device)
    if _poisoned or _emulated is not None:
        memory.fill_(255)
    lane = Lane((device, stream, memory.data_ptr(), size))
    lane.workspace = memory
    return module, lane


def native_module():
    """_cuda or what stands in for it, or None."""
    return _cuda if _emulated is None else _emulated


def on_cpu(x):
    """Whether ``native`` gives _C for tensors like ``x``."""
    return _emulated is None and not x.is_cuda


def build_info():
    """What setup.py wrote about the build of _cuda, or the one sentence why there is nothing to read.

    >>> isinstance(build_info(), dict)
    True
    """
    path = Path(_C.__file__).with_name("_cuda_build.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"reason": "this installation has no record of its build"}


def why_not_built():
    """The sentence, where _cuda is not there or cannot be imported; else None."""
    if _cuda is not None:
        return None
    built = list(Path(_C.__file__).parent.glob("_cuda.*.so"))
    return f"the CUDA kernels cannot be loaded: {_why_not}" if built else f"no CUDA kernel was built: {build_info().get('reason')}"


def runnable(backend, device, dtype, op=None):
    """(ok, reason) for a backend on tensors of this device and dtype; with ``op``, for that one.

    >>> runnable("cpu", torch.device("cpu"), torch.float64)
    (False, 'the CPU kernels take float32 and bfloat16, not torch.float64')
    """
    if backend == "reference":
        return True, "plain torch runs everywhere"
    if backend == "cuda":
        return _runnable_cuda(device, dtype, op)
    if device.type != "cpu":
        return False, f"the CPU kernels cannot read memory on {device}"
    if dtype not in DTYPES:
        return False, f"the CPU kernels take float32 and bfloat16, not {dtype}"
    return True, "CPU kernels, instruction set " + _C.isa()


def _runnable_cuda(device, dtype, op):
    module = native_module()
    missing = [] if op is None or module is None else [f for f in KERNELS[SHARED.get(op, op)] if not hasattr(module, f)]
    if _emulated is None and _cuda is None:
        return False, why_not_built()
    if _emulated is None and not torch.cuda.is_available():
        return False, "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU or no driver for it"
    if _emulated is None and device.type != "cuda":
        return False, f"the CUDA kernels cannot read memory on {device}"
    if dtype not in DTYPES:
        return False, f"the CUDA kernels take float32 and bfloat16, not {dtype}"
    if _emulated is not None:
        return (False, f"the emulated kernels have no {', '.join(missing)}") if missing else (True, "CUDA kernels, emulated")
    gpu = properties(device)
    if (gpu.major, gpu.minor) < CAPABILITY:
        return False, f"the CUDA kernels need compute capability {'.'.join(map(str, CAPABILITY))}, {gpu.name} has {gpu.major}.{gpu.minor}"
    if missing:
        return False, f"this build of the CUDA kernels has no {', '.join(missing)}"
    return True, f"CUDA kernels on {gpu.name}"


@functools.cache
def properties(device):
    """torch's of a GPU: name, uuid, major and minor of its compute capability."""
    return torch.cuda.get_device_properties(device)


def use_native(op, x):
    """Whether ``op`` on a tensor like ``x`` runs natively (else its torch reference).

    Raises ValueError if a forced backend cannot run, or the reference would where ``deterministic`` is on.
    """
    on_gpu = x.is_cuda or _emulated is not None
    if _deterministic:
        ok, reason = (False, "NANORLHF_BACKEND=reference") if _forced == "reference" else \
            _trusted(op, x.device, x.dtype) if on_gpu and _forced == "auto" else runnable("cuda" if on_gpu else "cpu", x.device, x.dtype, op)
        if not ok:
            kernels = "CUDA" if on_gpu else "CPU"
            raise ValueError(f"{op}: deterministic needs the {kernels} kernels, and they cannot run here: {reason}")
    if _forced == "auto":
        return _trusted(op, x.device, x.dtype)[0] if on_gpu else x.is_cpu and x.dtype in DTYPES
    if _forced == "reference":
        return False
    ok, reason = runnable(_forced, x.device, x.dtype, op)
    if not ok:
        raise ValueError(f"{op}: NANORLHF_BACKEND={_forced} cannot run here: {reason}")
    return True


def _trusted(op, device, dtype):
    """(ok, reason) for ``auto`` on a GPU: the kernel can run and has agreed with the reference there."""
    key = op, device, dtype
    if _emulated is None and key in _verdicts:
        return _verdicts[key]
    ok, reason = _runnable_cuda(device, dtype, op)
    if not ok or _emulated is not None or not KERNELS[SHARED.get(op, op)]:
        return ok, reason
    from nanorlhf.ops import trust  # which calls the ops

    ok, reason, settled = trust.verdict(SHARED.get(op, op), device)
    if settled:
        _verdicts[key] = ok, reason
    return ok, reason


def use_native_fp32(op, *tensors):
    """The same for a kernel that takes fp32 alone: narrower and wider tensors are the reference's."""
    return all(use_native(op, x) and x.dtype == torch.float32 for x in tensors)


def define(schema, run, fake):
    """Register a native op with torch, for CPU and CUDA tensors alike, and return a function that runs it. ``fake`` computes shapes
    only, for torch.compile. Where torch has no use for knowing of the call, it goes around torch's dispatcher, which costs a token
    of a small model as much as some of the kernels."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"nanorlhf::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.nanorlhf, name).default
    return lambda *args: (op if _observed(args[0]) else run)(*args)


def _observed(x):
    """Whether torch has to see an op on a tensor like ``x``: it is compiling, profiling or tracing, or transforms functions."""
    return (torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter) or torch.autograd._profiler_enabled()
            or torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None)  # fmt: skip


def empty_like(x):
    """Like x.new_empty(x.shape), which takes twice as long."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def table():
    """Rows (op, backend, device, ok, reason): what ``nanorlhf doctor`` prints. The CUDA kernels are checked for it."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rows = []
    for op in KERNELS:
        for backend in BACKENDS[1:]:
            for device in gpus or [torch.device("cpu")] if backend == "cuda" else [torch.device("cpu")]:
                ok, reason = runnable(backend, device, torch.float32, op)
                if ok and backend == "cuda":
                    ok, reason = _trusted(op, device, torch.float32)
                rows.append((op, backend, str(device), ok, reason))
    return rows


def cpu_features():
    """{name: whether this CPU has it}, for the instruction sets that a choice here depends on.

    >>> "avx512_bf16" in cpu_features()
    True
    """
    return dict(_C.cpu_features())
