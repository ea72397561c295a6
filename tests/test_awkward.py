"""What breaks kernels, asked of all of them: strides that pass 2³¹, one column, no row, −inf, NaN, memory full of NaN."""

import ctypes.util
import math
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanorlhf import ops

HERE = Path(__file__).parent
DTYPES = [torch.float32, torch.bfloat16]
FAR = 2**31 + 64  # elements


def far_apart(rows, dtype):
    """(count, ...) copied into room where one row follows the other FAR elements later; pages between are never touched."""
    width = rows[0].numel()
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number, which Python did not always know
    room = mmap.mmap(-1, ((len(rows) - 1) * FAR + width) * rows.element_size(),
                     flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    view = torch.frombuffer(room, dtype=dtype).as_strided((len(rows), *rows.shape[1:]), (FAR, *rows[0].stride()))
    return view.copy_(rows)


needs_room = pytest.mark.skipif(sys.maxsize < 2**32 or sys.platform != "linux",
                                reason="needs an address space of 64 bits and memory without reservation")


@needs_room
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [
    lambda x: ops.attention(x, x, x, torch.tensor([0, 3]).int()),
    lambda x: ops.attention_decode(x, x[:, None], x[:, None], torch.ones(3, dtype=torch.int32)),
    lambda x: ops.rope(x, torch.arange(3)),
    lambda x: ops.swiglu(x[:, 0], x[:, 1]),
    lambda x: ops.softmax(x),
    lambda x: ops.rms_norm(x, torch.ones(32)),
    lambda x: ops.embedding(torch.arange(3) * (x.stride(0) // 32), x.as_strided((2 * x.stride(0) // 32 + 1, 32), (32, 1))),
    lambda x: ops.token_logprobs(x[:, 0], x[:, 1], torch.arange(3)),
    lambda x: ops.logits_logprobs(x[:, 0], torch.arange(3)),
], ids=["attention", "attention_decode", "rope", "swiglu", "softmax", "rms_norm", "embedding", "token_logprobs",
        "logits_logprobs"])  # fmt: skip
def test_strides_that_pass_two_to_the_31_reach_the_right_memory(op, dtype):
    """The offsets of the third row are beyond 2³², so that neither half of a 64-bit number may be lost."""
    near = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    far = far_apart(near, dtype)
    assert far.stride(0) > 2**31
    expected, got = op(near), op(far)
    torch.testing.assert_close(got, expected)  # not equal: torch's product may take another path


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_column(dtype):
    """A softmax over one is 1 with no gradient; its log-prob and entropy are 0; RMSNorm leaves the sign; attention over
    values of width 1 averages them."""
    x = torch.tensor([[3.0], [-0.5], [100.0]], dtype=dtype, requires_grad=True)
    y = ops.softmax(x)
    y.backward(torch.ones_like(y))
    assert y.eq(1).all() and x.grad.eq(0).all()
    for logprobs, entropy in (ops.logits_logprobs(x, torch.zeros(3, dtype=torch.int64)),
                              ops.token_logprobs(x, torch.ones(1, 1, dtype=dtype), torch.zeros(3, dtype=torch.int64))):
        assert logprobs.eq(0).all() and entropy.eq(0).all()
    torch.testing.assert_close(ops.rms_norm(x, torch.ones(1), 0.0), x.sign())
    assert torch.equal(ops.embedding(torch.tensor([2, 0]), x), x[[2, 0]])
    torch.testing.assert_close(ops.swiglu(x, torch.ones_like(x)), torch.nn.functional.silu(x))
    q = torch.zeros(3, 1, 1, dtype=dtype)
    mean = ops.attention(q, q, torch.tensor([1.0, 3.0, 8.0], dtype=dtype).view(3, 1, 1), torch.tensor([0, 3]).int())
    torch.testing.assert_close(mean.flatten(), torch.tensor([1.0, 2.0, 4.0], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 15, 16, 33, 1500])
def test_minus_infinity_alone_in_a_row_and_nan_stay_in_their_row(columns, dtype):
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    clean = x.clone()
    x[1], x[3, columns // 2] = -math.inf, math.nan
    targets, sound = torch.zeros(5, dtype=torch.int64), [0, 2, 4]
    assert ops.softmax(x)[[1, 3]].isnan().all() and torch.equal(ops.softmax(x)[sound], ops.softmax(clean)[sound])
    for got, expected in zip(ops.logits_logprobs(x, targets), ops.logits_logprobs(clean, targets), strict=True):
        assert got[[1, 3]].isnan().all() and torch.equal(got[sound], expected[sound])
    norm = [ops.rms_norm(z, torch.ones(columns)) for z in (x, clean)]
    assert norm[0][3].isnan().all() and torch.equal(norm[0][sound], norm[1][sound])


@pytest.mark.parametrize("columns", [2, 17, 1030])
def test_logits_of_minus_infinity_but_one_are_certain(columns):
    """Whatever a filter leaves: the first thousand may all be excluded."""
    x = torch.full((1, columns), -math.inf, requires_grad=True)
    with torch.no_grad():
        x[0, columns - 1] = -5.0
    logprobs, entropy = ops.logits_logprobs(x, torch.tensor([columns - 1]))
    (logprobs + entropy).sum().backward()
    assert logprobs.item() == entropy.item() == 0 and x.grad.eq(0).all()
    assert ops.softmax(x).tolist() == [[0.0] * (columns - 1) + [1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0], [0, 0, 0]])
def test_no_token_at_all_gives_nothing_and_gradients_of_zero(cu_seqlens, dtype):
    cu_seqlens, none = torch.tensor(cu_seqlens).int(), torch.zeros(0, dtype=torch.int64)
    weight = torch.randn(7, 32, dtype=dtype, requires_grad=True)
    x = ops.rms_norm(ops.embedding(none, weight), weight[0])
    q = ops.rope(x.view(0, 2, 16), ops.positions_from_cu_seqlens(cu_seqlens))
    x = ops.swiglu(ops.softmax(ops.attention(q, q, q, cu_seqlens).view(0, 32)), x)
    logprobs, entropy = ops.token_logprobs(x, weight, none)
    (logprobs.sum() + entropy.sum() + ops.logits_logprobs(x, none)[0].sum()).backward()
    assert logprobs.shape == entropy.shape == (0,) and weight.grad.eq(0).all()
    assert ops.attention_decode(q, q[:, None], q[:, None], torch.zeros(0, dtype=torch.int32)).shape == (0, 2, 16)


POISON = """
#include <cstdlib>
#include <cstring>
extern "C" {
void* __libc_malloc(size_t);
void* __libc_memalign(size_t, size_t);
static void* poisoned(void* p, size_t n) { return p ? memset(p, 0xFF, n) : p; }
void* malloc(size_t n) { return poisoned(__libc_malloc(n), n); }
void* aligned_alloc(size_t a, size_t n) { return poisoned(__libc_memalign(a, n), n); }
void* memalign(size_t a, size_t n) { return poisoned(__libc_memalign(a, n), n); }
int posix_memalign(void** p, size_t a, size_t n) { return (*p = poisoned(__libc_memalign(a, n), n)) ? 0 : 12; }
}
"""

RESULTS = """
import sys
sys.path[1:1] = [sys.argv[1]]
import torch
from every_op import everything
if sys.argv[3] == "poisoned":
    assert torch.empty(1000).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
torch.save([everything() for _ in range(2)], sys.argv[2])
"""


@pytest.mark.skipif(not (shutil.which("g++") and sys.platform == "linux" and ctypes.util.find_library("c") == "libc.so.6"),
                    reason="needs a compiler and glibc")
@pytest.mark.parametrize("isa", ["portable", None])
def test_memory_that_is_all_nan_when_it_comes_changes_no_bit(tmp_path, isa):
    """Every allocation, torch's outputs and the kernels' workspaces, is filled with bytes of 255: NaN in fp32, bf16 and
    fp64. A kernel that read what it had not written would differ from the run without."""
    (tmp_path / "poison.cpp").write_text(POISON)
    library = tmp_path / "poison.so"
    subprocess.run(["g++", "-O1", "-fno-builtin", "-shared", "-fPIC", tmp_path / "poison.cpp", "-o", library], check=True)
    results = []
    for name, preload in (("clean", ""), ("poisoned", str(library))):
        # torch's own products round by where in memory their arguments lie, unless MKL is told not to.
        environment = {**os.environ, "LD_PRELOAD": preload, "MKL_CBWR": "COMPATIBLE", **({"NANORLHF_ISA": isa} if isa else {})}
        done = subprocess.run([sys.executable, "-c", RESULTS, str(HERE.parent), tmp_path / name, name], env=environment,
                              cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results += torch.load(tmp_path / name)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
    assert all(r.isfinite().all() for r in results[0])


def test_a_head_whose_sizes_do_not_fit_is_an_error():
    for hidden, weight in (((4, 32), (9, 4096)), ((4, 64), (9, 32)), ((4, 32), (9, 32, 1))):
        with pytest.raises(ValueError, match="cross_entropy: expected hidden of shape"):
            ops.cross_entropy(torch.ones(hidden).bfloat16(), torch.ones(weight).bfloat16(), torch.tensor([1, 2, 3, 4]))


def test_hidden_states_without_dimensions_are_uniform():
    """No dimension: all logits are 0, so each of 9 tokens has log-prob -ln 9, and there is nothing to differentiate by."""
    hidden = torch.zeros(4, 0).bfloat16().requires_grad_()
    logprobs, _ = ops.token_logprobs(hidden, torch.zeros(9, 0).bfloat16(), torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(logprobs, torch.full((4,), 9.0).log().neg())
    logprobs.sum().backward()
    assert hidden.grad.shape == (4, 0)


def test_a_value_that_is_not_a_number_reaches_the_loss_and_its_gradient():
    for which in range(3):
        given = [torch.zeros(40), torch.zeros(40), torch.ones(40)]
        given[which][2] = float("nan")
        values = given[0].requires_grad_()
        loss = ops.ppo_value_loss(values, *given[1:], 0.2).loss
        (gradient,) = torch.autograd.grad(loss, values)
        assert loss.isnan() and gradient[2].isnan() and gradient[3].isfinite()


def test_a_second_derivative_is_an_error_and_not_a_wrong_number():
    x, w = torch.randn(3, 8).requires_grad_(), torch.ones(8).requires_grad_()
    (g,) = torch.autograd.grad(ops.rms_norm(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (g * x).sum().backward()


def test_lengths_beyond_the_cache_are_an_error_with_a_prefix_too():
    one = torch.ones
    prefix = one(9, 1, 4), one(9, 1, 4), torch.tensor([0, 1, 9]).int(), torch.tensor([0, 1]).int()
    before = ops.backend.deterministic(True)
    try:
        for lengths in ([3, 0], [-1, 0]):
            with pytest.raises(ValueError, match=r"expected lengths in \[0, Tmax = 2"):
                ops.attention_decode(one(2, 1, 4), one(2, 2, 1, 4), one(2, 2, 1, 4), torch.tensor(lengths).int(), prefix=prefix)
    finally:
        ops.backend.deterministic(before)
