"""The CUDA kernels are trusted after a check: on the first use of an op's on a kind of GPU, under a driver, of a build, ``auto``
compares it with the torch reference, forward and backward, on small shapes that fit no tile, with NaN in the workspace. The
verdict is kept in nanorlhf/cuda_checks.json of the user's cache folder; a kernel that fails is not used, and a warning says so.
"""

import hashlib
import json
import math
import os
import re
import tempfile
import threading
import warnings
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch

from nanorlhf.ops import backend, optim
from nanorlhf.ops.attention import attention, attention_decode, attention_decode_reference, attention_reference
from nanorlhf.ops.attention_paged import attention_paged, attention_paged_reference
from nanorlhf.ops.embedding import embedding, embedding_reference
from nanorlhf.ops.gae import gae, gae_reference
from nanorlhf.ops.loss import logits_logprobs, logits_logprobs_reference, token_logprobs
from nanorlhf.ops.matmul import matmul, matmul_reference
from nanorlhf.ops.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from nanorlhf.ops.ppo_loss import ppo_policy_loss, ppo_policy_loss_reference, ppo_value_loss, ppo_value_loss_reference
from nanorlhf.ops.rope import rope_qkv, rope_qkv_reference
from nanorlhf.ops.sample import sample, sample_reference
from nanorlhf.ops.softmax import softmax, softmax_reference
from nanorlhf.ops.swiglu import swiglu, swiglu_reference

FACTOR, ROUNDINGS = 4, 16  # how far from fp64: times the reference's own error in that type, and roundings of the largest value
KEPT = 32  # environments that the file remembers, the latest

_lock, _here = threading.RLock(), threading.local()
_known = {}  # (environment, op) -> {"ok", "reason", "variant"}


@torch.compiler.assume_constant_result
def verdict(op, device):
    """(ok, reason, settled) for the kernels of one of backend.KERNELS; tried now if no verdict is known. While a CUDA graph is
    captured nothing can be tried: then they are not ok, but that is not settled."""
    if under_trial():
        return True, "being tried", False
    with _lock:
        key = environment(device), op
        if key not in _known:
            told = _read().get(key[0], {}).get(op)
            if not _sound(told):
                if capturing():
                    return False, "not tried yet, and while a CUDA graph is captured nothing can be", False
                try:
                    told = _try(op, device)
                except torch.OutOfMemoryError as error:
                    return False, f"there was no memory to try it: {error}", False
                _write(*key, told)
            _known[key] = told
            if told.get("variant"):
                backend.native_module().attention_variant(told["variant"])
            if not told["ok"]:
                warnings.warn(f"nanorlhf: the CUDA kernel of {op} is not used on {key[0]}: {told['reason']}", stacklevel=3)
        return _known[key]["ok"], _known[key]["reason"], True


def capturing():
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def under_trial():
    """Whether this thread is in the middle of a check: its ops run the kernels then."""
    return getattr(_here, "trying", False)


@cache
def environment(device):
    """What a verdict holds for: the kind of GPU, its driver, and the build of _cuda."""
    gpu = backend.properties(device)
    try:
        driver = re.search(r"\b\d+\.[\d.]+", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))[0]
    except (OSError, TypeError):
        driver = f"CUDA {torch._C._cuda_getDriverVersion()}"
    build = hashlib.sha256(Path(backend.native_module().__file__).read_bytes()).hexdigest()[:16]
    return f"{gpu.name} ({gpu.major}.{gpu.minor}), driver {driver}, build {build}"


def cache_file():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanorlhf" / "cuda_checks.json"


def _read():
    """{environment: {op: verdict}}; a file that cannot be read is as good as none."""
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home
        return {}
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def _write(where, op, told):
    found = _read()
    found[where] = {**found.pop(where, {}), op: told}
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as beside:
            json.dump(dict(list(found.items())[-KEPT:]), beside, indent=1)
        os.replace(beside.name, path)
    except (OSError, RuntimeError):
        pass  # the next process tries again


def _sound(told):
    return isinstance(told, dict) and isinstance(told.get("ok"), bool) and isinstance(told.get("reason"), str)


def _try(op, device):
    """A verdict. Attention has two kernels on Hopper: the portable one stands in for the other."""
    module, failed = backend.native_module(), []
    for variant in _variants(module, device) if op == "attention" else [None]:
        if variant:
            module.attention_variant(variant)
        why = _disagreement(op, device)
        if why is None:
            reason = "; ".join(["agrees with the reference" + (f" ({variant})" if variant else ""), *failed])
            return {"ok": True, "reason": reason, "variant": variant}
        failed.append(f"{variant}: {why}" if variant else why)
    return {"ok": False, "reason": "; ".join(failed), "variant": None}


def _variants(module, device):
    have = module.attention_variants() if hasattr(module, "attention_variants") else []
    hopper = "sm90" in have and (backend.properties(device).major, backend.properties(device).minor) == (9, 0)
    return ["sm90", "portable"] if hopper else ["portable"] if have else [None]


def _disagreement(op, device):
    """What is wrong with the op's kernels, or None."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    def below(high, *shape):
        return torch.randint(0, high, shape, generator=generator).to(device)

    def fixed(*values):
        return torch.tensor(values, dtype=torch.int32).to(device)

    _here.trying, before = True, backend.poison(True)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for dtypes, name, kernel, reference, *inputs in CASES[op](normal, below, fixed):
                for dtype in dtypes:
                    why = compare(kernel, reference, inputs, dtype)
                    if why:
                        return f"{name} in {str(dtype).removeprefix('torch.')}: {why}"
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernel
    except Exception as error:  # whatever a kernel does wrong, the reference can do the work
        return f"{type(error).__name__}: {error}"
    finally:
        _here.trying = False
        backend.poison(before)
    return None


def compare(kernel, reference, inputs, dtype):
    """How kernel(*inputs) and its gradients are too far from the reference in fp64; None if they are not."""
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    with _nothing_left():
        ours = _values(kernel, inputs)
    naive = _values(reference, inputs)
    exact = _values(reference, [x.double() if x.is_floating_point() else x for x in inputs])
    largest = max(float(z.abs().max()) for z in exact if z.numel())
    floor = ROUNDINGS * torch.finfo(dtype).eps * largest
    for i, (x, y, z) in enumerate(zip(ours, naive, exact, strict=True)):
        if x.shape != z.shape:
            return f"result {i} has shape {tuple(x.shape)} instead of {tuple(z.shape)}"
        error, allowed = (float((t.double() - z).abs().max()) if z.numel() else 0.0 for t in (x, y))
        if not error <= FACTOR * allowed + floor:
            return f"result {i} is off by {error:.3g} where {FACTOR * allowed + floor:.3g} would do"
    return None


@contextmanager
def _nothing_left():
    """Fresh tensors hold NaN: no memory of a right result can pass for one that a kernel has not written."""
    on, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, torch.utils.deterministic.fill_uninitialized_memory = torch.utils.deterministic.fill_uninitialized_memory, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _values(op, inputs):
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = op(*leaves)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    results = [y.detach() for y in outputs]
    with_gradient = [y for y in outputs if y.requires_grad]
    if with_gradient:
        # Weights that no symmetry cancels, the same in every type.
        weights = [torch.arange(y.numel(), device=y.device).double().mul(0.7).sin().view(y.shape).to(y.dtype) for y in with_gradient]
        floating = [x for x in leaves if x.requires_grad]
        gradients = torch.autograd.grad(with_gradient, floating, weights, allow_unused=True)
        results += [g for g in gradients if g is not None]
    return results


BOTH, WIDE = (torch.float32, torch.bfloat16), (torch.float32,)


def _attention_cases(normal, below, fixed):
    bounds = fixed(0, 1, 1, 130, 201)
    for D, causal in ((64, True), (64, False), (128, True), (40, True)):
        kernel, reference = (partial(f, cu_seqlens=bounds, causal=causal) for f in (attention, attention_reference))
        yield BOTH, f"D = {D}, causal {causal}", kernel, reference, normal(201, 4, D), normal(201, 2, D), normal(201, 2, D)


def _decode_cases(normal, below, fixed):
    lengths, bounds, owner = fixed(0, 1, 65, 100), fixed(0, 40, 47), fixed(0, 0, 1, 0)

    def run(f, q, k, v, prefix_k=None, prefix_v=None):
        return f(q, k, v, lengths, prefix=None if prefix_k is None else (prefix_k, prefix_v, bounds, owner))

    for D in (64, 40):
        inputs = normal(4, 6, D), normal(4, 100, 2, D), normal(4, 100, 2, D), normal(47, 2, D), normal(47, 2, D)
        kernel, reference = (partial(_no_gradient, run, f) for f in (attention_decode, attention_decode_reference))
        yield BOTH, f"D = {D}", kernel, reference, *inputs[:3]
        yield BOTH, f"D = {D} with prefixes", kernel, reference, *inputs
        pages, prefix = fixed(*range(28)).flip(0).view(4, 7), (fixed(0, 1, 2, 3).view(2, 2), fixed(17, 32), fixed(1, 0, -1, 1))
        kernel, reference = (partial(_no_gradient, lambda q, k, v, f=f: f(q, k, v, pages, lengths, prefix=prefix))
                             for f in (attention_paged, attention_paged_reference))  # fmt: skip
        yield BOTH, f"D = {D} in pages", kernel, reference, normal(4, 6, D), normal(28, 16, 2, D), normal(28, 16, 2, D)


def _no_gradient(run, *args):
    with torch.no_grad():
        return run(*args)


def _loss_cases(normal, below, fixed):
    targets = below(1025, 33)
    yield (BOTH, "from logits", lambda x: logits_logprobs(x, targets, 0.7),
           lambda x: logits_logprobs_reference(x, targets, 0.7), normal(33, 1025))  # fmt: skip
    yield (BOTH, "from hidden states", lambda h, w: token_logprobs(h, w, targets, 0.7),
           lambda h, w: logits_logprobs_reference(h @ w.T, targets, 0.7), normal(33, 72), normal(1025, 72))  # fmt: skip


def _rope_cases(normal, below, fixed):
    positions = below(5000, 37)
    kernel, reference = ((lambda f: lambda q, k, v, *w: f(q, k, v, positions, 1e4, *w))(f) for f in (rope_qkv, rope_qkv_reference))
    inputs = normal(37, 3, 40), normal(37, 1, 40), normal(37, 1, 40)
    yield BOTH, "rotation", kernel, reference, *inputs
    yield BOTH, "norm and rotation", kernel, reference, *inputs, normal(40), normal(40)


def _optim_cases(normal, below, fixed):
    shapes = [(7, 33), (5,)]
    tensors = [normal(*shape) for _ in range(4) for shape in shapes]

    def run(native, *tensors):
        params, gradients, first, second = (list(tensors[i : i + 2]) for i in (0, 2, 4, 6))
        with torch.no_grad():
            second = [t.abs() for t in second]
            size = optim.gradient_norm(gradients) if native else math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
            optim.adamw_(params, gradients, first, second, 3, 0.1, (0.9, 0.95), 1e-8, 0.1, 0.5)
            updates = optim.momentum_(gradients[:1], first[:1], 0.9, gradients[0].dtype)
            optim.apply_(params[:1], updates, 0.9, 0.1)
        return [t.clone() for t in (*params, *first, *second, updates)] + [params[0].new_tensor(size)]

    yield WIDE, "AdamW and Muon", partial(run, True), partial(_referred, partial(run, False)), *tensors


def _referred(run, *tensors):
    """The same in fp64, where no kernel runs."""
    return [t.to(tensors[0].dtype) for t in run(*(t.double() for t in tensors))]


def _ppo_cases(normal, below, fixed):
    inputs = [0.3 * normal(1003) for _ in range(4)]

    def policy(f, x, old, advantages, ref):
        return [t for t in f(x, old.detach(), advantages.detach(), 0.2, ref.detach())]

    kernel, reference = (partial(policy, f) for f in (ppo_policy_loss, ppo_policy_loss_reference))
    yield WIDE, "policy", kernel, reference, *inputs
    kernel, reference = (lambda x, old, returns, f=f: f(x, old.detach(), returns.detach(), 0.2)
                         for f in (ppo_value_loss, ppo_value_loss_reference))  # fmt: skip
    yield WIDE, "value", kernel, reference, *inputs[:3]


def _gae_cases(normal, below, fixed):
    bounds = fixed(0, 1, 1, 333)
    yield (WIDE, "scan", lambda r, v: gae(r, v, bounds, 0.99, 0.95), lambda r, v: _no_gradient(gae_reference, r, v, bounds, 0.99, 0.95),
           normal(333), normal(333))  # fmt: skip


def _sample_cases(normal, below, fixed):
    requests, steps = below(1000, 9), below(1000, 9)
    own = {"temperature": torch.arange(9, device=steps.device).double() / 4, "top_k": below(60, 9), "mask": below(2**31, 9, 32).int()}
    for name, settings in (("greedy", {"temperature": 0.0}), ("whole", {}), ("masked", own),
                           ("filtered", {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01})):
        kernel, reference = ((lambda f: lambda x: _no_gradient(lambda: f(x, 7, requests, steps, **settings)))(f)
                             for f in (sample, sample_reference))  # fmt: skip
        yield BOTH, name, kernel, reference, normal(9, 1003)


def _row_cases(kernel, reference, *shapes, dtypes=BOTH):
    return lambda normal, below, fixed: [(dtypes, "rows", kernel, reference, *(normal(*shape) for shape in shapes))]


def _embedding_cases(normal, below, fixed):
    ids = below(19, 77)
    yield (BOTH, "rows", lambda w: embedding(ids, w), lambda w: embedding_reference(ids, w), normal(19, 40))


CASES = {
    "attention": _attention_cases, "attention_decode": _decode_cases, "embedding": _embedding_cases, "gae": _gae_cases,
    "linear": lambda normal, below, fixed: [], "loss": _loss_cases, "optim": _optim_cases, "ppo_loss": _ppo_cases, "rope": _rope_cases,
    "sample": _sample_cases, "softmax": _row_cases(softmax, softmax_reference, (7, 1003)),
    "swiglu": _row_cases(swiglu, swiglu_reference, (7, 103), (7, 103)),
    "matmul": _row_cases(matmul, lambda *x: _no_gradient(matmul_reference, *x), (33, 72), (65, 72), (65,)),
    "norm": lambda normal, below, fixed: [
        (BOTH, "norm", rms_norm, rms_norm_reference, normal(7, 203), normal(203)),
        (BOTH, "sum and norm", add_rms_norm, add_rms_norm_reference, normal(7, 203), normal(7, 203), normal(203)),
    ],
}  # fmt: skip
