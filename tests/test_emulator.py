"""The emulator that the CUDA kernels are tested on: it runs what is right, and catches what is not. It can only show the mistakes
that its order of things brings about, hence several seeds."""

import re

import pytest
import torch

import emulated

SEEDS = range(8)


def results(name, in_, size):
    """What the kernel gives under each seed; None where the launch is an error."""
    cuda = emulated.module()
    found = []
    for seed in SEEDS:
        cuda.seed(seed)
        out = torch.full((size,), float("nan"))
        try:
            cuda.try_kernel(name, out.data_ptr(), in_.data_ptr())
            found.append(out)
        except RuntimeError as error:
            found.append(str(error))
    return found


def numbers(n):
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


def test_threads_meet_at_a_barrier():
    x = numbers(128)
    assert all(torch.equal(y, x.flip(0)) for y in results("reverse", x, 128))


def test_background_copies_come():
    x = numbers(512)
    assert all(torch.equal(y, x) for y in results("copy", x, 512))


def test_tma_and_wgmma_multiply():
    """64 rows by the 64 others, in fp32 from bf16."""
    rows = numbers(128 * 64).view(128, 64).bfloat16()
    expected = rows[:64].double() @ rows[64:].double().T
    for y in results("product", rows, 64 * 64):
        torch.testing.assert_close(y.view(64, 64).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["reverse without a barrier", "copy without waiting"])
def test_what_was_not_waited_for_is_not_there(name):
    x = numbers(512)
    assert any(y.isnan().any() for y in results(name, x, 512))


@pytest.mark.parametrize(("name", "sentence"), [
    ("half a barrier", "all others wait for each other"),
    ("half a warp", "lanes of one warp at different instructions"),
    ("past the end", "past the end of shared memory"),
    ("product that arrives twice", "more arrivals at an mbarrier|waits at an mbarrier"),
])  # fmt: skip
def test_a_kernel_that_cannot_go_on_is_an_error(name, sentence):
    x = numbers(128 * 64)
    assert all(isinstance(y, str) and re.search(sentence, y) for y in results(name, x, 64 * 64))


@pytest.mark.parametrize("name", ["product read early", "product without expecting"])
def test_a_product_that_is_not_waited_for_is_wrong(name):
    rows = numbers(128 * 64).view(128, 64).bfloat16()
    expected = rows[:64].float() @ rows[64:].float().T
    found = results(name, rows, 64 * 64)
    assert any(isinstance(y, str) or not torch.allclose(y.view(64, 64), expected, atol=1e-3) for y in found)
