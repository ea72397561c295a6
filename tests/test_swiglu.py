import math

import pytest
import torch

from nanorlhf.ops import swiglu
from nanorlhf.ops.swiglu import swiglu_reference
from oracle import assert_earned


def test_one_element_worked_by_hand():
    """gate = ln 3: the sigmoid is 3/4, so silu = 3/4 ln 3; times up = 4 that is 3 ln 3."""
    out = swiglu(torch.tensor([[math.log(3)]]), torch.tensor([[4.0]]))
    assert math.isclose(out.item(), 3 * math.log(3), rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (4, 16), (7, 300), (0, 8)])
def test_it_matches_the_oracle(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = 4 * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    assert_earned(swiglu, swiglu_reference, inputs, dtype)


def test_extreme_gates_neither_overflow_nor_turn_to_nan():
    gate = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0]], requires_grad=True)
    out = swiglu(gate, torch.ones(1, 6))
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 0.0, 0.0, 88.0, 200.0]]))
    out.sum().backward()
    torch.testing.assert_close(gate.grad, torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0]]))


def test_halves_of_one_product_need_no_copy():
    product = torch.randn(5, 40)
    gate, up = product.chunk(2, 1)
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))


def test_the_two_gradients_are_halves_of_one_array():
    gate, up = (torch.randn(5, 20, requires_grad=True) for _ in range(2))
    dgate, dup = torch.autograd.grad(swiglu(gate, up).sum(), (gate, up))
    assert dgate.stride() == dup.stride() == (40, 1) and dup.data_ptr() - dgate.data_ptr() == 20 * 4


def test_what_is_written_past_the_caches_is_the_same():
    gate, up = (torch.randn(9, 2**20, requires_grad=True) for _ in range(2))
    ours, plain = swiglu(gate, up), swiglu_reference(gate, up)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(*(torch.autograd.grad(y, (gate, up), up) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"swiglu: expected gate and up of one shape \(N, F\) and dtype, got \(2, 3\)"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 4))


def test_the_ops_are_good_citizens_of_torch():
    x = torch.randn(3, 5)
    torch.library.opcheck(torch.ops.nanorlhf.swiglu_forward.default, (x, x))
    torch.library.opcheck(torch.ops.nanorlhf.swiglu_backward.default, (x, x, x))
