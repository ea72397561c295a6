"""train/rloo.py: who is compared with whom, a score that rises, a kill that changes no bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nanorlhf.config import GroupConfig
from nanorlhf.optim import Optimizer
from nanorlhf.train.rloo import advantages, rloo, update
from nanorlhf.train.rollout import Judge, Rollout, roll_out
from tiny import OPTIM, Killed, killed_at, model, random_sequences, same_weights, saving

GOOD, END = 7, 21
SLOW = replace(OPTIM, lr=0.003, muon_lr=0.003)
CONFIG = GroupConfig(steps=4, prompts=6, samples=4, max_new_tokens=8, temperature=1.0, epochs=2, minibatches=2, kl_coef=0.05,
                     kl_horizon=2000, missing_end_score=-1.0, optim=SLOW)
PROMPTS = random_sequences(12, 6, seed=5)
KINDS = ("rloo", "grpo", "reinforce")


def score(sequences):
    return torch.tensor([(s[-8:].count(GOOD) - 1.0) for s in sequences], dtype=torch.float32)


JUDGE = Judge(score, END)


def train(config, folder, log=lambda row: None, start=0):
    return rloo(model(start, loud=False), model(0, loud=False), JUDGE, PROMPTS, config, 0, saving(folder), log)


def made_rollout(log_ratios, scores, cu_actions):
    nothing = torch.zeros(0)
    return Rollout(nothing, nothing, nothing, torch.tensor(cu_actions), torch.tensor(log_ratios), torch.zeros(len(log_ratios)),
                   nothing, torch.tensor(scores), nothing, nothing, nothing, nothing)


def test_advantages_by_hand():
    """Two groups of two; responses of 2, 1, 1, 1 tokens with log-ratios 1+1, 0, 0, 4; scores 1, 3, 5, 5; β = ½.
    Rewards 0, 3, 5, 3. RLOO: each less the other. REINFORCE: as they are, or less the mean 2.75. GRPO: the scores alone."""
    rollout = made_rollout([1.0, 1.0, 0.0, 0.0, 4.0], [1.0, 3.0, 5.0, 5.0], [0, 2, 3, 4, 5])
    said = lambda **changes: advantages(rollout, 0.5, replace(CONFIG, samples=2, **changes)).tolist()
    assert said() == [-3.0, 3.0, 2.0, -2.0]
    assert said(advantage="reinforce") == [0.0, 3.0, 5.0, 3.0]
    assert said(advantage="reinforce", baseline=True) == [-2.75, 0.25, 2.25, 0.25]
    assert said(advantage="grpo", std_norm=False) == [-1.0, 1.0, 0.0, 0.0]
    assert said(advantage="grpo") == pytest.approx([-(0.5**0.5), 0.5**0.5, 0.0, 0.0], abs=1e-3)  # deviation √2


def gradient(config, rollout, beta):
    """Of the loss over the whole rollout at the sampling weights, by the optimiser step's own way, caught before the step."""
    policy, caught = model(0, loud=False), {}
    optimizer = Optimizer(policy, config.optim, 1)
    optimizer.step = lambda step: (caught.update({n: p.grad.clone() for n, p in policy.named_parameters()}), (0.0, 0.0))[1]
    update(policy, optimizer, rollout, beta, replace(config, epochs=1, minibatches=1), 0, 0)
    return caught


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_at_the_start_is_that_of_the_log_probabilities_weighed_by_the_advantages(kind):
    """At ratio 1: −(1/B) Σ_i A_i w_i ∇ log π(response i), w = 1 but in GRPO's form, where it is 1 / length; there also β ∇ k3, whose
    gradient is (1 − π_ref/π) ∇ log π. From a loop over responses of the plain model."""
    config = replace(CONFIG, advantage=kind)
    policy, ref = model(0, loud=False), model(1, loud=False)
    rollout = roll_out(policy, ref, None, JUDGE, PROMPTS[:3], config, 2, config.samples)
    gains, net, bounds, actions = advantages(rollout, 0.3, config), model(0, loud=False), rollout.cu_seqlens.tolist(), rollout.cu_actions.tolist()
    total = torch.zeros(())
    for i, gain in enumerate(gains.tolist()):
        ids = rollout.tokens[bounds[i]:bounds[i + 1]]
        own = slice(actions[i], actions[i + 1])
        logits = net(ids, torch.tensor([0, len(ids)], dtype=torch.int32)) @ net.head_weight.T
        logp = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)[-(own.stop - own.start):]
        weight = 1 / len(logp) if kind == "grpo" else 1.0
        pull = 0.3 * (1 - (rollout.ref_logprobs[own] - rollout.logprobs[own]).exp()) if kind == "grpo" else 0.0
        total = total + (logp * (pull - gain)).sum() * weight / len(gains)
    total.backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(gradient(config, rollout, 0.3)[name], p.grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_learns_to_say_what_the_judge_rewards(tmp_path, kind):
    rows = []
    train(replace(CONFIG, advantage=kind, steps=25, prompts=12, optim=OPTIM, baseline=True), tmp_path, rows.append)
    before, after = (np.mean([r["score"] for r in part]) for part in (rows[:3], rows[-3:]))
    assert before < -0.7 and after > before + 0.5
    assert {row["stage"] for row in rows} == {kind}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_goes_on_bit_for_bit(tmp_path, kind):
    config, rows, again = replace(CONFIG, advantage=kind, kl_horizon=100), [], []
    expected = train(config, tmp_path / "whole", rows.append)
    with pytest.raises(Killed):
        train(config, tmp_path / "cut", killed_at(3, again))
    assert saving(tmp_path / "cut").saved_step() == 2
    del again[-1]
    assert same_weights(expected, train(config, tmp_path / "cut", again.append, start=9)) and again == rows


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_group_of_one_is_refused_in_one_sentence_before_anything_is_trained(tmp_path, kind):
    with pytest.raises(ValueError, match=f"{kind}: a group needs at least 2 samples to compare, got 1"):
        train(replace(CONFIG, advantage=kind, samples=1), tmp_path)
    train(replace(CONFIG, advantage="reinforce", samples=1, steps=1), tmp_path)  # compares with nothing
