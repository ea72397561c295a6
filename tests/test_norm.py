import math

import pytest
import torch

from nanorlhf.ops import add_rms_norm, rms_norm
from nanorlhf.ops.norm import add_rms_norm_reference, rms_norm_reference
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (300, 64), (2, 3, 17), (129, 256), (0, 8)])
def test_a_residual_is_added_and_both_gradients_come_through_it(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, *shape, generator=generator)
    inputs = x, residual, torch.randn(shape[-1:], generator=generator)
    assert_earned(lambda *a: add_rms_norm(*a), lambda *a: add_rms_norm_reference(*a), inputs, dtype)


def test_the_sum_of_x_and_residual_is_the_stream_and_may_end_there():
    """(1, 4) + (2, 0) = (3, 4), normalised as above; without a gradient of its own the stream adds none."""
    x, residual = torch.tensor([[1.0, 4.0]], requires_grad=True), torch.tensor([[2.0, 0.0]], requires_grad=True)
    y, total = add_rms_norm(x, residual, torch.ones(2), eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[3 * math.sqrt(2) / 5, 4 * math.sqrt(2) / 5]]))
    assert total.tolist() == [[3.0, 4.0]]
    # dy_1/dx = sqrt(2) (1/5 - 3 * 3/125, -3 * 4/125)
    expected = math.sqrt(2) * torch.tensor([[16 / 125, -12 / 125]])
    for gradient in torch.autograd.grad(y[0, 0], (x, residual), retain_graph=True):
        torch.testing.assert_close(gradient, expected)
    for gradient in torch.autograd.grad(total[0, 1], (x, residual)):
        assert gradient.tolist() == [[0.0, 1.0]]


def test_a_row_that_lies_elsewhere_and_a_large_one_are_the_same():
    """40 MB of output are written past the caches; a transposed input is copied first."""
    x, weight = torch.randn(10, 2**20), torch.randn(2**20)
    torch.testing.assert_close(rms_norm(x, weight), rms_norm_reference(x, weight))
    torch.testing.assert_close(rms_norm(x.T, weight[:10]), rms_norm_reference(x.T, weight[:10]))


def test_a_residual_that_is_not_like_x_is_named():
    with pytest.raises(ValueError, match=r"add_rms_norm: expected a residual like x, of shape \(2, 8\)"):
        add_rms_norm(torch.zeros(2, 8), torch.zeros(2, 7), torch.ones(8))


def test_the_ops_are_good_citizens_of_torch():
    x, weight = torch.randn(4, 8), torch.randn(8)
    torch.library.opcheck(torch.ops.nanorlhf.rms_norm_forward.default, (x, weight, 1e-5, x))
    torch.library.opcheck(torch.ops.nanorlhf.rms_norm_backward.default, (x, x, weight, torch.ones(4), None))
