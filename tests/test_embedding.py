import pytest
import torch

from nanorlhf.ops import embedding
from nanorlhf.ops.embedding import embedding_reference
from oracle import assert_earned

DTYPES = [torch.float32, torch.bfloat16]


def ids_of(N, V, seed=0):
    return torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed))


def test_rows_and_their_gradients_worked_by_hand():
    """Row 1 is taken twice, with gradients 1 and 10; row 2 never."""
    weight = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    out = embedding(torch.tensor([1, 0, 1]), weight)
    out.backward(torch.tensor([[1.0], [5.0], [10.0]]))
    assert out.tolist() == [[2], [1], [2]] and weight.grad.tolist() == [[5], [11], [0]]


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V, C", [(0, 3, 4), (1, 1, 1), (40, 7, 15), (300, 1000, 17), (999, 50, 64)])
def test_the_rows_are_torchs_to_the_last_bit(N, V, C, dtype, to):
    weight, ids = torch.randn(V, C, generator=torch.Generator().manual_seed(0)).to(dtype), ids_of(N, V)
    for index in (ids, ids.int()):
        out = embedding(index, weight, to)
        assert out.dtype == to and torch.equal(out, torch.nn.functional.embedding(ids, weight).to(to))


def test_copied_rows_keep_every_bit_whatever_they_mean():
    for dtype in DTYPES:
        odd = torch.tensor([[float("nan"), -0.0, float("inf"), 1e-40, -1e-45]]).to(dtype)
        whole = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(embedding(torch.tensor([0]), odd).view(whole), odd.view(whole))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V, C", [(1, 1, 1), (500, 3, 15), (2000, 100, 33)])
def test_the_gradient_matches_the_oracle(N, V, C, dtype):
    weight, ids = torch.randn(V, C, generator=torch.Generator().manual_seed(0)), ids_of(N, V)
    assert_earned(lambda w: embedding(ids, w), lambda w: embedding_reference(ids, w), (weight,), dtype)


def test_gradients_in_bf16_of_a_weight_in_fp32_are_added_in_fp32():
    """256 ones and one 2⁻⁷: bf16 sums stop at 256 and lose the fraction."""
    weight = torch.zeros(2, 16, requires_grad=True)
    dout = torch.ones(258, 16, dtype=torch.bfloat16)
    dout[7] = 2**-7
    embedding(torch.zeros(258, dtype=torch.int64), weight, torch.bfloat16).backward(dout)
    assert weight.grad.dtype == torch.float32 and weight.grad[0].eq(257 + 2**-7).all() and weight.grad[1].eq(0).all()


def test_the_order_of_the_sum_is_that_of_the_tokens_on_any_number_of_threads():
    """(2²⁴ + 1) + 1 is 2²⁴ in fp32, 1 + 1 + 2²⁴ is not; and a skewed batch splits into unequal rows."""
    weight = torch.zeros(1, 1, requires_grad=True)
    embedding(torch.zeros(3, dtype=torch.int64), weight).backward(torch.tensor([[2.0**24], [1.0], [1.0]]))
    assert weight.grad.item() == 2**24
    ids = ids_of(5000, 70) * (ids_of(5000, 3, 1) > 0)
    dout, results, before = torch.randn(5000, 48), [], torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        weight = torch.zeros(70, 48, requires_grad=True)
        embedding(ids, weight).backward(dout)
        results.append(weight.grad)
    torch.set_num_threads(before)
    expected = torch.zeros(70, 48)
    for n in range(5000):
        expected[ids[n]] += dout[n]
    assert all(torch.equal(expected, r) for r in results)


def test_strided_input_is_read_as_it_is():
    weight, ids = torch.randn(8, 6), torch.arange(8)
    assert torch.equal(embedding(ids[::2], weight.T.contiguous().T), weight[::2])
    weight.requires_grad_()
    embedding(ids, weight).sum().backward()  # an expanded gradient
    assert weight.grad.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_an_id_out_of_range_is_refused(wrong, dtype):
    weight = torch.zeros(5, 3, dtype=dtype, requires_grad=True)
    with pytest.raises(ValueError, match=r"embedding: expected ids in \[0, V = 5\)"):
        embedding(torch.tensor([0, wrong, 1]), weight)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"embedding: expected ids of shape \(N,\) in int64 and weight of shape \(V, C\)"):
        embedding(torch.zeros(2, 3), torch.zeros(4, 5))


def test_the_ops_are_good_citizens_of_torch():
    ids = torch.tensor([1, 0, 1])
    torch.library.opcheck(torch.ops.nanorlhf.embedding_forward.default, (ids, torch.randn(3, 4), torch.bfloat16))
    torch.library.opcheck(torch.ops.nanorlhf.embedding_backward.default, (torch.randn(3, 4), ids, 3))
