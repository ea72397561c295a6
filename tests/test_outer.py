"""The product that gives a weight its gradient, where the CPU multiplies bf16."""

import os
import sys

import pytest
import torch

from nanorlhf.ops.matmul import has_outer, outer
from test_backend import ISAS, python

SIZES = [(1, 1, 1), (0, 3, 5), (31, 32, 33), (33, 64, 31), (512, 96, 32), (513, 40, 64), (256, 32, 64), (257, 64, 32), (1100, 130, 70), (2, 576, 192), (700, 5, 0)]


def pair(N, R, C, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, R, generator=g).bfloat16(), torch.randn(N, C, generator=g).bfloat16()


def check():
    for N, R, C in SIZES:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            x, y = pair(N, R, C)
            found, exact = outer(x, y), x.double().T @ y.double()
            assert found.dtype == torch.float32 and found.shape == (R, C)
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6 * (N + 1), msg=str((N, R, C)))
            wide = torch.cat([y, x, y], 1)  # rows of which x is the middle
            assert torch.equal(outer(wide[:, C : C + R], y), found)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa == "amx"])
def test_on_every_instruction_set_it_is_the_product_in_fp64(isa):
    code = "import sys, test_outer; from nanorlhf import _C; assert _C.isa() == sys.argv[1]; test_outer.check()"
    done = python(code, isa, NANORLHF_ISA=isa, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode == 0, done.stderr


def test_two_rows_worked_by_hand():
    """(1, 2)ᵀ (3, 4) + (5, 6)ᵀ (7, 8) = ((38, 44), (48, 56))."""
    x, y = torch.tensor([[1.0, 2.0], [5.0, 6.0]]).bfloat16(), torch.tensor([[3.0, 4.0], [7.0, 8.0]]).bfloat16()
    if not has_outer(x, y):
        pytest.skip("this CPU does not multiply bf16")
    assert outer(x, y).tolist() == [[38.0, 44.0], [48.0, 56.0]]
    assert torch.ops.nanorlhf.outer.default(x, y).tolist() == outer(x, y).tolist()
    torch.library.opcheck(torch.ops.nanorlhf.outer.default, (x, y))


def test_what_it_does_not_take_is_torchs():
    x, y = pair(4, 32, 32)
    assert not has_outer(x.float(), y) and not has_outer(x.T.contiguous().T, y) and not has_outer(x[:2], y)
