"""train/dpo.py: the loss by hand, what it fits, a kill that changes no bit."""

import math
from dataclasses import replace

import pytest
import torch

from nanorlhf.config import DPOConfig
from nanorlhf.train.dpo import Pair, backward, dpo, response_sums
from tiny import OPTIM, Killed, killed_at, model, random_sequences, same_weights, saving

CONFIG = DPOConfig(steps=6, pairs_per_step=4, beta=0.3, optim=replace(OPTIM, lr=0.003, muon_lr=0.003))
PROMPTS = random_sequences(12, 6, seed=5)
GOOD, BAD, END = 7, 8, 21
PAIRS = [Pair(p + [GOOD] * (1 + i % 3) + [END], p + [BAD] * (1 + i % 2) + [END], len(p)) for i, p in enumerate(PROMPTS)]


def train(folder, log=lambda row: None, start=0, pairs=PAIRS, ref=None, **changes):
    return dpo(model(start, loud=False), ref or model(0, loud=False), pairs, replace(CONFIG, **changes), 0, saving(folder), log)


def test_the_sums_are_those_of_each_response_alone():
    """log π of the ids after the prompt, one conversation at a time, from the logits."""
    net = model(1)
    with torch.no_grad():
        chosen, rejected = response_sums(net, PAIRS)
        for i, pair in enumerate(PAIRS):
            for ids, found in ((pair.chosen, chosen[i]), (pair.rejected, rejected[i])):
                tokens = torch.tensor(ids)
                logits = net(tokens, torch.tensor([0, len(ids)], dtype=torch.int32)) @ net.head_weight.T
                each = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None]).squeeze(1)
                assert float(found) == pytest.approx(float(each[pair.start - 1:].sum()), abs=1e-3)


@pytest.mark.parametrize("loss, expected", [("sigmoid", math.log(2)), ("ipo", (1 / 0.6) ** 2)])
def test_at_the_start_nothing_is_told_apart(tmp_path, loss, expected):
    """Policy and reference are the same: margin exactly 0, so −log σ(0) = ln 2, and (0 − 1/(2·0.3))²."""
    rows = []
    train(tmp_path, rows.append, loss=loss, steps=1)
    assert rows[0]["margin"] == rows[0]["chosen"] == rows[0]["rejected"] == 0.0
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_a_policy_learns_which_response_is_preferred(tmp_path, loss):
    rows = []
    train(tmp_path, rows.append, loss=loss, steps=30)
    assert rows[-1]["pair_accuracy"] == 1.0 and rows[-1]["margin"] > 1.0 and rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["chosen"] - rows[-1]["rejected"] == pytest.approx(rows[-1]["margin"], abs=1e-4)


def test_a_pass_holds_every_pair_once(tmp_path, monkeypatch):
    """12 pairs, 4 a step: three steps are a pass."""
    from nanorlhf.train import dpo as room

    seen, sums = [], room.response_sums
    monkeypatch.setattr(room, "response_sums", lambda net, batch: (seen.extend(batch), sums(net, batch))[1])
    train(tmp_path)
    for turn in (seen[:24], seen[24:]):  # the reference's batch and the policy's
        assert sorted(PAIRS.index(p) for p in turn) == sorted([*range(12)] * 2)


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    rows, again = [], []
    expected = train(tmp_path / "whole", rows.append)
    with pytest.raises(Killed):
        train(tmp_path / "cut", killed_at(4, again))
    assert saving(tmp_path / "cut").saved_step() == 3
    del again[-1]
    assert same_weights(expected, train(tmp_path / "cut", again.append, start=9)) and again == rows


@pytest.mark.parametrize("pairs, sentence", [
    ([], "dpo: expected at least one pair, got none"),
    ([*PAIRS, Pair([1, 2], [1, 2, 3], 2)], "dpo: pair 12 has 2 and 3 tokens after a prompt of 2"),
    ([Pair([1] * 33, [1, 2, 3], 2)], "dpo: pair 0 has 33 and 3 tokens after a prompt of 2: both must go beyond the prompt and fit a context of 32"),
])  # fmt: skip
def test_pairs_that_do_not_fit_are_refused_in_one_sentence(tmp_path, pairs, sentence):
    rows = []
    with pytest.raises(ValueError, match=sentence):
        train(tmp_path, rows.append, pairs=pairs)
    assert rows == []


def test_another_vocabulary_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="dpo: policy and reference have vocabularies of different sizes, 23 and 24"):
        train(tmp_path, ref=model(0, vocab_size=24))


def test_a_margin_of_nothing_counts_one_half():
    """At the start the policy is its reference: no pair is told apart."""
    pairs = [Pair([1, 2, 3], [1, 4, 5], 1)]
    assert backward(model(), model(), pairs, DPOConfig())["pair_accuracy"] == 0.5
