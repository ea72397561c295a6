import pytest
import torch

from nanorlhf.ops import matmul
from nanorlhf.ops.matmul import matmul_reference
from test_backend import ISAS, python

SHAPES = [(1, 1, 1), (1, 33, 16), (2, 17, 31), (31, 64, 33), (32, 15, 257), (127, 40, 64), (128, 129, 32), (129, 300, 96), (300, 65, 500),
          (5, 600, 1600), (140, 31, 3100)]  # fmt: skip

EARNED = """
import sys
import torch
from nanorlhf import _C
from nanorlhf.ops import matmul
from nanorlhf.ops.matmul import matmul_reference

assert _C.isa() == sys.argv[1]
g = torch.Generator().manual_seed(0)
for N, R, C in eval(sys.argv[2]):
    for dtype, out in [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]:
        x, weight = torch.randn(N, C, generator=g).to(dtype), torch.randn(R, C, generator=g).to(dtype)
        bias, label = torch.randn(R, generator=g) if R % 2 else None, (N, R, C, dtype, out)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            got = matmul(x, weight, bias, out)
            if threads == 1:
                exact = matmul_reference(x.double(), weight.double(), bias)
                naive = matmul_reference(x, weight, bias, out).double() - exact
                floor = 4 * torch.finfo(out).eps * exact.abs().max()
                assert got.dtype == out and (got.double() - exact).abs().max() <= 2 * naive.abs().max() + floor, label
                one = got
            assert torch.equal(got, one), label
            for rows in (slice(0, 1), slice(N // 2, N), slice(N // 3, N // 3 + 20)):
                assert torch.equal(matmul(x[rows], weight, bias, out), one[rows]), label
            assert torch.equal(matmul(x, weight[R // 2:], None if bias is None else bias[R // 2:], out), one[:, R // 2:]), label
"""


def test_two_rows_worked_by_hand():
    """(1, 2) · (3, 4) = 11 and (1, 2) · (1, 0) = 1; (0, 1) takes the second column; then the bias."""
    x, weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert matmul(x, weight).tolist() == [[11, 1], [4, 0]]
    assert matmul(x.bfloat16(), weight.bfloat16(), torch.tensor([0.5, -1.0])).tolist() == [[11.5, 0], [4.5, -1]]


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_is_as_exact_as_torch_and_a_batch_is_its_rows_to_the_last_bit(isa):
    done = python(EARNED, isa, str(SHAPES), NANORLHF_ISA=isa)
    assert done.returncode == 0, done.stderr


def test_shapes_and_strides():
    x, weight = torch.randn(4, 3, 40), torch.randn(70, 40)
    assert matmul(x, weight).shape == (4, 3, 70) and matmul(x[0, 0], weight).shape == (70,)
    assert matmul(x[:0], weight).shape == (0, 3, 70) and matmul(x, weight[:0]).shape == (4, 3, 0)
    assert torch.equal(matmul(x[:, 1, ::2], weight.T[::2].T), matmul(x[:, 1, ::2].clone(), weight[:, ::2].clone()))
    wide = matmul(x.double(), weight.double())
    assert wide.dtype == torch.float64 and torch.equal(wide, matmul_reference(x.double(), weight.double()))


def test_nan_and_infinity_stay_in_their_row():
    x, weight = torch.randn(40, 50), torch.randn(20, 50)
    clean = matmul(x, weight)
    x[3, 7], x[20, 0] = torch.nan, torch.inf
    dirty, others = matmul(x, weight), [i for i in range(40) if i not in (3, 20)]
    assert dirty[3].isnan().all() and dirty[20].isinf().all() and torch.equal(dirty[others], clean[others])


def test_what_does_not_fit_is_named():
    for x, weight, bias in [((2, 8), (3, 7), None), ((2, 8), (3, 8), (2,)), ((2, 0), (3, 0), None), ((), (3, 8), None)]:
        with pytest.raises(ValueError, match=r"matmul: expected x of shape \(\.\.\., C\), weight of shape \(R, C\) in its dtype"):
            matmul(torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias))
    with pytest.raises(ValueError, match="in torch.float32, .* in torch.bfloat16"):
        matmul(torch.zeros(2, 8), torch.zeros(3, 8).bfloat16())
