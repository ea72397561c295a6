"""The command line: ``nanorlhf VERB``. It wires flags to calls; the work is done elsewhere."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import tyro
from rich.console import Console

from .config import RunConfig, preset

CONSOLE = Console(stderr=True)


def _run(default: RunConfig):
    def run(config: Annotated[RunConfig, tyro.conf.arg(name="")] = default, resume: bool = False,
            json_: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
        """All stages in order: tokenizer, base model, SFT, reward model, PPO, comparison, report.

        Args:
            config: Every setting; --preset names the values that the others start from.
            resume: Go on with the run in the folder, with the settings it began with.
            json: Print the report as JSON.
        """
        from . import parallel
        from .progress import Progress
        from .run import run as run_all

        try:
            with Progress(CONSOLE) as progress:
                report = run_all(config, resume, progress)
        except KeyboardInterrupt:
            CONSOLE.print(f"Interrupted. Go on with: nanorlhf run --out {config.out} --resume", markup=False, soft_wrap=True)
            sys.exit(130)
        if not parallel.first():
            return
        if json_:
            print(json.dumps(report))
            return
        peak = max((mib for mib in report.get("peak_mib", {}).values() if mib), default=None)
        held = f", {peak:.0f} MiB of memory at most" if peak else ""
        CONSOLE.print(f"Done in {report['seconds']['total'] / 60:.1f} minutes{held}. Report: {config.out}/report.html   "
                      f"Talk to it: nanorlhf chat {config.out}/ppo", markup=False, soft_wrap=True)
    return run


def _preset(words: list[str]) -> RunConfig:
    """The preset that the command line names: its values are the defaults of all other flags."""
    for i, word in enumerate(words):
        if word == "--preset" and i + 1 < len(words):
            return preset(words[i + 1])
        if word.startswith("--preset="):
            return preset(word.split("=", 1)[1])
    return preset("laptop")


def _stage(name: str):
    def stage(out: str = "runs/first") -> None:
        """One stage of the run in a folder, from the stage before it; an interrupted one goes on where it was.

        Args:
            out: The run's folder.
        """
        from . import alignment, stages
        from .progress import Progress
        from .run import open_run

        with Progress(CONSOLE) as progress:
            {**stages.STAGES, **alignment.ALIGNMENTS}[name](open_run(RunConfig(out=out), True, progress))
    return stage


def chat(path: tyro.conf.Positional[str], message: Optional[str] = None, temperature: float = 1.0, top_p: float = 1.0,
         max_new_tokens: int = 64, seed: int = 0) -> None:
    """Talk to an assistant in the terminal; answers stream. Each message is a conversation of its own.

    Args:
        path: A stage's folder, for example runs/first/ppo.
        message: Answer this one message and stop.
        temperature: 0 takes the most probable token.
        top_p: Keep the most probable tokens with at least this probability together.
        max_new_tokens: Most tokens of an answer.
        seed: Of the first answer; it goes up by one an answer.
    """
    from .assistant import load

    assistant = load(path)

    def answer(text: str, seed: int) -> None:
        assistant.chat([{"role": "user", "content": text}], max_new_tokens, temperature, 0, top_p, seed,
                       lambda piece: print(piece, end="", flush=True))
        print()

    if message is not None:
        answer(message, seed)
        return
    CONSOLE.print("Type a message; an empty one, or Ctrl-D, ends.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        answer(text, seed)
        seed += 1


def report(out: str = "runs/first") -> None:
    """Write report.html again from a run's report.json and metrics.jsonl.

    Args:
        out: The run's folder.
    """
    from .report import write_report

    print(write_report(Path(out)))


def tokenizer() -> None:
    """Train a vocabulary, encode, decode, look into one: nanorlhf tokenizer --help."""


def lab() -> None:
    """Experiments on a finished run, for its report: nanorlhf lab --help."""


def data(offline: bool = False, json_: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Fetch what can be fetched, and list the sources of text and those that are left out.

    Args:
        offline: Fetch nothing; use what is installed or cached.
        json: Print the list as JSON.
    """
    from .data.sources import load_sources

    sources, left_out = load_sources(None, offline)
    rows = [{"source": s.name, "slot": s.slot, "version": s.version, "licence": s.licence, "bytes": s.bytes,
             "documents": len(s.documents), "sha256": s.sha256} for s in sources]
    if json_:
        print(json.dumps({"sources": rows, "left_out": left_out}))
        return
    for row in rows:
        print("{source:<12}{slot:<14}{bytes:>11,} bytes {documents:>7,} documents   {licence}".format(**row))
    if left_out:
        print("left out: " + "; ".join(left_out))


def doctor(json_: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """What can run here: each op on each backend and, where it cannot, why; CUDA kernels are checked. And how those were built.

    Args:
        json: Print the table as JSON.
    """
    from .ops import backend

    rows = [dict(zip(("op", "backend", "device", "ok", "reason"), row)) for row in backend.table()]
    build = backend.build_info()
    if json_:
        print(json.dumps({"cpu": backend.cpu_features(), "backends": rows, "cuda_build": build}))
        return
    for row in rows:
        print("{op:<18}{backend:<11}{device:<8}{yes:<5}{reason}".format(**row, yes="yes" if row["ok"] else "no"))
    if build.get("nvcc"):
        print(f"CUDA kernels: built by nvcc {build['nvcc']} for {', '.join(build['archs'])}")
        for row in build["left_out"]:
            print("left out: {file}: {reason}".format(**row))


VERBS = {"pretrain": _stage("base"), "sft": _stage("sft"), "reward": _stage("reward"), "ppo": _stage("ppo"),
         "dpo": _stage("dpo"), "rloo": _stage("rloo"), "grpo": _stage("grpo"), "reinforce": _stage("reinforce"),
         "chat": chat, "report": report, "tokenizer": tokenizer, "lab": lab, "data": data, "doctor": doctor}


def main() -> None:
    """Exit codes: 0 done, 2 bad input (one sentence on stderr), 130 interrupted."""
    try:
        words = sys.argv[1:]
        if words[:1] == ["tokenizer"]:
            from . import tokenizer_cli

            tyro.extras.subcommand_cli_from_dict(tokenizer_cli.VERBS, prog="nanorlhf tokenizer", args=words[1:],
                                                 description=tokenizer_cli.__doc__)
            return
        if words[:1] == ["lab"]:
            from . import lab

            tyro.extras.subcommand_cli_from_dict(lab.VERBS, prog="nanorlhf lab", args=words[1:], description=lab.__doc__)
            return
        verbs = {"run": _run(_preset(words)), **VERBS}
        tyro.extras.subcommand_cli_from_dict(verbs, prog="nanorlhf", description=__doc__)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, KeyError, OSError, FloatingPointError) as error:
        sentence = error.args[0] if isinstance(error, KeyError) else error
        CONSOLE.print(f"nanorlhf: {sentence}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        CONSOLE.print("Interrupted.")
        sys.exit(130)


if __name__ == "__main__":
    main()
