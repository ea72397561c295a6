"""report.html of a run: one file that opens offline, written from the run's report.json and metrics.jsonl.

Beside the keys that `validate` asks for, the page shows, where report.json has them: preset, seed, xz_bpb.{source},
samples.stages = [{family, prompt, responses: {model: text}, gold: {model: score}}], length.{model} (tokens),
diversity.{model}.distinct_2, copied.{model}, reward.linear_pair_accuracy,
reward.quality.{source} (evals/reward_quality.py), alignment.{model} = {kl, score, length, entropy}, ppo.gold_curve = [{kl, gold}], data[].slot,
data[].documents, data[].epochs (how often pretraining read it), gold_by_family.{family}.{model},
overoptimisation (lab/overoptimisation.py), and left_out = [reason].
"""

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

from nanorlhf import metrics
from nanorlhf.report_charts import can_draw
from nanorlhf.report_page import at, duration, html_table, interval, missing, number, percent, section, text
from nanorlhf.report_results import comparison, examples, overoptimisation
from nanorlhf.report_training import (
    below_xz,
    entropy,
    fine_tuning,
    ppo,
    pretraining,
    reward_against_kl,
    reward_model,
    samples_over_time,
)

EXPERIMENTS = {"overoptimisation": "overoptimisation.json"}  # what report.json holds of the lab: key and file of the run's folder
STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo")

# What report.json holds at least. "*" stands for every key of a mapping or entry of a list, of which there is one.
REQUIRED = (
    *(f"seconds.{stage}" for stage in (*STAGES, "total")),
    "tokenizer.bytes_per_token.*",
    "pretrain.bpb.*",
    "pretrain.tokens_per_s",
    *(f"sft.response_bpb.{model}" for model in ("base", "sft")),
    "reward.pair_accuracy.*",
    "ppo.kl",
    *(f"ppo.entropy.{model}" for model in ("base", "sft", "ppo")),
    *(f"gold.{m}.{key}" for m in ("base", "base_prompted", "sft", "best_of_n", "ppo") for key in ("mean", "ci95")),
    *(f"win_rate.{duel}.{key}" for duel in ("sft_vs_base_prompted", "ppo_vs_sft") for key in ("mean", "ci95", "n")),
    "elo.*.rating",
    "elo.*.ci95",
    *(f"data.*.{key}" for key in ("source", "version", "sha256", "licence", "bytes")),
    "config.*",
    *(f"machine.{key}" for key in ("cpu", "gpu", "versions")),
)


def validate(report: Mapping) -> list[str]:
    """The paths of REQUIRED that `report` lacks, in order; an empty list if it is whole.

    A value may be null where null says something (a machine without a GPU), so only absence counts.

    >>> [path for path in validate({"seconds": {"total": 1.0}}) if path.startswith("seconds")][:2]
    ['seconds.tokenizer', 'seconds.pretrain']
    """
    return list(dict.fromkeys(gap for path in REQUIRED for gap in _gaps(report, path.split("."), ())))


def write_report(folder: str | Path) -> Path:
    """Write FOLDER/report.html and return its path. A run that has not ended yet is reported as far as it went.

    Charts need matplotlib, the `report` extra; without it every chart is a table and the page says so.

    Raises ValueError if the folder holds neither report.json nor metrics.jsonl, or one that cannot be read.
    """
    folder = Path(folder)
    summary = folder / "report.json"
    if not summary.exists() and not (folder / "metrics.jsonl").exists():
        raise ValueError(f"report: expected report.json or metrics.jsonl in {folder}, got neither")
    report = {**(_load(summary) if summary.exists() else {}), **experiments(folder)}
    page = render(report, metrics.read(folder), can_draw())
    fresh = folder / "report.html.tmp"
    fresh.write_text(page, encoding="utf-8")
    os.replace(fresh, folder / "report.html")
    return folder / "report.html"


def experiments(folder: Path) -> dict:
    """The results of the lab's experiments on the run, as report.json names them."""
    return {name: _load(folder / file) for name, file in EXPERIMENTS.items() if (folder / file).is_file()}


def render(report: Mapping, rows: list[dict], drawn: bool) -> str:
    """The page, as text, of a run's report and rows of metrics; with charts where `drawn`."""
    sections = [
        comparison(report, drawn),
        examples(report, drawn),
        pretraining(report, rows, drawn),
        samples_over_time(report, rows, drawn),
        fine_tuning(report, rows, drawn),
        reward_model(report, rows, drawn),
        ppo(report, rows, drawn),
        reward_against_kl(report, rows, drawn),
        overoptimisation(report, drawn),
        entropy(report, rows, drawn),
        data_card(report),
        machine_and_config(report),
    ]
    body = f"{header(report, drawn)}<main>{''.join(sections)}</main>"
    template = files("nanorlhf").joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(title="nanorlhf: report of a run", body=body)


def header(report: Mapping, drawn: bool) -> str:
    """Title, totals and the way to the sections."""
    named = [f"{word} {report[word.lower()]}" for word in ("Preset", "Seed") if report.get(word.lower()) is not None]
    rates = at(report, "win_rate", {})
    fall = [at(report, f"ppo.entropy.{model}") for model in ("sft", "ppo")]
    below, compared = below_xz(report)
    pairs = at(report, "reward.pair_accuracy", {})
    tiles = [
        ("Total time", duration(at(report, "seconds.total")), "all stages"),
        ("Fewer bits than xz -9", f"{below} of {compared}" if compared else "–", "sources of held-out text"),
        ("Reward model", percent(next(iter(pairs.values()), None)), f"pairs of {next(iter(pairs), 'no source yet')}"),
        *(
            (title, percent(at(rates, f"{duel}.mean")), f"95 %: {interval(at(rates, duel), percent)}")
            for duel, title in (("sft_vs_base_prompted", "SFT over prompted base"), ("ppo_vs_sft", "PPO over SFT"))
        ),
        ("Entropy, SFT → PPO", " → ".join(number(value) for value in fall), "nats a token"),
    ]
    boxes = "".join(f"<div><dt>{text(a)}</dt><dd>{text(b)}<small>{text(c)}</small></dd></div>" for a, b, c in tiles)
    gaps = validate(report)
    notes = [] if drawn else ['The charts are left out: pip install ".[report]" brings matplotlib, which draws them']
    notes += [f"Not in report.json: {', '.join(gaps)}"] if gaps else []
    links = {
        "comparison": "Comparison", "examples": "Answers", "pretraining": "Pretraining", "samples": "Samples",
        "sft": "SFT", "reward": "Reward model", "ppo": "PPO", "reward-kl": "Reward and KL", "overoptimisation": "Over-optimisation", "entropy": "Entropy",
        "data": "Data", "machine": "Machine and config",
    }  # fmt: skip
    return (
        f'<header><h1>From text to assistant</h1><p class="soft">A run of nanorlhf: tokenizer, base model, SFT, reward '
        f"model and PPO, each trained from the one before. {text(', '.join(named))}</p>"
        f'<dl class="tiles">{boxes}</dl>{"".join(f"<p class=missing>{text(note)}.</p>" for note in notes)}'
        f'<nav aria-label="Sections">{"".join(f"<a href=#{a}>{text(b)}</a>" for a, b in links.items())}</nav></header>'
    )


def data_card(report: Mapping) -> str:
    """Where the run's text comes from, under which licence, and how much of it was used."""
    used = [row for row in at(report, "data", []) if isinstance(row, Mapping)]
    keys = ["source", "slot", "version", "licence", "bytes", "documents", "epochs", "sha256"]
    parts = []
    if used:
        body = [[number(row.get(key)) for key in keys[:-1]] + [_digest(row.get("sha256"))] for row in used]
        head = ["source", "slot", "version", "licence", "bytes", "documents", "times read", "sha256"]
        caption = "Sources; times read counts pretraining's passes; report.json has the digests in full"
        parts.append(html_table(caption, head, body, words=True))
    else:
        parts.append(missing("the data card"))
    left_out = at(report, "left_out", [])
    if left_out:
        parts.append(f"<h3>Left out</h3><ul>{''.join(f'<li>{text(reason)}</li>' for reason in left_out)}</ul>")
    lead = "Every source of text of this run, its licence, and how much of it was used."
    return section("data", "Data", lead, *parts)


def machine_and_config(report: Mapping) -> str:
    """Seconds of each stage, the machine, and every resolved value of the configuration."""
    parts = []
    seconds = at(report, "seconds", {})
    timed = [[stage, duration(seconds[stage])] for stage in sorted(seconds, key=lambda stage: stage == "total")]
    peaks = at(report, "peak_mib", {})
    timed = [[stage, time, number(peaks[stage]) if peaks.get(stage) else ""] for stage, time in timed]
    shown = html_table("Time and memory of each stage", ["stage", "time", "MiB at most"], timed)
    parts.append(shown if timed else missing("stage times"))
    for key, caption in (("machine", "Machine"), ("config", "Configuration, every resolved value")):
        values = _flat(at(report, key, {}))
        if not values:
            parts.append(missing(f"the {key}"))
            continue
        shown = html_table(caption, ["name", "value"], values, words=True)
        parts.append(shown if key == "machine" else f"<details><summary>{caption}</summary>{shown}</details>")
    speed = at(report, "pretrain.tokens_per_s")
    lead = "What ran, where, and for how long." + (f" Pretraining: {number(speed)} tokens a second." if speed else "")
    return section("machine", "Machine and config", lead, *parts)


def _load(path: Path) -> dict:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"report: expected JSON in {path}, got {error}") from error
    if not isinstance(report, dict):
        raise ValueError(f"report: expected an object in {path}, got {type(report).__name__}")
    return report


def _gaps(value: object, path: list[str], walked: tuple[str, ...]) -> list[str]:
    """The paths under `walked` that are missing when `path` is followed into `value`."""
    if not path:
        return []
    head, rest = path[0], path[1:]
    whole = [".".join((*walked, *path))]
    if head == "*":
        entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        found = [_gaps(entry, rest, (*walked, str(key))) for key, entry in entries]
        return [gap for gaps in found for gap in gaps] if found else whole
    if not isinstance(value, Mapping) or head not in value:
        return whole
    return _gaps(value[head], rest, (*walked, head))


def _flat(value: object, name: str = "") -> list[list[str]]:
    """Rows [dotted name, value] of nested mappings; lists are one value."""
    if not isinstance(value, Mapping):
        return [[name, json.dumps(value, ensure_ascii=False) if isinstance(value, (list, bool)) else str(value)]]
    return [row for key, item in value.items() for row in _flat(item, f"{name}.{key}" if name else str(key))]


def _digest(sha256: object) -> str:
    return f"{sha256[:16]}…" if isinstance(sha256, str) and len(sha256) > 20 else number(sha256)
