"""train/ppo.py: where the score lands, what is trained on, ratio 1 and KL 0 at the start, a score that rises, a kill
that changes no bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nanorlhf.config import PPOConfig
from nanorlhf.optim import Optimizer
from nanorlhf.train.loss import sum_by_sequence
from nanorlhf.train.ppo import Critic, ppo, token_rewards, update
from nanorlhf.train.rollout import Judge, Rollout, roll_out
from tiny import OPTIM, Killed, killed_at, model, random_sequences, same_weights, saving

GOOD, ASK, END = 7, 20, 21
SLOW = replace(OPTIM, lr=0.003, muon_lr=0.003)
CONFIG = PPOConfig(steps=4, prompts=16, max_new_tokens=8, temperature=1.0, epochs=2, minibatches=2, kl_coef=0.05,
                   kl_target=6.0, kl_horizon=2000, missing_end_score=-1.0, optim=SLOW, value_optim=OPTIM)
PLAIN = replace(CONFIG, kl_centred=False)
PROMPTS = random_sequences(12, 6, seed=5)


def score(sequences):
    """How many of the last eight ids are GOOD, brought near mean 0 and deviation 1."""
    return torch.tensor([(s[-8:].count(GOOD) - 1.0) for s in sequences], dtype=torch.float32)


JUDGE = Judge(score, END)


def models(seed=0):
    """(policy, ref, value): the policy starts as the reference, the value model has a head of its own."""
    return model(seed, loud=False), model(seed, loud=False), model(seed + 1, scalar_head=True, loud=False)


def rollout_of(config=CONFIG, seed=3, loud=True):
    policy, ref, value = model(0, loud=loud), model(1, loud=loud), model(2, scalar_head=True)
    return roll_out(policy, ref, Critic(value), JUDGE, PROMPTS, config, seed), (policy, ref, value)


def made_rollout(logprobs, ref_logprobs, scores, cu_actions):
    """A rollout of which only what token_rewards reads is filled in."""
    nothing = torch.zeros(0)
    return Rollout(nothing, nothing, nothing, torch.tensor(cu_actions), torch.tensor(logprobs), torch.tensor(ref_logprobs),
                   nothing, torch.tensor(scores), nothing, nothing, nothing, nothing)


# --- rewards -------------------------------------------------------------------------------------------------------

def test_the_score_lands_on_the_last_action_and_the_kl_on_every_one():
    """Two episodes of 3 and 1 actions, β = 0.5. Log-ratios 1, −1, 0 | 2: penalties −0.5, 0.5, 0 | −1; scores 10 and 20
    are added to the third action and to the only one."""
    rollout = made_rollout([-1.0, -3.0, -2.0, -1.0], [-2.0, -2.0, -2.0, -3.0], [10.0, 20.0], [0, 3, 4])
    assert token_rewards(rollout, 0.5, PLAIN).tolist() == [-0.5, 0.5, 10.0, 19.0]


def test_a_centred_penalty_charges_nothing_for_length():
    """The same, less the mean log-ratio 0.5: penalties −0.25, 0.75, 0.25 | −0.75. Where all log-ratios are equal, so that
    length is all that tells two episodes apart, nothing is left."""
    rollout = made_rollout([-1.0, -3.0, -2.0, -1.0], [-2.0, -2.0, -2.0, -3.0], [10.0, 20.0], [0, 3, 4])
    assert token_rewards(rollout, 0.5, CONFIG).tolist() == [-0.25, 0.75, 10.25, 19.25]
    even = made_rollout([-1.0] * 4, [-2.0] * 4, [3.0, 3.0], [0, 3, 4])
    assert token_rewards(even, 0.5, CONFIG).tolist() == [0.0, 0.0, 3.0, 3.0]


def test_an_episodes_rewards_sum_to_its_score_less_beta_times_its_kl():
    rollout, _ = rollout_of()
    total = sum_by_sequence(token_rewards(rollout, 0.3, PLAIN), rollout.cu_actions)
    kl = sum_by_sequence(rollout.logprobs - rollout.ref_logprobs, rollout.cu_actions)
    assert kl.abs().max() > 0.1
    torch.testing.assert_close(total, rollout.scores - 0.3 * kl, atol=1e-4, rtol=1e-4)


# --- the start -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_at_the_start_the_kl_is_exactly_zero_and_the_ratio_one_at_any_temperature(tmp_path, temperature):
    """The same weights, the same kernels, the same batch: not nearly equal but equal. The first minibatch is another
    batch of the same episodes, whose products a library may round otherwise."""
    config = replace(CONFIG, steps=1, temperature=temperature)
    policy, ref, value = models()
    rollout = roll_out(policy, ref, Critic(value), JUDGE, PROMPTS, config, 0)
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)
    rows = []
    ppo(*models(), JUDGE, PROMPTS, config, 0, saving(tmp_path), rows.append)
    assert rows[0]["kl"] == 0.0 and rows[0]["reward"] == rows[0]["score"]
    assert rows[0]["first_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert rows[0]["ratio_max"] > 1.001  # later passes move the policy


def test_the_first_policy_loss_is_minus_the_mean_whitened_advantage_which_is_zero():
    """At ratio 1 nothing is clipped, and the loss over the whole batch is −mean(A) = 0."""
    policy, ref, value = models()
    config = replace(CONFIG, epochs=1, minibatches=1)
    rollout = roll_out(policy, ref, Critic(value), JUDGE, PROMPTS, config, 0)
    optimizers = Optimizer(policy, config.optim, 1), Optimizer(value, config.value_optim, 1)
    row = update(policy, Critic(value), optimizers, rollout, 0.05, config, 0, 0)
    assert row["policy_loss"] == pytest.approx(0, abs=1e-4) and row["clip_fraction"] == 0
    assert row["grad_norm"] > 1e-3


# --- the loop ------------------------------------------------------------------------------------------------------

def learn(folder, seed=0, rows=None, **changes):
    config = replace(CONFIG, **{"steps": 25, "prompts": 48, "optim": OPTIM, **changes})
    return ppo(*models(seed), JUDGE, PROMPTS, config, seed, saving(folder), [].append if rows is None else rows.append)


def test_a_policy_learns_to_say_what_the_judge_rewards_and_to_end_its_turn(tmp_path):
    """The judge counts a token that an untrained policy draws once in 23, and less than a third of the responses end
    by themselves, the rest of which score −1 whatever they say."""
    rows = []
    learn(tmp_path, rows=rows)
    means = lambda key: (np.mean([r[key] for r in rows[:3]]), np.mean([r[key] for r in rows[-3:]]))
    (score_before, score_after), (ended_before, ended_after) = means("score"), means("finished")
    assert score_before < -0.8 and score_after > 0.5
    assert ended_before < 0.5 < ended_after


def test_a_dear_kl_keeps_the_policy_at_its_reference(tmp_path):
    held, free = [], []
    learn(tmp_path / "held", rows=held, steps=10, kl_coef=3.0, kl_horizon=10**9)
    learn(tmp_path / "free", rows=free, steps=10, kl_coef=0.0, kl_horizon=10**9)
    assert held[-1]["kl_coef"] == pytest.approx(3.0, rel=1e-6)  # such a horizon holds it
    assert abs(held[-1]["kl"]) < 0.3 < 1.0 < free[-1]["kl"]


def test_the_logged_figures_agree_with_one_another(tmp_path):
    """reward = score − β·KL, and β moves by its rule: error −0.2 below a target of 6 nats, 16 of 100 episodes."""
    rows = []
    learn(tmp_path, rows=rows, steps=3, prompts=16, kl_horizon=100)
    for row in rows:
        assert row["reward"] == pytest.approx(row["score"] - row["kl_coef"] * row["kl"], abs=1e-5)
        assert 1 <= row["length"] <= 8 and 0 <= row["finished"] <= 1 and row["entropy"] > 0
    assert [row["kl_coef"] for row in rows] == pytest.approx([0.05, 0.05 * 0.968, 0.05 * 0.968**2])


def test_prompts_are_drawn_in_turn_so_that_none_falls_behind(tmp_path):
    """12 prompts, 18 a step, 2 steps: each exactly three times."""
    seen = []

    def watch(sequences):
        seen.extend(tuple(s) for s in sequences)
        return score(sequences)

    prompts = [[i, i, ASK] for i in range(12)]
    ppo(*models(), Judge(watch, END), prompts, replace(CONFIG, steps=2, prompts=18), 0, saving(tmp_path), lambda row: None)
    assert sorted(s[:3] for s in seen) == sorted(tuple(p) for p in prompts for _ in range(3))


def test_no_prompt_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="ppo: expected at least one prompt, got none"):
        ppo(*models(), JUDGE, [], CONFIG, 0, saving(tmp_path), lambda row: None)


@pytest.mark.parametrize("step", [2, 4])
def test_a_killed_training_goes_on_bit_for_bit_with_its_value_model_and_its_coefficient(tmp_path, step):
    def train(folder, log, seed=0):
        policy, _, value = models(seed)
        ppo(policy, model(0, loud=False), value, JUDGE, PROMPTS, replace(CONFIG, kl_horizon=100), 1, saving(folder), log)
        return policy, value

    rows, again = [], []
    expected = train(tmp_path / "whole", rows.append)
    with pytest.raises(Killed):
        train(tmp_path / "cut", killed_at(step, again))
    assert saving(tmp_path / "cut").saved_step() == step - 1
    del again[-1]  # the row of the step that was lost; a run's log drops it too
    resumed = train(tmp_path / "cut", again.append, seed=9)
    assert all(same_weights(a, b) for a, b in zip(expected, resumed))
    assert again == rows and len({row["kl_coef"] for row in rows}) == 4


# --- variants ------------------------------------------------------------------------------------------------------

def test_whitened_rewards_keep_their_mean():
    """Rewards 0, 0, 10 | 20 have mean 7.5 and deviation √68.75."""
    rollout = made_rollout([-1.0] * 4, [-1.0] * 4, [10.0, 20.0], [0, 3, 4])
    found = token_rewards(rollout, 0.5, replace(PLAIN, whiten_rewards=True))
    assert found.tolist() == pytest.approx([7.5 + (x - 7.5) / 68.75**0.5 for x in (0, 0, 10, 20)], rel=1e-5)


def test_with_the_kl_in_the_loss_the_rewards_are_the_scores_alone():
    rollout = made_rollout([-1.0, -3.0, -2.0, -1.0], [-2.0] * 4, [10.0, 20.0], [0, 3, 4])
    assert token_rewards(rollout, 0.5, replace(CONFIG, kl_in="loss")).tolist() == [0.0, 0.0, 10.0, 20.0]


@pytest.mark.parametrize("changes", [dict(kl_in="loss"), dict(kl_in="loss", kl_loss="k3"), dict(whiten_advantages="minibatch"),
                                     dict(value_init="zero"), dict(importance_cap=2.0, top_k=5)])
def test_every_variant_learns(tmp_path, changes):
    rows = []
    learn(tmp_path, rows=rows, **changes)
    assert np.mean([r["score"] for r in rows[-3:]]) > np.mean([r["score"] for r in rows[:3]]) + 0.5
