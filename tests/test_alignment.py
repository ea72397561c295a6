"""alignment.py: which stages there are, the pairs that DPO is given, and that the judge reads the policy's ids."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from nanorlhf import alignment, metrics, stages
from nanorlhf.checkpoint import load_model
from nanorlhf.config import preset
from nanorlhf.engine import Completion
from nanorlhf.run import open_run
from nanorlhf.train.rollout import Judge


@pytest.fixture(scope="module")
def opened(tiny_run):
    return open_run(tiny_run.config, resume=True)


def test_what_is_compared_comes_before_ppo_and_after_the_reward_model():
    assert list(alignment.stages_of(preset("tiny")))[3:] == ["reward", "dpo", "rloo", "grpo", "ppo"]
    assert list(alignment.stages_of(preset("tiny", compared=())))[3:] == ["reward", "ppo"]
    assert list(alignment.stages_of(preset("tiny", compared=("reinforce",))))[3:] == ["reward", "reinforce", "ppo"]


def test_every_method_leaves_a_policy_of_its_own_and_its_figures(tiny_run):
    sft, seen = load_model(tiny_run.folder / "sft").state_dict(), []
    for name in ("dpo", "rloo", "grpo", "ppo"):
        policy = load_model(tiny_run.folder / name)
        weights = policy.state_dict()
        assert not hasattr(policy, "score") and weights.keys() == sft.keys()
        assert any(not torch.equal(weights[k], sft[k]) for k in sft)
        assert all(any(not torch.equal(weights[k], other[k]) for k in sft) for other in seen)
        seen.append(weights)
    facts = json.loads((tiny_run.folder / "rloo" / "stage.json").read_text())
    assert {"kl", "kl_exact", "score", "length", "entropy"} <= set(facts)
    assert {"pair_accuracy", "margin"} <= set(json.loads((tiny_run.folder / "dpo" / "stage.json").read_text()))


def test_the_best_and_the_worst_of_the_samples_that_ended_make_a_pair(opened, monkeypatch):
    """Scores by the first id of the response. First prompt: 5 did not end, so 3 over 1. Second: one ended, so all are compared, ended
    where they were cut. Third: equal scores are no pair."""
    end = opened.tokenizer.special_tokens["<|end|>"]
    prompts = [[10, 11], [12], [13, 14, 15]]
    firsts = [(1, True), (3, True), (5, False), (2, True), (4, True), (6, False), (1, False), (2, False), *[(7, True)] * 4]
    drawn = [Completion([k, end] if done else [k], [], done) for k, done in firsts]
    judge = Judge(lambda seqs: torch.tensor([float(s[-2]) for s in seqs]), end)
    monkeypatch.setattr(alignment, "judge_of", lambda run: judge)
    monkeypatch.setattr(alignment, "training_prompts", lambda *_: prompts)
    monkeypatch.setattr(alignment, "generate", lambda *_: drawn)
    pairs = alignment.sampled_pairs(opened, None)
    assert [(p.chosen, p.rejected, p.start) for p in pairs] == [
        ([10, 11, 3, end], [10, 11, 1, end], 2), ([12, 6, end], [12, 1, end], 1),
    ]  # fmt: skip


def test_the_judge_is_the_reward_stages_model_less_its_mean(opened):
    judge = alignment.judge_of(opened)
    sequences = [[1, 2, 3, judge.end], [4, 5, judge.end]]
    plain = stages.load_stage(opened, "reward")
    from nanorlhf.train.reward import score_all

    torch.testing.assert_close(judge.score(sequences), score_all(plain, sequences) - judge.offset)
    assert judge.offset == opened.facts("reward")["score_means"][0]


def test_a_reward_model_of_another_tokenizer_is_refused_in_one_sentence(tiny_run, tmp_path):
    for stage in ("tokenizer", "sft", "reward"):
        shutil.copytree(tiny_run.folder / stage, tmp_path / stage)
    path = tmp_path / "reward" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    run = open_run(replace(tiny_run.config, out=str(tmp_path)))
    with pytest.raises(ValueError, match="the reward model has another tokenizer than the SFT model; it cannot judge its ids"):
        alignment.judge_of(run)


def test_prompts_leave_room(opened):
    prompts = alignment.training_prompts(opened, 20, 100)
    assert prompts and all(len(p) <= opened.config.model.context - 100 for p in prompts)


@pytest.fixture
def again(tiny_run, tmp_path):
    """again(**changes): a copy of the run up to the SFT model, or the reward model, with another configuration."""

    def open_copy(*left, **changes):
        for stage in ("tokenizer", "base", "sft", *left):
            shutil.copytree(tiny_run.folder / stage, tmp_path / stage)
        shutil.copy(tiny_run.folder / "run.json", tmp_path / "run.json")
        run = open_run(replace(tiny_run.config, out=str(tmp_path)), resume=True)
        run.config = replace(run.config, **changes)
        return run

    return open_copy


@pytest.mark.parametrize("changes", [dict(value="shared"), dict(value_init="zero"), dict(kl_in="loss"), dict(kl_budget=1e-9)])
def test_ppo_runs_with_any_value_model_and_ends_in_a_policy_without_a_head(tiny_run, again, changes):
    run = again("reward", ppo=replace(tiny_run.config.ppo, **changes))
    alignment.ppo_stage(run)
    assert run.done("ppo") and not hasattr(load_model(run.folder / "ppo"), "score")
    assert "kl" in run.facts("ppo")


def test_reinforce_is_a_stage_too(again):
    run = again("reward")
    alignment.ALIGNMENTS["reinforce"](run)
    assert run.done("reinforce") and run.facts("reinforce")["length"] > 1


def test_several_reward_models_judge_together(tiny_run, again):
    run = again(reward=replace(tiny_run.config.reward, members=2, member_score="min", normalise="both", loss="pairwise", margin=0.1))
    stages.STAGES["reward"](run)
    both, means = stages.load_ensemble(run), run.facts("reward")["score_means"]
    assert len(both.models) == len(means) == 2
    assert any(not torch.equal(a, b) for a, b in zip(both.models[0].parameters(), both.models[1].parameters()))
    from nanorlhf.train.reward import score_all

    sequences = [[1, 2, 3], [4, 5]]
    each = [score_all(m, sequences) - mean for m, mean in zip(both.models, means)]
    torch.testing.assert_close(alignment.judge_of(run).score(sequences), torch.minimum(*each))


def test_an_ensemble_that_was_ended_between_its_members_keeps_the_rows_of_the_first(tiny_run, again, monkeypatch):
    run, train = again(reward=replace(tiny_run.config.reward, members=2)), stages.train_reward

    def killed(model, epochs, config, seed, state, evaluate, log, stage):
        if stage != "reward":
            log({"stage": stage, "step": 1})  # a row that the next sitting writes again
            raise KeyboardInterrupt
        return train(model, epochs, config, seed, state, evaluate, log, stage)

    monkeypatch.setattr(stages, "train_reward", killed)
    with pytest.raises(KeyboardInterrupt):
        stages.STAGES["reward"](run)
    first = [row for row in metrics.read(run.folder) if row["stage"] == "reward"]
    monkeypatch.setattr(stages, "train_reward", train)
    stages.STAGES["reward"](run)
    rows = metrics.read(run.folder)
    assert first and [row for row in rows if row["stage"] == "reward"] == first
    assert [row["step"] for row in rows if row["stage"] == "reward-1" and "event" not in row] == list(range(1, first[-1]["step"] + 1))


def test_the_figures_of_a_run_that_its_budget_stopped_are_those_of_the_policy_that_is_kept(tiny_run, again):
    run = again("reward", ppo=replace(tiny_run.config.ppo, kl_budget=1e-9))
    alignment.ppo_stage(run)
    rows = [row["kl"] for row in metrics.read(run.folder) if row["stage"] == "ppo"]
    assert rows[-1] > 1e-9 and run.facts("ppo")["kl"] == pytest.approx(sum(rows[-5:]) / len(rows[-5:]))


def test_prompts_that_leave_no_room_are_refused_in_one_sentence(opened):
    with pytest.raises(ValueError, match=r"none of \d+ prompts leaves room for 255 more tokens in a context of 256"):
        alignment.training_prompts(opened, 20, 255)
