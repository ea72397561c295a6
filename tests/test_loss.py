import math

import pytest
import torch

from nanorlhf.ops import cross_entropy, logits_logprobs, next_token_positions, token_logprobs
from nanorlhf.ops.loss import logits_logprobs_reference
from oracle import assert_earned, values_and_gradients


def problem(N, C, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, C, generator=generator), torch.randn(V, C, generator=generator)
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


def test_two_tokens_worked_by_hand():
    """Logits 0 and ln 3: p = (1/4, 3/4), entropy = ln 4 - 3/4 ln 3. At temperature 1/2 they are 0 and ln 9:
    p = (1/10, 9/10)."""
    logits, target = torch.tensor([[0.0, math.log(3)]]), torch.tensor([1])
    logprob, entropy = logits_logprobs(logits, target)
    assert math.isclose(logprob.item(), math.log(0.75), abs_tol=1e-6)
    assert math.isclose(entropy.item(), math.log(4) - 0.75 * math.log(3), abs_tol=1e-6)
    assert math.isclose(logits_logprobs(logits, target, 0.5)[0].item(), math.log(0.9), abs_tol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("N", "C", "V"), [(1, 1, 1), (5, 8, 15), (33, 16, 16), (7, 24, 17), (20, 32, 1025), (0, 4, 5)])
def test_values_and_gradients_match_the_oracle(N, C, V, temperature):
    hidden, weight, targets = problem(N, C, V)
    assert_earned(
        lambda h, w: token_logprobs(h, w, targets, temperature),
        lambda h, w: logits_logprobs_reference(h @ w.T, targets, temperature),
        (hidden, weight),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_logits_match_the_oracle(dtype):
    hidden, weight, targets = problem(30, 8, 2049)
    assert_earned(
        lambda x: logits_logprobs(x, targets, 1.5),
        lambda x: logits_logprobs_reference(x, targets, 1.5),
        (hidden @ weight.T,),
        dtype,
    )


def test_the_chunk_size_changes_nothing_but_rounding(monkeypatch):
    hidden, weight, targets = problem(50, 16, 300)
    whole = values_and_gradients(lambda h, w: token_logprobs(h, w, targets), (hidden, weight), torch.float32)
    monkeypatch.setattr("nanorlhf.ops.loss.CHUNK_BYTES", 4 * 300 * 7)  # 7 rows: eight chunks
    parts = values_and_gradients(lambda h, w: token_logprobs(h, w, targets), (hidden, weight), torch.float32)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_computing_the_logits_again_gives_the_same_bits_as_keeping_them(monkeypatch):
    hidden, weight, targets = problem(50, 16, 300)
    kept = values_and_gradients(lambda h, w: token_logprobs(h, w, targets), (hidden, weight), torch.float32)
    monkeypatch.setattr("nanorlhf.ops.loss.KEEP_BYTES", 0)
    again = values_and_gradients(lambda h, w: token_logprobs(h, w, targets), (hidden, weight), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_a_second_backward_gives_the_same_gradient():
    hidden, weight, targets = problem(20, 8, 30)
    hidden.requires_grad_()
    loss = token_logprobs(hidden, weight, targets)[0].sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)


def test_bf16_inputs_give_fp32_results_from_fp32_products():
    hidden, weight, targets = problem(9, 32, 40)
    h, w = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    logprobs, entropy = token_logprobs(h, w, targets)
    exact, _ = logits_logprobs_reference(h.double() @ w.double().T, targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-5, atol=1e-5)
    (logprobs.sum() + entropy.sum()).backward()
    assert h.grad.dtype == w.grad.dtype == torch.bfloat16


def test_gradient_of_the_logprob_alone_is_onehot_minus_p():
    logits = torch.randn(4, 10, requires_grad=True)
    targets = torch.tensor([0, 9, 3, 3])
    logits_logprobs(logits, targets)[0].sum().backward()
    expected = torch.nn.functional.one_hot(targets, 10) - logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, expected)


def test_logprobs_are_never_positive_and_entropies_never_negative():
    for scale in (1e-3, 1.0, 30.0, 1e4):
        logits = scale * torch.randn(64, 1500, generator=torch.Generator().manual_seed(2))
        logprobs, entropy = logits_logprobs(logits, logits.argmax(-1))
        assert (logprobs <= 1e-6).all()
        assert (entropy >= 0).all()
        assert (entropy <= math.log(1500) + 1e-5).all()


def test_infinite_and_equal_logits():
    """-inf means impossible: with two of four left and equal, each has log-prob -ln 2 and the entropy is ln 2."""
    logits = torch.tensor([[-math.inf, 1e4, -math.inf, 1e4]], requires_grad=True)
    logprob, entropy = logits_logprobs(logits, torch.tensor([3]))
    assert math.isclose(logprob.item(), -math.log(2), abs_tol=1e-6)
    assert math.isclose(entropy.item(), math.log(2), abs_tol=1e-6)
    (logprob + entropy).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, -0.5, 0.0, 0.5]]))
    impossible, _ = logits_logprobs(logits.detach(), torch.tensor([0]))
    assert impossible.item() == -math.inf
    assert logits_logprobs(torch.full((1, 3), -1e30), torch.tensor([0]))[0].item() == pytest.approx(-math.log(3))


def test_positions_skip_each_last_token_and_empty_sequences():
    assert next_token_positions(torch.tensor([0, 0, 1, 4, 4], dtype=torch.int32)).tolist() == [1, 2]
    assert next_token_positions(torch.tensor([0], dtype=torch.int32)).tolist() == []


def test_bad_arguments_are_named():
    hidden, weight, targets = problem(3, 4, 5)
    with pytest.raises(ValueError, match=r"expected targets in \[0, V = 5\), got 5"):
        token_logprobs(hidden, weight, torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match=r"expected targets in \[0, V = 5\), got -1"):
        logits_logprobs(hidden @ weight.T, torch.tensor([0, -1, 1]))
    with pytest.raises(ValueError, match=r"expected hidden of shape \(N, C\) and weight of shape \(V, C\)"):
        token_logprobs(hidden, weight[:, :3], targets)
    with pytest.raises(ValueError, match=r"expected targets of shape \(3,\) in int64"):
        token_logprobs(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match="expected temperature > 0, got 0"):
        token_logprobs(hidden, weight, targets, 0)


def test_the_ops_are_good_citizens_of_torch():
    hidden, weight, targets = problem(6, 4, 20)
    ops = torch.ops.nanorlhf
    torch.library.opcheck(ops.token_logprobs_forward.default, (hidden, weight, targets, 0.8, False))
    logprobs, entropy, lse, kept = ops.token_logprobs_forward(hidden, weight, targets, 0.8, True)
    given = (logprobs, entropy, entropy, hidden, weight, targets, entropy, lse, kept, 0.8)
    torch.library.opcheck(ops.token_logprobs_backward.default, given)
    logits = hidden @ weight.T
    torch.library.opcheck(ops.logits_logprobs_forward.default, (logits, targets, 0.8))
    torch.library.opcheck(ops.logits_logprobs_backward.default, (logprobs, entropy, logits, targets, entropy, lse, 0.8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_is_torch_with_a_z_loss_and_the_ignored_rows_left_out(dtype, z_loss):
    """The oracle is torch in fp64: F.cross_entropy with ignore_index, plus z_loss times the mean of logsumexp² (PaLM §5)."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(70, 64, generator=generator), 0.5 * torch.randn(90, 64, generator=generator)
    targets = torch.randint(0, 90, (70,), generator=generator)
    targets[::3] = -100
    counted = targets != -100

    def oracle(h, w):
        logits = h @ w.T
        z = logits.logsumexp(-1)[counted].square().mean()
        return (torch.nn.functional.cross_entropy(logits, targets) + z_loss * z,)

    assert_earned(lambda h, w: (cross_entropy(h, w, targets, z_loss=z_loss),), oracle, (hidden, weight), dtype)
    leaf = hidden.to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(leaf, weight.to(dtype), targets, z_loss=z_loss), leaf)
    assert not gradient[~counted].any() and gradient[counted].any(1).all()


def test_cross_entropy_without_a_target_is_an_error():
    with pytest.raises(ValueError, match="expected at least one target that counts, got none"):
        cross_entropy(torch.ones(2, 8), torch.ones(4, 8), torch.full((2,), -100))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_same_whatever_the_default_dtype_is(dtype, default):
    hidden, weight, targets = problem(300, 32, 700)

    def found():
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        logprobs, entropy = token_logprobs(h, w, targets)[:2]
        (logprobs + entropy).sum().backward()
        return logprobs, entropy, h.grad, w.grad

    expected = found()
    torch.set_default_dtype(default)
    try:
        ours = found()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(ours, expected))
