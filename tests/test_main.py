"""The command line: exit code 0 and an answer, 2 and one sentence, 130 when interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanorlhf import __main__ as room
from nanorlhf.config import preset
from nanorlhf.run import open_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*words) → (exit code, stdout, stderr) of ``nanorlhf WORDS``."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["nanorlhf", *map(str, words)])
        code = 0
        try:
            room.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


def one_sentence(err):
    """What stands on stderr after the name of the program, if it is one line."""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("nanorlhf: "), err
    return lines[0].removeprefix("nanorlhf: ")


def test_chat_answers_a_message(tiny_run, command):
    code, out, _ = command("chat", tiny_run.folder / "ppo", "--message", "Say something.", "--max-new-tokens", 12, "--seed", 3)
    assert code == 0 and out.strip()
    again = command("chat", tiny_run.folder / "ppo", "--message", "Say something.", "--max-new-tokens", 12, "--seed", 3)
    assert again[1] == out
    assert command("chat", tiny_run.folder / "ppo", "--message", "Say something.", "--seed", 4)[1] != out


def test_the_module_is_a_program(tiny_run):
    done = subprocess.run([sys.executable, "-m", "nanorlhf", "chat", str(tiny_run.folder / "sft"), "--message", "hi"],
                          capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout.strip() and not done.stderr.strip()


def test_a_conversation_ends_at_an_empty_line_or_at_the_end_of_the_input(tiny_run, command, monkeypatch):
    for lines in (["hello", ""], ["hello"]):
        left = list(lines)

        def read(_):
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("builtins.input", read)
        code, out, err = command("chat", tiny_run.folder / "ppo")
        assert code == 0 and len(out.strip().splitlines()) >= 1 and "Type a message" in err


@pytest.mark.parametrize("words, sentence", [
    (["chat", "nowhere", "--message", "hi"], "nowhere holds no model"),
    (["run", "--preset", "tiny", "--offline", "--out", "OUT", "--files", "none.txt"], "expected a file, got none.txt"),
    (["run", "--preset", "tiny", "--offline", "--out", "OUT", "--files", "EMPTY"], "got an empty file"),
    (["run", "--resume", "--out", "OUT"], "holds no run to resume"),
    (["ppo", "--out", "OUT"], "holds no run to resume"),
    (["report", "--out", "OUT"], "expected report.json or metrics.jsonl in"),
    (["tokenizer", "inspect", "nowhere", "text"], "nowhere"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_code_2(command, tmp_path, words, sentence):
    (tmp_path / "empty.txt").write_text("")
    places = {"OUT": tmp_path / "out", "EMPTY": tmp_path / "empty.txt"}
    code, out, err = command(*[places.get(word, word) for word in words])
    assert code == 2 and sentence in one_sentence(err) and out == ""


def test_input_that_is_refused_leaves_no_folder_that_stands_in_the_way(command, tmp_path):
    """A second try with the mistake put right is not told that the folder already holds a run."""
    for _ in range(2):
        code, _, err = command("run", "--preset", "tiny", "--offline", "--out", tmp_path / "out", "--files", "none.txt")
        assert code == 2 and "expected a file" in one_sentence(err)


@pytest.mark.parametrize("words", [["run", "--preset", "huge"], ["walk"], ["run", "--seed", "x"], ["chat"], []])
def test_a_command_that_cannot_be_read_is_exit_code_2_with_a_reason(command, words):
    code, out, err = command(*words)
    assert code == 2 and (out + err).strip() and "Traceback" not in err


@pytest.mark.parametrize("words", [["--help"], *[[verb, "--help"] for verb in room.VERBS]])
def test_every_verb_explains_itself(command, words):
    code, out, _ = command(*words)
    assert code == 0 and len(out) > 100


def test_a_run_in_the_way_and_a_run_of_another_version_are_one_sentence(command, tmp_path):
    open_run(preset("tiny", out=str(tmp_path)))
    code, _, err = command("run", "--preset", "tiny", "--out", tmp_path)
    assert code == 2 and "already holds a run; go on with it by --resume" in one_sentence(err)
    held = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**held, "format": 999}))
    code, _, err = command("run", "--resume", "--out", tmp_path)
    assert code == 2 and "holds a run of another version" in one_sentence(err)


def test_a_model_of_another_version_is_one_sentence(command, tmp_path, tiny_run):
    (tmp_path / "config.json").write_text((tiny_run.folder / "ppo" / "config.json").read_text().replace('"format": 1', '"format": 0'))
    (tmp_path / "model.safetensors").write_bytes((tiny_run.folder / "ppo" / "model.safetensors").read_bytes())
    code, _, err = command("chat", tmp_path, "--message", "hi")
    assert code == 2 and "was written by another version" in one_sentence(err)


def test_flags_reach_the_run(command, monkeypatch, tmp_path):
    from nanorlhf import run as runs

    seen = {}

    def fake(config, resume, notify):
        seen.update(config=config, resume=resume)
        return {"seconds": {"total": 90.0}, "gold": 1}

    monkeypatch.setattr(runs, "run", fake)
    code, out, err = command("run", "--preset", "tiny", "--out", tmp_path / "o", "--seed", 7, "--files", "a.txt", "b.txt",
                             "--offline", "--resume", "--json")
    assert code == 0 and json.loads(out)["gold"] == 1 and seen["resume"]
    config = seen["config"]
    assert (config.preset, config.out, config.seed) == ("tiny", str(tmp_path / "o"), 7)
    assert config.data.files == ("a.txt", "b.txt") and config.data.offline and config.model == preset("tiny").model
    code, out, err = command("run", "--out", tmp_path / "o")
    assert out == "" and "1.5 minutes" in err and f"nanorlhf chat {tmp_path}/o/ppo" in err.replace("\n", "")
    assert seen["config"].preset == "laptop" and not seen["config"].data.offline and not seen["resume"]


def test_ctrl_c_is_exit_code_130_with_the_way_to_go_on(command, monkeypatch):
    from nanorlhf import run as runs

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", interrupted)
    code, _, err = command("run", "--preset", "tiny")
    assert code == 130 and "nanorlhf run --out runs/first --resume" in err


def test_the_tokens_of_a_text_are_shown(tiny_run, command):
    code, out, _ = command("tokenizer", "inspect", tiny_run.folder / "tokenizer", "def f(x):", "--json")
    shown = json.loads(out)
    assert code == 0 and "".join(shown["pieces"]) == "def f(x):" and len(shown["ids"]) == len(shown["pieces"])
    _, out, _ = command("tokenizer", "inspect", tiny_run.folder / "tokenizer", "def f(x):")
    assert out.split("  ")[0] == f"{shown['ids'][0]}:{shown['pieces'][0]!r}"


def test_a_vocabulary_is_trained_inspected_and_timed(command, tmp_path):
    text, out = Path(json.__file__), str(tmp_path / "vocabulary")
    code, said, _ = command("tokenizer", "train", text, "--out", out, "--vocab-size", "270", "--special-token", "<|end|>")
    assert code == 0 and said.startswith("270 tokens from 0.0 MB")
    _, ids, _ = command("tokenizer", "encode", out, "the cat<|end|>", "--special")
    assert json.loads(ids)[-1] == 269
    _, said, _ = command("tokenizer", "inspect", out, "--json")
    facts = json.loads(said)
    assert facts["vocab_size"] == 270 and facts["special_tokens"] == {"<|end|>": 269} and facts["bytes_per_token"]["Python code"] > 0
    code, said, _ = command("tokenizer", "bench", out, "--repeats", "1", "--json")
    assert code == 0 and json.loads(said)["tokens"] > 0


def test_a_page_is_written_again(tiny_run, command):
    before = (tiny_run.folder / "report.html").stat().st_mtime_ns
    code, out, _ = command("report", "--out", tiny_run.folder)
    assert code == 0 and out.strip() == str(tiny_run.folder / "report.html")
    assert (tiny_run.folder / "report.html").stat().st_mtime_ns > before


def test_doctor_says_what_runs_here_and_why_not(command):
    code, out, _ = command("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["cpu"] and {row["backend"] for row in found["backends"]} == {"cpu", "cuda", "reference"}
    assert all(row["reason"] and row["op"] for row in found["backends"])
    build = found["cuda_build"]
    lines = command("doctor")[1].splitlines()
    assert len(lines) == len(found["backends"]) + (1 + len(build["left_out"]) if build.get("nvcc") else 0)
    assert build.keys() <= {"reason"} or {"nvcc", "archs", "left_out", "kernels"} <= build.keys()


def test_the_sources_are_listed_with_those_that_are_left_out(command, monkeypatch):
    from nanorlhf.data import sources

    one = sources.make_source("plays", "books", "archive", "public domain", "1", ["To be."])
    monkeypatch.setattr(sources, "load_sources", lambda names, offline: ([one], ["films: offline"]))
    listed = json.loads(command("data", "--offline", "--json")[1])
    assert listed["left_out"] == ["films: offline"]
    assert listed["sources"][0] | {"source": "plays", "bytes": 6, "documents": 1} == listed["sources"][0]
    out = command("data", "--offline")[1]
    assert "plays" in out and "public domain" in out and "left out: films: offline" in out
