import json
import math

import numpy as np
import pytest
import torch

from nanorlhf.metrics import MetricsLog, read


def test_rows_come_back_as_they_were_written(tmp_path):
    log = MetricsLog(tmp_path / "new" / "run")
    rows = [
        {"stage": "pretrain", "step": 0, "event": "sample", "prompt": "a\nb", "text": "\u2028 </script> ☃ \udc80"},
        {"stage": "pretrain", "step": 1, "event": "eval", "bpb": {"prose": 2.5}},
    ]
    for row in rows:
        log.append(row)
    assert read(tmp_path / "new" / "run") == rows


def test_scalars_become_plain_and_what_is_not_finite_becomes_null(tmp_path):
    MetricsLog(tmp_path).append(
        {"stage": "ppo", "step": np.int64(3), "loss": torch.tensor(0.5), "kl": math.nan, "deep": {"x": [np.inf, 1]}}
    )
    assert read(tmp_path) == [{"stage": "ppo", "step": 3, "loss": 0.5, "kl": None, "deep": {"x": [None, 1]}}]
    json.loads(log_text(tmp_path), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def log_text(folder):
    return (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_torn_by_a_kill_is_dropped_and_the_next_row_starts_clean(tmp_path, cut):
    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.append({"stage": "sft", "step": step, "loss": 1.0})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-cut])
    assert [row["step"] for row in read(tmp_path)] == [1]
    MetricsLog(tmp_path).append({"stage": "sft", "step": 2, "loss": 1.0})
    assert log.path.read_bytes() == whole


def test_a_resumed_stage_has_no_double_rows_and_others_are_left_alone(tmp_path):
    log = MetricsLog(tmp_path)
    for stage, step in [("pretrain", 9), ("sft", 1), ("sft", 2), ("sft", 3)]:
        log.append({"stage": stage, "step": step})
    log.truncate_after("sft", 1)
    log.append({"stage": "sft", "step": 2})
    assert [(r["stage"], r["step"]) for r in read(tmp_path)] == [("pretrain", 9), ("sft", 1), ("sft", 2)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_without_a_log_has_no_rows(tmp_path):
    assert read(tmp_path) == []
    MetricsLog(tmp_path).truncate_after("sft", 0)
    assert read(tmp_path) == []


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"stage": "sft", "step": 1}\n{"sta\n{"stage": "sft", "step": 2}\n')
    with pytest.raises(ValueError, match="JSON in line 2"):
        read(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"[1, 2]\n")
    with pytest.raises(ValueError, match="stage and a step in line 1"):
        read(tmp_path)


@pytest.mark.parametrize("row", [{}, {"stage": "sft"}, {"step": 1}, {"stage": "sft", "step": 1.5}])
def test_a_row_without_stage_and_step_gets_one_sentence(tmp_path, row):
    with pytest.raises(ValueError, match="stage name and an integer step"):
        MetricsLog(tmp_path).append(row)
