"""train/reward.py: scores that do not depend on company, rankings that are learnt, scores normalised."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanorlhf.config import RewardConfig
from nanorlhf.evals import reward_quality as quality
from nanorlhf.train.reward import (Ensemble, Ranking, group_bounds, normalise, pair_accuracy, ranking_loss, score_all, score_sequences,
                                   train_reward)
from tiny import OPTIM, Killed, killed_at, model, random_sequences, same_weights, saving

GOOD, END = 7, 21
CONFIG = RewardConfig(groups_per_step=4, k=4, optim=OPTIM)


def rankings(count, seed):
    """Groups of four random sequences, the one with the most of the token GOOD first; equal counts tie."""
    made = []
    for i in range(count):
        group = random_sequences(4, 10, 12, seed=1000 * seed + i, shortest=4)
        counts = [sequence.count(GOOD) for sequence in group]
        if len(set(counts)) > 1:
            made.append(Ranking("made", [sequence + [END] for sequence in group],
                                [sorted(set(counts), reverse=True).index(c) for c in counts]))
    return made


def train(state, log=lambda row: None, seed=0, epochs=2, groups=24):
    return train_reward(model(seed, scalar_head=True), [rankings(groups, e) for e in range(epochs)], CONFIG, 5, state,
                        lambda m: {"made": 0.5}, log)


@torch.no_grad()
def test_the_score_is_the_head_at_the_last_token_alone_or_in_any_company():
    net, sequences = model(1, scalar_head=True), random_sequences(9, 12)
    alone = torch.cat([score_sequences(net, [s]) for s in sequences])
    torch.testing.assert_close(score_sequences(net, sequences), alone, atol=1e-5, rtol=1e-5)
    for batch in (1, 2, 9, 100):
        torch.testing.assert_close(score_all(net, sequences, batch), alone, atol=1e-5, rtol=1e-5)
    changed = [s[:-1] + [(s[-1] + 1) % 23] for s in sequences]
    assert (score_all(net, changed) - alone).abs().min() > 1e-4
    assert score_all(net, []).shape == (0,)


def test_groups_lie_end_to_end():
    groups = [Ranking("a", [[1]] * 3, [0, 1, 2]), Ranking("a", [[1]] * 2, [0, 1])]
    assert group_bounds(groups).tolist() == [0, 3, 5]


def test_pair_accuracy_counts_pairs_of_all_groups_alike():
    """A head that reads nothing scores everything alike: every pair is a tie and counts one half. With the head's
    scores in hand, the share is counted by loops."""
    net, groups = model(1, scalar_head=True), rankings(6, 3)
    right = total = 0
    for group in groups:
        scores = score_all(net, group.sequences).tolist()
        for i, one in enumerate(group.ranks):
            for j, other in enumerate(group.ranks):
                if one < other:
                    right, total = right + (scores[i] > scores[j]), total + 1
    assert pair_accuracy(net, groups) == pytest.approx(right / total)
    with torch.no_grad():
        net.score.weight.zero_()
    assert pair_accuracy(net, groups) == 0.5


def test_a_model_learns_the_order_and_shows_it_on_groups_it_never_saw(tmp_path):
    held_out = rankings(40, 99)
    before = pair_accuracy(model(0, scalar_head=True), held_out)
    after = pair_accuracy(train(saving(tmp_path), epochs=5), held_out)
    assert after > max(0.85, before + 0.1)


def test_steps_evaluations_and_passes_are_logged(tmp_path):
    """23 groups at most, 4 a step, two passes: the last batch of a pass is smaller and no group is left out."""
    rows, groups = [], [rankings(24, e) for e in range(2)]
    train(saving(tmp_path), rows.append)
    steps = [row for row in rows if "event" not in row]
    planned = sum(-(-len(g) // 4) for g in groups)
    assert [row["step"] for row in steps] == list(range(1, planned + 1))
    assert {row["steps"] for row in steps} == {planned}
    looks = [row["step"] for row in rows if row.get("event") == "eval"]
    assert looks[0] == 0 and looks[-1] == planned and len(looks) == 5


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    expected = train(saving(tmp_path / "whole"))
    with pytest.raises(Killed):
        train(saving(tmp_path / "cut"), killed_at(8))
    assert saving(tmp_path / "cut").saved_step() == 7
    assert same_weights(expected, train(saving(tmp_path / "cut"), seed=9))


def test_no_ranking_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="train_reward: expected at least one ranking, got none"):
        train(saving(tmp_path), groups=0)


def test_normalised_scores_have_deviation_one_and_the_mean_that_is_returned():
    net, sequences = model(4, scalar_head=True), random_sequences(64, 12, seed=8)
    with torch.no_grad():
        net.score.weight.mul_(7.3)
    before = score_all(net, sequences)
    offset = normalise(net, sequences)
    after = score_all(net, sequences) - offset
    assert float(after.mean()) == pytest.approx(0, abs=1e-5)
    assert float(after.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(before.argsort(), after.argsort())


def test_equal_scores_are_not_divided_by_zero():
    net = model(4, scalar_head=True)
    with torch.no_grad():
        net.score.weight.zero_()
    assert normalise(net, random_sequences(5, 6)) == 0.0
    assert not net.score.weight.any()


def test_nothing_to_normalise_on_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="normalise: expected at least one sequence, got none"):
        normalise(model(scalar_head=True), [])


# --- kinds of loss, ensembles, quality --------------------------------------------------------------------------------

def test_the_kinds_of_ranking_loss_by_hand():
    """Scores 1, 0 | 2, 1, 0 with ranks 0, 1 | 0, 1, 2: gaps 1 | 1, 2, 1. f(x) = ln(1 + e^−x). kwise: the mean of f(1) and of
    (2 f(1) + f(2)) / 3; pairwise: (3 f(1) + f(2)) / 4; with margins of ½ a rank, gaps ½ | ½, 1, ½."""
    scores, ranks = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0]), torch.tensor([0, 1, 0, 1, 2])
    f = lambda x: float(np.log(1 + np.exp(-x)))
    loss = lambda **changes: float(ranking_loss(scores, ranks, torch.tensor([0, 2, 5]), replace(CONFIG, **changes))[0])
    assert loss() == pytest.approx((f(1) + (2 * f(1) + f(2)) / 3) / 2)
    assert loss(loss="pairwise") == pytest.approx((3 * f(1) + f(2)) / 4)
    assert loss(loss="pairwise", margin=0.5) == pytest.approx((3 * f(0.5) + f(1)) / 4)
    assert loss(margin=0.5) == pytest.approx((f(0.5) + (2 * f(0.5) + f(1)) / 3) / 2)
    assert loss(margin=1e-9) == pytest.approx(loss(), abs=1e-6)  # the two ways to the same loss
    with pytest.raises(ValueError, match="no group holds two completions of different rank"):
        ranking_loss(scores[:2], torch.tensor([1, 1]), torch.tensor([0, 2]), replace(CONFIG, loss="pairwise"))


def test_an_ensemble_takes_the_mean_or_the_least_of_its_members():
    nets, sequences = [model(i, scalar_head=True) for i in range(3)], random_sequences(7, 8)
    each = torch.stack([score_all(net, sequences) - offset for net, offset in zip(nets, (0.5, -1.0, 0.0))])
    torch.testing.assert_close(Ensemble(nets, (0.5, -1.0, 0.0))(sequences), each.mean(0))
    torch.testing.assert_close(Ensemble(nets, (0.5, -1.0, 0.0), "min")(sequences), each.min(0).values)


def test_the_calibration_error_by_hand():
    """Gaps ±ln 3: the model is three to one sure, so ¾, and right in 2 of 4: error ¼. Right in 3 of 4 there is none."""
    gap = math.log(3)
    assert quality.calibration([gap, gap, -gap, -gap])["error"] == pytest.approx(0.25)
    assert quality.calibration([gap, gap, gap, -gap])["error"] == pytest.approx(0)
    with pytest.raises(ValueError, match="calibration: expected at least one pair, got none"):
        quality.calibration([])


def test_what_length_explains_by_hand():
    """Scores equal to lengths: the model always prefers the longer one. Of three pairs two have the longer one labelled better;
    pair (20, 19) is within a tenth."""
    lengths = [10, 5, 20, 19, 3, 8]
    better, worse = np.array([0, 2, 4]), np.array([1, 3, 5])
    found = quality.length_check([float(x) for x in lengths], lengths, better, worse)
    assert found["longer_wins"] == pytest.approx(2 / 3) and found["model_prefers_longer"] == 1.0
    assert found["correlation"] == pytest.approx(1.0) and found["accuracy_same_length"] == 1.0


def test_accuracy_by_confidence_by_hand():
    rows = quality.accuracy_by([1, 2, 3, 4, 5, 6], [-1, 1, -1, 1, 1, 1], bins=3)
    assert [(r["from"], r["to"], r["n"], r["accuracy"]) for r in rows] == [(1, 2, 2, 0.5), (3, 4, 2, 0.5), (5, 6, 2, 1.0)]
    with pytest.raises(ValueError, match="expected a confidence for each of 2 pairs, got 1"):
        quality.accuracy_by([1.0], [1.0, 2.0])


def test_gaps_that_are_not_finite_are_refused():
    for measure in (quality.accuracy, quality.calibration):
        with pytest.raises(ValueError, match="expected finite gaps"):
            measure([float("nan"), 1.0])
