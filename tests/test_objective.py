"""train/objective.py: means that add up, REINFORCE, importance weights and divergences, by hand, by loops and by enumeration."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.train.loss import full_kl
from nanorlhf.train.objective import MEANS, average, importance_weights, logits_kl, reinforce_loss, sampler_kl


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def bounds_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


# --- average -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("by, expected, gradient", [
    ("token", 15 / 6, [1 / 6] * 6),
    ("sequence", (1 + 5 / 2 + 3) / 3, [1 / 3, 1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9]),
    ("sum", (1 + 5 + 9) / 3, [1 / 3] * 6),
])  # fmt: skip
def test_three_sequences_of_one_two_and_three_tokens_by_hand(by, expected, gradient):
    """Tokens 1 | 2 3 | 2 3 4: sums 1, 5, 9; own means 1, 2.5, 3."""
    x = tensor(1, 2, 3, 2, 3, 4).requires_grad_()
    got = average(x, bounds_of([1, 2, 3]), by)
    got.backward()
    assert got.item() == pytest.approx(expected, abs=1e-12)
    assert x.grad.tolist() == pytest.approx(gradient, abs=1e-12)


def test_a_constant_length_divides_the_sums():
    """Sums 1, 5, 9 over a constant of 10, averaged over 3."""
    assert float(average(tensor(1, 2, 3, 2, 3, 4), bounds_of([1, 2, 3]), "sum", length=10)) == pytest.approx(0.5, abs=1e-12)


def test_a_sequence_without_tokens_counts_as_one_that_adds_nothing():
    assert float(average(tensor(4, 2), bounds_of([0, 2]), "sequence")) == 1.5  # (0 + 3) / 2
    assert float(average(tensor(4, 2), bounds_of([0, 2]), "token")) == 3.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(-9, 9), max_size=5), min_size=2, max_size=6), st.sampled_from(MEANS), st.data())
def test_micro_batches_and_ranks_with_the_global_count_add_up_to_the_whole(sequences, by, data):
    sequences = [[1.0], *sequences]
    flat = [x for s in sequences for x in s]
    count = len(flat) if by == "token" else len(sequences)
    whole = average(tensor(*flat), bounds_of([len(s) for s in sequences]), by)
    cut = data.draw(st.integers(1, len(sequences) - 1))
    parts = [sequences[:cut], sequences[cut:]]
    total = sum(float(average(tensor(*[x for s in p for x in s]), bounds_of([len(s) for s in p]), by, count)) for p in parts)
    assert total == pytest.approx(float(whole), abs=1e-9)


def test_averages_of_micro_batches_without_the_global_count_are_another_loss():
    """The defect that the count is there for: 1 | 3 5 has the token mean 3; the mean of its halves' means is 2.5."""
    assert float(average(tensor(1, 3, 5), bounds_of([1, 2]), "token")) == 3.0
    assert (float(average(tensor(1), bounds_of([1]))) + float(average(tensor(3, 5), bounds_of([2])))) / 2 == 2.5


def test_an_unknown_mean_and_nothing_to_average_are_refused():
    with pytest.raises(ValueError, match="average: unknown mean 'batch'; there are token, sequence, sum"):
        average(tensor(1), bounds_of([1]), "batch")
    with pytest.raises(ValueError, match="average: expected at least one token to average over, got 0"):
        average(tensor(), bounds_of([0]))
    with pytest.raises(ValueError, match="average: expected at least one sequence to average over, got 0"):
        average(tensor(), torch.tensor([0]), "sequence")


# --- REINFORCE -----------------------------------------------------------------------------------------------------

def test_reinforce_is_the_language_model_loss_weighted_by_the_reward():
    """log π −1, −2 | −3 with rewards 2 and −1: −(2·(−3) + (−1)·(−3)) / 2 = 1.5; less a baseline of 0.5: −(1.5·(−3) − 1.5·(−3)) / 2 = 0."""
    logprobs, bounds = tensor(-1, -2, -3), bounds_of([2, 1])
    assert float(reinforce_loss(logprobs, tensor(2, -1), bounds)) == pytest.approx(1.5, abs=1e-12)
    assert float(reinforce_loss(logprobs, tensor(2, -1), bounds, 0.5)) == pytest.approx(0.0, abs=1e-12)
    assert float(reinforce_loss(logprobs, tensor(2, -1), bounds, count=4)) == pytest.approx(0.75, abs=1e-12)


@pytest.mark.parametrize("baseline", [0.0, 1.7, -3.0])
def test_its_expected_gradient_is_that_of_the_expected_reward_with_any_baseline(baseline):
    """A choice of four with logits θ: Σ_a π(a) ∇loss(a) against the closed form ∂E[R]/∂θ_a = π_a (R_a − E[R]), negated."""
    theta, rewards = tensor(0.3, -1, 0.8, 0).requires_grad_(), tensor(1, -2, 0.5, 3)
    chance = theta.softmax(0).detach()
    loss = sum(chance[a] * reinforce_loss(theta.log_softmax(0)[a:a + 1], rewards[a:a + 1], torch.tensor([0, 1]), baseline) for a in range(4))
    loss.backward()
    mean = float((chance * rewards).sum())
    assert theta.grad.tolist() == pytest.approx([-float(p) * (float(r) - mean) for p, r in zip(chance, rewards)], abs=1e-12)


def test_a_reward_for_each_response_is_needed():
    with pytest.raises(ValueError, match="reinforce_loss: expected one reward for each of 2 responses"):
        reinforce_loss(tensor(-1, -2), tensor(1), bounds_of([1, 1]))


# --- a sampler that is not the policy ------------------------------------------------------------------------------

def test_importance_weights_are_ratios_up_to_the_cap_and_constants():
    logprobs = tensor(math.log(0.5), math.log(0.3), math.log(0.2)).requires_grad_()
    sampled = tensor(math.log(0.25), math.log(0.6), math.log(0.02))
    weights = importance_weights(logprobs, sampled, 3.0)
    assert weights.tolist() == pytest.approx([2.0, 0.5, 3.0], abs=1e-12) and not weights.requires_grad
    with pytest.raises(ValueError, match="importance_weights: expected a cap above 0, got 0"):
        importance_weights(logprobs, sampled, 0)


def test_uncapped_weights_turn_the_samplers_expectation_into_the_policys():
    """π = (½, 3/10, 1/5), q = (¼, ¼, ½), f = (1, 2, 3): E_q[w f] = E_π[f] = 1.7; with a cap of 1, ¼ + ½ + ½·⅖·3 = 1.35."""
    policy, sampler, f = tensor(0.5, 0.3, 0.2), tensor(0.25, 0.25, 0.5), tensor(1, 2, 3)
    weigh = lambda cap: float((sampler * importance_weights(policy.log(), sampler.log(), cap) * f).sum())
    assert weigh(10) == pytest.approx(1.7, abs=1e-12)
    assert weigh(1) == pytest.approx(0.25 + 0.5 + 0.5 * 0.4 * 3, abs=1e-12)


def test_both_estimates_of_the_samplers_divergence_have_its_value_for_mean_and_k3_is_never_negative():
    sampler, policy = tensor(0.25, 0.25, 0.5), tensor(0.5, 0.3, 0.2)
    exact = 0.25 * math.log(0.25 / 0.5) + 0.25 * math.log(0.25 / 0.3) + 0.5 * math.log(0.5 / 0.2)
    k1, k3 = sampler_kl(policy.log(), sampler.log())
    assert float((sampler * k1).sum()) == pytest.approx(exact, abs=1e-12) == pytest.approx(float((sampler * k3).sum()), abs=1e-12)
    assert (k1 < 0).any() and (k3 >= 0).all()


def test_with_a_filter_k1_keeps_its_mean_and_k3_loses_the_mass_that_was_cut():
    """π = (0.6, 0.3, 0.1) with the last cut: q = (⅔, ⅓), KL(q‖π) = −log 0.9; E_q[π/q] = 0.9."""
    policy, sampler = tensor(0.6, 0.3), tensor(2 / 3, 1 / 3)
    k1, k3 = sampler_kl(policy.log(), sampler.log())
    assert float((sampler * k1).sum()) == pytest.approx(-math.log(0.9), abs=1e-12)
    assert float((sampler * k3).sum()) == pytest.approx(-math.log(0.9) - 0.1, abs=1e-12)


# --- exact divergence ----------------------------------------------------------------------------------------------

def kl_by_loops(p, q):
    return [sum(a * math.log(a / b) for a, b in zip(x, y) if a > 0) for x, y in zip(p, q)]


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_the_exact_divergence_is_the_sum_over_the_vocabulary_by_any_number_of_rows(rows):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    chances = [[[math.exp(v / 0.7) for v in row] for row in x.tolist()] for x in (a, b)]
    p, q = ([[v / sum(row) for v in row] for row in x] for x in chances)
    assert logits_kl(a, b, 0.7, rows).tolist() == pytest.approx(kl_by_loops(p, q), abs=1e-12)


def test_it_is_the_divergence_of_the_hidden_states_that_make_the_logits():
    generator = torch.Generator().manual_seed(1)
    h, r = (torch.randn(6, 4, generator=generator) for _ in range(2))
    w, u = (torch.randn(9, 4, generator=generator) for _ in range(2))
    torch.testing.assert_close(full_kl(h, w, r, u, 0.7), logits_kl((h @ w.T).double(), (r @ u.T).double(), 0.7).float(), atol=1e-5, rtol=1e-4)


def test_forbidden_tokens_cost_nothing_where_both_forbid_them_and_everything_where_only_the_reference_does():
    a = torch.tensor([[0.0, 0.0, -math.inf]]).requires_grad_()
    got = logits_kl(a, torch.tensor([[math.log(3), 0.0, -math.inf]]))
    got.sum().backward()
    assert got.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), abs=1e-6)
    assert a.grad.isfinite().all()
    assert float(logits_kl(torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]]))) == math.inf
    assert logits_kl(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)
    with pytest.raises(ValueError, match="logits_kl: expected two tensors of one shape"):
        logits_kl(torch.zeros(1, 2), torch.zeros(1, 3))
