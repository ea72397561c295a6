"""All stages in order: tokenizer → base → SFT → reward → what is compared with PPO → PPO, then the comparison and the report.

A run's folder holds one folder a stage, complete when its ``stage.json`` is there (written last). A run that is
started again skips the complete stages and takes the interrupted one up where its state was last saved.
"""

import json
import platform
import time
from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Callable, get_type_hints

import torch

from . import alignment, comparison, parallel
from .checkpoint import FORMAT, StageState, write_json
from .config import RunConfig
from .data.corpus import Corpus
from .metrics import MetricsLog
from .ops import backend
from .report import experiments, write_report
from .tokenizer import Tokenizer


class Run:
    """One run: its folder, its configuration, its text and its log. Stages take it and leave their facts in it."""

    def __init__(self, config: RunConfig, notify: Callable[[dict], None] = lambda row: None):
        self.config, self.folder = config, Path(config.out)
        self.device = device_of(config)
        backend.deterministic(config.deterministic)
        self.metrics = MetricsLog(self.folder)
        self.notify = notify if parallel.first() else lambda row: None
        self.seconds_elsewhere = 0.0  # spent outside the stages: reading the corpus

    @cached_property
    def corpus(self) -> Corpus:
        began = time.perf_counter()
        corpus = Corpus(self.config)
        if corpus.left_out:
            self.notify({"left_out": corpus.left_out})
        self.seconds_elsewhere += time.perf_counter() - began
        return corpus

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer")

    def log(self, row: dict) -> None:
        self.metrics.append(row)
        c = self.config
        steps = {name: getattr(c, name).steps for name in ("pretrain", "sft", "dpo", "rloo", "grpo", "reinforce", "ppo")}
        self.notify({"steps": steps.get(row["stage"]), **row})

    def state(self, stage: str, rows: str | None = None) -> StageState:
        """The stage's saved state. Rows that the log holds beyond it are dropped: the stage will write them again. rows: what they
        are called, the stage's name unless given; with "" none are dropped."""
        state = StageState(self.folder / stage / "state.safetensors")
        step = state.saved_step()
        self.metrics.truncate_after(("pretrain" if stage == "base" else stage) if rows is None else rows, step)
        return state

    def facts(self, stage: str) -> dict:
        """What a complete stage left behind. Errors: ValueError when it is not complete."""
        path = self.folder / stage / "stage.json"
        if not path.is_file():
            raise ValueError(f"{self.folder} has no complete stage {stage!r}; run it first: nanorlhf {stage}")
        return json.loads(path.read_text())

    def done(self, stage: str) -> bool:
        return (self.folder / stage / "stage.json").is_file()

    def complete(self, stage: str, seconds: float, **facts) -> None:
        write_json(self.folder / stage / "stage.json", {"seconds": seconds, "peak_mib": peak_memory(), **facts})
        StageState(self.folder / stage / "state.safetensors").clear()


def device_of(config: RunConfig) -> torch.device:
    return torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def open_run(config: RunConfig, resume: bool = False, notify: Callable[[dict], None] = lambda row: None) -> Run:
    """A new run in ``config.out``, or with ``resume`` the one that is there, with the configuration it began with.

    Errors: ValueError for a folder that already holds a run (without ``resume``), holds none (with it), or holds one
    of another version.
    """
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {config.device} is asked for, but torch finds no CUDA device here")
    if config.deterministic and config.device != "cpu" and (config.device != "auto" or torch.cuda.is_available()):
        raise ValueError(f"deterministic needs the CPU kernels: ask for device cpu instead of {config.device}")
    parallel.start(device_of(config))
    path = Path(config.out) / "run.json"
    held = parallel.agreed(json.loads(path.read_text()) if path.is_file() else None)
    if held is not None:
        if held.get("format") != FORMAT:
            raise ValueError(f"{config.out} holds a run of another version (format {held.get('format')}; "
                             f"this one reads {FORMAT})")
        if not resume:
            raise ValueError(f"{config.out} already holds a run; go on with it by --resume, or choose another --out")
        try:
            config = replace(from_dict(RunConfig, held["config"]), out=config.out)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{config.out} holds a run of another version (its settings differ: {error})") from error
    elif resume:
        raise ValueError(f"{config.out} holds no run to resume")
    else:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, "config": config.to_dict()})
    return Run(config, notify)


def pin_text(run: Run) -> None:
    """Note in ``run.json`` which text the run reads. Errors: ValueError when it went on with other text than it began with."""
    path = run.folder / "run.json"
    held = json.loads(path.read_text())
    now = {source.name: source.sha256 for source in run.corpus.sources.values()}
    before = held.setdefault("sources", now)
    if before != now:
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        raise ValueError(f"{run.config.out} began with other text: {', '.join(changed)} came, went or changed since")
    write_json(path, held)


def from_dict(cls: type, values: dict):
    """The frozen dataclass that ``to_dict`` wrote, lists back to tuples."""
    hints, made = get_type_hints(cls), {}
    for f in fields(cls):
        value = values[f.name]
        if is_dataclass(hints[f.name]):
            value = from_dict(hints[f.name], value)
        made[f.name] = tuple(value) if isinstance(value, list) else value
    return cls(**made)


def machine() -> dict:
    """What the run ran on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {"cpu": model, "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__}}


def peak_memory(restart: bool = False) -> float | None:
    """The most memory in MiB that this process held since the last restart of the count; None where Linux does not tell."""
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def run(config: RunConfig, resume: bool = False, notify: Callable[[dict], None] = lambda row: None) -> dict:
    """Every stage that is not complete, then the comparison and the report. Returns the report."""
    current = open_run(config, resume, notify)
    try:
        pin_text(current)  # which reads it all, before the first stage's clock starts
        for name, stage in alignment.stages_of(current.config).items():
            if not current.done(name):
                current.notify({"stage": name, "begin": True})
                peak_memory(restart=True)
                stage(current)
                current.notify({"stage": name, "end": True, "peak_mib": current.facts(name)["peak_mib"]})
    except ValueError:
        if not current.done("tokenizer"):  # text or settings that are refused leave no run in the way of the next try
            (current.folder / "run.json").unlink(missing_ok=True)  # by whichever rank comes first
        raise
    current.notify({"stage": "comparison", "begin": True})
    report = None
    if parallel.first():
        report = {**comparison.report(current), "machine": machine(), "config": current.config.to_dict(),
                  **experiments(current.folder)}
    report = parallel.agreed(report)
    write_json(current.folder / "report.json", report)
    if parallel.first():
        write_report(current.folder)
    return report
