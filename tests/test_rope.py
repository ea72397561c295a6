import math

import pytest
import torch

from nanorlhf.ops import positions_from_cu_seqlens, rope
from nanorlhf.ops.rope import rope_reference
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


def test_the_op_is_a_good_citizen_of_torch():
    args = (torch.randn(3, 2, 8), torch.arange(3), 1e4, False)
    torch.library.opcheck(torch.ops.nanorlhf.rope.default, args)
