"""The CUDA kernels on a GPU, in one command: builds them, checks each against fp64, times each against what torch has.

    python bench/gpu.py [--quick] [--seconds 480] [--out FOLDER] [--only PATTERN] [--no-build] [--no-verify] [--emulated]

Writes gpu.json and gpu.md to the folder after every line, and prints the table last. Checks (gpu_verify.py) come first, then rows
(gpu_rows*.py) from the most telling to the least; what there is no time for is named. Each is done by a worker process that is
replaced when it dies or hangs, so that one broken kernel costs one line. Rows are medians of runs in turns on N(0, 1) inputs, timed
by CUDA events with the L2 cache emptied before each run; ratios are to a peer of the same run. --emulated: the checks alone, on the
CPU, by the emulator of the tests.
"""

import argparse
import json
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]
SECONDS = {"check": 60, "sanitizer": 100}  # the longest that one may take; rows have their own
VERIFY_SHARE = 0.4  # of the time that is left after the build, before the rows begin
LEAST = 100  # seconds for checks and rows, however long the build took
SMI = "name,driver_version,power.limit,power.draw,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu"


class Lost(Exception):
    """The worker gave no answer."""


class Worker:
    """A process that answers lines of JSON, each with one; started when it is needed, and again when it is gone."""

    def __init__(self, command):
        self.command, self.child = command, None

    def _start(self):
        self.child = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.lines = queue.Queue()
        threading.Thread(target=self._read, args=(self.child, self.lines), daemon=True).start()

    @staticmethod
    def _read(child, lines):
        for line in child.stdout:
            if line.startswith("RESULT "):
                lines.put(json.loads(line.removeprefix("RESULT ")))
            else:
                print(line, end="", flush=True)
        lines.put(None)

    def ask(self, question, seconds):
        if self.child is None or self.child.poll() is not None:
            self._start()
        try:
            self.child.stdin.write(json.dumps(question) + "\n")
            self.child.stdin.flush()
            answer = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            raise Lost(f"no answer in {seconds:.0f} s, as where a kernel hangs") from None
        except BrokenPipeError:
            answer = None
        if answer is None:
            code = self.child.wait()
            self.child = None
            raise Lost(f"the process died with status {code}")
        if answer.pop("fatal", False):  # the GPU's context is of no more use
            self.stop()
        return answer

    def stop(self):
        if self.child is not None:
            self.child.kill()
            try:
                self.child.wait(20)
            except subprocess.TimeoutExpired:
                print("the worker cannot be ended: the driver holds it", flush=True)
            self.child = None


def work(given):
    """The worker: reads questions, prints answers."""
    import gc
    from contextlib import nullcontext

    import torch

    import gpu_rows
    import gpu_time
    import gpu_verify
    from nanorlhf.ops import backend

    device = "cpu" if given.emulated or given.host else "cuda"
    if given.emulated:
        import emulated
    elif device == "cuda":
        backend.force("cuda")
    with emulated.kernels() if given.emulated else nullcontext() as kernels:
        module = kernels or gpu_verify.native_module(device)
        rows = {row.name: row for row in [*gpu_rows.CEILINGS, *gpu_rows.rows()]}
        for line in sys.stdin:
            question = json.loads(line)
            avoid = frozenset(question.get("avoid", ()))
            if hasattr(module, "attention_variant"):
                module.attention_variant("portable" if avoid else "auto")
            try:
                if question["kind"] == "hello":
                    answer = software(torch, device)
                elif question["kind"] == "check":
                    place = gpu_verify.Place(device, device == "cpu" or given.sanitized, question["runs"], module, avoid)
                    answer = gpu_verify.run_checks(place, [question["name"]], note=lambda text: None)[0]
                else:
                    gpu_rows.gpu_rows_attention.AVOID = avoid
                    watch = gpu_time.HostClock() if device == "cpu" else gpu_time.Events()
                    answer = gpu_time.measured(rows[question["name"]], watch, device, device == "cpu", seconds=6)
                    answer["numbers"] |= card(torch)
            except Exception as error:  # a row that breaks is a line that says so
                answer = {"name": question.get("name"), "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            answer |= settled(torch, gc, device)
            print("RESULT " + json.dumps(answer), flush=True)


def settled(torch, gc, device):
    """Frees what the last question left; says whether the device still answers."""
    gc.collect()
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        torch.compiler.reset()  # it gives up on a function that it has compiled eight times
    except Exception:  # whatever it is, the context is gone
        return {"fatal": True}
    return {}


def software(torch, device):
    """What the numbers depend on beside the card."""
    found = {"torch": torch.__version__}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "capability": f"{gpu.major}.{gpu.minor}",
                  "multiprocessors": gpu.multi_processor_count}  # fmt: skip
    return found


def card(torch):
    """Clock and power after a row, where torch can ask."""
    try:
        return {"MHz": torch.cuda.clock_rate(), "W": round(torch.cuda.power_draw() / 1e3)}
    except Exception:  # without NVML's Python module
        return {}


def query(fields=SMI):
    """What nvidia-smi says of the first GPU, or {}."""
    try:
        out = subprocess.check_output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), (x.strip() for x in out.splitlines()[0].split(",")), strict=False))


def commit():
    """Of this checkout, where there is one."""
    try:
        return subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def build(seconds):
    """Builds both modules in place; returns "" or what went wrong. setuptools leaves alone what is newer than its sources."""
    env = {**os.environ, "NANORLHF_CUDA": "1", "NPY_NUM_BUILD_JOBS": str(os.cpu_count() or 2)}
    try:
        done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=env, timeout=seconds, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"the build took over {seconds:.0f} s"
    return "" if done.returncode == 0 else "the build failed:\n" + done.stdout[-3000:]


def sanitizer_command(tool="memcheck"):
    program = shutil.which("compute-sanitizer")
    return program and [program, "--tool", tool, "--error-exitcode", "99", sys.executable, __file__, "--sanitized"]


def sanitize(names, avoid, seconds):
    """compute-sanitizer's memcheck over a few small checks, each allocation on its own: a row like a check's."""
    began, command = time.monotonic(), sanitizer_command()
    row = {"name": "compute-sanitizer", "verdict": "skipped", "detail": "it is not here"}
    if command is None:
        return row | {"seconds": 0}
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    questions = "".join(json.dumps({"kind": "check", "name": n, "runs": 2, "avoid": sorted(avoid)}) + "\n" for n in names)
    try:
        done = subprocess.run(command, input=questions, env=env, timeout=seconds, capture_output=True, text=True, cwd=ROOT)
        found = re.findall(r"ERROR SUMMARY: (\d+) error", done.stdout + done.stderr)
        passed = done.stdout.count('"verdict": "ok"')
        verdict = "ok" if done.returncode == 0 and found and not int(found[-1]) and passed == len(names) else "FAILED"
        row |= {"verdict": verdict, "detail": f"{found[-1] if found else '?'} errors, {passed} of {len(names)} checks passed"}
        if verdict == "FAILED":
            row["detail"] += ": " + " ".join(re.findall(r"========= .*", done.stdout + done.stderr)[:6])[:600]
    except subprocess.TimeoutExpired:
        row |= {"detail": f"not done after {seconds:.0f} s"}
    return row | {"seconds": round(time.monotonic() - began, 1)}


class Session:
    """A whole run: asks the worker line after line, keeps what it answered, writes it down each time."""

    def __init__(self, worker, deadline, folder=None, clock=time.monotonic, say=print):
        self.worker, self.deadline, self.folder, self.clock, self.say = worker, deadline, folder, clock, say
        self.checks, self.rows, self.notes, self.machine = [], [], [], {}

    def left(self):
        return self.deadline - self.clock()

    def verdict_of(self, name):
        return next((c["verdict"] for c in self.checks if c["name"] == name), "not run")

    def avoided(self, needs):
        """The variants that a row or check must not use, as what it needs of them is wrong."""
        return ["sm90"] if any("sm90" in n and self.verdict_of(n) == "FAILED" for n in needs) else []

    def begin(self, seconds):
        """Whether the worker can work at all."""
        try:
            answer = self.worker.ask({"kind": "hello"}, seconds)
        except Lost as lost:
            answer = {"error": str(lost)}
        if "error" in answer:
            self.notes.append(f"the worker cannot start: {answer['error']}")
            return False
        self.machine |= answer
        return True

    def check(self, names, until, runs=100):
        for name in names:
            seconds = min(SECONDS["check"], until - self.clock())
            needs = [] if name.startswith("attention") else ["attention sm90 forward", "attention sm90"]
            row = {"name": name, "verdict": "not run", "detail": "no time left", "seconds": 0}
            if self.verdict_of(f"{name} forward") == "FAILED":
                row |= {"verdict": "FAILED", "detail": "not run, as its forward kernels failed"}
            elif seconds >= 3:
                began = self.clock()
                try:
                    answer = self.worker.ask({"kind": "check", "name": name, "runs": runs, "avoid": self.avoided(needs)}, seconds)
                    row |= {"verdict": "FAILED", "detail": answer.get("error", "")} | answer
                except Lost as lost:
                    row |= {"verdict": "FAILED", "detail": str(lost), "seconds": round(self.clock() - began, 1)}
            self.checks.append(row)
            self.say(f"{row['verdict']:8} {name:26} {row['seconds']:6.1f} s  {row['detail'][:300]}")
            self.write()

    def time(self, rows, verified=True):
        from gpu_time import verdict

        for row in rows:
            seconds = min(row.patience, self.left() - 3)
            if seconds < 5:
                result = {"name": row.name, "error": "no time left"}
            else:
                avoid = self.avoided(row.needs)
                try:
                    result = self.worker.ask({"kind": "row", "name": row.name, "avoid": avoid}, seconds)
                except Lost as lost:
                    result = {"name": row.name, "error": str(lost)}
                if avoid:
                    result.setdefault("numbers", {})["variant"] = "portable"
            # Hopper's kernels that failed were not run, and where they are skipped there are none.
            failed = [n for n in row.needs if self.verdict_of(n) not in (("ok", "FAILED", "skipped") if "sm90" in n else ("ok",))]
            result["verdict"] = "error" if "error" in result else verdict(result, failed if verified else ())
            self.rows.append(result)
            self.say(line(result, self.ceilings()))
            self.write()

    def ceilings(self):
        """{unit: the rate of what the card can do}."""
        return {r["unit"]: r["rate"][r["ours"]] for r in self.rows if r["name"].startswith(("cuBLAS", "copy")) and "rate" in r}

    def write(self):
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = {"machine": self.machine, "notes": self.notes, "checks": self.checks, "rows": self.rows}
            (self.folder / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
            (self.folder / "gpu.md").write_text(markdown(self), encoding="utf-8")


def line(result, ceilings):
    """A result in one line of plain text."""
    if "error" in result:
        return f"{result['name']:30} {result['error'][:120]}"
    ours, unit = result["ours"], result["unit"]
    rate = result["rate"][ours]
    share = f"{rate / ceilings[unit]:5.0%}" if unit in ceilings else "     "
    peers = ", ".join(f"{name.removeprefix('nanorlhf ')} {ms[0]:.3g}" for name, ms in result["ms"].items() if name != ours)
    bar = ""
    if result["must"] and result["ratio"]:
        aim = f", aim {result['aim']:g}" if result["aim"] else ""
        bar = f"{result['ratio']:5.2f} × {result['against']} (must {result['must']:g}{aim})"
    median, spread = result["ms"][ours]
    return f"{result['name']:30} {median:8.3f} ms ±{spread:6.3f} {rate:7.1f} {unit:7} {share} {result['verdict']:10} {bar} [{peers}]"


def markdown(session):
    """The whole run as one page."""
    cells = ["row", "ms (median ± quartiles)", "rate", "of cuBLAS or copy", "ratio", "must", "aim", "verdict", "others, ms"]
    lines = [f"`{json.dumps(session.machine)}`", "", *(f"- {note}" for note in session.notes), ""]
    lines += ["| check | verdict | seconds | |", "|---|---|---|---|"]
    lines += [f"| {c['name']} | {c['verdict']} | {c['seconds']} | {' '.join(c['detail'].split())[:200]} |" for c in session.checks]
    lines += ["", "| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
    ceilings = session.ceilings()
    for r in session.rows:
        if "error" in r:
            lines.append(f"| {r['name']} |" + " |" * (len(cells) - 2) + f" {' '.join(r['error'].split())[:200]} |")
            continue
        ours, unit, (median, spread) = r["ours"], r["unit"], r["ms"][r["ours"]]
        others = [f"{name} {ms[0]:.3f} ± {ms[1]:.3f}" for name, ms in r["ms"].items() if name != ours]
        others += [f"{name}: {why}"[:80].replace("|", "/").replace("\n", " ") for name, why in r["errors"].items()]
        others += [f"{name} {value}" for name, value in r["numbers"].items()]
        share = f"{r['rate'][ours] / ceilings[unit]:.0%}" if unit in ceilings else ""
        ratio = f"{r['ratio']:.2f} × {r['against']}" if r["ratio"] else ""
        bars = [f"{x:g}" if x else "" for x in (r["must"], r["aim"])]
        lines.append("| " + " | ".join([r["name"], f"{median:.3f} ± {spread:.3f}", f"{r['rate'][ours]:.1f} {unit}", share, ratio, *bars,
                                        r["verdict"], "; ".join(others)]) + " |")  # fmt: skip
    return "\n".join(lines) + "\n"


def summary(session):
    """The lines that are printed last."""
    count = {}
    for r in session.rows:
        count[r["verdict"]] = count.get(r["verdict"], 0) + 1
    wrong = [f"{c['name']} ({c['verdict']}: {c['detail'][:100]})" for c in session.checks if c["verdict"] != "ok"]
    ok = sum(c["verdict"] == "ok" for c in session.checks)
    return [json.dumps(session.machine), *session.notes, *(line(r, session.ceilings()) for r in session.rows),
            f"checks: {ok} of {len(session.checks)} ok" + ("; " + "; ".join(wrong) if wrong else ""),
            "rows: " + (", ".join(f"{n} {verdict}" for verdict, n in sorted(count.items())) or "none")]  # fmt: skip


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the rows that tell most, in two minutes")
    parser.add_argument("--seconds", type=float, help="for everything, the build included: 480, or 120 with --quick")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--only", default="", help="checks and rows whose name this regular expression finds")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--emulated", action="store_true")
    for hidden in ("--worker", "--sanitized", "--host"):  # what a worker is told; --host: this CPU's own kernels, tiny
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(given):
    """The whole of it; returns the exit status: 0 where every check passed that could be made, 2 where nothing can be done."""
    import torch

    began = time.monotonic()
    seconds = given.seconds or (120 if given.quick else 480)
    if not given.emulated and not torch.cuda.is_available():
        print("gpu.py: torch finds no GPU here; --emulated makes the checks on the CPU", file=sys.stderr)
        return 2
    sys.stdout.reconfigure(line_buffering=True)
    command = [sys.executable, __file__, "--worker", *(["--emulated"] if given.emulated else [])]
    session = Session(Worker(command), began + seconds, given.out)
    session.machine = {**query(), "host": platform.machine(), "cores": os.cpu_count(), "commit": commit()}
    if not given.emulated and not given.no_build:
        problem = build(max(0.6 * seconds, 300))
        session.notes.append(problem or f"built in {time.monotonic() - began:.0f} s")
        session.deadline = max(session.deadline, session.clock() + LEAST)
        print(session.notes[-1])
    if not session.begin(900 if given.emulated else 120):
        session.write()
        print(session.notes[-1])
        return 2
    import gpu_rows  # needs the built module
    import gpu_verify

    def wanted(name):
        return re.search(given.only, name)

    until = session.clock() + VERIFY_SHARE * session.left()
    if not given.no_verify:
        runs = 3 if given.emulated else 20 if given.quick else 100
        session.check([n for n in gpu_verify.checks() if wanted(n)], session.deadline if given.emulated else until, runs)
    if not given.emulated:
        if not given.quick and not given.no_verify and wanted("compute-sanitizer"):
            avoid = session.avoided(["attention sm90 forward", "attention sm90"])
            names = [n for n in gpu_verify.SANITIZED if session.verdict_of(n) == "ok"]
            session.checks.append(sanitize(names, avoid, min(SECONDS["sanitizer"], 0.25 * session.left())))
            session.say(str(session.checks[-1]))
        rows = [r for r in gpu_rows.rows() if wanted(r.name) and (r.quick or not given.quick)]
        session.time([*gpu_rows.CEILINGS, *rows], verified=not given.no_verify)
    session.machine["after"] = query("clocks.sm,power.draw,temperature.gpu")
    session.notes.append(f"{time.monotonic() - began:.0f} s in all")
    session.worker.stop()
    session.write()
    print("\n".join(["", *summary(session)]))
    return int(any(c["verdict"] == "FAILED" for c in session.checks))


if __name__ == "__main__":
    given = arguments()
    sys.exit(work(given) if given.worker or given.sanitized else run(given))
