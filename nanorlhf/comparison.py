"""The end of a run: every system answers the same held-out prompts, the gold judge scores them, and all that was
measured becomes ``report.json``."""

import time

from .alignment import ALIGNMENTS, stages_of
from .assistant import Assistant
from .evals.compare import compare
from .evals.diversity import distinct_n, self_bleu
from .evals.elo import ratings
from .evals.gold import GoldJudge
from .evals.winrate import difference, length_controlled, mean_ci95, win_rate
from .stages import load_ensemble, load_stage, questions

SHOWN = 12  # prompts whose responses the report prints


def answers(run) -> tuple:
    """(examples, {system: Answers}, {system: gold scores}, {system: share of copied lines}) on held-out prompts."""
    config = run.config
    train = run.corpus.demonstrations[0]
    examples = questions(run, True, config.eval.prompts, config.seed)
    names = ("base", "sft", *(name for name in ALIGNMENTS if run.done(name)))
    systems = {name: Assistant(load_stage(run, name), run.tokenizer) for name in names}
    found = compare(systems, examples, train, load_ensemble(run), config.eval.best_of, config.eval.shots, config.ppo.max_new_tokens,
                    config.eval.temperature, config.seed)
    judge = gold_judge(run)
    scores = {name: [judge.score(e, text) for e, text in zip(examples, a.texts)] for name, a in found.items()}
    copied = {name: sum(map(judge.copied, a.texts)) / len(a.texts) for name, a in found.items()}
    return examples, found, scores, copied


def gold_judge(run) -> GoldJudge:
    # The source films holds training films only, so its held-out part is not the judge's to read.
    reference = [text for name, documents in run.corpus.held_out.items() if name != "films" for text in documents]
    return GoldJudge.fit(run.corpus.films.gold if run.corpus.films else [], reference, [e.response for e in run.corpus.demonstrations[0]])


def comparison(run) -> dict:
    """The report's part on the stages' responses."""
    began = time.perf_counter()
    examples, found, scores, copied = answers(run)
    families = sorted({e.family for e in examples})
    tuned = [name for name in found if name not in ("base", "base_prompted", "sft")]

    def duel(one: str, other: str) -> dict:
        """The win-rate, the paired difference of the scores, and the win-rate of answers of equal length."""
        sides = scores[one], scores[other]
        return {**win_rate(*sides), "difference": difference(*sides),
                "length_controlled": length_controlled(*sides, found[one].tokens, found[other].tokens)}

    by_family = {f: {name: mean_ci95([s for s, e in zip(values, examples) if e.family == f])
                     for name, values in scores.items()} for f in families}
    shown = [{"family": e.family, "prompt": e.prompt,
              "responses": {name: a.texts[i] for name, a in found.items()},
              "gold": {name: values[i] for name, values in scores.items()}}
             for i, e in enumerate(examples[:SHOWN])]
    return {
        "gold": {name: mean_ci95(values) for name, values in scores.items()},
        "gold_by_family": by_family,
        "win_rate": {"sft_vs_base_prompted": duel("sft", "base_prompted"), **{f"{name}_vs_sft": duel(name, "sft") for name in tuned}},
        "copied": copied,  # share of the responses that are, letter for letter, a demonstration's
        "elo": ratings(scores, seed=run.config.seed),
        "length": {name: sum(a.tokens) / len(a.tokens) for name, a in found.items()},
        "diversity": {name: {"distinct_2": distinct_n(a.texts, 2), "self_bleu": self_bleu(a.texts)} for name, a in found.items()},
        "entropy": {"base": found["base_prompted"].entropy, **{name: found[name].entropy for name in ("sft", *tuned) if name != "best_of_n"}},
        "samples": {"stages": shown},
        "seconds": time.perf_counter() - began,
    }


def report(run) -> dict:
    """Everything that ``report.json`` holds, but the machine and the configuration."""
    facts = {stage: run.facts(stage) for stage in stages_of(run.config)}
    compared = comparison(run)
    seconds = {("pretrain" if stage == "base" else stage): f["seconds"] for stage, f in facts.items()}
    seconds["comparison"] = compared.pop("seconds")
    seconds["total"] = sum(seconds.values()) + run.seconds_elsewhere
    base = facts["base"]
    return {
        "preset": run.config.preset, "seed": run.config.seed, "seconds": seconds,
        "peak_mib": {("pretrain" if stage == "base" else stage): f["peak_mib"] for stage, f in facts.items()},
        "tokenizer": {"bytes_per_token": facts["tokenizer"]["bytes_per_token"]},
        "pretrain": {key: base[key] for key in ("bpb", "tokens_per_s", "tokens", "parameters")},
        "xz_bpb": base["xz_bpb"],
        "sft": {key: facts["sft"][key] for key in ("response_bpb", "examples", "families")},
        "reward": {k: v for k, v in facts["reward"].items() if k not in ("seconds", "peak_mib")},
        "ppo": {"kl": facts["ppo"].get("kl"), "score": facts["ppo"].get("score"), "entropy": compared.pop("entropy")},
        "alignment": {name: {k: v for k, v in facts[name].items() if k not in ("seconds", "peak_mib")} for name in ALIGNMENTS if name in facts},
        **compared,
        "data": run.corpus.data_card(base["epochs"]), "left_out": run.corpus.left_out,
    }
