"""The loss head that never forms the logits, where this CPU multiplies bf16; elsewhere the same calls take the other way. And the
GPU's, block by block."""

from types import SimpleNamespace

import pytest
import torch

from nanorlhf import _C
from nanorlhf.ops import backend, head, token_logprobs
from nanorlhf.ops.loss import logits_logprobs_reference
from oracle import assert_earned, values_and_gradients


def inputs_of(N, C, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, C, generator=generator), 0.3 * torch.randn(V, C, generator=generator)
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("N", "C", "V"),
    [(1, 32, 1), (3, 64, 7), (31, 32, 8), (32, 96, 63), (33, 32, 65), (127, 64, 127), (129, 256, 129), (260, 32, 1000), (5, 40, 30)],
)
def test_values_and_gradients_match_the_oracle(N, C, V, temperature):
    """Tiles are 32 tokens by 64 words forward and 128 by 32 backward; a width of 40 is not one that it takes."""
    hidden, weight, targets = inputs_of(N, C, V)
    assert_earned(
        lambda h, w: token_logprobs(h, w, targets, temperature),
        lambda h, w: logits_logprobs_reference(h @ w.T, targets, temperature),
        (hidden, weight),
        torch.bfloat16,
    )


def test_log_probabilities_are_those_of_exact_products():
    """The logits are never rounded to bf16: log-probs are as good as fp32 makes them."""
    hidden, weight, targets = inputs_of(200, 64, 3000)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact = logits_logprobs_reference(hidden.double() @ weight.double().T, targets)
    for ours, wanted in zip(token_logprobs(hidden, weight, targets), exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), wanted, rtol=2e-6, atol=2e-5)


def test_a_batch_is_its_rows_and_no_rows_are_no_loss():
    hidden, weight, targets = inputs_of(100, 32, 300)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    together = token_logprobs(hidden, weight, targets)
    for rows in (slice(0, 1), slice(17, 50), slice(64, 100)):
        alone = token_logprobs(hidden[rows], weight, targets[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))
    leaves = [x.clone().requires_grad_() for x in (hidden[:0], weight)]
    logprobs, entropy = token_logprobs(*leaves, targets[:0])
    gradients = torch.autograd.grad(logprobs.sum() + entropy.sum(), leaves)
    assert logprobs.shape == (0,) and gradients[0].shape == (0, 32) and not gradients[1].any()


def test_gradients_are_the_same_on_every_run_and_come_in_the_dtypes_of_their_inputs():
    hidden, weight, targets = inputs_of(150, 64, 500)
    first, second = (values_and_gradients(lambda h: token_logprobs(h, weight, targets), [hidden], torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    master = weight.clone().requires_grad_()  # fp32
    token_logprobs(hidden.bfloat16(), master, targets)[0].sum().backward()
    assert master.grad.dtype == torch.float32


def test_a_target_out_of_range_is_an_error():
    hidden, weight, _ = inputs_of(2, 32, 5)
    with pytest.raises(ValueError, match=r"expected targets in \[0, V = 5\), got 5"):
        token_logprobs(hidden.bfloat16(), weight.bfloat16(), torch.tensor([0, 5]))


def test_this_machine_says_whether_it_has_it():
    assert _C.has_head() == (_C.isa() in ("avx512bf16", "amx"))


@pytest.fixture
def blocks(monkeypatch):
    """The GPU's head on the CPU, with the CPU's reduction: 7 rows or 128 columns at a time where both are few."""
    shapes = []

    def loss(is_backward, rows, columns, *args):
        shapes.append((is_backward, rows, columns))
        _C.loss(is_backward, rows, columns, *args[:-1], 1)

    monkeypatch.setattr(head, "BLOCK_BYTES", 4 * 7 * 300)
    monkeypatch.setattr(head, "KEPT_BYTES", 0)
    before = backend.emulate(SimpleNamespace(loss=loss, loss_workspace=lambda rows, columns: 0))
    yield shapes
    backend.emulate(before)


@pytest.mark.parametrize("kept", [0, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_by_block_as_on_a_gpu_it_is_the_same(blocks, monkeypatch, dtype, kept):
    monkeypatch.setattr(head, "KEPT_BYTES", kept)
    hidden, weight, targets = inputs_of(20, 32, 300)
    assert_earned(
        lambda h, w: token_logprobs(h, w, targets, 0.7),
        lambda h, w: logits_logprobs_reference(h @ w.T, targets, 0.7),
        (hidden, weight),
        dtype,
    )
    forward = [(False, 20, 300)] if kept else [(False, 7, 300), (False, 7, 300), (False, 6, 300)]
    assert blocks == [*forward, (True, 20, 128), (True, 20, 128), (True, 20, 44)]


def test_types_may_differ_and_rows_be_none(blocks):
    hidden, weight, targets = inputs_of(3, 32, 300)
    weight.requires_grad_()
    logprobs, _ = token_logprobs(hidden.bfloat16(), weight, targets)
    logprobs.sum().backward()
    exact = logits_logprobs_reference(hidden.bfloat16().double() @ weight.detach().bfloat16().double().T, targets)[0]
    torch.testing.assert_close(logprobs.double(), exact, rtol=2e-6, atol=2e-5)
    assert weight.grad.dtype == torch.float32 and weight.grad.any()
    empty = hidden[:0].clone().requires_grad_()
    weight.grad = None
    token_logprobs(empty, weight, targets[:0])[0].sum().backward()
    assert empty.grad.shape == (0, 32) and not weight.grad.any()


def test_a_target_that_is_no_word_makes_its_row_nan_and_no_other(blocks):
    hidden, weight, targets = inputs_of(5, 32, 300)
    _, entropy, lse, kept = head.forward(hidden, weight, targets, 1.0, False)
    targets[3] = 300
    ones = torch.ones(5)
    dhidden, _ = head.backward(ones, ones * 0, ones * 0, hidden, weight, targets, entropy, lse, kept, 1.0)
    assert dhidden[3].isnan().all() and not dhidden[[0, 1, 2, 4]].isnan().any()


def test_kept_logits_survive_the_gradient(blocks, monkeypatch):
    monkeypatch.setattr(head, "KEPT_BYTES", 1 << 20)
    hidden, weight, targets = inputs_of(5, 32, 100)
    loss = token_logprobs(hidden.requires_grad_(), weight, targets)[0].sum()
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
