import math

import pytest
import torch

from nanorlhf.ops import rms_norm
from nanorlhf.ops.norm import rms_norm_reference
from oracle import assert_earned


def test_a_row_worked_by_hand():
    """x = (3, 4): the mean square is 25/2, so y = x · √2 / 5 · weight."""
    y = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([5.0, 10.0]), eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[3 * math.sqrt(2), 8 * math.sqrt(2)]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (300, 64), (2, 3, 17), (129, 256), (0, 8)])
def test_it_matches_the_oracle(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(shape[-1:], generator=generator)
    assert_earned(lambda x, w: rms_norm(x, w), lambda x, w: rms_norm_reference(x, w), (x, weight), dtype)


def test_scaling_the_input_changes_nothing():
    x, weight = torch.randn(5, 40), torch.randn(40)
    torch.testing.assert_close(rms_norm(1000 * x, weight, 0.0), rms_norm(x, weight, 0.0))


def test_a_zero_row_stays_zero():
    assert rms_norm(torch.zeros(2, 8), torch.ones(8)).eq(0).all()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"rms_norm: expected x of shape \(\.\.\., C\) and weight of shape \(C,\)"):
        rms_norm(torch.zeros(2, 8), torch.ones(7))


def test_the_ops_are_good_citizens_of_torch():
    x, weight = torch.randn(4, 8), torch.randn(8)
    torch.library.opcheck(torch.ops.nanorlhf.rms_norm_forward.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.nanorlhf.rms_norm_backward.default, (x, x, weight, torch.ones(4)))
