"""train/sft.py: the loss counts the response's tokens and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.config import SFTConfig
from nanorlhf.engine import SamplingConfig, generate
from nanorlhf.engine.generate import ragged
from nanorlhf.train.sft import response_logprobs, sft, token_batches
from tiny import OPTIM, Killed, killed_at, model, same_weights, saving

ASK, END = 20, 21
CONFIG = SFTConfig(steps=150, batch_tokens=48, optim=replace(OPTIM, lr=0.02, muon_lr=0.02))


def echo(a, b):
    """A prompt of two numbers, and the response that says them in reverse."""
    return [ASK, a, b, END, b, a, END], [0, 0, 0, 0, 1, 1, 1]


EXAMPLES = [echo(a, b) for a in range(5) for b in range(5) if a != b]
TWO_TURNS = ([ASK, 1, END, 2, END, ASK, 3, END, 4, 5, END], [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 5))
def test_a_pass_holds_each_example_once_in_batches_within_the_budget(lengths, budget, epoch):
    batches = token_batches(lengths, budget, 1, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)
    for batch, following in zip(batches, batches[1:]):  # no batch is closed while the next example would still fit
        assert sum(lengths[i] for i in batch) + lengths[following[0]] > budget


def test_each_pass_has_an_order_of_its_own_that_the_seed_decides():
    orders = {tuple(np.concatenate(token_batches([1] * 30, 8, seed, epoch))) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert [b.tolist() for b in token_batches([1] * 9, 4, 5, 2)] == [b.tolist() for b in token_batches([1] * 9, 4, 5, 2)]


def hand_masked_gradients(net, examples):
    """The mean of cross entropies over response tokens, from full logits and one sequence at a time."""
    losses = []
    for ids, mask in examples:
        tokens, cu_seqlens = ragged([ids])
        logits = net(tokens, cu_seqlens) @ net.head_weight.T
        losses += [torch.nn.functional.cross_entropy(logits[i - 1], tokens[i]) for i in range(len(ids)) if mask[i]]
    torch.stack(losses).mean().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    return gradients


def test_the_gradient_is_that_of_a_loss_masked_by_hand():
    net, examples = model(2), [EXAMPLES[3], TWO_TURNS, EXAMPLES[7]]
    expected = hand_masked_gradients(net, examples)
    logprobs, ids = response_logprobs(net, examples)
    (-logprobs.mean()).backward()
    assert ids.tolist() == [i for sequence, mask in examples for i, m in zip(sequence, mask) if m]
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=2e-5, rtol=1e-3)
    assert expected["model.embed_tokens.weight"].abs().max() > 1e-2


def test_no_gradient_comes_from_a_position_that_predicts_a_prompts_token():
    """The states whose next token is the prompt's, or which end a sequence, get exactly zero; so what the labels there
    are cannot matter. The end of turn is the response's own."""
    net, kept = model(2), []
    net.model.norm.register_forward_hook(lambda _, __, hidden: (hidden.retain_grad(), kept.append(hidden)) and None)
    logprobs, _ = response_logprobs(net, [EXAMPLES[0], TWO_TURNS])
    (-logprobs.mean()).backward()
    reached = (kept[0].grad != 0).any(-1).int().tolist()
    following = lambda mask: mask[1:] + [0]
    assert reached == following(EXAMPLES[0][1]) + following(TWO_TURNS[1])


def train(config, state, log=lambda row: None, seed=0):
    return sft(model(seed, loud=False), EXAMPLES, config, 3, state, lambda m: 1.0, log)


def test_a_model_learns_the_responses_and_to_end_its_turn(tmp_path):
    rows = []
    net = train(CONFIG, saving(tmp_path), rows.append)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] > 2.5 and losses[-1] < 0.5
    answers = generate(net, [ids[:4] for ids, _ in EXAMPLES], 8, stop=[END], sampling=SamplingConfig(temperature=0))
    right = [drawn.ids == ids[4:] for drawn, (ids, _) in zip(answers, EXAMPLES)]
    assert np.mean(right) > 0.6  # 1 in 400 by chance


def test_held_out_bits_are_measured_at_the_start_halfway_and_at_the_end(tmp_path):
    rows = []
    train(replace(CONFIG, steps=6), saving(tmp_path), rows.append)
    assert [row["step"] for row in rows if row.get("event") == "eval"] == [0, 3, 6]
    assert [row["step"] for row in rows if "event" not in row] == [1, 2, 3, 4, 5, 6]


def test_every_pass_sees_every_example(tmp_path):
    """20 examples of 7 tokens, 6 in a batch of at most 48: 4 steps a pass."""
    rows = []
    train(replace(CONFIG, steps=9), saving(tmp_path), rows.append)
    assert [row["epoch"] for row in rows if "loss" in row] == [0, 0, 0, 0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("step", [3, 5, 6])
def test_a_killed_training_goes_on_bit_for_bit_also_over_a_new_pass(tmp_path, step):
    config = replace(CONFIG, steps=7)
    expected = train(config, saving(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(config, saving(tmp_path / "cut"), killed_at(step))
    assert saving(tmp_path / "cut").saved_step() == step - 1
    assert same_weights(expected, train(config, saving(tmp_path / "cut"), seed=9))


def test_no_example_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="sft: expected at least one example, got none"):
        sft(model(), [], CONFIG, 0, saving(tmp_path), lambda m: 1.0, lambda row: None)
