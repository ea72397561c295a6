"""Items 39 – 54: the update, what is measured of it, and divergences. Sources B, O, S, T as in test_items_data.py; PPO = Schulman et al. 2017.

Judged on any adapter that has the method: all; with methods that only ours has so far: 39 and 40 (of whole passes), 46, 50, 51, 54.
"""

import math

import pytest
import torch

from .contract import assert_close, differences, gradient, mask_of, need, ones, tensor


def padded_terms():
    """Terms 1 2 3 | 4 | 5 6 | 7 8 9 10, with rubbish behind: 10 tokens of sum 55."""
    mask = mask_of([3, 1, 2, 4], 5)
    return torch.full((4, 5), 99.0, dtype=torch.float64).masked_scatter(mask, torch.arange(1.0, 11.0, dtype=torch.float64)), mask


# --- batches -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("micro", [1, 3, 5])
def test_item_39_micro_batches_make_the_step_that_the_batch_makes(adapter, micro):
    """O. Two passes of two optimiser steps over 12 episodes of unlike lengths, in fp64: the same weights."""
    weights = need(adapter, "ppo_weights")
    assert_close(weights(micro_episodes=micro), weights(), 1e-9)


def test_beyond_the_items_a_resumed_run_is_the_run_to_the_bit(adapter):
    """T (TRL #2657, OpenRLHF #1103). Weights of policy and value model after a kill, with optimisers, coefficient and data in between."""
    for whole, cut in zip(*need(adapter, "ppo_resumed")()):
        for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values()):
            assert torch.equal(a, b), name


def test_item_40_the_ratio_is_exactly_1_before_the_first_step(adapter):
    """T (TRL #454, minimind #814). In the log of a run: the largest |log ratio| of the first minibatch, and the gap of sampler and
    trainer, are 0; later passes move."""
    row = need(adapter, "ppo_rows")(steps=1)[0]
    assert row["first_ratio_max"] == 1.0 and row["sampler_gap"] == 0.0 and row["ratio_max"] > 1.0


def test_item_40_at_ratio_1_the_loss_is_minus_the_mean_advantage(adapter):
    """Nothing is clipped: −(1 − 2 + 4)/3, gradient −A/3."""
    x = tensor([-1, -2, -3])
    loss, grad = gradient(lambda l: need(adapter, "policy_loss")(l, x, tensor([1, -2, 4]), ones(1, 3), 0.2), x)
    assert_close(loss, -1.0, 1e-6)
    assert_close(grad, [[-1 / 3, 2 / 3, -4 / 3]], 1e-6)


# --- the losses ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("ratio, advantage, loss, pull", [
    (0.5, 1.0, -0.5, -0.5), (1.1, 1.0, -1.1, -1.1), (1.5, 1.0, -1.2, 0.0), (0.5, -1.0, 0.8, 0.0), (0.9, -1.0, 0.9, 0.9), (1.5, -1.0, 1.5, 1.5),
])  # fmt: skip
def test_item_41_the_clipped_loss_for_every_side_and_sign(adapter, ratio, advantage, loss, pull, dtype, near):
    """PPO eq. 7, ε = 0.2: max(−A·r, −A·clip(r, 0.8, 1.2)); dL/d(log π) = −A·r where the free branch is the larger, else 0. Beside two
    padded slots whose numbers would be clipped."""
    given = [tensor([x, 5.0, 5.0], dtype=dtype) for x in (math.log(ratio) - 2, -2.0, advantage)]
    given[1][0, 1:] = 0
    found, grad = gradient(lambda l: need(adapter, "policy_loss")(l, given[1], given[2], mask_of([1], 3), 0.2), given[0])
    assert_close(found, loss, near)
    assert_close(grad, [[pull, 0.0, 0.0]], near)


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("value, loss, pull", [(0.1, 0.405, -0.9), (0.5, 0.32, 0.0), (1.5, 0.32, 0.0), (3.0, 2.0, 2.0), (-0.5, 1.125, -1.5)])
def test_item_42_the_value_is_clipped_around_its_old_self(adapter, value, loss, pull, dtype, near):
    """O. V_old = 0, R = 1, ε = 0.2: ½ max((V − 1)², (clip(V, ±0.2) − 1)²), in the order of the cases: ½·0.9²; ½·0.8² with no pull, twice;
    ½·2²; ½·1.5²."""
    given = [tensor([x, 5.0], dtype=dtype) for x in (value, 0.0, 1.0)]
    found, grad = gradient(lambda v: need(adapter, "value_loss")(v, given[1], given[2], mask_of([1], 2), 0.2), given[0])
    assert_close(found, loss, near)
    assert_close(grad, [[pull, 0.0]], near)


def test_item_43_the_kl_coefficient_follows_its_rule(adapter):
    """O: e = clip(KL/6 − 1, ±0.2), β ← β(1 + e·n/10,000), β₀ = 0.15, n = 512. KL 12: × 1.01024; 6.6: × 1.00512; 6: × 1; 0 and −3: × 0.98976."""
    update, beta = need(adapter, "kl_controller")(0.15, 6.0, 10_000), 0.15
    for kl, factor in ((12.0, 1.01024), (6.6, 1.00512), (6.0, 1.0), (0.0, 0.98976), (-3.0, 0.98976)):
        beta *= factor
        assert_close(update(kl, 512), beta)


def adam_by_loops(gradients, lr, betas, eps, hat):
    """Kingma & Ba 2015, algorithm 1; with ``hat`` the form at the end of their §2, ε beside the uncorrected root, as TensorFlow has it."""
    p, m, v, values = 0.0, 0.0, 0.0, []
    for t, g in enumerate(gradients, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        first, second = 1 - betas[0] ** t, 1 - betas[1] ** t
        p -= lr * (second**0.5 / first * m / (v**0.5 + eps)) if hat else lr * (m / first) / ((v / second) ** 0.5 + eps)
        values.append(p)
    return values


def test_item_44_adam_is_one_of_its_two_forms_and_eps_is_where_that_form_has_it(adapter):
    """B. β₂ = 0.999, ε = 1e-5 and gradients as small as ε, where the forms differ: at the first step torch's ε counts √0.001 = 1/31.6 of
    TensorFlow's. The suite accepts either, and nothing between; ours is algorithm 1."""
    gradients = [1e-5, -3e-6, 2e-5, 5e-6, 1e-5]
    found = need(adapter, "adam")(gradients, 0.01, (0.9, 0.999), 1e-5)
    forms = [adam_by_loops(gradients, 0.01, (0.9, 0.999), 1e-5, hat) for hat in (False, True)]
    assert abs(forms[0][0] / forms[1][0]) > 10
    assert min(max(abs(a - b) for a, b in zip(found, form)) for form in forms) < 1e-6


# --- what is measured ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [2, 3, 8])
def test_item_45_figures_of_the_update_do_not_see_padding(adapter, T):
    """T. Log-ratios ln 1.5, ln 0.5 | 0 with advantages 1, 1 | −2 and ε = 0.2: ½ mean d² = (ln²1.5 + ln²2)/6; one of three is clipped
    (1.5 with A > 0); the mean ratio is (1.5 + 0.5 + 1)/3."""
    mask = mask_of([2, 1], T)
    fill = lambda values, rest: torch.full((2, T), rest, dtype=torch.float64).masked_scatter(mask, tensor(*values))
    found = need(adapter, "policy_metrics")(fill([math.log(1.5) - 1, math.log(0.5) - 1, -1], 0.0), fill([-1, -1, -1], 0.0), fill([1, 1, -2], 0.0), mask, 0.2)
    expected = {"approx_kl": (math.log(1.5) ** 2 + math.log(2) ** 2) / 6, "clip_fraction": 1 / 3, "ratio_mean": 1.0}
    assert set(found) <= set(expected) and found
    for name, value in found.items():
        assert_close(value, expected[name], 1e-6)


def test_item_45_a_mean_over_tokens_does_not_see_padding(adapter):
    x, mask = padded_terms()
    assert_close(need(adapter, "masked_mean")(x, mask), 5.5, 1e-6)


def test_item_46_score_divergence_and_their_difference_are_told_apart(adapter):
    """B. reward = score − β·KL in every row, the score without the penalty; β is the one that the step used."""
    for row in need(adapter, "ppo_rows")(steps=2):
        assert_close(row["reward"], row["score"] - row["kl_coef"] * row["kl"], 1e-6)
    assert row["kl"] != 0


POLICY = torch.linspace(-1.3, 1.7, 50, dtype=torch.float64).sin()  # logits of a choice of fifty
REFERENCE = torch.linspace(0.4, 4.1, 50, dtype=torch.float64).cos()


def kl_of_logits(a, b):
    """Σ p log(p/q) of two rows of logits, by a loop."""
    p, q = ([x / sum(w) for x in w] for w in ([math.exp(x) for x in row.tolist()] for row in (a, b)))
    return sum(x * math.log(x / y) for x, y in zip(p, q))


def expected_pull(kl, kind):
    """E_π of the estimate's gradient, the samples being constants; a row of one action each."""
    chance = POLICY.softmax(0)
    return gradient(lambda z: (chance * kl(z.log_softmax(0)[:, None], REFERENCE.log_softmax(0)[:, None], kind)[:, 0]).sum(), POLICY)


def test_item_47_k1_and_k3_have_the_divergence_for_mean_and_k2_is_half_the_square(adapter):
    """Schulman 2020. Over all fifty choices, by loops. KL(π‖ref), not KL(ref‖π), and not with the sign turned."""
    kl, exact = need(adapter, "kl"), kl_of_logits(POLICY, REFERENCE)
    assert abs(exact - kl_of_logits(REFERENCE, POLICY)) > 0.01
    assert_close(expected_pull(kl, "k1")[0], exact)
    assert_close(expected_pull(kl, "k3")[0], exact)
    p, q = POLICY.softmax(0).tolist(), REFERENCE.softmax(0).tolist()
    assert_close(expected_pull(kl, "k2")[0], sum(a * 0.5 * math.log(a / b) ** 2 for a, b in zip(p, q)))


def test_item_47_as_losses_k1_pulls_nowhere_k2_as_the_divergence_k3_as_the_forward_one(adapter):
    """T (OpenRLHF #1309). Against central differences of the two divergences, themselves loops over all choices."""
    kl = need(adapter, "kl")
    assert_close(expected_pull(kl, "k1")[1], torch.zeros(50))
    assert_close(expected_pull(kl, "k2")[1], differences(lambda z: kl_of_logits(z, REFERENCE), POLICY), 1e-8)
    assert_close(expected_pull(kl, "k3")[1], differences(lambda z: kl_of_logits(REFERENCE, z), POLICY), 1e-8)


def test_item_47_the_divergence_over_the_vocabulary_is_exact(adapter):
    found = need(adapter, "exact_kl")(torch.stack([POLICY, REFERENCE]), torch.stack([REFERENCE, POLICY]))
    assert_close(found, [kl_of_logits(POLICY, REFERENCE), kl_of_logits(REFERENCE, POLICY)])


@pytest.mark.parametrize("sizes", [[4], [2, 2], [1, 3], [1, 1, 1, 1]])
def test_item_48_a_loss_over_tokens_does_not_depend_on_how_the_batch_is_cut(adapter, sizes):
    """T (nanochat #59, transformers #35203). 55 over 10 tokens, however many responses a micro-batch holds. The mean of the
    micro-batches' means would be 5.0625 for 2 + 2 and 5.1875 for four."""
    assert_close(need(adapter, "accumulated_loss")(*padded_terms(), sizes), 5.5, 1e-6)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_item_49_log_probs_of_a_filtered_sampler_are_renormalised(adapter, k):
    """T (TRL #6789). The chance of a token under top-k is its own over the sum of the k largest; all the tokens are of those."""
    generate, logprobs = need(adapter, "generate", "logprobs")
    every = [logprobs([[3, 5, 8, v]])[0][-1] for v in range(adapter.vocab)]
    kept = sorted(every)[-k:]
    for ids, sampled, _ in generate([[3, 5, 8]], 1, 50, top_k=k):
        assert every[ids[0]] in kept
        assert_close(sampled[0], every[ids[0]] - math.log(sum(map(math.exp, kept))), 1e-4)


def test_item_49_importance_weights_make_up_for_the_sampler_up_to_the_cap(adapter):
    """Chances ½, 0.3, 0.2 of the trainer over ¼, 0.6, 0.02 of the sampler, cap 3: 2, ½, 3."""
    found = need(adapter, "importance_weights")(tensor(0.5, 0.3, 0.2).log(), tensor(0.25, 0.6, 0.02).log(), 3.0)
    assert_close(found, [2.0, 0.5, 3.0])


def test_item_50_the_ids_that_were_sampled_are_the_ids_that_are_trained_on(adapter):
    """T. No text in between."""
    prompts, drawn, rollout = need(adapter, "rollout")()
    assert rollout.tokens.tolist() == [id for p, c in zip(prompts, drawn) for id in p + c.ids]
    assert rollout.tokens[rollout.where + 1].tolist() == [id for c in drawn for id in c.ids]


def test_item_51_a_response_begins_right_after_its_prompt(adapter):
    """B: queries padded left, responses right, so that all begin at one index. Without padding: the first state of each response is its
    prompt's last token, and its last state the token before its last."""
    prompts, drawn, rollout = need(adapter, "rollout")()
    starts, actions = rollout.cu_seqlens.tolist(), rollout.cu_actions.tolist()
    for i, (prompt, c) in enumerate(zip(prompts, drawn)):
        own = rollout.where[actions[i]:actions[i + 1]].tolist()
        assert own == list(range(starts[i] + len(prompt) - 1, starts[i] + len(prompt) + len(c.ids) - 1))


def test_item_52_log_probs_of_bf16_logits_are_sums_in_fp32(adapter):
    """T (TRL #4303, OpenRLHF #634). 1000 logits in bf16: −z + log Σ e^z of exactly these numbers in fp64 is met within 1e-4; a softmax
    whose sum is rounded to bf16 is 1e-2 off."""
    logits = (torch.arange(4000).view(1, 4, 1000) * 0.37).sin().mul(5).to(torch.bfloat16)
    ids = torch.tensor([[0, 17, 500, 999]])
    exact = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert_close(need(adapter, "token_logprobs")(logits, ids, 1.0).double(), exact, 1e-4)


def test_item_53_the_divergence_of_the_best_of_n_is_log_n_less_a_share(adapter):
    """Stiennon et al. 2020 G.3: log n − (n − 1)/n, the integral of n u^(n−1) log(n u^(n−1)), here by the midpoint rule."""
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    for n in (1, 2, 16, 64):
        density = n * u ** (n - 1)
        assert_close(need(adapter, "best_of_n_kl")(n), float(torch.special.xlogy(density, density).mean()), 1e-4)


def test_item_54_the_reference_stays_and_the_divergence_starts_at_exactly_0(adapter):
    """By sampled log-ratios, by k2 and k3, and over the whole vocabulary, at any temperature; afterwards the reference has not moved."""
    rows, moves = need(adapter, "ppo_rows", "ppo_moves")
    for temperature in (1.0, 0.6):
        row = rows(steps=1, temperature=temperature)[0]
        assert row["kl"] == row["kl_exact"] == row["kl_k2"] == row["kl_k3"] == 0.0
    assert moves(0.01, 0.01)[1] is False
