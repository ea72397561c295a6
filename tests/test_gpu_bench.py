"""bench/gpu.py without a GPU: its table, verdicts, budget and survival with made-up answers; its rows in tiny sizes on the CPU; its
checks, which have to pass on right kernels and to fail on wrong ones."""

import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from nanorlhf import ops
from nanorlhf.ops import backend

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def bench():
    """gpu.py and what it is made of, by name."""
    sys.path.insert(0, str(BENCH))
    try:
        names = ("gpu", "gpu_time", "gpu_rows", "gpu_rows_attention", "gpu_verify")
        yield type("Bench", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCH))


class Watch:
    """A stopwatch by which every run takes what it returns."""

    def measure(self, runs):
        return [run() for run in runs]


def counting(*values):
    """A callable that gives one after the other, then the last for ever."""
    left = list(values)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def answer(name, ours=1.0, peer=2.0, **more):
    return {"name": name, "ours": "nanorlhf", "ms": {"nanorlhf": [ours, 0.1], "cuDNN": [peer, 0.1]}, "unit": "TFLOP/s", "errors": {},
            "rate": {"nanorlhf": 100 / ours, "cuDNN": 100 / peer}, "must": 0.8, "aim": 1.0, "numbers": {}, "ratio": peer / ours,
            "against": "cuDNN"} | more  # fmt: skip


class Answers:
    """A worker that answers from a table of name: what, or raises it."""

    def __init__(self, table):
        self.table, self.asked = table, []

    def ask(self, question, seconds):
        self.asked.append(question)
        found = self.table.get(question["name"], {"name": question["name"], "verdict": "ok", "detail": "", "seconds": 1})
        if isinstance(found, Exception):
            raise found
        return dict(found)

    def stop(self):
        pass


def row(bench, name, **more):
    return bench.gpu_time.Row(name, None, ("cuDNN",), 0.8, 1.0, **more)


def test_medians_and_quartiles_of_runs_in_turns(bench):
    """After one warm-up, 1 to 7: the quartiles are 2, 4 and 6."""
    times = bench.gpu_time.interleaved({"a": counting(100.0, *map(float, range(1, 8))), "b": lambda: 3.0}, Watch(), 7, 1)
    assert times == {"a": (4.0, 4.0), "b": (3.0, 0.0)}


def test_runs_end_when_their_time_is_up_but_not_before_five(bench):
    runs = []
    bench.gpu_time.interleaved({"a": lambda: runs.append(1) or 1.0}, Watch(), 100, 0, seconds=0)
    assert len(runs) == 5


@pytest.mark.parametrize("ratio, must, aim, expected", [
    (1.1, 0.8, 1.0, "aim"), (1.0, 0.8, 1.0, "aim"), (0.9, 0.8, 1.0, "must"), (0.79, 0.8, 1.0, "SHORT"), (None, 0.8, 1.0, "no peer"),
    (0.1, None, None, "-"), (0.9, 0.8, None, "must"),
])  # fmt: skip
def test_verdicts(bench, ratio, must, aim, expected):
    result = {"ratio": ratio, "must": must, "aim": aim}
    assert bench.gpu_time.verdict(result) == expected and bench.gpu_time.verdict(result, ["softmax"]) == "unverified"


def test_a_peer_that_cannot_run_or_disagrees_is_named(bench):
    def broken():
        raise RuntimeError("not on this card")

    ways = {"ours": lambda: torch.ones(3), "right": lambda: torch.ones(3, 1), "wrong": lambda: torch.tensor([1.0, 1.0, 2.0]),
            "broken": broken, "nan": lambda: torch.full((3,), math.nan), "copy": lambda: None}  # fmt: skip
    good, errors = bench.gpu_time.tried(bench.gpu_time.Case(ways, 1.0, "GB/s"))
    assert [*good] == ["ours", "right", "wrong", "nan", "copy"] and [*errors] == ["wrong", "broken", "nan"]
    assert errors["broken"] == "RuntimeError: not on this card" and "differs by 1 of 2" in errors["wrong"]


def test_the_ratio_is_to_the_fastest_of_those_named(bench):
    ways = {"ours": lambda: 2.0, "slow": lambda: 9.0, "fast": lambda: 3.0, "other": lambda: 1.0}
    made = bench.gpu_time.Row("r", lambda device, tiny: bench.gpu_time.Case(ways, 4.0, "GB/s", compared=False), ("slow", "fast"), 1.0, 2.0)
    result = bench.gpu_time.measured(made, Watch(), repeats=5)
    assert result["ratio"] == 1.5 and result["against"] == "fast" and result["rate"]["ours"] == 2000


def test_a_session_goes_on_after_losses_and_writes_down_what_it_has(bench, tmp_path):
    table = {"softmax": {"name": "softmax", "verdict": "FAILED", "detail": "AssertionError: error", "seconds": 1},
             "norm": bench.gpu.Lost("no answer in 9 s"),
             "a": answer("a"), "b": bench.gpu.Lost("the process died with status -6"), "c": answer("c", 3.0),
             "d": {"name": "d", "error": "OutOfMemoryError"},
             "cuBLAS 8192^3": answer("cuBLAS 8192^3", 0.125, must=None, aim=None)}  # fmt: skip
    session = bench.gpu.Session(Answers(table), 1e9, tmp_path, lambda: 0.0, lambda text: None)
    session.check(["softmax", "norm", "loss"], 1e9)
    session.time([row(bench, "cuBLAS 8192^3"), row(bench, "a", needs=("loss",)), row(bench, "b"), row(bench, "c", needs=("softmax",)),
                  row(bench, "d")])  # fmt: skip
    assert [c["verdict"] for c in session.checks] == ["FAILED", "FAILED", "ok"]
    assert [r["verdict"] for r in session.rows] == ["-", "aim", "error", "unverified", "error"]
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == session.rows
    page, last = (tmp_path / "gpu.md").read_text(), bench.gpu.summary(session)
    assert "| a | 1.000 ± 0.100 | 100.0 TFLOP/s | 12% | 2.00 × cuDNN | 0.8 | 1 | aim | cuDNN 2.000 ± 0.100 |" in page
    assert "| norm | FAILED |" in page and "the process died with status -6" in page
    assert last[-2].startswith("checks: 1 of 3 ok; softmax (FAILED") and last[-1] == "rows: 1 -, 1 aim, 2 error, 1 unverified"
    assert all(len(text) < 400 for text in last)


def test_what_there_is_no_time_for_is_named(bench):
    now = counting(*[float(x) for x in range(0, 200, 20)])
    session = bench.gpu.Session(Answers({"a": answer("a")}), 30.0, None, now, lambda text: None)
    session.time([row(bench, name) for name in "aab"])
    assert [r.get("error") for r in session.rows] == [None, None, "no time left"]
    late = bench.gpu.Session(Answers({}), 0.0, None, lambda: 10.0, lambda text: None)
    late.check(["softmax"], 11.0)
    assert late.checks[0]["verdict"] == "not run"


def test_hopper_kernels_that_fail_are_not_run_again(bench):
    """A backward pass that hangs leaves the forward one its rows; without a check of theirs rows are not trusted."""
    table = {"attention sm90": bench.gpu.Lost("no answer"), "forward": answer("forward"), "backward": answer("backward")}
    worker = Answers(table)
    session = bench.gpu.Session(worker, 1e9, None, lambda: 0.0, lambda text: None)
    session.check(["attention portable", "attention sm90 forward", "attention sm90", "determinism"], 1e9)
    session.time([row(bench, "forward", needs=("attention sm90 forward",)),
                  row(bench, "backward", needs=("attention portable", "attention sm90"))])  # fmt: skip
    assert [q["avoid"] for q in worker.asked] == [[], [], [], ["sm90"], [], ["sm90"]]
    assert [r["verdict"] for r in session.rows] == ["aim", "aim"] and session.rows[1]["numbers"] == {"variant": "portable"}


def test_a_backward_pass_whose_forward_hangs_is_left_alone(bench):
    worker = Answers({"attention sm90 forward": bench.gpu.Lost("no answer in 60 s, as where a kernel hangs")})
    session = bench.gpu.Session(worker, 1e9, None, lambda: 0.0, lambda text: None)
    session.check(["attention sm90 forward", "attention sm90"], 1e9)
    assert len(worker.asked) == 1 and [c["verdict"] for c in session.checks] == ["FAILED", "FAILED"]
    assert session.avoided(["attention sm90"]) == session.avoided(["attention sm90 forward"]) == ["sm90"]


WORKER = """
import json, sys, time
for line in sys.stdin:
    name = json.loads(line)["name"]
    if name == "die": sys.exit(3)
    if name == "hang": time.sleep(60)
    print("a library talks")
    print("RESULT " + json.dumps({"name": name, "fatal": name == "poison"}), flush=True)
"""


def test_a_worker_that_dies_or_hangs_is_replaced(bench, capfd):
    worker = bench.gpu.Worker([sys.executable, "-c", WORKER])
    try:
        first = worker.ask({"name": "a"}, 30), worker.child
        with pytest.raises(bench.gpu.Lost, match="died with status 3"):
            worker.ask({"name": "die"}, 30)
        assert worker.ask({"name": "b"}, 30) == {"name": "b"} and worker.child is not first[1]
        with pytest.raises(bench.gpu.Lost, match="no answer in 1 s"):
            worker.ask({"name": "hang"}, 1)
        assert worker.ask({"name": "poison"}, 30) == {"name": "poison"} and worker.child is None
    finally:
        worker.stop()
    assert "a library talks" in capfd.readouterr().out


def test_the_worker_answers_with_checks_rows_and_errors(bench, tmp_path):
    session = bench.gpu.Session(bench.gpu.Worker([sys.executable, str(BENCH / "gpu.py"), "--worker", "--host"]), 1e12, tmp_path)
    rows = {r.name: r for r in [*bench.gpu_rows.CEILINGS, *bench.gpu_rows.rows()]}
    try:
        assert session.begin(120) and session.machine["torch"] == torch.__version__
        session.check(["swiglu", "graphs"], 1e12, 2)
        session.time([rows["copy 4 GiB"], rows["SwiGLU both ways"], bench.gpu_time.Row("of no such name", None)])
    finally:
        session.worker.stop()
    assert [c["verdict"] for c in session.checks] == ["ok", "skipped"]
    assert [r["verdict"] for r in session.rows] == ["-", "-", "error"] and "KeyError" in session.rows[2]["error"]
    assert session.rows[1]["against"] == "copy" and set(session.rows[1]["ms"]) == {"nanorlhf", "compiled", "copy"}
    assert "| SwiGLU both ways |" in (tmp_path / "gpu.md").read_text() and session.ceilings().keys() == {"GB/s"}


def test_every_row_is_asked_for_once_and_the_bars_are_there(bench):
    rows = bench.gpu_rows.rows()
    names = [r.name for r in rows]
    assert len(set(names)) == len(names)
    assert sum(r.must is not None for r in rows) == 48 + 4 + 4 + 1 + 5 + 3 + 1
    assert all(need in bench.gpu_verify.checks() for r in rows for need in r.needs)
    assert set(bench.gpu_verify.SANITIZED) <= set(bench.gpu_verify.checks())
    quick = [r.quick for r in rows]
    assert quick == sorted(quick, reverse=True) and 8 <= sum(quick) <= 20


KINDS = ["cuBLAS", "copy 4", "forward D128 S4096 causal", "backward D128 S4096 full", "packed forward D64", "decode B8", "64 samples",
         "softmax 16384", "loss head with", "loss head,", "loss head memory", "training", "logprobs", "RMSNorm", "SwiGLU", "RoPE",
         "engine", "sample"]  # fmt: skip


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_built_and_their_contenders_agree(bench, kind):
    """In tiny sizes on the CPU, where some of torch's backends are not."""
    found = next(r for r in [*bench.gpu_rows.CEILINGS, *bench.gpu_rows.rows()] if r.name.startswith(kind))
    result = bench.gpu_time.measured(found, bench.gpu_time.HostClock(), "cpu", True, repeats=2, warmups=0)
    assert not [e for e in result["errors"].values() if e.startswith("disagrees")], result["errors"]
    assert all(ms > 0 for ms, _ in result["ms"].values()) and all(r > 0 for r in result["rate"].values())
    absent = {"cuDNN", "efficient", "varlen"} | ({"flex"} if "backward" in kind else set())
    assert set(result["errors"]) <= absent


def test_the_checks_pass_on_the_kernels_of_this_cpu(bench):
    found = bench.gpu_verify.run_checks(bench.gpu_verify.Place("cpu", small=True, runs=2), note=lambda text: None)
    assert not [f for f in found if f["verdict"] == "FAILED"]
    absent = {"paged", "graphs", "decode graphs", "large offsets", "attention sm90", "attention sm90 forward"}
    assert {f["name"] for f in found if f["verdict"] == "skipped"} <= absent


def test_a_wrong_kernel_and_a_broken_check_are_found(bench, monkeypatch):
    right = ops.softmax
    for wrong in (lambda x: right(x) * 1.01, lambda x: right(x.flatten()).view(x.shape), lambda x: 1 / 0):
        monkeypatch.setattr(ops, "softmax", wrong)
        found = bench.gpu_verify.run_checks(bench.gpu_verify.Place("cpu", small=True), ["softmax"], note=lambda text: None)
        assert found[0]["verdict"] == "FAILED"


def test_memory_is_poisoned_around_inputs_and_in_what_is_new(bench):
    x = torch.arange(6.0).view(2, 3)
    for off in (0, 1):
        inside = bench.gpu_verify.boxed(x, off)
        around = torch.as_strided(inside, (70,), (1,), inside.storage_offset() - 64)
        assert torch.equal(inside, x) and around[:64].isnan().all() and inside.data_ptr() % 16 == 4 * off
    with bench.gpu_verify.poisoned():
        assert torch.empty(5).isnan().all() and x.new_empty(3, 2).isnan().all() and (torch.empty(4, dtype=torch.uint8) == 255).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_the_sanitizer_says_is_a_line(bench, monkeypatch, tmp_path):
    said = tmp_path / "said.py"
    command = [sys.executable, str(said)]
    monkeypatch.setattr(bench.gpu, "sanitizer_command", lambda: command)
    for text, expected in (("0 errors", "ok"), ("2 errors", "FAILED")):
        answers = "import sys\nfor line in sys.stdin: print('RESULT {\"verdict\": \"ok\"}')\n"
        said.write_text(f"{answers}print('========= ERROR SUMMARY: {text}')")
        got = bench.gpu.sanitize(["softmax", "norm"], [], 60)
        assert got["verdict"] == expected and re.search(r"\d errors, 2 of 2 checks passed", got["detail"])
    said.write_text("import time; time.sleep(60)")
    assert bench.gpu.sanitize(["softmax"], [], 1)["verdict"] == "skipped"
    monkeypatch.setattr(bench.gpu, "sanitizer_command", lambda: None)
    assert bench.gpu.sanitize(["softmax"], [], 1)["detail"] == "it is not here"


def test_a_worker_that_cannot_start_ends_the_run(bench):
    session = bench.gpu.Session(bench.gpu.Worker([sys.executable, "-c", "raise SystemExit(4)"]), 1e9)
    assert not session.begin(30) and session.notes == ["the worker cannot start: the process died with status 4"]
    answering = type("Worker", (), {"ask": lambda self, question, seconds: {"torch": "2"}})
    assert bench.gpu.Session(answering(), 1e9).begin(30)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(bench, capsys):
    assert bench.gpu.run(bench.gpu.arguments([])) == 2
    assert capsys.readouterr().err.startswith("gpu.py: torch finds no GPU here")


@pytest.mark.skipif(not hasattr(backend, "emulate"), reason="this backend cannot be emulated")
def test_the_checks_pass_on_the_emulated_kernels(bench):
    import emulated

    with emulated.kernels() as module:
        place = bench.gpu_verify.Place("cpu", small=True, runs=2, module=module)
        found = bench.gpu_verify.run_checks(place, note=lambda text: None)
    wrong = [f for f in found if f["verdict"] == "FAILED"]
    assert not wrong, "\n".join(f"{f['name']}: {f['detail']}" for f in wrong)
    assert {f["name"] for f in found if f["verdict"] == "skipped"} <= {"paged", "graphs", "decode graphs", "large offsets"}
