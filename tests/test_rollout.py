"""train/rollout.py: the very ids that were sampled, what every model says of them, and figures that company does not change."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanorlhf.config import RLConfig
from nanorlhf.engine import SamplingConfig, generate
from nanorlhf.engine.generate import ragged
from nanorlhf.train.rollout import (Judge, check_prompts, drawn_prompts, end_rule, episodes, importance, merged, roll_out)
from tiny import OPTIM, model, random_sequences

GOOD, END = 7, 21
CONFIG = RLConfig(steps=4, max_new_tokens=8, temperature=1.0, kl_coef=0.05, missing_end_score=-1.0, optim=OPTIM)
PROMPTS = random_sequences(12, 6, seed=5)


def score(sequences):
    return torch.tensor([(s[-8:].count(GOOD) - 1.0) for s in sequences], dtype=torch.float32)


JUDGE = Judge(score, END)


def rollout_of(config=CONFIG, seed=3, loud=True, n=1, prompts=PROMPTS):
    policy, ref, value = model(0, loud=loud), model(1, loud=loud), model(2, scalar_head=True)
    return roll_out(policy, ref, value.scores, JUDGE, prompts, config, seed, n), (policy, ref, value)


def test_the_ids_that_were_sampled_are_the_ids_that_are_trained_on():
    rollout, (policy, _, _) = rollout_of()
    drawn = generate(policy, PROMPTS, 8, stop=[END], sampling=SamplingConfig(1.0), seed=3)
    tokens, cu_seqlens = ragged([p + c.ids for p, c in zip(PROMPTS, drawn)])
    assert torch.equal(rollout.tokens, tokens) and torch.equal(rollout.cu_seqlens, cu_seqlens)
    assert rollout.tokens[rollout.where + 1].tolist() == [i for c in drawn for i in c.ids]
    assert rollout.cu_actions.diff().tolist() == [len(c.ids) for c in drawn]
    assert rollout.finished.tolist() == [c.ids[-1] == END for c in drawn]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_trainers_logprobs_are_the_samplers_and_values_belong_to_the_states_before_the_actions(temperature):
    rollout, (policy, ref, value) = rollout_of(replace(CONFIG, temperature=temperature))
    drawn = generate(policy, PROMPTS, 8, stop=[END], sampling=SamplingConfig(temperature), seed=3)
    sampled = torch.tensor([x for c in drawn for x in c.logprobs])
    torch.testing.assert_close(rollout.logprobs, sampled, atol=2e-5, rtol=0)
    assert torch.equal(rollout.sampled, sampled)
    assert 0 <= rollout.measured()["sampler_gap"] == float((sampled - rollout.logprobs).abs().max()) < 2e-5
    at = 0
    for prompt, c in zip(PROMPTS, drawn):
        for t, token in enumerate(c.ids):  # one state at a time
            with torch.no_grad():
                state, bounds = ragged([prompt + c.ids[:t]])
                last = torch.tensor([len(state) - 1])
                logits = ref(state, bounds)[-1] @ ref.head_weight.T / temperature
                assert float(rollout.values[at]) == pytest.approx(float(value.scores(state, bounds, last)), abs=1e-4)
                assert float(rollout.ref_logprobs[at]) == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)
            at += 1
    assert at == len(rollout.logprobs)


def test_a_response_without_an_end_gets_the_missing_end_score_instead_of_its_own():
    rollout, _ = rollout_of(replace(CONFIG, missing_end_score=-5.5), loud=False)
    assert 0 < int(rollout.finished.sum()) < len(PROMPTS)  # both kinds are there
    bounds = rollout.cu_seqlens.tolist()
    own = score([rollout.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:])])
    assert rollout.scores.tolist() == [float(s) if f else -5.5 for s, f in zip(own, rollout.finished)]


def test_a_selection_of_episodes_is_their_batch_and_points_back_to_their_actions():
    rollout, _ = rollout_of()
    chosen = np.array([7, 0, 11])
    tokens, cu_seqlens, where, index = episodes(rollout, chosen)
    bounds = rollout.cu_seqlens.tolist()
    expected, expected_cu = ragged([rollout.tokens[bounds[i]:bounds[i + 1]].tolist() for i in chosen])
    assert torch.equal(tokens, expected) and torch.equal(cu_seqlens, expected_cu)
    assert torch.equal(tokens[where + 1], rollout.tokens[rollout.where + 1][index])
    assert len(index) == sum(int(rollout.cu_actions[i + 1] - rollout.cu_actions[i]) for i in chosen)


def test_the_responses_to_one_prompt_stand_together():
    rollout, _ = rollout_of(n=3)
    bounds = rollout.cu_seqlens.tolist()
    for i, prompt in enumerate(p for p in PROMPTS for _ in range(3)):
        assert rollout.tokens[bounds[i]:bounds[i] + len(prompt)].tolist() == prompt
    assert len(rollout.scores) == 36


# --- figures ---------------------------------------------------------------------------------------------------------

def test_the_full_kl_and_the_entropy_are_sums_over_the_vocabulary():
    """From the logits of each state, by themselves, in fp64."""
    rollout, (policy, ref, _) = rollout_of(replace(CONFIG, temperature=0.7))
    bounds = rollout.cu_seqlens.tolist()
    with torch.no_grad():
        for m, at in list(enumerate(rollout.where.tolist()))[::9]:
            start = max(b for b in bounds if b <= at)
            state, cu = ragged([rollout.tokens[start:at + 1].tolist()])
            p, q = (((net(state, cu)[-1] @ net.head_weight.T).double() / 0.7).softmax(-1) for net in (policy, ref))
            assert float(rollout.full_kl[m]) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-4)
            assert float(rollout.entropy[m]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-4)


def test_the_sampled_kl_is_without_bias_for_the_full_one():
    """1200 responses of one token each: the mean of log π/π_ref of the drawn token lies within 4 standard errors of the sum over
    the vocabulary, and so does that of k3."""
    rollout, _ = rollout_of(replace(CONFIG, max_new_tokens=1), n=100)
    gap = rollout.logprobs - rollout.ref_logprobs
    for estimate in (gap, (-gap).expm1() + gap):
        error = (estimate - rollout.full_kl).std() / math.sqrt(len(gap))
        assert abs(float((estimate - rollout.full_kl).mean())) < 4 * float(error)


def test_every_figure_is_the_same_whatever_sequences_join_the_batch():
    """Rollouts apart and merged: every tensor is end to end, every mean is that of the parts."""
    (a, _), (b, _) = rollout_of(prompts=PROMPTS[:5], seed=8), rollout_of(prompts=PROMPTS[5:], seed=9)
    one, other = a.measured(), b.measured()
    both = merged([a, b]).measured()
    assert set(both) == set(one)
    for key in ("score", "kl", "kl_exact", "kl_k2", "kl_k3", "length", "finished"):  # means over responses
        assert both[key] == pytest.approx((5 * one[key] + 7 * other[key]) / 12, abs=1e-5), key
    m, n = len(a.where), len(b.where)
    for key in ("entropy", "sampler_kl"):  # over tokens
        assert both[key] == pytest.approx((m * one[key] + n * other[key]) / (m + n), abs=1e-5), key
    assert both["sampler_gap"] == max(one["sampler_gap"], other["sampler_gap"])


def test_a_sequences_own_figures_do_not_depend_on_its_company():
    """Each request draws from its own stream, so the first five prompts say the same alone; so do the models of them."""
    (few, _), (all_, _) = rollout_of(prompts=PROMPTS[:5]), rollout_of()
    m = len(few.where)
    assert torch.equal(few.tokens, all_.tokens[:len(few.tokens)]) and torch.equal(few.where, all_.where[:m])
    assert torch.equal(few.scores, all_.scores[:5])
    for name in ("logprobs", "ref_logprobs", "values", "sampled", "entropy", "full_kl"):
        torch.testing.assert_close(getattr(few, name), getattr(all_, name)[:m], atol=2e-5, rtol=1e-5)


def test_merged_rollouts_are_the_rollout_of_all():
    whole, _ = rollout_of()
    bounds, actions = whole.cu_seqlens.tolist(), whole.cu_actions.tolist()
    parts = [rollout_of(prompts=PROMPTS[:5])[0], rollout_of(prompts=PROMPTS[:5], seed=4)[0]]
    states = [p.where.clone() for p in parts]
    both = merged(parts)
    assert all(torch.equal(p.where, w) for p, w in zip(parts, states))  # they can be merged again
    assert both.cu_seqlens.dtype == whole.cu_seqlens.dtype and both.cu_seqlens[:6].tolist() == bounds[:6]
    assert both.cu_actions[:6].tolist() == actions[:6] and len(both.scores) == 10
    assert bool((both.where.diff() > 0).all()) and int(both.where[-1]) == len(both.tokens) - 2


# --- the end of a response ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule, expected", [("replace", [2.0, -1.5]), ("subtract", [2.0, 1.5]), ("keep", [2.0, 3.0])])
def test_a_missing_end_is_replaced_subtracted_or_let_be(rule, expected):
    """Scores 2 and 3, of which the second did not end; the other score is −1.5."""
    config = replace(CONFIG, missing_end=rule, missing_end_score=-1.5)
    assert end_rule(torch.tensor([2.0, 3.0]), torch.tensor([True, False]), config).tolist() == expected


def test_a_score_that_is_not_finite_is_refused_in_one_sentence():
    for bad in (math.nan, math.inf):
        judge = Judge(lambda sequences: torch.tensor([0.0, 0.0, bad] + [0.0] * (len(sequences) - 3)), END)
        with pytest.raises(ValueError, match=f"the judge's score of response 2 is {bad}; it must be finite"):
            roll_out(model(0), model(1), None, judge, PROMPTS, CONFIG, 0)


@pytest.mark.parametrize("prompts, sentence", [
    ([], "rl: expected at least one prompt, got none"),
    ([[1], [1] * 25], "rl: prompt 1 has 25 tokens and leaves no room for 8 more in a context of 32"),
    ([[]], "rl: prompt 0 has 0 tokens and leaves no room"),
])  # fmt: skip
def test_prompts_without_room_are_refused_in_one_sentence(prompts, sentence):
    check_prompts("rl", [[1] * 24], CONFIG, 32)
    with pytest.raises(ValueError, match=sentence):
        check_prompts("rl", prompts, CONFIG, 32)


def test_prompts_come_in_shuffled_passes():
    """7 prompts, 3 a step: any 7 in a row from a multiple of 7 are all of them, and passes differ."""
    prompts = [[i] for i in range(7)]
    flat = [p[0] for step in range(14) for p in drawn_prompts(prompts, 3, 1, step)]
    turns = [flat[i:i + 7] for i in range(0, 42, 7)]
    assert all(sorted(turn) == list(range(7)) for turn in turns) and len(set(map(tuple, turns))) > 1


# --- importance weights ------------------------------------------------------------------------------------------------

def test_a_samplers_filter_is_weighed_by_the_trainer_over_the_sampler():
    """With top-k 2 the sampler renormalises two chances: the weight of a drawn token is the sum of the two largest."""
    config = replace(CONFIG, top_k=2, max_new_tokens=1, importance_cap=2.0)
    rollout, (policy, _, _) = rollout_of(config, n=4)
    weights = importance(rollout, config.importance_cap)
    with torch.no_grad():
        hidden = policy(rollout.tokens, rollout.cu_seqlens)[rollout.where]
        largest = (hidden @ policy.head_weight.T).softmax(-1).topk(2).values.sum(-1)
    torch.testing.assert_close(weights, largest, atol=1e-4, rtol=1e-4)
    assert float(weights.min()) < 0.99
    assert importance(rollout, 0.0).eq(1).all() and float(importance(rollout, 0.5).max()) == 0.5
    assert rollout.measured()["sampler_kl"] == pytest.approx(-float(largest.log().mean()), abs=1e-4)


def test_without_a_filter_the_weights_are_one():
    rollout, _ = rollout_of()
    torch.testing.assert_close(importance(rollout, 5.0), torch.ones_like(rollout.logprobs), atol=1e-4, rtol=0)
