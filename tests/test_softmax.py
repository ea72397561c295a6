import math

import pytest
import torch

from nanorlhf.ops import softmax
from nanorlhf.ops.softmax import softmax_reference
from oracle import assert_earned


def test_two_logits_worked_by_hand():
    """exp(0) = 1 and exp(ln 3) = 3, so the shares are 1/4 and 3/4."""
    torch.testing.assert_close(softmax(torch.tensor([0.0, math.log(3)])), torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 3, 16), (5, 17), (2, 5000), (0, 4), (7,)])
def test_it_matches_the_oracle(shape, dtype):
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_earned(softmax, softmax_reference, [x], dtype)


def test_shares_are_positive_and_sum_to_one():
    y = softmax(torch.randn(4, 1000) * 10)
    assert (y >= 0).all()
    torch.testing.assert_close(y.sum(-1), torch.ones(4))


def test_huge_equal_and_infinite_logits():
    assert softmax(torch.tensor([1e4, 0.0])).tolist() == [1, 0]
    assert softmax(torch.full((4,), -1e30)).tolist() == [0.25] * 4
    assert softmax(torch.tensor([-math.inf, 2.0])).tolist() == [0, 1]
    assert softmax(torch.full((3,), -math.inf)).isnan().all()
    assert softmax(torch.tensor([math.nan] + [0.0] * 40)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_past_the_caches_is_the_same(dtype):
    x = torch.randn(20, 2**20).to(dtype).requires_grad_()
    y, plain = softmax(x), softmax_reference(x)
    torch.testing.assert_close(y, plain, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    gradients = [torch.autograd.grad(z, x, x.detach() * 1000)[0] for z in (y, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-5)


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"softmax: expected x of shape \(\.\.\., V\) in floating point"):
        softmax(torch.arange(3))


def test_the_ops_are_good_citizens_of_torch():
    x = torch.randn(3, 5)
    torch.library.opcheck(torch.ops.nanorlhf.softmax_forward.default, (x,))
    torch.library.opcheck(torch.ops.nanorlhf.softmax_backward.default, (x, x))
