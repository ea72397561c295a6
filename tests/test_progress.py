"""progress.py: one bar a stage, whatever rows come."""

import io
import re

from rich.console import Console

from nanorlhf.progress import Progress


def shown(*rows):
    """(progress, text) after these rows."""
    out = io.StringIO()
    with Progress(Console(file=out, width=200, force_terminal=True)) as progress:
        for row in rows:
            progress(row)
        tasks = {t.description: t for t in progress.bars.tasks}
    return tasks, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())  # without colours


def test_a_stage_gets_a_bar_that_moves_with_its_steps_and_shows_its_figures():
    tasks, text = shown({"stage": "base", "begin": True},
                        {"stage": "pretrain", "step": 3, "steps": 10, "loss": 2.34567, "tokens_per_s": 51234.5})
    assert list(tasks) == ["pretrain"]  # the folder is called base, the stage pretrain
    assert (tasks["pretrain"].completed, tasks["pretrain"].total) == (3, 10)
    assert tasks["pretrain"].fields["note"] == "loss 2.346  tokens_per_s 5.123e+04"
    assert "pretrain" in text and "3/10" in text


def test_the_end_of_a_stage_fills_its_bar_also_one_without_steps():
    tasks, _ = shown({"stage": "tokenizer", "begin": True}, {"stage": "tokenizer", "end": True},
                     {"stage": "sft", "begin": True}, {"stage": "sft", "step": 4, "steps": 9, "loss": 1.0},
                     {"stage": "sft", "end": True})
    assert (tasks["tokenizer"].completed, tasks["tokenizer"].total) == (1, 1)
    assert (tasks["sft"].completed, tasks["sft"].total) == (4, 4)


def test_events_move_no_bar_and_figures_that_are_not_there_are_not_shown():
    tasks, _ = shown({"stage": "ppo", "step": 1, "steps": 5, "score": 0.5, "kl": 0.25, "length": 12.0},
                     {"stage": "ppo", "step": 4, "event": "eval"},
                     {"stage": "comparison", "begin": True})
    assert tasks["ppo"].completed == 1 and tasks["ppo"].fields["note"] == "score 0.5  kl 0.25  length 12"
    assert tasks["comparison"].total is None and tasks["comparison"].fields["note"] == ""


def test_what_is_left_out_is_said_in_one_line_without_markup():
    _, text = shown({"left_out": ["films: [bold] is not here", "plays: offline"]})
    assert "left out: films: [bold] is not here; plays: offline" in text
