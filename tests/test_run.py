"""run.py: the whole recipe end to end, killed and resumed, and one sentence for what cannot be run."""

import json
import mmap
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from nanorlhf import metrics, stages
from nanorlhf import run as room
from nanorlhf.alignment import stages_of
from nanorlhf.checkpoint import StageState
from nanorlhf.config import PRESETS, RunConfig, preset
from nanorlhf.report import validate
from nanorlhf.run import from_dict, machine, open_run, peak_memory, run

STAGES = ["tokenizer", "base", "sft", "reward", "dpo", "rloo", "grpo", "ppo"]
NAMES = {"pretrain" if stage == "base" else stage for stage in STAGES}  # in the report


def copied(tiny_run, folder, without=()):
    """A copy of the run without these stages' folders and without the report; its configuration with the new folder."""
    shutil.copytree(tiny_run.folder, folder)
    for name in (*without, "report.json", "report.html"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    return replace(tiny_run.config, out=str(folder))


def facts(folder, stage):
    """What a stage left behind that does not depend on the clock."""
    held = json.loads((folder / stage / "stage.json").read_text())
    return {key: value for key, value in held.items() if key not in ("seconds", "tokens_per_s", "peak_mib")}


def rows(folder, stage):
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in metrics.read(folder) if row["stage"] == stage]


# --- end to end ----------------------------------------------------------------------------------------------------

def test_a_tiny_run_ends_with_a_whole_report_a_page_and_all_stages(tiny_run):
    assert validate(tiny_run.report) == []
    assert json.loads((tiny_run.folder / "report.json").read_text()) == json.loads(json.dumps(tiny_run.report))
    assert "nanorlhf" in (tiny_run.folder / "report.html").read_text()
    assert [note["stage"] for note in tiny_run.notes if note.get("end")] == STAGES
    for stage in STAGES:
        assert (tiny_run.folder / stage / "tokenizer.json").is_file() and facts(tiny_run.folder, stage)
        assert not (tiny_run.folder / stage / "state.safetensors").exists()  # nothing is left to resume
    assert tiny_run.report["config"] == tiny_run.config.to_dict()
    assert {row["source"] for row in tiny_run.report["data"]} == {"stdlib", "docstrings", "topics"}


def test_a_tiny_run_takes_well_under_a_minute_on_a_quiet_machine(tiny_run):
    assert tiny_run.report["seconds"]["total"] < 90  # room for a busy one


def test_the_total_is_the_wall_clock_up_to_the_writing_of_the_report(tiny_run):
    """The stages, each with the measurements at its end, fill the time to the beginning of the comparison."""
    seconds = dict(tiny_run.report["seconds"])
    total, comparison = seconds.pop("total"), seconds["comparison"]
    assert set(seconds) == {*NAMES, "comparison"}
    assert tiny_run.notes[-1] == {"stage": "comparison", "begin": True}
    assert total == pytest.approx(tiny_run.times[-1] + comparison, rel=0.03, abs=0.2)
    assert sum(seconds.values()) <= total


def test_the_report_has_the_memory_of_each_stage(tiny_run):
    """A Python with torch holds a few hundred MiB; the tiny model adds little. The count starts again with each stage."""
    peaks = tiny_run.report["peak_mib"]
    assert set(peaks) == NAMES
    assert all(50 < mib < 8000 for mib in peaks.values())
    before = peak_memory(restart=True)
    with mmap.mmap(-1, 300 << 20) as held:
        for page in range(0, 300 << 20, 4096):
            held[page] = 1
    assert peak_memory() > before + 290  # the highest counts, not what is there now
    assert peak_memory(restart=True) < before + 100


def test_each_stage_of_a_tiny_run_improves_its_own_number(tiny_run):
    """Pretraining: fewer bits per byte than at its start, on each source. SFT: fewer bits for the human responses."""
    looks = [row["bpb"] for row in rows(tiny_run.folder, "pretrain") if row.get("event") == "eval"]
    assert set(looks[0]) == set(tiny_run.report["pretrain"]["bpb"]) == {"stdlib", "docstrings", "topics"}
    assert all(tiny_run.report["pretrain"]["bpb"][name] < 0.9 * looks[0][name] for name in looks[0])
    bits = tiny_run.report["sft"]["response_bpb"]
    assert bits["sft"] < bits["base"]
    assert all(np.isfinite(row["loss"]) for row in rows(tiny_run.folder, "reward") if "loss" in row)


def test_ppo_starts_at_its_reference(tiny_run):
    first = next(row for row in rows(tiny_run.folder, "ppo"))
    assert first["kl"] == 0 and first["first_ratio_max"] == pytest.approx(1, abs=1e-3) and first["sampler_gap"] < 1e-3


def test_the_reports_ppo_figures_are_the_means_of_the_last_five_steps(tiny_run):
    last = rows(tiny_run.folder, "ppo")[-5:]
    assert tiny_run.report["ppo"]["kl"] == pytest.approx(np.mean([row["kl"] for row in last]))
    assert facts(tiny_run.folder, "ppo")["length"] == pytest.approx(np.mean([row["length"] for row in last]))


# --- killed and resumed --------------------------------------------------------------------------------------------

class Kill:
    """A notification that interrupts a stage, as Ctrl-C does, when a step's row comes."""

    def __init__(self, stage, step):
        self.stage, self.step = stage, step

    def __call__(self, row):
        if row.get("stage") == self.stage and row.get("step") == self.step and "event" not in row:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage, step", [("base", 9), ("sft", 7), ("reward", 2), ("dpo", 2), ("rloo", 2), ("grpo", 3), ("ppo", 3)])
def test_a_stage_that_is_killed_and_resumed_ends_as_if_nothing_had_happened(tiny_run, tmp_path, monkeypatch, stage, step):
    """The stage's folder is taken away and made again with a kill in between. State is saved at every step, and the
    kill comes after the step's row is logged and before its state is saved."""
    config = copied(tiny_run, tmp_path / "run", [stage])
    trained = stages_of(config)
    monkeypatch.setattr(room, "StageState", lambda path: StageState(path, every=0.0))
    name = "pretrain" if stage == "base" else stage
    with pytest.raises(KeyboardInterrupt):
        trained[stage](open_run(config, resume=True, notify=Kill(name, step)))
    again = open_run(config, resume=True)
    assert not again.done(stage)
    assert StageState(tmp_path / "run" / stage / "state.safetensors").saved_step() == step - 1
    trained[stage](again)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "run" / stage / file).read_bytes() == (tiny_run.folder / stage / file).read_bytes(), file
    assert facts(tmp_path / "run", stage) == facts(tiny_run.folder, stage)
    assert rows(tmp_path / "run", name) == rows(tiny_run.folder, name)


def test_a_run_that_is_killed_goes_on_with_the_settings_it_began_with_and_reports_the_same(tiny_run, tmp_path):
    """Killed in PPO before any state was saved: complete stages are not run again, PPO is, from its start."""
    config = copied(tiny_run, tmp_path / "run", ["ppo"])
    kept = {stage: (tmp_path / "run" / stage / "stage.json").stat().st_mtime_ns for stage in STAGES[:-1]}
    with pytest.raises(KeyboardInterrupt):
        run(config, resume=True, notify=Kill("ppo", 2))
    report = run(RunConfig(out=config.out, seed=99), resume=True)
    assert report["seed"] == tiny_run.config.seed and report["config"] == config.to_dict()
    for key in ("gold", "win_rate", "elo", "samples", "ppo", "reward", "pretrain", "length"):
        assert report[key] == tiny_run.report[key], key
    assert kept == {stage: (tmp_path / "run" / stage / "stage.json").stat().st_mtime_ns for stage in kept}


# --- opening -------------------------------------------------------------------------------------------------------

def test_a_folder_that_holds_a_run_is_not_started_over(tmp_path):
    config = preset("tiny", out=str(tmp_path / "r"))
    open_run(config)
    with pytest.raises(ValueError, match="already holds a run; go on with it by --resume, or choose another --out"):
        open_run(config)
    assert open_run(RunConfig(out=config.out), resume=True).config == config


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    with pytest.raises(ValueError, match="nothing holds no run to resume"):
        open_run(preset("tiny", out=str(tmp_path / "nothing")), resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_run_of_another_version_is_refused_either_way(tmp_path):
    config = preset("tiny", out=str(tmp_path))
    open_run(config)
    held = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**held, "format": 999}))
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"holds a run of another version \(format 999; this one reads"):
            open_run(config, resume=resume)


def test_a_stage_before_the_one_it_starts_from_is_refused_in_one_sentence(tmp_path):
    current = open_run(preset("tiny", out=str(tmp_path)))
    with pytest.raises(ValueError, match="has no complete stage 'reward'; run it first"):
        current.facts("reward")
    with pytest.raises(ValueError):
        stages.STAGES["base"](current)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_configuration_comes_back_from_json_as_it_was(name):
    config = preset(name, seed=4)
    config = replace(config, data=replace(config.data, files=("a.txt", "b.txt")))
    assert from_dict(RunConfig, json.loads(json.dumps(config.to_dict()))) == config


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(tmp_path):
    text = tmp_path / "small.txt"
    text.write_text("one two three four " * 40)
    config = preset("tiny", out=str(tmp_path / "run"))
    config = replace(config, data=replace(config.data, sources=(str(text),)),
                     tokenizer=replace(config.tokenizer, vocab_size=5000))
    with pytest.raises(ValueError, match="expected vocab_size of at most .* got 5000"):
        run(config)
    assert not (tmp_path / "run" / "run.json").exists()  # the next try is not told that a run is there


def test_the_machine_is_described():
    found = machine()
    assert found["threads"] >= 1 and found["versions"]["torch"] and "cpu" in found and "gpu" in found


def test_a_run_does_not_go_on_with_other_text(tiny_run, tmp_path):
    """The text is the configuration's and the machine's; what the machine has may change between two sittings."""
    config = copied(tiny_run, tmp_path / "run", without=("ppo",))
    path = tmp_path / "run" / "run.json"
    held = json.loads(path.read_text())
    assert set(held["sources"]) == {"stdlib", "docstrings", "topics"}
    held["sources"]["stdlib"] = "another"
    del held["sources"]["topics"]
    path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match="began with other text: stdlib, topics came, went or changed since"):
        run(config, resume=True)
    assert json.loads(path.read_text()) == held  # and nothing was lost


def test_a_device_that_is_not_there_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(room.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda is asked for, but torch finds no CUDA device here"):
        open_run(preset("tiny", out=str(tmp_path / "run"), device="cuda"))
    assert not (tmp_path / "run").exists()


def test_two_processes_do_not_write_one_folder(tiny_run, tmp_path):
    """The second is refused while the first lives, and not afterwards; the same process may open its run again."""
    config = copied(tiny_run, tmp_path / "run")
    hold = ("import sys; from pathlib import Path; from nanorlhf.checkpoint import claim; claim(Path(sys.argv[1])); print('held', flush=True); "
            "sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", hold, config.out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is at work"):
            open_run(config, resume=True)
    finally:
        other.communicate()
    open_run(config, resume=True)
    open_run(config, resume=True)
