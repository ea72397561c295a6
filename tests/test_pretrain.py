"""train/pretrain.py: one update whatever its micro-batches, a loss that falls, and a kill that changes no bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nanorlhf.config import PretrainConfig
from nanorlhf.data.mixture import Mixture, pack
from nanorlhf.engine.generate import ragged
from nanorlhf.model import Model
from nanorlhf.optim import Optimizer
from nanorlhf.train.pretrain import pretrain, row_slices, train_step
from tiny import OPTIM, SHAPE, Killed, killed_at, model, same_weights, saving

EOT = 22
CONFIG = PretrainConfig(steps=60, rows=4, row_tokens=16, micro_rows=2, evals=2, sample_points=(0.0, 0.5, 1.0), optim=OPTIM)


class Recorder:
    """In an optimiser's place: keeps the gradients and changes nothing."""

    def __init__(self, model):
        self.model, self.params = model, list(model.parameters())

    def step(self, step):
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        self.model.zero_grad()
        return 0.0, 0.0


def counting(seed=0):
    """A mixture of documents that count up, modulo 20, from a random start: after two tokens the rest is known."""
    starts = np.random.default_rng(7).integers(0, 20, 60)
    ids = np.concatenate([(start + np.arange(9)) % 20 for start in starts])
    return Mixture({"count": pack(ids, np.arange(61) * 9, EOT)}, {"count": 1.0}, CONFIG.row_tokens, seed, EOT)


def train(config, state, log=lambda row: None, seed=0):
    return pretrain(model(seed), counting(), config, state, lambda m: {"count": 1.0}, lambda m: [("a", "b")], log)


def test_rows_are_cut_into_slices_with_bounds_of_their_own():
    """Three rows of 4 tokens, the second holding a document's end at 6; two rows a slice."""
    slices = list(row_slices(torch.arange(12), torch.tensor([0, 4, 6, 8, 12]), 4, 2))
    assert [tokens.tolist() for tokens, _ in slices] == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11]]
    assert [bounds.tolist() for _, bounds in slices] == [[0, 4, 6, 8], [0, 4]]


@pytest.mark.parametrize("micro_rows", [1, 3])
def test_micro_batches_give_the_gradient_of_one_batch(micro_rows):
    """In double precision; 5 rows of documents of many lengths, so that slices hold different numbers of targets."""
    big = Model(SHAPE, dtype=torch.float64, seed=3).double()
    tokens, cu_seqlens = counting().batch(2, 5)
    whole, cut = Recorder(big), Recorder(big)
    one = train_step(big, whole, tokens, cu_seqlens, replace(CONFIG, micro_rows=5), 0)
    other = train_step(big, cut, tokens, cu_seqlens, replace(CONFIG, micro_rows=micro_rows), 0)
    assert one["loss"] == pytest.approx(other["loss"], abs=1e-12)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(gradient, cut.gradients[name], atol=1e-13, rtol=1e-10)
        assert gradient.abs().max() > 1e-6, name


@torch.no_grad()
def test_the_loss_is_the_mean_over_every_token_after_the_first_of_its_document():
    """The documents one by one, with a full softmax, are the reference: none sees the one before it."""
    net = model(1)
    tokens, cu_seqlens = counting().batch(0, 3)
    nats, count = 0.0, 0
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        alone, bounds = ragged([tokens[start:end].tolist()])
        logits = net(alone, bounds).double() @ net.head_weight.T.double()
        nats += torch.nn.functional.cross_entropy(logits[:-1], alone[1:], reduction="sum").item()
        count += end - start - 1
    with torch.enable_grad():
        row = train_step(net, Recorder(net), tokens, cu_seqlens, CONFIG, 0)
    assert row["loss"] == pytest.approx(nats / count, rel=1e-5)


def test_a_model_learns_to_count(tmp_path):
    """Of ten predictions in a document eight can be known (the next number, and the end), one is an even choice of 20
    and one is certain: at best log(20)/10 = 0.3 nats on average. An untrained model is above log(23) = 3.1."""
    rows = []
    train(CONFIG, saving(tmp_path), rows.append)
    losses = [row["loss"] for row in rows if "event" not in row]
    assert losses[0] > 3 and np.mean(losses[-5:]) < 1.2


def test_what_is_logged_when(tmp_path):
    rows = []
    train(replace(CONFIG, steps=4), saving(tmp_path), rows.append)
    assert [row["step"] for row in rows if row.get("event") == "eval"] == [0, 2]
    assert [row["step"] for row in rows if row.get("event") == "sample"] == [0, 2, 4]
    steps = [row for row in rows if "event" not in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4] and [row["tokens"] for row in steps] == [64, 128, 192, 256]
    assert all(row["stage"] == "pretrain" for row in rows)


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    config, rows, again = replace(CONFIG, steps=8), [], []
    expected = train(config, saving(tmp_path / "whole"), rows.append)
    with pytest.raises(Killed):
        train(config, saving(tmp_path / "cut"), killed_at(5, again))
    assert saving(tmp_path / "cut").saved_step() == 4
    del again[-1]  # the row of the step that was lost; a run's log drops it too
    resumed = train(config, saving(tmp_path / "cut"), again.append, seed=9)  # its weights come from the state
    assert same_weights(expected, resumed)
    losses = lambda found: [(row["step"], row["loss"], row["grad_norm"]) for row in found if "loss" in row]
    assert losses(again) == losses(rows)


def test_a_gradient_that_is_not_finite_stops_the_training_with_its_step():
    net = model()
    with torch.no_grad():
        net.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the gradient is not finite at step 7"):
        train_step(net, Optimizer(net, OPTIM, 9), *counting().batch(0, 2), CONFIG, 7)
