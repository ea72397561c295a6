"""Ragged attention against torch's SDPA, forward and forward with backward, in fp32 and bf16.

Batches of one length go to torch as one dense call; a packed batch of mixed lengths as a loop over its sequences, and as one
call with a block mask. Every contender gets inputs of the same dtype, and is compared with the others first.
"""

import pytest
import torch
import torch.nn.functional as F

from nanorlhf.ops import attention
from timing import report

HEADS, DIM = 4, 64
MIXED = [8, 431, 77, 260, 19, 512, 143, 330, 52, 208, 495, 101, 366, 33, 290, 174, 64, 449, 120, 237]
LENGTHS = {"T256": [256] * 16, "T512": [512] * 8, "T1024": [1024] * 4, "mixed 8-512": MIXED}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dense(q, k, v, lengths):
    """One call for sequences of one length."""
    q, k, v = (x.view(len(lengths), lengths[0], HEADS, DIM).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)


def loop(q, k, v, lengths):
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    rows = [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), is_causal=True)[0] for part in parts]
    return torch.cat([x.transpose(0, 1) for x in rows])


def masked(q, k, v, mask):
    return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask)[0].transpose(0, 1)


def block_mask(lengths):
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()


def case(name, dtype):
    """Verifies, then gives [(shape, GFLOP, contenders)] of both directions."""
    lengths = LENGTHS[name]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (torch.randn(sum(lengths), HEADS, DIM).to(DTYPES[dtype]).requires_grad_() for _ in range(3))
    g, mask = torch.randn(sum(lengths), HEADS, DIM).to(DTYPES[dtype]), block_mask(lengths)
    ways = {"nanorlhf": lambda: attention(q, k, v, cu_seqlens)}
    if len(set(lengths)) == 1:
        ways["torch dense"] = lambda: dense(q, k, v, lengths)
    else:
        ways |= {"torch loop": lambda: loop(q, k, v, lengths), "torch mask": lambda: masked(q, k, v, mask)}
    exact = loop(*(x.double() for x in (q, k, v)), lengths)
    for way in ways.values():
        torch.testing.assert_close(way().double(), exact, rtol=0, atol=2e-2 if dtype == "bf16" else 1e-4)
    work = sum(2 * HEADS * DIM * T * (T + 1) for T in lengths) / 1e9  # causal: half of 4 H D T²

    def inference(way):
        def run():
            with torch.no_grad():
                way()

        return run

    forward = {name: inference(way) for name, way in ways.items()}
    both = {name: lambda way=way: torch.autograd.grad(way(), (q, k, v), g) for name, way in ways.items()}
    return [(f"forward  {name} {dtype}", work, forward), (f"backward {name} {dtype}", 3.5 * work, both)]


@pytest.mark.parametrize("direction", [0, 1], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("contender", ["nanorlhf", "torch dense", "torch loop", "torch mask"])
def test_attention(benchmark, name, dtype, direction, contender):
    contenders = case(name, dtype)[direction][2]
    if contender not in contenders:
        pytest.skip("dense is for one length, loop and mask for several")
    benchmark(contenders[contender])


if __name__ == "__main__":
    report([row for name in LENGTHS for dtype in DTYPES for row in case(name, dtype)])
