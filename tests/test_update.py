"""train/update.py: the loop that PPO, RLOO, GRPO and REINFORCE share. Where it starts, that the parts of a minibatch add up to it,
and what stops it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanorlhf.config import GroupConfig, PPOConfig
from nanorlhf.ops import backend
from nanorlhf.optim import Optimizer
from nanorlhf.train import ppo as ppo_room
from nanorlhf.train import rloo as rloo_room
from nanorlhf.train.rollout import Judge, Rollout, roll_out
from nanorlhf.train.update import share_of
from tiny import OPTIM, model, random_sequences, same_weights, saving

GOOD, END = 7, 21
ALIKE = dict(steps=3, max_new_tokens=8, temperature=0.8, epochs=2, minibatches=2, kl_coef=0.05, kl_horizon=100,
             optim=replace(OPTIM, lr=0.003, muon_lr=0.003))
CONFIGS = {
    "ppo": PPOConfig(prompts=12, value_optim=OPTIM, **ALIKE),
    "ppo, KL in the loss": PPOConfig(prompts=12, value_optim=OPTIM, kl_in="loss", whiten_advantages="minibatch", **ALIKE),
    "ppo, shared": PPOConfig(prompts=12, value="shared", value_optim=OPTIM, **ALIKE),
    "rloo": GroupConfig(prompts=4, samples=3, **ALIKE),
    "rloo, one prompt": GroupConfig(prompts=1, samples=3, **ALIKE),  # of two ranks, one has nothing to roll out
    "grpo": GroupConfig(prompts=4, samples=3, advantage="grpo", **ALIKE),
    "dr grpo": GroupConfig(prompts=4, samples=3, advantage="grpo", std_norm=False, length_norm=False, **ALIKE),
    "reinforce": GroupConfig(prompts=4, samples=3, advantage="reinforce", baseline=True, **ALIKE),
}
PROMPTS = random_sequences(12, 6, seed=5)
every = pytest.mark.parametrize("name", CONFIGS)


def score(sequences):
    return torch.tensor([(s[-8:].count(GOOD) - 1.0) + 0.1 * (s[-1] % 5) for s in sequences], dtype=torch.float32)


JUDGE = Judge(score, END)


def made(config, seed=0, start=0):
    """(policy, ref, value) of a configuration."""
    shared = isinstance(config, PPOConfig) and config.value == "shared"
    policy = model(start, scalar_head=shared, loud=False)
    return policy, model(0, loud=False), policy if shared else model(seed + 1, scalar_head=True, loud=False)


def train(config, folder, log=lambda row: None, start=0, judge=JUDGE, prompts=PROMPTS):
    policy, ref, value = made(config, start=start)
    if isinstance(config, PPOConfig):
        ppo_room.ppo(policy, ref, value, judge, prompts, config, 0, saving(folder), log)
    else:
        rloo_room.rloo(policy, ref, judge, prompts, config, 0, saving(folder), log)
    return policy


def wide(net):
    """The model in fp64."""
    net = net.double()
    net.compute_dtype = torch.float64
    return net


def rolled(config):
    """A rollout of another policy than the reference, all its numbers in fp64."""
    policy, _, value = made(config, start=3)
    ref, critic = model(0, loud=False), value.scores if isinstance(config, PPOConfig) else None
    rollout = roll_out(policy, ref, critic, JUDGE, PROMPTS[:config.prompts], config, 1, getattr(config, "samples", 1))
    return Rollout(**{k: v.double() if v.is_floating_point() else v for k, v in rollout.__dict__.items()})


def updated(config, rollout):
    policy, _, value = (wide(net) for net in made(config, start=4))  # has moved from where it sampled
    optimizers = [Optimizer(policy, config.optim, 4)]
    if not isinstance(config, PPOConfig):
        return policy, rloo_room.update(policy, optimizers[0], rollout, 0.1, config, 0, 0)
    if config.value == "separate":
        optimizers.append(Optimizer(value, config.value_optim, 4))
    return policy, ppo_room.update(policy, ppo_room.Critic(value), optimizers, rollout, 0.1, config, 0, 0)


@every
def test_the_kl_is_exactly_zero_and_the_ratio_exactly_one_at_the_start(tmp_path, name):
    """The policy is its reference, in fp32 with kernels whose bits do not depend on the batch: no ratio at all before the first
    optimiser step, whatever the order of the episodes."""
    before, rows = backend.deterministic(True), []
    try:
        train(replace(CONFIGS[name], steps=1), tmp_path, rows.append)
    finally:
        backend.deterministic(before)
    row = rows[0]
    assert row["kl"] == row["kl_exact"] == row["kl_k2"] == row["kl_k3"] == 0.0 and row["reward"] == row["score"]
    assert row["first_ratio_max"] == 1.0 and row["sampler_gap"] == 0.0
    assert row["ratio_max"] > 1.0  # later passes move the policy


@every
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_the_parts_of_a_minibatch_add_up_to_it(name, micro):
    """Two passes of two optimiser steps in fp64, the gradient in one backward or in several. A value is rounded to fp32 on its way."""
    rollout, near = rolled(CONFIGS[name]), 1e-5 if name == "ppo, shared" else 1e-9
    (whole, one), (parts, other) = updated(CONFIGS[name], rollout), updated(replace(CONFIGS[name], micro_episodes=micro), rollout)
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, atol=near, rtol=near)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert other["ratio_max"] == pytest.approx(one["ratio_max"], rel=1e-5) and one["ratio_max"] > 1.01
    assert other["policy_loss"] == pytest.approx(one["policy_loss"], abs=1e-7)
    assert other["clip_fraction"] == pytest.approx(one["clip_fraction"], abs=1e-6)


def test_a_parts_share_is_its_number_of_actions():
    """Episodes of 2, 1 and 5 actions: of the last two, the second is 1 / 6."""
    rollout = rolled(CONFIGS["rloo"])
    rollout.cu_actions = torch.tensor([0, 2, 3, 8])
    assert share_of(rollout, np.array([1]), np.array([2, 1])) == 1 / 6


@every
def test_the_kl_budget_stops_the_run_for_good(tmp_path, name):
    """One step moves the policy beyond it; the second rollout is measured and not trained on, now or after a resume."""
    config = replace(CONFIGS[name], kl_budget=1e-6, steps=6)
    rows = []
    policy = train(config, tmp_path, rows.append)
    assert [row.get("event", row["step"]) for row in rows][-1] == "stop" and rows[-1]["kl"] > 1e-6
    again, more = train(config, tmp_path, (late := []).append, start=9), late
    assert more == rows[-1:] and same_weights(policy, again)  # the log of a sitting that was ended here lost its last event
    assert len(rows) < 6 and saving(tmp_path).saved_step() == rows[-1]["step"]


def test_a_minibatch_whose_ratio_is_too_large_ends_the_passes_unless_it_is_the_first(tmp_path):
    rows = []
    train(replace(CONFIGS["rloo"], ratio_stop=1.0000001, steps=1), tmp_path, rows.append)
    assert rows[0]["passes_ended"] and rows[0]["ratio_max"] == rows[0]["first_ratio_max"]  # one optimiser step and no more
    train(replace(CONFIGS["rloo"], ratio_stop=100.0, steps=1), tmp_path / "b", rows.append)
    assert not rows[1]["passes_ended"]


@every
@pytest.mark.parametrize("prompts, judge, sentence", [
    (PROMPTS, Judge(lambda s: torch.full((len(s),), float("nan")), END), "the judge's score of response 0 is nan"),
    ([*PROMPTS, [1] * 25], JUDGE, "prompt 12 has 25 tokens and leaves no room for 8 more in a context of 32"),
    ([], JUDGE, "expected at least one prompt, got none"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_trained(tmp_path, name, prompts, judge, sentence):
    rows = []
    with pytest.raises(ValueError, match=sentence):
        train(CONFIGS[name], tmp_path, rows.append, judge=judge, prompts=prompts)
    assert rows == [] and saving(tmp_path).saved_step() == 0


def test_models_of_different_vocabularies_are_refused_in_one_sentence(tmp_path):
    """Before anything is trained, by each algorithm."""
    other, state, log = model(0, vocab_size=24), saving(tmp_path), lambda row: None
    policy, ref, value = made(CONFIGS["ppo"])
    with pytest.raises(ValueError, match="ppo: policy, reference and value model have vocabularies of different sizes: 23, 24 and 23"):
        ppo_room.ppo(policy, other, value, JUDGE, PROMPTS, CONFIGS["ppo"], 0, state, log)
    with pytest.raises(ValueError, match="rloo: policy and reference have vocabularies of different sizes, 23 and 24"):
        rloo_room.rloo(policy, other, JUDGE, PROMPTS, CONFIGS["rloo"], 0, state, log)
    with pytest.raises(ValueError, match="ppo: with a shared value function the value model is the policy"):
        ppo_room.ppo(policy, ref, value, JUDGE, PROMPTS, CONFIGS["ppo, shared"], 0, state, log)


@pytest.mark.parametrize("name", ["ppo, KL in the loss", "grpo"])
def test_a_filtered_samplers_kl_in_the_loss_is_weighted_like_its_rewards(tmp_path, name):
    """A cap of almost 0 makes all weights so, and leaves nothing of the KL's gradient either, whatever β is."""
    norms = []
    for cap in (0.0, 1e-6):
        rows = []
        train(replace(CONFIGS[name], importance_cap=cap, kl_coef=100.0, kl_target=0.0, steps=2), tmp_path / str(cap), rows.append)
        norms.append(rows[-1]["grad_norm"])
    assert norms[1] < 1e-3 * norms[0]


def test_nothing_is_explained_of_returns_that_do_not_vary(tmp_path):
    rows = []
    config = replace(CONFIGS["ppo"], max_new_tokens=1, missing_end="replace", kl_coef=0.0, kl_target=0.0, steps=1)
    train(config, tmp_path, rows.append, judge=Judge(lambda s: torch.full((len(s),), -1.0), END))
    assert math.isnan(rows[0]["explained_variance"])
