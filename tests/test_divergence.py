"""Policy and reference in one pass: the bits of token_logprobs, and a KL that is judged against fp64."""

import os
import sys

import pytest
import torch

from nanorlhf.ops import backend, token_divergence, token_logprobs
from nanorlhf.ops import loss as loss_room
from nanorlhf.ops.divergence import divergence_reference
from test_backend import ISAS, python

SIZES = [(1, 32, 32, 1), (3, 64, 32, 7), (32, 32, 32, 8), (33, 96, 64, 63), (127, 64, 64, 65), (129, 32, 96, 129), (260, 64, 32, 1001),
         (5, 40, 30, 30), (20, 32, 40, 1025), (0, 32, 32, 5)]  # tiles are 32 tokens by 64 words; a width of 40 has no tiles


def problem(N, C, other, V, dtype, seed=0, apart=1.0):
    """Two models and targets; where their widths are alike, the reference is as far ``apart`` as that."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g)
    h, w, r, u = draw(N, C), 0.3 * draw(V, C), draw(N, other), 0.3 * draw(V, other)
    if C == other:
        r, u = h + apart * r, w + 0.3 * apart * u
    return [x.to(dtype) for x in (h, w, r, u)], torch.randint(0, V, (N,), generator=g)


def exact_kl(h, w, r, u, temperature):
    p, q = ((x.double() @ y.double().T / temperature).log_softmax(-1) for x, y in ((h, w), (r, u)))
    return (p.exp() * (p - q)).sum(-1)


def check(dtype):
    for N, C, other, V in SIZES:
        for temperature, apart in ((1.0, 1.0), (0.7, 0.01)):
            given, targets = problem(N, C, other, V, dtype, seed=N, apart=apart)
            logprobs, entropy, ref_logprobs, kl = token_divergence(*given, targets, temperature)
            wanted = token_logprobs(*given[:2], targets, temperature)
            assert torch.equal(logprobs, wanted[0]) and torch.equal(entropy, wanted[1]), (N, C, other, V)
            assert torch.equal(ref_logprobs, token_logprobs(*given[2:], targets, temperature)[0])
            exact, naive = exact_kl(*given, temperature), divergence_reference(*(x.float() for x in given), temperature)
            assert kl.dtype == torch.float32 and kl.shape == (N,)
            if N:
                error, allowed = (kl - exact).abs().max(), (naive - exact).abs().max()
                assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * (1 + exact.max()), (N, C, other, V, error, allowed)


CHECK = """
import sys
import torch
import test_divergence
from nanorlhf import _C

assert _C.isa() == sys.argv[1]
test_divergence.check(torch.float32)
test_divergence.check(torch.bfloat16)
"""


@pytest.mark.parametrize("isa", ISAS)
def test_on_every_instruction_set_it_has_the_bits_of_token_logprobs_and_the_kl_of_fp64(isa):
    done = python(CHECK, isa, NANORLHF_ISA=isa, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_models_are_no_distance_apart(dtype):
    (h, w, _, _), targets = problem(150, 64, 64, 1000, dtype)
    assert torch.equal(token_divergence(h, w, h.clone(), w.clone(), targets, 0.7)[3], torch.zeros(150, dtype=torch.promote_types(dtype, torch.float32)))


def test_two_words_worked_by_hand():
    """p = (1/4, 3/4) beside (1/2, 1/2): KL = 1/4 ln(1/2) + 3/4 ln(3/2). The other way: 1/2 ln 2 + 1/2 ln(2/3)."""
    ln3 = torch.log(torch.tensor(3.0))
    uneven, even, words, one = torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), ln3 * torch.eye(2), torch.tensor([1])
    logprobs, entropy, ref_logprobs, kl = (float(x) for x in token_divergence(uneven, words, even, words, one))
    assert [logprobs, entropy, ref_logprobs, kl] == pytest.approx([-0.287682, 0.562335, -0.693147, 0.130812], abs=1e-6)
    assert float(token_divergence(even, words, uneven, words, one)[3]) == pytest.approx(0.143841, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_training_and_of_deterministic_mode(dtype):
    given, targets = problem(70, 32, 32, 300, dtype)
    leaves = [x.clone().requires_grad_() for x in given[:2]]
    assert torch.equal(token_divergence(*given, targets)[0], token_logprobs(*leaves, targets)[0].detach())
    before = backend.deterministic(True)
    together = token_divergence(*given, targets)
    alone = token_divergence(given[0][7:9], given[1], given[2][7:9], given[3], targets[7:9])
    own = token_logprobs(*given[:2], targets)[0]
    backend.deterministic(before)
    assert torch.equal(together[0], own) and all(torch.equal(a, b[7:9]) for a, b in zip(alone, together))


def test_rows_in_chunks_are_the_rows_of_all(monkeypatch):
    given, targets = problem(50, 16, 24, 300, torch.float32)
    whole = token_divergence(*given, targets)
    monkeypatch.setattr(loss_room, "CHUNK_BYTES", 4 * 300 * 7)  # 7 rows: eight chunks
    for a, b in zip(token_divergence(*given, targets), whole):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_of_different_types_it_is_the_same_to_rounding():
    """Policy in bf16, reference in fp32; and the plain torch of other devices."""
    (h, w, r, u), targets = problem(40, 32, 32, 70, torch.float32)
    found = token_divergence(h.bfloat16(), w, r, u, targets)
    torch.testing.assert_close(found[3].double(), exact_kl(h.bfloat16(), w.bfloat16(), r, u, 1.0), rtol=0.02, atol=0.02)
    before = backend.force("reference")
    plain = token_divergence(h, w, r, u, targets)
    backend.force(before)
    for a, b in zip(token_divergence(h, w, r, u, targets), plain):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named():
    (h, w, r, u), targets = problem(3, 32, 32, 5, torch.bfloat16)
    for wrong, sentence in [((h, w, r[:2], u, targets), "got 2 and 5 beside 3 and 5"), ((h, w, r, u[:4], targets), "got 3 and 4 beside 3 and 5"),
                            ((h, w, r, u[:, :3], targets), "token_divergence: expected hidden of shape"),
                            ((h, w, r, u, targets[:2]), r"expected targets of shape \(3,\) in int64"),
                            ((h, w, r, u, torch.tensor([0, 5, 1])), r"expected targets in \[0, V = 5\), got 5"),
                            ((h, w, r, u, targets, 0.0), "expected temperature > 0, got 0")]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            token_divergence(*wrong)


def test_it_is_a_good_citizen_of_torch():
    for dtype in (torch.float32, torch.bfloat16):
        given, targets = problem(6, 32, 32, 20, dtype)
        torch.library.opcheck(torch.ops.nanorlhf.token_divergence.default, (*given, targets, 0.8))
