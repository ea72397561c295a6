import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nanorlhf import _C, ops
from nanorlhf.ops import backend, trust

ISAS = ["portable"]
ISAS += ["avx2"] if _C.cpu_features()["avx2"] and _C.cpu_features()["fma"] else []
ISAS += ["avx512"] if all(_C.cpu_features()["avx512" + part] for part in ("f", "bw", "vl", "dq")) else []
ISAS += ["avx512bf16"] if "avx512" in ISAS and _C.cpu_features()["avx512_bf16"] else []
ISAS += ["amx"] if "avx512bf16" in ISAS and _C.cpu_features()["amx_bf16"] else []

EVERY_OP = """
import sys
import torch
from nanorlhf import _C, ops
from nanorlhf.ops import backend

assert _C.isa() == sys.argv[1]
g = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(90, h, 40, generator=g) for h in (4, 2, 2))
x, w, up = (torch.randn(s, generator=g) for s in ((90, 50), (70, 50), (90, 50)))
targets, cu_seqlens = torch.randint(0, 70, (90,), generator=g), torch.tensor([0, 17, 17, 90]).int()
cases = {
    "attention": (lambda q, k, v: ops.attention(q, k, v, cu_seqlens), (q, k, v)),
    "bidirectional": (lambda q, k, v: ops.attention(q, k, v, cu_seqlens, causal=False), (q, k, v)),
    "token_logprobs": (lambda x, w: sum(ops.token_logprobs(x, w, targets)), (x, w)),
    "softmax": (ops.softmax, (x,)),
    "rms_norm": (lambda x, w: ops.rms_norm(x, w[0]), (x, w)),
    "rope": (lambda q: ops.rope(q, torch.arange(90)), (q,)),
    "swiglu": (ops.swiglu, (x, up)),
    "embedding": (lambda w: ops.embedding(targets, w), (w,)),
    "ppo_policy_loss": (lambda x: sum(ops.ppo_policy_loss(x[0], *up[:2].to(x), 0.2, up[2].to(x))), (x,)),
    "ppo_value_loss": (lambda x: sum(ops.ppo_value_loss(x[0], *up[:2].to(x), 0.2)), (x,)),
    "add_rms_norm": (lambda x, up, w: sum(ops.add_rms_norm(x, up, w[0])), (x, up, w)),
    "rope_qkv": (lambda q, k, w: torch.cat(ops.rope_qkv(q, k, k, torch.arange(90), 1e4, w[0, :40], w[1, :40]), 1), (q, k, w)),
}
def run(op, inputs, dtype):
    leaves = [t.to(dtype).clone().requires_grad_() for t in inputs]
    out = op(*leaves)
    out.square().sum().backward()
    return [out.detach().double()] + [t.grad.double() for t in leaves]
for name, (op, inputs) in cases.items():
    for a, b in zip(run(op, inputs, torch.float32), run(op, inputs, torch.float64)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()), msg=name)
for a, b in zip(*(ops.gae(*(t.T.flatten()[:90].to(d) for t in (x, up)), cu_seqlens, 0.99, 0.95) for d in (torch.float32, torch.float64))):
    torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
large = torch.randn(2, 3, 2**21, generator=g)  # written past the caches
for dtype in (torch.float32, torch.bfloat16):
    for op, inputs in ((ops.softmax, large[:1]), (ops.swiglu, large), (lambda x: ops.rms_norm(x, x[0]), large[:1])):
        for a, b in zip(run(op, inputs, dtype), run(op, inputs.to(dtype), torch.float64)):
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
cache, lengths = k[None, :, :].expand(3, 90, 2, 40), torch.tensor([1, 33, 90]).int()
a = ops.attention_decode(q[:3], cache, cache, lengths)
b = ops.attention_decode(q[:3].double(), cache.double(), cache.double(), lengths)
torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
results = []
for dtype in (torch.float32, torch.float64):
    p, gradient, m, v = (t.to(dtype).clone() for t in (x, up, x * 0, x * 0))
    ops.optim.adamw_([p], [gradient], [m], [v], 1, 0.1, (0.9, 0.95), 1e-8, 0.1, scale=0.5)
    update = ops.optim.momentum_([gradient], [m], 0.9, dtype)
    ops.optim.apply_([p], update, 0.9, 0.1)
    rounded = ops.optim.momentum_([gradient], [m.clone()], 0.9, torch.bfloat16)
    ops.optim.apply_([p], rounded, 0.9, 0.1)
    results.append([t.double() for t in (p, m, v, update, torch.tensor(ops.optim.gradient_norm([p, gradient])))])
for a, b in zip(*results):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
"""


def python(code, *args, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture
def forced():
    before = backend.force("auto")
    yield backend.force
    backend.force(before)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_of_this_cpu_computes_the_same(isa):
    done = python(EVERY_OP, isa, NANORLHF_ISA=isa)
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_an_error():
    done = python("import torch, nanorlhf.ops", NANORLHF_ISA="sse9")
    assert "NANORLHF_ISA: expected portable, avx2, avx512, avx512bf16 or amx, got sse9" in done.stderr
    assert done.returncode != 0


def test_the_environment_names_the_backend():
    show = "import torch; from nanorlhf.ops import backend; print(backend.use_native('x', torch.zeros(1)))"
    assert python(show, NANORLHF_BACKEND="reference").stdout.strip() == "False"
    assert "NANORLHF_BACKEND: expected one of auto, cpu, cuda, reference, got 'gpu'" in python(
        show, NANORLHF_BACKEND="gpu"
    ).stderr


def test_auto_takes_the_kernel_where_it_can_run(forced):
    assert backend.use_native("softmax", torch.zeros(1))
    assert not backend.use_native("softmax", torch.zeros(1, dtype=torch.float64))


def test_a_forced_backend_that_cannot_run_says_why(forced):
    forced("cuda")
    with pytest.raises(ValueError, match="softmax: NANORLHF_BACKEND=cuda cannot run here: .*CUDA"):
        ops.softmax(torch.zeros(1))
    forced("cpu")
    with pytest.raises(ValueError, match="the CPU kernels take float32 and bfloat16, not torch.float64"):
        ops.softmax(torch.zeros(1, dtype=torch.float64))


def test_the_reference_can_be_forced_and_agrees(forced):
    x = torch.randn(3, 20)
    native = ops.softmax(x)
    forced("reference")
    torch.testing.assert_close(ops.softmax(x), native)


def test_every_row_of_the_table_has_a_reason():
    rows = backend.table()
    assert {row[0] for row in rows} == set(backend.KERNELS) and {row[1] for row in rows} == {"cpu", "cuda", "reference"}
    assert all(isinstance(ok, bool) and reason for *_, ok, reason in rows)
    assert _C.isa() in ISAS


@pytest.fixture
def world(monkeypatch):
    """What backend.py sees of this machine: any part of it can be replaced."""
    gpu = SimpleNamespace(name="GPU", major=9, minor=0)
    monkeypatch.setattr(backend, "_cuda", SimpleNamespace(softmax=print, matmul=print))
    monkeypatch.setattr(backend, "properties", lambda device: gpu)
    monkeypatch.setattr(backend, "_verdicts", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return SimpleNamespace(gpu=gpu, patch=monkeypatch.setattr)


CUDA = torch.device("cuda", 0)


def test_every_way_in_which_cuda_cannot_run_has_its_reason(world):
    def reason(device=CUDA, dtype=torch.float32, op="softmax"):
        ok, why = backend.runnable("cuda", device, dtype, op)
        assert not ok
        return why

    assert backend.runnable("cuda", CUDA, torch.bfloat16, "softmax") == (True, "CUDA kernels on GPU")
    assert reason(torch.device("cpu")) == "the CUDA kernels cannot read memory on cpu"
    assert reason(dtype=torch.float16) == "the CUDA kernels take float32 and bfloat16, not torch.float16"
    assert reason(op="rms_norm") == "this build of the CUDA kernels has no norm"
    world.gpu.major, world.gpu.minor = 7, 5
    assert reason() == "the CUDA kernels need compute capability 8.0, GPU has 7.5"
    world.patch(torch.cuda, "is_available", lambda: False)
    world.patch(torch.version, "cuda", None)
    assert reason() == "this torch is built without CUDA"
    world.patch(torch.version, "cuda", "13.0")
    assert reason() == "torch finds no GPU or no driver for it"
    world.patch(backend, "_cuda", None)
    world.patch(backend, "build_info", lambda: {"reason": "no nvcc was found"})
    world.patch(backend.Path, "glob", lambda *_: [])
    assert reason() == "no CUDA kernel was built: no nvcc was found"
    world.patch(backend.Path, "glob", lambda *_: ["_cuda.so"])
    world.patch(backend, "_why_not", ImportError("undefined symbol"), raising=False)
    assert reason() == "the CUDA kernels cannot be loaded: undefined symbol"


def test_torch_sees_an_op_where_it_looks():
    """A profile names it; under a mode of the dispatcher and under a transform of functions it is an op like torch's own."""
    seen, x = [], torch.ones(2, 4)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Watch():
        ops.swiglu(x, x)
    with torch.profiler.profile() as profile:
        ops.swiglu(x, x)
    assert "nanorlhf.swiglu_forward.default" in seen and "nanorlhf::swiglu_forward" in {e.name for e in profile.events()}
    stacked = torch.vmap(lambda x: ops.swiglu(x, x))(torch.stack((x, 2 * x)))
    assert torch.equal(stacked, torch.stack((ops.swiglu(x, x), ops.swiglu(2 * x, 2 * x))))


@pytest.mark.parametrize("op", [*backend.KERNELS, *backend.SHARED])
def test_every_op_knows_its_kernels(op):
    functions = backend.KERNELS[backend.SHARED.get(op, op)]
    assert all(hasattr(_C, name) for name in functions)


class OnGpu:
    is_cuda, device = True, CUDA

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype


def test_auto_takes_a_cuda_kernel_that_is_trusted(world, forced):
    told = {"softmax": (None, "later", False), "matmul": (True, "agrees", True)}
    asked = []
    world.patch(trust, "verdict", lambda op, device: asked.append(op) or told[op])
    assert not backend.use_native("softmax", OnGpu())
    told["softmax"] = (True, "agrees", True)
    assert backend.use_native("softmax", OnGpu()) and backend.use_native("softmax", OnGpu())
    assert asked == ["softmax"] * 2  # asked until it is settled
    assert not backend.use_native("rms_norm", OnGpu()) and not backend.use_native("softmax", OnGpu(torch.float64))
    assert backend.use_native("linear", OnGpu())  # torch's own products: nothing to check
    told["matmul"] = (False, "is off", True)
    assert not backend.use_native("matmul", OnGpu()) and asked == ["softmax"] * 2 + ["matmul"]
    forced("cuda")  # never checks
    assert backend.use_native("matmul", OnGpu()) and len(asked) == 3
    forced("reference")
    assert not backend.use_native("softmax", OnGpu())
    forced("cpu")
    with pytest.raises(ValueError, match="the CPU kernels cannot read memory on cuda:0"):
        backend.use_native("softmax", OnGpu())


def test_deterministic_on_a_gpu_takes_what_has_kernels(world, forced):
    world.patch(trust, "verdict", lambda op, device: (op == "softmax", "says the check", True))
    before = backend.deterministic(True)
    try:
        assert backend.use_native("softmax", OnGpu())
        with pytest.raises(ValueError, match="rms_norm: deterministic needs the CUDA kernels, and they cannot run here: this build .* no norm"):
            backend.use_native("rms_norm", OnGpu())
        with pytest.raises(ValueError, match="matmul: deterministic needs the CUDA kernels.*: says the check"):
            backend.use_native("matmul", OnGpu())
        forced("cuda")
        assert backend.use_native("matmul", OnGpu())
    finally:
        backend.deterministic(before)


def test_an_emulated_module_runs_on_cpu_tensors_in_workspaces_full_of_nan():
    lanes = []

    def softmax(*args):
        lanes.append(args[-1])
        _C.softmax(*args[:-1], 1)

    x = torch.randn(3, 5)
    expected = ops.softmax(x)
    before = backend.emulate(SimpleNamespace(softmax=softmax, softmax_workspace=lambda rows, columns: 8 * rows * columns))
    try:
        assert torch.equal(ops.softmax(x), expected)
        ops.rms_norm(x, torch.ones(5))  # it has no such kernel: the reference runs
    finally:
        module = backend.emulate(before)
    assert module.softmax is softmax and len(lanes) == 1
    device, stream, address, size = lanes[0]
    assert (device, stream, size) == (0, 0, 120) and address == lanes[0].workspace.data_ptr()
    assert lanes[0].workspace.view(torch.float32).isnan().all()
    assert backend.native(x) == (_C, torch.get_num_threads())


@pytest.mark.parametrize(("workspace", "size"), [(None, 0), (24, 24), (lambda module: module.bytes, 40)])
def test_a_workspace_is_asked_for_in_three_ways(workspace, size):
    before = backend.emulate(SimpleNamespace(bytes=40))
    try:
        assert backend.native(torch.zeros(1), workspace)[1][3] == size
    finally:
        backend.emulate(before)
