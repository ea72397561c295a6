"""comparison.py: the figures of the report are those of the answers."""

from dataclasses import replace

import numpy as np
import pytest

from nanorlhf.comparison import SHOWN, answers, comparison, report
from nanorlhf.evals.winrate import win_rate
from nanorlhf.run import open_run

SYSTEMS = ["base", "base_prompted", "sft", "best_of_n", "dpo", "rloo", "grpo", "ppo"]


@pytest.fixture(scope="module")
def opened(tiny_run):
    return open_run(tiny_run.config, resume=True)


@pytest.fixture(scope="module")
def answered(opened):
    return answers(opened)


def test_all_systems_answer_the_same_held_out_prompts(tiny_run, opened, answered):
    examples, found, scores, _ = answered
    assert list(found) == list(scores) == SYSTEMS
    assert len(examples) == len({e.prompt for e in examples}) == tiny_run.config.eval.prompts
    assert not {e.response for e in examples} & {e.response for e in opened.corpus.demonstrations[0]}
    assert all(len(a.texts) == len(a.tokens) == len(scores[name]) == len(examples) for name, a in found.items())
    assert all(0 <= s <= 1 for values in scores.values() for s in values)


def test_the_report_holds_the_means_of_the_answers(tiny_run, answered):
    """The run's own comparison and this one are the same: everything is drawn from the seed."""
    examples, found, scores, _ = answered
    for name in SYSTEMS:
        assert tiny_run.report["gold"][name]["mean"] == pytest.approx(np.mean(scores[name]))
        low, high = tiny_run.report["gold"][name]["ci95"]
        assert low < np.mean(scores[name]) < high
        assert tiny_run.report["length"][name] == pytest.approx(np.mean(found[name].tokens))
    duels = [("sft", "base_prompted"), *((name, "sft") for name in SYSTEMS[3:])]
    assert list(tiny_run.report["win_rate"]) == [f"{one}_vs_{other}" for one, other in duels]
    for one, other in duels:
        row = tiny_run.report["win_rate"][f"{one}_vs_{other}"]
        assert {key: row[key] for key in ("mean", "ci95", "n", "wins", "ties")} == win_rate(scores[one], scores[other])
        assert row["difference"]["mean"] == pytest.approx(np.mean(scores[one]) - np.mean(scores[other]))
        assert 0 <= row["length_controlled"]["mean"] <= 1
    assert set(tiny_run.report["elo"]) == set(SYSTEMS)


def test_a_familys_figures_are_those_of_its_prompts(tiny_run, answered):
    examples, _, scores, _ = answered
    by_family = tiny_run.report["gold_by_family"]
    assert set(by_family) == {e.family for e in examples}
    for family, figures in by_family.items():
        own = [s for s, e in zip(scores["sft"], examples) if e.family == family]
        assert figures["sft"]["mean"] == pytest.approx(np.mean(own)) and figures["sft"]["n"] == len(own)


def test_some_prompts_are_shown_with_every_systems_answer(tiny_run, answered):
    examples, found, scores, _ = answered
    shown = tiny_run.report["samples"]["stages"]
    assert len(shown) == min(SHOWN, len(examples))
    for i, sample in enumerate(shown):
        assert sample["prompt"] == examples[i].prompt
        assert sample["responses"] == {name: found[name].texts[i] for name in SYSTEMS}
        assert sample["gold"] == {name: scores[name][i] for name in SYSTEMS}


def test_the_report_names_the_entropies_once_and_adds_the_seconds_up(tiny_run, opened):
    again = report(opened)
    assert "entropy" not in again and set(again["ppo"]["entropy"]) == {"base", "sft", "dpo", "rloo", "grpo", "ppo"}
    assert set(again["alignment"]) == set(SYSTEMS[4:]) and again["alignment"]["rloo"]["length"] > 1
    parts = {k: v for k, v in again["seconds"].items() if k != "total"}
    assert again["seconds"]["total"] == pytest.approx(sum(parts.values()) + opened.seconds_elsewhere)
    assert again["data"] == tiny_run.report["data"] and again["gold"] == tiny_run.report["gold"]


def test_a_run_with_an_incomplete_stage_is_not_compared(tmp_path, tiny_run):
    current = open_run(replace(tiny_run.config, out=str(tmp_path)))
    with pytest.raises(ValueError, match="has no complete stage 'tokenizer'"):
        report(current)
    with pytest.raises(ValueError, match="holds no model"):
        comparison(current)
