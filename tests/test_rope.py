import math

import pytest
import torch

from nanorlhf.ops import positions_from_cu_seqlens, rope, rope_qkv
from nanorlhf.ops.rope import rope_qkv_reference, rope_reference
from oracle import assert_earned


def test_a_quarter_turn_worked_by_hand():
    """D = 4, base = (2/π)² : the frequencies are 1 and base^(-1/2) = π/2, so position 1 turns the second pair
    (x[1], x[3]) by a quarter: (1, 0) becomes (0, 1)."""
    out = rope(torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]), torch.tensor([1]), base=(2 / math.pi) ** 2)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 0.0, 0.0, 1.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "H", "D"), [(1, 1, 2), (5, 3, 30), (40, 2, 32), (9, 4, 34), (300, 2, 64), (0, 2, 8)])
def test_it_matches_the_oracle(N, H, D, dtype):
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 3000, (N,), generator=generator)
    x = torch.randn(N, H, D, generator=generator)
    assert_earned(lambda x: rope(x, positions), lambda x: rope_reference(x, positions), (x,), dtype)


def test_products_depend_on_the_distance_only():
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    near = (rope(q, torch.tensor([7])) * rope(k, torch.tensor([3]))).sum()
    far = (rope(q, torch.tensor([107])) * rope(k, torch.tensor([103]))).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def test_lengths_are_kept_and_position_zero_is_left_alone():
    x = torch.randn(6, 2, 32)
    turned = rope(x, torch.arange(6))
    assert torch.equal(turned[0], x[0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_a_slice_of_a_packed_product_needs_no_copy():
    packed = torch.randn(7, 6, 16)
    assert torch.equal(rope(packed[:, :4], torch.arange(7)), rope(packed[:, :4].contiguous(), torch.arange(7)))


def test_positions_restart_in_every_sequence():
    assert positions_from_cu_seqlens(torch.tensor([0, 0, 2, 5, 5], dtype=torch.int32)).tolist() == [0, 1, 0, 1, 2]
    assert positions_from_cu_seqlens(torch.tensor([0], dtype=torch.int32)).tolist() == []


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"rope: expected x of shape \(N, H, D\) with D even, got \(2, 1, 3\)"):
        rope(torch.zeros(2, 1, 3), torch.arange(2))
    with pytest.raises(ValueError, match=r"rope: expected positions of shape \(2,\) in int64"):
        rope(torch.zeros(2, 1, 4), torch.arange(3))
    with pytest.raises(ValueError, match="rope: expected positions of at least 0, got -1"):
        rope(torch.zeros(2, 1, 4), torch.tensor([0, -1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("N", "H", "Hkv", "D"), [(1, 1, 1, 2), (5, 3, 1, 30), (300, 4, 2, 32), (9, 2, 2, 34), (40, 2, 1, 128), (0, 2, 1, 8)])
def test_queries_and_keys_of_one_product_match_the_oracle(N, H, Hkv, D, normed, dtype):
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 3000, (N,), generator=generator)
    packed = torch.randn(N, (H + 2 * Hkv) * D, generator=generator)
    weights = [torch.randn(D, generator=generator) for _ in range(2 * normed)]

    def through(op):
        def run(packed, *weights):
            q, k, v = packed.unflatten(1, (-1, D)).split([H, Hkv, Hkv], 1)
            return op(q, k, v, positions, 1e4, *weights)

        return run

    assert_earned(through(rope_qkv), through(rope_qkv_reference), (packed, *weights), dtype)


def test_a_normalised_head_worked_by_hand():
    """D = 2, a quarter turn: (3, 4) becomes sqrt(2)/5 (3, 4) · (5, 10) = sqrt(2) (3, 8), turned (-8, 3); a key without weight
    in each place is as it was."""
    x = torch.tensor([[[3.0, 4.0]]])
    base_free = torch.tensor([1])
    q, k, v = rope_qkv(x, x, x, base_free, q_weight=torch.tensor([5.0, 10.0]), k_weight=torch.ones(2), eps=0.0)
    turned = [[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]]
    expected = math.sqrt(2) * torch.tensor(turned) @ torch.tensor([3.0, 8.0])
    torch.testing.assert_close(q[0, 0], expected)
    torch.testing.assert_close(k[0, 0], math.sqrt(2) / 5 * torch.tensor(turned) @ torch.tensor([3.0, 4.0]))
    assert v is x or torch.equal(v, x)


def test_the_three_gradients_are_columns_of_one_array():
    q, k, v = torch.randn(7, 4, 16), torch.randn(7, 2, 16), torch.randn(7, 2, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    outputs = rope_qkv(*leaves, torch.arange(7))
    dq, dk, dv = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
    assert dq.stride() == dk.stride() == dv.stride() == (8 * 16, 16, 1)
    assert dk.data_ptr() - dq.data_ptr() == 4 * 16 * 4 and dv.data_ptr() - dq.data_ptr() == 6 * 16 * 4


def test_arguments_of_the_fused_op_are_named():
    q, k = torch.zeros(2, 2, 4), torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match=r"rope_qkv: expected q \(N, H, D\) and k, v \(N, Hkv, D\) of one dtype"):
        rope_qkv(q, k, k.bfloat16(), torch.arange(2))
    with pytest.raises(ValueError, match=r"rope_qkv: expected two weights of shape \(4,\) or none, got \[\(4,\)\]"):
        rope_qkv(q, k, k, torch.arange(2), q_weight=torch.ones(4))
    with pytest.raises(ValueError, match="rope: expected positions of at least 0, got -1"):
        rope_qkv(q, k, k, torch.tensor([0, -1]))


def test_the_ops_are_good_citizens_of_torch():
    q, k, weight, positions = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(8), torch.arange(3)
    torch.library.opcheck(torch.ops.nanorlhf.rope_forward.default, (q, k, positions, 1e4, weight, weight, 1e-5))
    torch.library.opcheck(torch.ops.nanorlhf.rope_forward.default, (q, k, positions, 1e4, None, None, 1e-5))
    backward = torch.ops.nanorlhf.rope_backward.default
    torch.library.opcheck(backward, (q, k, k, positions, 1e4, q, k, weight, weight, 1e-5))
    torch.library.opcheck(backward, (q, k, k, positions, 1e4, None, None, None, None, 1e-5))
