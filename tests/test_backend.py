import os
import subprocess
import sys

import pytest
import torch

from nanorlhf import _C, ops
from nanorlhf.ops import backend

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
    with pytest.raises(ValueError, match="softmax: NANORLHF_BACKEND=cuda cannot run here: no CUDA kernel was built"):
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
    assert {row[0] for row in rows} == {"cpu", "cuda", "reference"}
    assert all(isinstance(ok, bool) and reason for *_, ok, reason in rows)
    assert _C.isa() in ISAS
