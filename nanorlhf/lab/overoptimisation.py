"""Over-optimisation: how the gold reward and its proxy, the reward model, go with the distance from the SFT model, for best-of-n and for
PPO without a KL penalty. Source: Gao et al. 2023, "Scaling laws for reward model overoptimization", figures 1 and 2.

Distance is √KL in nats a response: of best-of-n log n − (n − 1)/n, of PPO that over the whole vocabulary at every token of its own
responses. Gains are counted from the mean of the SFT model's samples of the same prompts, in deviations of those samples, so that gold
and proxy share an axis.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import numpy as np
import tyro

from .. import parallel
from ..alignment import judge_of, ppo_models, training_prompts
from ..assistant import Assistant
from ..checkpoint import StageState, write_json
from ..comparison import gold_judge
from ..config import RunConfig
from ..engine import Completion, SamplingConfig, generate
from ..evals.best_of_n import expected_best, kl_bound
from ..evals.compare import render_prompts
from ..evals.overoptimisation import FORMS, fit
from ..report import EXPERIMENTS, write_report
from ..run import open_run
from ..stages import load_stage, questions
from ..train.ppo import ppo
from ..train.rollout import end_rule, merged, roll_out

NAME = "overoptimisation"
OWN_FORM = {"best_of_n": "best_of_n", "ppo": "rl"}  # Gao et al.'s form of each course
FEWEST_POINTS = 3  # away from the start: what a fit of two coefficients needs to leave a residual
LOT = 2048  # samples drawn before progress is shown
ROLLOUTS = 256  # responses that a policy's measurement holds in memory together


@dataclass(frozen=True)
class Settings:
    seeds: int = 3  # each its own prompts, samples and course of PPO, from the same SFT and reward model
    prompts: int = 128  # held-out prompts of a seed
    samples: int = 64  # of the SFT model for each prompt: best-of-n for n = 1, 2, 4, … up to it
    answers: int = 3  # of the policy to each prompt at each point of PPO's course
    steps: int = 24  # of PPO: on the default run enough for gold to turn and to fall below SFT's
    points: int = 12  # of PPO's course at which it is measured
    kl_coef: float = 0.0  # of PPO's penalty, which stays as it is

    def __post_init__(self) -> None:
        for name in ("seeds", "prompts", "answers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{NAME}: {name} must be positive, got {getattr(self, name)}")
        if self.samples < 2**FEWEST_POINTS:
            raise ValueError(f"{NAME}: samples must be at least {2**FEWEST_POINTS} for a curve to be fitted, got {self.samples}")
        if not FEWEST_POINTS <= self.points <= self.steps:
            raise ValueError(f"{NAME}: expected from {FEWEST_POINTS} points to as many as there are steps ({self.steps}), got {self.points}")
        if not self.kl_coef >= 0:
            raise ValueError(f"{NAME}: kl_coef must be 0 or more, got {self.kl_coef}")


def command(out: str = "runs/first", settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),
            json_: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Gold against proxy reward over the distance from SFT, for best-of-n and PPO, fitted with both forms of Gao et al.

    An interrupted one goes on where it was when it is started again.

    Args:
        out: The folder of a run whose SFT and reward models are complete.
        json: Print the result as JSON.
    """
    from rich.console import Console

    from ..progress import Progress

    console = Console(stderr=True)
    with Progress(console) as progress:
        result = measure(open_run(RunConfig(out=out), True, progress), settings)
    if json_:
        print(json.dumps(result))
        return
    for course, forms in result["fits"].items():
        for form, found in forms["all"].items():
            print("{course:<10} form {form:<10} alpha {alpha:8.4f}  beta {beta:8.4f}  rms {rms:.4f}  r2 {r2:7.4f}  peak KL {peak}".format(
                course=course, peak="none" if found["peak_kl"] is None else f"{found['peak_kl']:.1f}", **found))
    console.print(f"{result['seconds']:.0f} s. Report: {out}/report.html#{NAME}", markup=False, soft_wrap=True)


def measure(run, settings: Settings) -> dict:
    """The courses of every seed that the run's folder does not hold yet, then the fits; both go into the run's report.

    Errors: ValueError where the run has no complete SFT or reward model, or holds points of other settings.
    """
    for stage in ("sft", "reward"):
        run.facts(stage)
    path, began = run.folder / EXPERIMENTS[NAME], time.perf_counter()
    held = _held(path, settings)
    courses = held["seeds"]

    def save() -> dict:
        result = {"settings": {**asdict(settings), "seeds": len(courses)}, "seconds": held["seconds"] + time.perf_counter() - began, "seeds": courses,
                  "means": {course: means(courses, course) for course in OWN_FORM},
                  "fits": {course: fits(courses, course) for course in OWN_FORM}}
        write_json(path, result)
        return result

    gold = gold_judge(run)
    for index in range(settings.seeds):
        examples = questions(run, True, settings.prompts, run.config.seed + index)
        if index == len(courses):
            courses.append(best_of_n_course(run, settings, index, examples, gold))
            save()
        ppo_course(run, settings, courses[index], examples, gold, save)
    result = save()
    summary = run.folder / "report.json"
    if summary.is_file():
        write_json(summary, {**json.loads(summary.read_text()), NAME: result})
    if parallel.first():
        write_report(run.folder)
    return result


def _held(path, settings: Settings) -> dict:
    """What an earlier sitting left. Errors: ValueError where it had other settings; another number of seeds is none."""
    if not path.is_file():
        return {"seeds": [], "seconds": 0.0}
    held = json.loads(path.read_text())
    before, now = held["settings"], asdict(settings)
    changed = [f"{key} {before.get(key)}" for key in now if key != "seeds" and before.get(key) != now[key]]
    if changed:
        raise ValueError(f"{path} holds points of other settings ({', '.join(changed)}): ask for the same, or remove the file")
    return {"seeds": held["seeds"], "seconds": held["seconds"]}


def golds(run, gold, examples: Sequence, ids: Sequence[Sequence[int]]) -> np.ndarray:
    """The gold judge's score of each response, read as the run's comparison reads it."""
    assistant = Assistant(None, run.tokenizer)
    return np.array([gold.score(e, assistant.text(Completion(list(i))).strip()) for e, i in zip(examples, ids)])


def gained(row: dict, sft: dict) -> dict:
    """The row with the gains of its gold and proxy mean, in deviations of the SFT model's samples.

    >>> gained({"gold": 0.5, "proxy": 3.0}, {"gold": [0.25, 0.5], "proxy": [1.0, 4.0]})
    {'gold': 0.5, 'proxy': 3.0, 'gold_gain': 0.5, 'proxy_gain': 0.5}
    """
    return {**row, **{f"{kind}_gain": (row[kind] - sft[kind][0]) / sft[kind][1] for kind in ("gold", "proxy")}}


def best_of_n_course(run, settings: Settings, index: int, examples: Sequence, gold) -> dict:
    """A seed's samples of the SFT model as {"seed", "sft": {kind: [mean, deviation]}, "best_of_n": a row for each n, "ppo": its start}.

    The proxy is what PPO is paid: the reward model's score, after the rule for a response without an end of turn.
    """
    judge, config, n, seed = judge_of(run), run.config.ppo, settings.samples, run.config.seed + index
    model, prompts = load_stage(run, "sft"), render_prompts(Assistant(None, run.tokenizer), examples)
    proxy, value, size = [], [], max(1, LOT // n)
    for first in range(0, len(prompts), size):
        part = prompts[first:first + size]
        drawn = generate(model, part, config.max_new_tokens, n, [judge.end],
                         SamplingConfig(config.temperature, config.top_k, config.top_p, config.min_p), seed, first_request=first * n)
        scores = judge.score([part[i // n] + c.ids for i, c in enumerate(drawn)])
        proxy.append(end_rule(scores, scores.new_tensor([c.finished for c in drawn]).bool(), config).double().numpy())
        value.append(golds(run, gold, [e for e in examples[first:first + size] for _ in range(n)], [c.ids for c in drawn]))
        done = index * len(prompts) + first + len(part)
        run.notify({"stage": "best of n", "step": done, "steps": settings.seeds * len(prompts)})
    samples = {"gold": np.concatenate(value).reshape(-1, n), "proxy": np.concatenate(proxy).reshape(-1, n)}
    sft = {kind: [float(x.mean()), float(x.std())] for kind, x in samples.items()}
    if not all(deviation > 0 for _, deviation in sft.values()):
        raise ValueError(f"{NAME}: the SFT model's samples are all worth the same to a judge; there is nothing to optimise")
    rows = [{"n": k, "kl": kl_bound(k), **{kind: float(expected_best(samples["proxy"], x, k).mean()) for kind, x in samples.items()}}
            for k in (2**i for i in range(n.bit_length())) if k <= n]
    start = {"step": 0, "kl": 0.0, "kl_sampled": 0.0, **{kind: mean for kind, (mean, _) in sft.items()}}
    return {"seed": seed, "sft": sft, "best_of_n": [gained(row, sft) for row in rows], "ppo": [gained(start, sft)]}


def ppo_course(run, settings: Settings, course: dict, examples: Sequence, gold, save: Callable[[], dict]) -> None:
    """Train PPO from SFT and add a row to course["ppo"] at each of its points, saved as it comes.

    All of PPO's randomness comes from (seed, step), so a course that is taken up again repeats what its last state has not seen, and
    the rows that are there stay true.
    """
    config = replace(run.config.ppo, steps=settings.steps, kl_coef=settings.kl_coef, kl_target=0.0, kl_budget=0.0)
    marks = {round(settings.steps * (k + 1) / settings.points) for k in range(settings.points)}
    known = {row["step"] for row in course["ppo"]}
    if marks <= known:
        return
    policy, ref, value = ppo_models(run)
    asked = render_prompts(Assistant(None, run.tokenizer), examples)
    index = course["seed"] - run.config.seed

    def log(row: dict) -> None:
        run.notify({**row, "step": index * settings.steps + row["step"], "steps": settings.seeds * settings.steps})
        if row["step"] in marks - known:
            point = measured(run, policy, ref, asked, examples, settings.answers, course["seed"], gold)
            course["ppo"].append(gained({"step": row["step"], **point}, course["sft"]))
            save()

    state = StageState(run.folder / f"{NAME}-{index}.safetensors")
    prompts = training_prompts(run, config.distinct_prompts, config.max_new_tokens)
    ppo(policy, ref, value, judge_of(run), prompts, config, course["seed"], state, log)
    state.clear()


def measured(run, policy, ref, asked: Sequence[list[int]], examples: Sequence, n: int, seed: int, gold) -> dict:
    """The policy on held-out prompts, n answers to each: means of gold and proxy, KL in nats a response, over the whole vocabulary and
    as the samples have it, and tokens a response."""
    judge, size = judge_of(run), max(1, ROLLOUTS // n)
    rollout = merged([roll_out(policy, ref, None, judge, asked[i:i + size], run.config.ppo, seed * 1_000_003 + i, n)
                      for i in range(0, len(asked), size)])
    ids = [part.tolist() for part in rollout.tokens[rollout.where + 1].split(rollout.cu_actions.diff().tolist())]
    found = rollout.measured()
    return {"kl": found["kl_exact"], "kl_sampled": found["kl"], "gold": float(golds(run, gold, [e for e in examples for _ in range(n)], ids).mean()),
            "proxy": found["score"], "length": found["length"], "finished": found["finished"]}


def means(courses: Sequence[dict], course: str) -> list[dict]:
    """The rows of a course, each the mean of the seeds that have come so far.

    >>> means([{"ppo": [{"step": 4, "kl": 1.0}]}, {"ppo": [{"step": 4, "kl": 2.0}, {"step": 8, "kl": 3.0}]}], "ppo")
    [{'step': 4, 'kl': 1.5}]
    """
    together = zip(*(c[course] for c in courses))
    return [{key: rows[0][key] if key in ("n", "step") else sum(r[key] for r in rows) / len(rows)
             for key in rows[0] if all(key in r for r in rows)} for rows in together]


def fits(courses: Sequence[dict], course: str) -> dict:
    """Both forms fitted to the gold gains of all seeds together, and to each seed's: {"form": the course's own, "all": {form: fit},
    "seeds": [{form: fit}]}. A fit's residuals are in the order of the points away from KL 0, seed after seed. Empty where points are
    too few yet.
    """
    def both(rows: list[dict]) -> dict:
        if sum(row["kl"] > 0 for row in rows) < FEWEST_POINTS:
            return {}
        return {form: fit([r["kl"] for r in rows], [r["gold_gain"] for r in rows], form) for form in FORMS}

    return {"form": OWN_FORM[course], "all": both([row for c in courses for row in c[course]]), "seeds": [both(c[course]) for c in courses]}
