"""Items 22 – 38: what a rollout is and what it is worth. Sources B, O, S, T as in test_items_data.py; GAE = Schulman et al. 2016.

Judged on any adapter that has the method: all; with methods that only ours has so far: 24, 25, 26, 36. Item 26, where queries begin
and end, is a choice of the task: here a prompt is whole turns, and ends where the assistant's begins.
"""

import math

import pytest
import torch

from .contract import assert_close, mask_of, need, ones, tensor

PUBLISHED = [0.0508, 0.4381, 0.8254, 1.2127, 1.6, 1.9873, 2.3746, 2.7619, 3.1492]  # B, of 1.2, 1.3, … 2.0
RUBBISH = (0.0, 7.0, -300.0)  # what a padded position may hold


def gae_by_sums(rewards, values, gamma, lam):
    """A_t = Σ_l (γλ)^l (r_{t+l} + γ V_{t+l+1} − V_{t+l}) with V = 0 after the end; GAE eq. 16. Lists of one episode."""
    T = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < T else 0.0) - values[t] for t in range(T)]
    return [sum((gamma * lam) ** l * delta[t + l] for l in range(T - t)) for t in range(T)]


def padded(rows, T, rest):
    """Lists of unlike lengths as (B, T), filled up with ``rest``, and the mask."""
    return tensor(*[row + [rest] * (T - len(row)) for row in rows]), mask_of([len(row) for row in rows], T)


# --- sampling ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_item_22_log_probs_are_those_of_the_logits_over_the_temperature(adapter, temperature):
    """B. By loops: z/T − log Σ e^(z/T)."""
    logits, ids = (torch.arange(24, dtype=torch.float64).view(2, 3, 4) * 1.3).sin() * 3, torch.tensor([[0, 3, 1], [2, 2, 0]])
    found = need(adapter, "token_logprobs")(logits, ids, temperature)
    for b in range(2):
        for t in range(3):
            z = [x / temperature for x in logits[b, t].tolist()]
            assert_close(found[b, t], z[ids[b, t]] - math.log(sum(map(math.exp, z))))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_item_22_a_token_is_trained_at_the_temperature_it_was_sampled_at(adapter, temperature):
    """B, T. The sampler's log-probs are the trainer's at that temperature, and not at another."""
    generate, logprobs = need(adapter, "generate", "logprobs")
    for ids, sampled, _ in generate([[3, 5, 8]], 6, 4, temperature=temperature):
        assert_close(sampled, logprobs([[3, 5, 8] + ids], temperature)[0][2:], 1e-4)
        assert max(abs(a - b) for a, b in zip(sampled, logprobs([[3, 5, 8] + ids], 0.85)[0][2:])) > 1e-3


def test_item_23_a_low_temperature_takes_the_most_probable_token(adapter):
    """S evaluates at T = 0.01: the logits lie more than 0.1 apart, which makes odds of e^10."""
    generate, logprobs = need(adapter, "generate", "logprobs")
    ids = generate([[3, 5, 8]], 1, 20, temperature=0.01)
    chances = [logprobs([[3, 5, 8, v]])[0][-1] for v in range(adapter.vocab)]
    first, second = sorted(chances)[-1], sorted(chances)[-2]
    assert first - second > 0.1 and all(i == [chances.index(first)] for i, _, _ in ids)


# --- the value function --------------------------------------------------------------------------------------------

SEQUENCES = [[3, 5, 8, 1, 21], [4, 21]]


def test_item_24_a_value_function_starts_at_zero_or_at_the_scores(adapter):
    """O: zero. S, InstructGPT: the reward model, so that the value of the end is the score itself, normalisation and all."""
    start = need(adapter, "initial_values")
    assert all(v == 0 for row in start(SEQUENCES, "zero")[0] for v in row)
    values, scores = start(SEQUENCES, "reward")
    assert_close([row[-1] for row in values], scores, 1e-5)


def test_item_25_policy_and_value_model_are_two_networks(adapter):
    """S. With the policy's rate at 0 only the value model moves, and the other way round; the reference never does."""
    moves = need(adapter, "ppo_moves")
    assert moves(0.0, 0.01) == [False, False, True]
    assert moves(0.01, 0.0) == [True, False, False]


def test_item_26_a_prompt_is_whole_turns_and_ends_where_the_answer_begins(adapter):
    ids, _, end, assistant = need(adapter, "render")([{"role": "user", "content": "Tell me."}], True)
    assert ids[-1] == assistant and ids[-2] == end


def test_item_27_nothing_comes_after_the_stop_token(adapter):
    """B, O, S. Stop 9, padding 0: what follows the first stop is padding, a row without one is left as it is."""
    found = need(adapter, "truncate")(torch.tensor([[5, 9, 4, 9], [9, 1, 1, 1], [4, 5, 6, 7], [4, 5, 6, 9]]), 9, 0)
    assert found.tolist() == [[5, 9, 0, 0], [9, 0, 0, 0], [4, 5, 6, 7], [4, 5, 6, 9]]


def test_item_27_the_engine_ends_a_response_at_its_first_stop_token(adapter):
    """The same of a generator that stops: the stop is the last id and the only one, in all that are finished, and in no other."""
    drawn = need(adapter, "generate")([[3, 5, 8], [4, 4]], 12, 40, stop=[adapter.end, 4])
    assert {True, False} == {finished for _, _, finished in drawn}
    for ids, logprobs, finished in drawn:
        assert [i for i, id in enumerate(ids) if id in (adapter.end, 4)] == ([len(ids) - 1] if finished else [])
        assert len(ids) == len(logprobs) and (finished or len(ids) == 12)


def test_item_28_a_response_without_an_end_has_its_score_replaced(adapter):
    """B, O, S. Scores 3, −2.5, 0.25, of which the first and the last did not end: −1 exactly, and not 1 off."""
    found = need(adapter, "missing_end")(tensor(3, -2.5, 0.25), torch.tensor([False, True, False]), -1.0)
    assert found.tolist() == [-1.0, -2.5, -1.0]


def test_item_29_gamma_is_1_and_lambda_095_unless_told(adapter):
    """B, O."""
    defaults = need(adapter, "defaults")()
    assert (defaults["gamma"], defaults["lam"]) == (1.0, 0.95)


# --- rewards -------------------------------------------------------------------------------------------------------

LOGPROBS, REFERENCE, SCORES = [[-1.0, -3.0, -2.0], [-1.0]], [[-2.0, -2.0, -2.0], [-3.0]], tensor(10, 20)


@pytest.mark.parametrize("rest", RUBBISH)
def test_item_30_every_token_pays_beta_times_its_log_ratio_and_the_last_has_the_score(adapter, rest):
    """B, O. β = ½, log-ratios 1, −1, 0 | 2: −½, ½, 10 | −1 + 20, and nothing after the end. A policy that drifts to what the reference
    finds improbable pays: the sum is score − β · Σ log π/π_ref."""
    (logprobs, mask), (ref, _) = padded(LOGPROBS, 4, rest), padded(REFERENCE, 4, rest)
    found = need(adapter, "token_rewards")(SCORES, logprobs, ref, mask, 0.5)
    assert_close(found.masked_fill(~mask, 0), [[-0.5, 0.5, 10.0, 0.0], [19.0, 0.0, 0.0, 0.0]])
    assert_close(found.sum(1), [10.0 - 0.5 * 0.0, 20.0 - 0.5 * 2.0])


@pytest.mark.parametrize("T", [5, 6, 9])
def test_item_31_the_score_is_worth_all_of_itself_at_the_end_of_turn_action(adapter, T):
    """S, T (TRL #1893, #3750). Five actions, the last the end of turn; V = 0, no KL, score 1, γ = 1, λ = 0.95: δ = (0, 0, 0, 0, 1), so
    A = 0.95^(4 − t) = .8145 .8574 .9025 .95 1. One slot later it is .7738 .8145 .8574 .9025 .95. With and without room for padding."""
    token_rewards, gae = need(adapter, "token_rewards", "gae")
    mask, zeros = mask_of([5], T), torch.zeros(1, T, dtype=torch.float64)
    advantages, _ = gae(token_rewards(tensor(1), zeros, zeros, mask, 0.1), zeros, mask, 1.0, 0.95)
    assert_close(advantages[0, :5], [0.95**4, 0.95**3, 0.95**2, 0.95, 1.0])


def test_item_32_each_mask_covers_what_it_says(adapter):
    """S. Five slots, three actions. Log-probs, rewards, advantages and values live at the three actions; the value of the state after
    the last one is 0, whatever stands in the slots after it, and nothing is returned there that could enter a mean.
    r = 1, 2, 4 and V = 3, 5, 7, γ = 1, λ = ½: δ = 3, 4, −3; A = 3 + ½·2.5, 4 − 1.5, −3."""
    gae, mask = need(adapter, "gae"), mask_of([3], 5)
    for rest in RUBBISH:
        advantages, returns = gae(padded([[1.0, 2.0, 4.0]], 5, 0.0)[0], padded([[3.0, 5.0, 7.0]], 5, rest)[0], mask, 1.0, 0.5)
        assert_close(advantages[mask], [4.25, 2.5, -3.0])
        assert_close(returns[mask], [7.25, 7.5, 4.0])


@pytest.mark.parametrize("rest", RUBBISH)
def test_item_33_padding_enters_no_entropy_and_no_divergence(adapter, rest):
    """S, T (TRL #2022, #2281, #2496: each pad added −1 to the entropy). Rows of logits 0, 0, 0 (entropy ln 3) and 0, 0, −∞ almost
    (ln 2), counted once each; the pads' rows are whatever is there. An entropy is never negative."""
    entropy = need(adapter, "entropy")
    logits = tensor([[0, 0, 0], [0, 0, -800], [rest, 0, 0], [rest, 0, 0]])
    found = entropy(logits, mask_of([2], 4))
    assert_close(found, (math.log(3) + math.log(2)) / 2, 1e-6)
    assert float(found) >= 0


@pytest.mark.parametrize("rest", RUBBISH)
def test_item_33_the_divergence_of_equal_log_probs_is_zero_beside_any_padding(adapter, rest):
    """An invalid log-prob, the same on both sides, cancels."""
    x, mask = padded([[-1.0, -2.0], [-0.5]], 4, rest)
    for kind in ("k1", "k2", "k3"):
        assert float(need(adapter, "kl")(x, x, kind)[mask].abs().max()) == 0


# --- whitening -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rest", RUBBISH)
def test_item_34_whitening_uses_the_population_variance_and_keeps_or_removes_the_mean_as_told(adapter, rest):
    """B. 1.2, 1.3, … 2.0 in two rows: mean 1.6, population variance 1/15, so that 2.0 is 1.5492 deviations off. Rewards keep their mean:
    the published .0508 … 3.1492; advantages lose it: the same less 1.6. With ddof 1 the ends would be .1393 and 3.0607."""
    whiten = need(adapter, "whiten")
    x, mask = padded([[1.2, 1.3, 1.4, 1.5], [1.6, 1.7, 1.8, 1.9, 2.0]], 7, rest)
    assert_close(whiten(x, mask, True)[mask], [p - 1.6 for p in PUBLISHED], 6e-5)
    assert_close(whiten(x, mask, False)[mask], PUBLISHED, 6e-5)


def test_item_34_whitened_numbers_have_mean_0(adapter):
    """The same without asking for a variance: torchtune's whiten(shift_mean=True) adds the mean again."""
    x, mask = padded([[1.2, 1.3, 1.4, 1.5], [1.6, 1.7, 1.8, 1.9, 2.0]], 7, 5.0)
    assert_close(need(adapter, "whiten")(x, mask, True)[mask].mean(), 0.0, 1e-6)


@pytest.mark.parametrize("rest", RUBBISH)
def test_item_34_advantages_are_whitened_over_the_actions_alone(adapter, rest):
    """O; trlx whitens over padding. r = 1 | 2 at the end, V = 0, λ = 1: raw 1 1 1 | 2, mean 1.25, so that over the four actions the mean
    is 0 and the ratio of the deviations is −3 : 1."""
    found = need(adapter, "advantages")(*[padded(rows, 5, r)[0] for rows, r in (([[0.0, 0.0, 1.0], [2.0]], 0.0), ([[0.0] * 3, [0.0]], rest))],
                                        mask_of([3, 1], 5), 1.0, 1.0)
    mask = mask_of([3, 1], 5)
    assert_close(found[mask].mean(), 0.0, 1e-6)
    assert_close(found[1, 0] / found[0, 0], -3.0, 1e-6)


def test_item_35_too_few_rewards_to_whiten_do_no_harm(adapter):
    """O asks for minibatches of at least 8. What is the matter with fewer: one number, or equal ones, have no deviation. The result is
    finite, and 0 where the mean is removed."""
    whiten = need(adapter, "whiten")
    for x in (tensor([3.0]), tensor([3.0, 3.0, 3.0])):
        assert_close(whiten(x, ones(*x.shape), True), torch.zeros_like(x))
        assert_close(whiten(x, ones(*x.shape), False), x)


def test_item_36_whitening_by_minibatch_and_by_batch_are_one_where_there_is_one_minibatch(adapter):
    """B, O. In fp64, after two passes; with two minibatches they are not."""
    weights = need(adapter, "ppo_weights")
    one = [weights(minibatches=1, whiten_advantages=how) for how in ("batch", "minibatch")]
    two = [weights(minibatches=2, whiten_advantages=how) for how in ("batch", "minibatch")]
    assert_close(one[0], one[1], 1e-9)
    assert float((two[0] - two[1]).abs().max()) > 1e-6


# --- advantages ----------------------------------------------------------------------------------------------------

EPISODES = [([1.0, 0.0, -2.0, 3.0], [0.5, 1.0, -1.0, 2.0]), ([2.0], [0.25]), ([0.0, 1.0], [3.0, -1.0])]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0), (0.7, 1.0)])
@pytest.mark.parametrize("rest", RUBBISH)
def test_item_37_and_38_advantages_are_the_double_sum_and_returns_are_values_more(adapter, gamma, lam, rest):
    """GAE eq. 16, each episode by loops, nothing bootstrapped after its last action, truncated or not; returns = A + V of the
    advantages before whitening."""
    gae = need(adapter, "gae")
    rewards, mask = padded([r for r, _ in EPISODES], 6, 0.0)
    values, _ = padded([v for _, v in EPISODES], 6, rest)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = [a for r, v in EPISODES for a in gae_by_sums(r, v, gamma, lam)]
    assert_close(advantages[mask], expected)
    assert_close(returns[mask], [a + v for a, v in zip(expected, [x for _, row in EPISODES for x in row])])


def test_item_37_advantages_are_constants_to_the_loss(adapter):
    """O: stop-gradient."""
    values = tensor([0.5, 1.0, -1.0]).requires_grad_()
    advantages, returns = need(adapter, "gae")(tensor([1.0, 0.0, 2.0]), values.detach(), ones(1, 3), 1.0, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad


def test_item_38_lambda_1_is_reward_to_go_less_the_value(adapter):
    """Rewards 1, 2, 4, values 5, 6, 7: to go 7, 6, 4. With λ = 0 one step: 1 + 6 − 5, 2 + 7 − 6, 4 − 7."""
    gae = need(adapter, "gae")
    given = tensor([1, 2, 4]), tensor([5, 6, 7]), ones(1, 3)
    assert_close(gae(*given, 1.0, 1.0)[0], [[2, 0, -3]])
    assert_close(gae(*given, 1.0, 0.0)[0], [[2, 3, -3]])
