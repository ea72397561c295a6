"""lab/overoptimisation.py: points that Gao et al.'s forms made are fitted by their coefficients, the points are what the judges say of the
samples, an interrupted course goes on bit for bit, and the report shows it all."""

import itertools
import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from nanorlhf import __main__ as program
from nanorlhf.comparison import gold_judge
from nanorlhf.evals.compare import chat_answers, render_prompts
from nanorlhf.assistant import Assistant
from nanorlhf.lab import overoptimisation as room
from nanorlhf.lab.overoptimisation import Settings, fits, gained, means, measure, measured
from nanorlhf.report import render, write_report
from nanorlhf.run import open_run, run
from nanorlhf.stages import load_stage, questions

SMALL = Settings(seeds=2, prompts=5, samples=8, answers=2, steps=3, points=3)


def opened(tiny_run, folder, without=()):
    """A copy of the tiny run, without these stages, opened."""
    shutil.copytree(tiny_run.folder, folder)
    for stage in without:
        shutil.rmtree(folder / stage)
    current = open_run(replace(tiny_run.config, out=str(folder)), resume=True)
    # So small a model seldom ends its turn: under the rule for that all of its responses would be worth the same.
    current.config = replace(current.config, ppo=replace(current.config.ppo, missing_end="keep"))
    return current


@pytest.fixture(scope="module")
def done(tiny_run, tmp_path_factory):
    """(run, result, proxy and gold of all SFT samples a seed, as expected_best was given them) of SMALL."""
    current, given = opened(tiny_run, tmp_path_factory.mktemp("lab") / "run"), []
    exact, patch = room.expected_best, pytest.MonkeyPatch()
    patch.setattr(room, "expected_best", lambda proxy, value, n: (given.append((proxy, value, n)), exact(proxy, value, n))[1])
    result = measure(current, SMALL)
    patch.undo()
    return current, result, given


def untimed(result):
    return {key: value for key, value in result.items() if key != "seconds"}


# --- fits ----------------------------------------------------------------------------------------------------------

def made_up_courses():
    """Three seeds whose gold gains the forms made: best-of-n d (0.8 − 0.1 d), PPO d (0.9 − 0.3 ln d); the proxy rises like d."""
    courses = []
    for seed in range(3):
        n = [2**k for k in range(7)]
        kl = [math.log(k) - (k - 1) / k for k in n]
        steps = [0.0, *(0.7 + seed / 10 + k for k in range(6))]  # √KL
        courses.append({
            "seed": seed, "sft": {"gold": [0.5, 0.25], "proxy": [0.0, 1.0]},
            "best_of_n": [{"n": k, "kl": x, "gold": 0.5, "proxy": 0.0, "proxy_gain": math.sqrt(x),
                           "gold_gain": math.sqrt(x) * (0.8 - 0.1 * math.sqrt(x))} for k, x in zip(n, kl)],
            "ppo": [{"step": k, "kl": d * d, "gold": 0.5, "proxy": 0.0, "proxy_gain": d,
                     "gold_gain": d * (0.9 - 0.3 * math.log(d)) if d else 0.0} for k, d in enumerate(steps)]})  # fmt: skip
    return courses


@pytest.mark.parametrize("course, form, alpha, beta", [("best_of_n", "best_of_n", 0.8, 0.1), ("ppo", "rl", 0.9, 0.3)])
def test_the_points_of_all_seeds_and_of_each_give_back_the_coefficients(course, form, alpha, beta):
    found = fits(made_up_courses(), course)
    assert found["form"] == form and len(found["seeds"]) == 3
    for forms in (found["all"], *found["seeds"]):
        assert (forms[form]["alpha"], forms[form]["beta"]) == pytest.approx((alpha, beta))
        other = next(fit for name, fit in forms.items() if name != form)
        assert other["rms"] > 1e-3 > 1e-9 > forms[form]["rms"]
    assert len(found["all"][form]["residuals"]) == 18  # three seeds of six points away from KL 0


def test_a_course_of_too_few_points_has_no_fit_yet():
    short = [{**course, "ppo": course["ppo"][:3]} for course in made_up_courses()]
    assert fits(short[:1], "ppo")["all"] == {} and fits(short, "ppo")["seeds"] == [{}, {}, {}]
    assert set(fits(short, "ppo")["all"]) == {"best_of_n", "rl"}


def test_gains_are_deviations_from_sft():
    row = gained({"n": 4, "gold": 0.9, "proxy": -1.0}, {"gold": [0.5, 0.2], "proxy": [1.0, 4.0]})
    assert (row["gold_gain"], row["proxy_gain"]) == pytest.approx((2.0, -0.5))


# --- courses -------------------------------------------------------------------------------------------------------

def test_best_of_n_is_the_mean_over_all_choices_of_n_samples(done):
    """By enumeration of the C(8, n) choices of every prompt."""
    _, result, given = done
    assert len(given) == 2 * 4 * 2  # seeds, n, kinds
    for k, course in enumerate(result["seeds"]):
        (proxy, gold, _), (_, same, _) = given[8 * k: 8 * k + 2]
        gold, proxy = (same, proxy) if np.array_equal(gold, proxy) else (gold, proxy)
        assert proxy.shape == (5, 8) and course["sft"]["gold"] == pytest.approx([gold.mean(), gold.std()])
        assert [row["n"] for row in course["best_of_n"]] == [1, 2, 4, 8]
        for row in course["best_of_n"]:
            picks = [[max(choice, key=lambda i: p[i]) for choice in itertools.combinations(range(8), row["n"])] for p in proxy]
            assert row["proxy"] == pytest.approx(np.mean([p[i] for p, pick in zip(proxy, picks) for i in pick]))
            if all(len(set(p)) == 8 for p in proxy):
                assert row["gold"] == pytest.approx(np.mean([g[i] for g, pick in zip(gold, picks) for i in pick]))
            assert row["kl"] == pytest.approx({1: 0, 2: 0.1931471806, 4: 0.6362943611, 8: 1.2044415417}[row["n"]])
        assert course["best_of_n"][0]["gold_gain"] == pytest.approx(0, abs=1e-12)


def test_ppo_starts_at_sft_and_is_measured_at_its_points(done):
    _, result, _ = done
    for course in result["seeds"]:
        start, *rest = course["ppo"]
        assert (start["step"], start["kl"], start["gold_gain"], start["proxy_gain"]) == (0, 0, 0, 0)
        assert [row["step"] for row in rest] == [1, 2, 3]
        assert all(row["kl"] > 0 and 0 <= row["gold"] <= 1 and 1 <= row["length"] <= 16 for row in rest)
    assert result["seeds"][0]["ppo"][1]["kl"] != result["seeds"][1]["ppo"][1]["kl"]
    assert [row["step"] for row in result["means"]["ppo"]] == [0, 1, 2, 3]
    assert result["means"]["ppo"][3]["kl"] == pytest.approx(np.mean([c["ppo"][3]["kl"] for c in result["seeds"]]))


def test_ppo_has_no_target_no_budget_and_the_penalty_that_is_asked_for(tiny_run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(room, "ppo", lambda policy, ref, value, judge, prompts, config, seed, state, log: seen.append((config, seed)))
    current = opened(tiny_run, tmp_path / "run")
    current.config = replace(current.config, ppo=replace(current.config.ppo, kl_budget=1.0))
    room.ppo_course(current, replace(SMALL, kl_coef=0.05, steps=7), {"seed": 1, "ppo": []}, [], None, None)
    [(config, seed)] = seen
    assert (config.kl_coef, config.kl_target, config.kl_budget, config.steps, seed) == (0.05, 0, 0, 7, 1)
    assert config.optim == current.config.ppo.optim


def test_the_sft_model_is_measured_as_the_comparison_reads_it_and_is_no_distance_from_itself(tiny_run, done):
    current, _, _ = done
    model, config = load_stage(current, "sft"), current.config
    examples, gold = questions(current, True, 6, 0), gold_judge(current)
    assistant = Assistant(model, current.tokenizer)
    found = measured(current, model, model, render_prompts(assistant, examples), examples, 1, 3, gold)
    said = chat_answers(assistant, examples, config.ppo.max_new_tokens, config.ppo.temperature, 3 * 1_000_003)
    assert found["gold"] == pytest.approx(np.mean([gold.score(e, text) for e, text in zip(examples, said.texts)]))
    assert found["length"] == pytest.approx(np.mean(said.tokens)) and found["kl"] == found["kl_sampled"] == 0


class Stop(Exception):
    """Stands for a kill."""


def test_an_interrupted_experiment_goes_on_bit_for_bit(tiny_run, done, tmp_path):
    current = opened(tiny_run, tmp_path / "run")

    def stop(row):
        if row["stage"] == "ppo" and row["step"] == 5:  # the second seed's second step
            raise Stop

    current.notify = stop
    with pytest.raises(Stop):
        measure(current, SMALL)
    held = json.loads((current.folder / "overoptimisation.json").read_text())
    assert [len(course["ppo"]) for course in held["seeds"]] == [4, 2] and held["fits"]["ppo"]["all"]
    current.notify = lambda row: None
    assert untimed(measure(current, SMALL)) == untimed(done[1])
    assert not list(current.folder.glob("*.safetensors"))


def test_a_saved_state_is_taken_up(tiny_run, done, tmp_path, monkeypatch):
    from tiny import saving

    current, folder = opened(tiny_run, tmp_path / "run"), tmp_path / "state"
    monkeypatch.setattr(room, "StageState", lambda path: saving(folder))
    steps = []

    def stop(row):
        if row["stage"] == "ppo":
            steps.append(row["step"])
            if steps == [1, 2]:
                raise Stop

    current.notify = stop
    with pytest.raises(Stop):
        measure(current, replace(SMALL, seeds=1))
    assert untimed(measure(current, replace(SMALL, seeds=1)))["seeds"] == done[1]["seeds"][:1]
    assert steps == [1, 2, 2, 3]


def test_what_is_there_is_kept_for_any_number_of_seeds(done, tmp_path):
    current, result, _ = done
    before = (current.folder / "metrics.jsonl").read_bytes()
    assert measure(current, SMALL)["seeds"] == measure(current, replace(SMALL, seeds=1))["seeds"] == result["seeds"]
    assert (current.folder / "metrics.jsonl").read_bytes() == before  # the run's own rows are left alone


# --- report --------------------------------------------------------------------------------------------------------

def made_up_report():
    courses = made_up_courses()
    return {"overoptimisation": {
        "settings": {"prompts": 64, "samples": 64, "kl_coef": 0.0, "steps": 6}, "seconds": 1.0, "seeds": courses,
        "means": {c: means(courses, c) for c in ("best_of_n", "ppo")}, "fits": {c: fits(courses, c) for c in ("best_of_n", "ppo")}}}


@pytest.mark.parametrize("drawn", [False, True])
def test_the_section_shows_the_points_the_fits_and_the_residuals(drawn):
    if drawn:
        pytest.importorskip("matplotlib")
    page = render(made_up_report(), [], drawn)
    section = page[page.index('<section id="overoptimisation"'):]
    section = section[: section.index("</section>")]
    assert section.count("<svg") == (2 if drawn else 0)
    assert '<td>d (α − β ln d) *</td><td>0.9</td><td>0.3</td>' in section
    assert '<td>d (α − β d) *</td><td>0.8</td><td>0.1</td>' in section
    assert f"<td>{math.exp(4):.3g}, beyond the points</td>" in section  # the KL where 0.9 = 0.3 (ln d + 1), d = e²: past 5.9²
    assert section.count("<caption>PPO: every point</caption>") == 1 and "3 seeds, 64 held-out prompts each" in section
    assert "gold is highest at step 6" in section


def test_the_turn_is_told_where_there_is_one():
    report = made_up_report()
    for row, gain in zip(report["overoptimisation"]["means"]["ppo"], [0.0, 0.4, 0.9, 1.25, 1.0, 0.5, 0.125]):
        row["gold_gain"] = gain
    page = render(report, [], False)
    assert "a gold score of 0" not in page
    assert "gold is highest at step 3" in page and "with 1.25, and 0.125 at the last point" in page


def test_the_least_score_that_the_judge_gives_is_marked_where_gold_comes_near_it():
    report = made_up_report()
    report["overoptimisation"]["seeds"][1]["ppo"][6]["gold_gain"] = -1.5
    assert "<th scope=\"row\">a gold score of 0</th><td>-2</td>" in render(report, [], False)  # 0.5 / 0.25 deviations down


def test_a_run_without_it_says_how_to_get_it():
    page = render({}, [], False)
    assert page.count('id="overoptimisation"') == 1 and "nanorlhf lab overoptimisation measures and fits it" in page


def test_the_result_is_in_the_report_whoever_writes_it(done):
    current, result, _ = done
    path = current.folder / "report.json"
    held = json.loads(path.read_text())
    assert untimed(held["overoptimisation"]) == untimed(json.loads(json.dumps(result)))
    first = (current.folder / "report.html").read_text()
    write_report(current.folder)
    assert (current.folder / "report.html").read_text() == first and "2 seeds, 5 held-out prompts each" in first
    path.unlink()
    again = run(current.config, resume=True)
    assert again["overoptimisation"] == held["overoptimisation"] == json.loads(path.read_text())["overoptimisation"]


# --- bad input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, sentence", [
    (dict(seeds=0), "seeds must be positive, got 0"),
    (dict(prompts=-1), "prompts must be positive, got -1"),
    (dict(samples=7), "samples must be at least 8 for a curve to be fitted, got 7"),
    (dict(points=2), "from 3 points to as many as there are steps"),
    (dict(steps=5), r"as many as there are steps \(5\), got 12"),
    (dict(kl_coef=float("nan")), "kl_coef must be 0 or more, got nan"),
])  # fmt: skip
def test_settings_that_make_no_curve_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**changes)


def test_points_of_other_settings_are_not_mixed(done):
    with pytest.raises(ValueError, match=r"holds points of other settings \(steps 3\): ask for the same, or remove the file"):
        measure(done[0], replace(SMALL, steps=9))


def test_a_run_without_a_reward_model_is_refused_before_anything_is_drawn(tiny_run, tmp_path):
    current = opened(tiny_run, tmp_path / "run", ["reward"])
    with pytest.raises(ValueError, match="no complete stage 'reward'; run it first"):
        measure(current, SMALL)
    assert not (tmp_path / "run" / "overoptimisation.json").exists()


def test_the_verb_prints_the_fits_and_refuses_a_folder_without_a_run(done, tmp_path, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["nanorlhf", "lab", "overoptimisation", "--out", *map(str, words)])
        program.main()
        return capsys.readouterr().out

    flags = [w for name in ("seeds", "prompts", "samples", "answers", "steps", "points") for w in (f"--{name}", getattr(SMALL, name))]
    lines = call(done[0].folder, *flags).splitlines()
    assert len(lines) == 4 and all("alpha" in line and "rms" in line for line in lines)
    assert json.loads(call(done[0].folder, *flags, "--json"))["fits"] == json.loads(json.dumps(done[1]["fits"]))
    with pytest.raises(SystemExit) as end:
        call(tmp_path / "none")
    assert end.value.code == 2 and "holds no run" in capsys.readouterr().err
