"""The sections of a report that compare the models: gold scores, win-rates, Elo, diversity, answers side by side.

Each function takes the run's `report` (report.json) and whether charts are `drawn`, and returns one <section>.
"""

import math
from collections.abc import Mapping

from nanorlhf.evals.overoptimisation import curve
from nanorlhf.report_charts import Chart, Intervals, Series, block
from nanorlhf.report_page import MODELS, at, duration, html_table, interval, missing, number, percent, section, text

OPEN_EXAMPLES = 2  # examples of each family that are unfolded


def comparison(report: dict, drawn: bool) -> str:
    """Base, prompted base, SFT, best-of-n, PPO and what is compared with it under the gold judge: the chart of Ouyang et al. 2022
    ("Training language models to follow instructions with human feedback", figure 1), on this run's prompts."""
    gold, rates, elo = (at(report, key, {}) for key in ("gold", "win_rate", "elo"))
    scores = _rows(gold, "mean")
    duels = {_duel(key): row for key, row in _rows(rates, "mean").items()}
    rated = _rows(elo, "rating")
    parts = ['<div class="charts three">']
    parts.append(
        block(Intervals("gold", "Mean gold score", "gold score", {_name(m): v for m, v in scores.items()}),
              "Dots are means over held-out prompts, bars their 95 % intervals.", drawn)
        if scores else missing("gold scores")
    )  # fmt: skip
    parts.append(
        block(Intervals("win-rate", "Win-rate", "share of prompts won", duels, 0.5),
              "A tie counts one half. The dashed line is even; an interval clear of it is a difference.", drawn)
        if duels else missing("win-rates")
    )  # fmt: skip
    parts.append(
        block(Intervals("elo", "Elo", "rating", {_name(m): v for m, v in rated.items()}, 1000),
              "All pairs on all prompts, mean 1000; 400 points are odds of ten to one.", drawn)
        if rated else missing("Elo ratings")
    )  # fmt: skip
    parts.append("</div>")
    parts.append(_summary(report, gold, rates))
    lead = (
        "Every model answered the same held-out prompts and one gold judge, which no stage trained on, scored the "
        "answers. The judge is simulated (rules, and a classifier of sentiment), not a person."
    )
    return section("comparison", "The stages compared", lead, *parts)


def examples(report: dict, drawn: bool) -> str:
    """The models' answers to the same prompts, side by side."""
    shown = [row for row in at(report, "samples.stages", []) if isinstance(row, Mapping)]
    families = list(dict.fromkeys(str(row.get("family", "")) for row in shown))
    parts = [] if shown else [missing("responses to held-out prompts")]
    for family in families:
        cards = [_card(row) for row in shown if str(row.get("family", "")) == family]
        parts.append(f"<h3>{text(family.replace('_', ' '))}</h3>{''.join(cards[:OPEN_EXAMPLES])}")
        if cards[OPEN_EXAMPLES:]:
            more = "".join(cards[OPEN_EXAMPLES:])
            parts.append(f"<details><summary>{len(cards) - OPEN_EXAMPLES} more</summary>{more}</details>")
    lead = "Not chosen for looks: held-out prompts as they come, with the gold judge's score of each answer."
    return section("examples", "Answers side by side", lead, *parts)


COURSES = {"best_of_n": ("Best of n", "n"), "ppo": ("PPO", "step")}
FORMS = {"best_of_n": "d (α − β d)", "rl": "d (α − β ln d)"}


def overoptimisation(report: dict, drawn: bool) -> str:
    """Gold and proxy gain against √KL for best-of-n and PPO with the fits of Gao et al. 2023, their figures and residuals."""
    found = at(report, "overoptimisation", {})
    if not found:
        return section("overoptimisation", "Over-optimisation", "Gold against proxy reward over the distance from SFT: nanorlhf lab "
                       "overoptimisation measures and fits it, for best-of-n and PPO, and puts it here.")
    parts = ['<div class="charts">', *(_course(found, course, drawn) for course in COURSES), "</div>"]
    body = [[COURSES[course][0], seed, FORMS[form] + (" *" if form == fits["form"] else ""),
             *(number(fit[key]) for key in ("alpha", "beta", "rms", "r2")), _peak(fit["peak_kl"], found["means"][course][-1]["kl"])]
            for course, fits in found["fits"].items() for seed, forms in [("all", fits["all"]), *enumerate(fits["seeds"])]
            for form, fit in forms.items()]
    parts.append(html_table("Fits of the gold gain, d = √KL; * the course's own form in Gao et al.",
                            ["", "seed", "form", "α", "β", "rms of the residuals", "R²", "KL of the peak"], body))
    inside = "".join(_residuals(found, course) for course in COURSES if at(found, f"fits.{course}.all"))
    parts.append(f"<details><summary>Every point and its residuals</summary>{inside}</details>")
    settings = found["settings"]
    lead = (f"{len(found['seeds'])} seeds, {settings['prompts']} held-out prompts each. Best of n: of {settings['samples']} SFT samples a prompt, "
            f"KL = ln n − (n − 1)/n. PPO: β = {number(settings['kl_coef'])}, {settings['steps']} steps, KL over the whole vocabulary. Gains are from "
            "the mean of the SFT model's samples, in deviations of those samples, for gold and proxy alike.")
    return section("overoptimisation", "Over-optimisation", lead, *parts)


def _peak(kl: float | None, last: float) -> str:
    return "none" if kl is None else number(kl) + (", beyond the points" if kl > last else "")


def _course(found: Mapping, course: str, drawn: bool) -> str:
    """A course's chart, and a sentence on where its gold reward was highest."""
    rows, (name, unit) = [row for seed in found["seeds"] for row in seed[course]], COURSES[course]
    xs = [math.sqrt(row["kl"]) for row in rows]
    lines = [Series(f"{kind}, {word}", xs, [row[f"{kind}_gain"] for row in rows], points=True, colour=colour)
             for kind, word, colour in (("proxy", "the reward model", 0), ("gold", "the judge", 2))]
    ends = [max(xs) * k / 40 for k in range(41)]
    lines += [Series(f"gold, {FORMS[form]}", ends, curve(fit, [d * d for d in ends]), colour=1 if form == "best_of_n" else 3)
              for form, fit in found["fits"][course]["all"].items()]
    least = sum(-seed["sft"]["gold"][0] / seed["sft"]["gold"][1] for seed in found["seeds"]) / len(found["seeds"])
    marks = {"a gold score of 0": least} if min(row["gold_gain"] for row in rows) < least / 2 else {}
    best, last = (pick(found["means"][course]) for pick in (lambda m: max(m, key=lambda row: row["gold_gain"]), lambda m: m[-1]))
    said = f"Mean of the seeds: gold is highest at {unit} {best[unit]} (KL {number(best['kl'])}) with {number(best['gold_gain'])}"
    said += ", the last point." if best is last else (
        f", and {number(last['gold_gain'])} at the last point (KL {number(last['kl'])}), where the proxy has gone from "
        f"{number(best['proxy_gain'])} to {number(last['proxy_gain'])}.")
    return block(Chart(f"overoptimisation-{course}", name, "√KL to the SFT model", "gain in deviations of SFT", lines, marks), said, drawn)


def _residuals(found: Mapping, course: str) -> str:
    """A row for each point of the course, in the order of the fits' residuals."""
    (name, unit), forms = COURSES[course], found["fits"][course]["all"]
    rows = [(k, row) for k, seed in enumerate(found["seeds"]) for row in seed[course] if row["kl"] > 0]
    body = [[k, row[unit], *(number(row[key]) for key in ("kl", "proxy_gain", "gold_gain")),
             *(number(fit["residuals"][i]) for fit in forms.values())] for i, (k, row) in enumerate(rows)]
    return html_table(f"{name}: every point", ["seed", unit, "KL", "proxy gain", "gold gain", *(f"residual of {FORMS[f]}" for f in forms)], body)


def _rows(table: Mapping, key: str) -> dict[str, tuple[float, float, float]]:
    """{name: (value, low, high)} of the entries that have all three."""
    found = {}
    for name, row in table.items():
        if isinstance(row, Mapping) and row.get(key) is not None and None not in (row.get("ci95") or [None]):
            found[name] = (row[key], *row["ci95"])
    return found


def _summary(report: dict, gold: Mapping, rates: Mapping) -> str:
    models = list(dict.fromkeys([*(m for m in MODELS if m in gold), *gold]))
    body = [
        [
            _name(model), number(at(gold, f"{model}.mean")), interval(at(gold, model)),
            number(at(report, f"elo.{model}.rating")), interval(at(report, f"elo.{model}")),
            number(at(report, f"length.{model}")), number(at(report, f"diversity.{model}.distinct_2")),
            percent(at(report, f"copied.{model}")),
        ]
        for model in models
    ]  # fmt: skip
    head = ["model", "gold", "95 %", "Elo", "95 %", "tokens a response", "distinct bigrams", "copied from a demonstration"]
    parts = [html_table("Each model in numbers", head, body)] if body else []
    body = [
        [_duel(key), percent(at(row, "mean")), interval(row, percent), number(at(row, "n"))]
        for key, row in rates.items()
    ]
    if body:
        parts.append(html_table("Win-rates, a tie counting one half", ["", "won", "95 %", "prompts"], body))
    aligned = at(report, "alignment", {})
    keys = ("kl", "kl_exact", "score", "length", "entropy")
    body = [[_name(model), *(number(at(row, key)) for key in keys), duration(at(report, f"seconds.{model}"))]
            for model, row in aligned.items()]
    if body:
        head = ["model", "KL to SFT", "KL, whole vocabulary", "reward-model score", "tokens a response", "entropy", "time"]
        parts.append(html_table("What each method cost: means of its last five rollouts, nats a response (DPO samples none)", head, body))
    by_family = at(report, "gold_by_family", {})
    if by_family:
        body = [
            [family.replace("_", " "), *(number(at(row, f"{model}.mean")) for model in models)]
            for family, row in by_family.items()
        ]
        parts.append(html_table("Mean gold score by family of prompts", ["family", *map(_name, models)], body))
    sft, tuned = at(report, "length.sft"), at(report, "length.ppo")
    if sft and tuned is not None:
        parts.append(f"<p>{text(f'PPO answers are {percent(tuned / sft)} as long as SFT answers.')}</p>")
    return "".join(parts)


def _card(row: Mapping) -> str:
    """One prompt and every model's answer to it."""
    answers = []
    for model, said in (row.get("responses") or {}).items():
        score = at(row, f"gold.{model}")
        judged = f" · gold {number(score)}" if score is not None else ""
        answers.append(f'<div><h4>{text(_name(model) + judged)}</h4><p class="said">{text(said)}</p></div>')
    prompt = f'<p class="said"><b>{text(row.get("prompt", ""))}</b></p>'
    return f'<div class="card">{prompt}<div class="answers">{"".join(answers)}</div></div>'


def _name(model: str) -> str:
    return MODELS.get(model, model.replace("_", " "))


def _duel(key: str) -> str:
    return " over ".join(_name(side) for side in key.split("_vs_"))
