import pytest
import torch
import torch.nn.functional as F

from nanorlhf.ops import backend, linear, weights_held
from nanorlhf.ops.linear import linear_reference
from oracle import assert_earned

SIZES = (12, 5, 20)


def matrices(columns=16, sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator) for rows in sizes]


def test_two_maps_of_one_row_worked_by_hand():
    """(1, 2) · I = (1, 2); (1, 2) · (1, 1) + 10 = 13."""
    x, biases = torch.tensor([[1.0, 2.0]]), [torch.zeros(2), torch.tensor([10.0])]
    assert [y.tolist() for y in linear(x, [torch.eye(2), torch.ones(1, 2)], biases)] == [[[1.0, 2.0]], [[13.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 16), (0, 16), (1, 16), (2, 9, 16), (16,)])
@pytest.mark.parametrize("biased", [False, True])
def test_it_matches_the_oracle(shape, dtype, biased):
    x, biases = torch.randn(shape, generator=torch.Generator().manual_seed(1)), [w[:, 0].clone() for w in matrices()] * biased
    for count in (1, 3):
        run = lambda op: lambda x, *rest: op(x, rest[:count], rest[count:])
        assert_earned(run(linear), run(linear_reference), (x, *matrices()[:count], *biases[:count]), dtype)


@pytest.mark.parametrize("rows", [63, 64, 65])
def test_few_rows_and_many_round_alike(rows):
    """Another product may do few rows of bf16; both round an exact sum once, which is half a unit of the eight bits of the mantissa."""
    x, weight = torch.randn(rows, 48).bfloat16(), torch.randn(40, 48)
    exact = x.double() @ weight.bfloat16().double().T
    bound = exact.abs() * 2**-8 + 1e-6 * (x.double().abs() @ weight.double().abs().T)
    assert ((linear(x, [weight])[0].double() - exact).abs() <= bound).all()


def test_without_columns_the_sums_are_zero():
    for dtype in (torch.float32, torch.bfloat16):
        assert linear(torch.zeros(2, 0, dtype=dtype), [torch.zeros(3, 0)])[0].eq(torch.zeros(2, 3)).all()


def test_gradients_of_fp32_weights_come_in_fp32_whatever_the_product():
    x = torch.randn(30, 16).bfloat16().requires_grad_()
    weights, biases = [w.requires_grad_() for w in matrices()], [torch.zeros(n, requires_grad=True) for n in SIZES]
    ys = linear(x, weights, biases)
    sum(y.float().square().sum() for y in ys).backward()
    assert {y.dtype for y in ys} == {x.grad.dtype} == {torch.bfloat16}
    for y, w, b in zip(ys, weights, biases, strict=True):
        dy = 2 * y.detach()
        torch.testing.assert_close(w.grad, (dy.double().T @ x.detach().double()).float(), rtol=5e-3, atol=0.05)
        torch.testing.assert_close(b.grad, dy.double().sum(0).float(), rtol=1e-5, atol=1e-5)


def test_gradients_are_alike_whether_they_come_in_one_tensor_or_apart():
    """A kernel may write the gradients of all parts side by side; then one product does them."""
    x, weights = torch.randn(30, 16, requires_grad=True), [w.requires_grad_() for w in matrices()]
    wide = torch.randn(30, sum(SIZES))
    ways = [wide.split(SIZES, 1), [part.clone() for part in wide.split(SIZES, 1)], [part.T.clone().T for part in wide.split(SIZES, 1)]]
    first, *others = [torch.autograd.grad(linear(x, weights), [x, *weights], way) for way in ways]
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-5, atol=1e-5)


def test_an_unused_part_and_a_frozen_weight_have_no_part_in_it():
    x, weights = torch.randn(6, 16, requires_grad=True), [w.requires_grad_(i != 1) for i, w in enumerate(matrices())]
    linear(x, weights)[0].sum().backward()
    torch.testing.assert_close(x.grad, weights[0].detach().sum(0).expand(6, 16))
    assert weights[1].grad is None and weights[2].grad.eq(0).all()


def test_a_change_of_a_weight_shows_in_the_next_product():
    x, weight = torch.randn(3, 16).bfloat16(), torch.nn.Parameter(matrices()[0])
    for change in (weight.data.neg_, lambda: setattr(weight, "data", 2 * weight.data), lambda: weight.data[0].zero_()):
        change()
        assert torch.equal(linear(x, [weight])[0], F.linear(x, weight.bfloat16()))


def test_held_weights_are_cast_once_and_let_go():
    x, weight = torch.randn(3, 16).bfloat16(), torch.nn.Parameter(matrices()[0])
    with torch.no_grad():
        with weights_held():
            first = linear(x, [weight])[0]
            weight.neg_()  # against the rule, to see the held cast
            assert torch.equal(linear(x, [weight])[0], first)
        assert torch.equal(linear(x, [weight])[0], -first)


def test_the_reference_can_be_forced():
    x, weights = torch.randn(3, 16), matrices()
    ours, before = linear(x, weights), backend.force("reference")
    try:
        torch.testing.assert_close(linear(x, weights), ours)
    finally:
        backend.force(before)


def test_shapes_that_do_not_fit_are_named():
    for biases in ([], [torch.zeros(2)], [torch.zeros(3), torch.zeros(3)]):
        weights = [torch.zeros(2, 8), torch.zeros(3, 7 if not biases else 8)]
        with pytest.raises(ValueError, match=r"linear: expected x of shape \(\.\.\., C\), weights of shape \(R, C\)"):
            linear(torch.zeros(1, 8), weights, biases)
