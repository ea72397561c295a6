"""The sections of a report that show training: losses, samples over time, reward against KL, entropy.

Each function takes the run's `report` (report.json), its `rows` (metrics.jsonl) and whether charts are `drawn`, and
returns one <section>. Whatever is missing is said in the section.
"""

import math

from nanorlhf.report_charts import Chart, Series, block, smooth
from nanorlhf.report_page import MODELS, at, html_table, missing, number, percent, section, text

MOST_SERIES = 6  # as many colours as a chart has


def steps(rows: list[dict], stage: str) -> list[dict]:
    """The rows of a stage's training steps."""
    return [row for row in rows if row["stage"] == stage and "event" not in row]


def events(rows: list[dict], stage: str, event: str) -> list[dict]:
    """The rows of a stage's evaluations or samples."""
    return [row for row in rows if row["stage"] == stage and row.get("event") == event]


def below_xz(report: dict) -> tuple[int, int]:
    """In how many sources the base model needs fewer bits per byte than xz, and how many have both figures."""
    bpb, xz = at(report, "pretrain.bpb", {}), at(report, "xz_bpb", {})
    both = [source for source in bpb if bpb[source] is not None and xz.get(source) is not None]
    return sum(bpb[source] < xz[source] for source in both), len(both)


def pretraining(report: dict, rows: list[dict], drawn: bool) -> str:
    """Loss against tokens; held-out bits per byte of each source against xz."""
    parts = []
    trained = [row for row in steps(rows, "pretrain") if row.get("loss") is not None]
    if trained:
        parts += ['<div class="charts">', _loss(trained, "pretrain", "tokens", drawn)]
        parts += [_held_out(report, events(rows, "pretrain", "eval"), drawn), "</div>", _step_health(trained, drawn)]
    else:
        parts.append(missing("the loss of pretraining"))
    bpb, xz = at(report, "pretrain.bpb", {}), at(report, "xz_bpb", {})
    below, compared = below_xz(report)
    lead = "The base model learns to predict the next token of documents."
    if bpb:
        body = [
            [s, number(bpb[s]), number(xz.get(s)), number(at(report, f"tokenizer.bytes_per_token.{s}"))] for s in bpb
        ]
        head = ["source", "model, bits per byte", "xz -9, bits per byte", "bytes per token"]
        parts.append(html_table("Held-out text of each source, never trained on, after pretraining", head, body))
        lead += f" On held-out text it needs fewer bits per byte than xz -9 in {below} of {compared} sources."
    else:
        parts.append(missing("held-out bits per byte"))
    return section("pretraining", "Pretraining", lead, *parts)


def samples_over_time(report: dict, rows: list[dict], drawn: bool) -> str:
    """What the base model makes of the same prompts, from initialisation on."""
    sampled = events(rows, "pretrain", "sample")
    prompts = list(dict.fromkeys(row.get("prompt", "") for row in sampled))
    parts = [] if sampled else [missing("samples during pretraining")]
    for prompt in prompts:
        moments = []
        for row in (row for row in sampled if row.get("prompt", "") == prompt):
            said = str(row.get("text", ""))
            said = said[len(prompt) :] if prompt and said.startswith(prompt) else said
            when = f"step {number(row['step'])}" if row["step"] else "initialisation"
            if row.get("tokens"):
                when += f", {number(row['tokens'])} tokens"
            moments.append(
                f'<div class="moment"><h4>{text(when)}</h4><p class="said"><b>{text(prompt)}</b>{text(said)}</p></div>'
            )
        parts.append(f"<h3>{text(prompt) or '(empty prompt)'}</h3>{''.join(moments)}")
    lead = "The same prompts, at initialisation and as pretraining goes on. Look for words, then grammar, then sense."
    return section("samples", "Samples over time", lead, *parts)


def fine_tuning(report: dict, rows: list[dict], drawn: bool) -> str:
    """The loss on response tokens and what it did to held-out responses."""
    parts = []
    trained = [row for row in steps(rows, "sft") if row.get("loss") is not None]
    held_out = [row for row in events(rows, "sft", "eval") if row.get("response_bpb") is not None]
    if trained:
        parts += ['<div class="charts">', _loss(trained, "sft", "step", drawn)]
        if held_out:
            line = Series("SFT", [row["step"] for row in held_out], [row["response_bpb"] for row in held_out])
            base = at(report, "sft.response_bpb.base")
            chart = Chart("sft-held-out", "Held-out responses", "step", "bits per byte", [line],
                          {} if base is None else {"base model": base})  # fmt: skip
            parts.append(block(chart, "Bits per byte of human responses to held-out prompts; lower is better.", drawn))
        parts.append("</div>")
    else:
        parts.append(missing("the loss of supervised fine-tuning"))
    before, after = at(report, "sft.response_bpb.base"), at(report, "sft.response_bpb.sft")
    lead = "Demonstrations turn the base model into one that answers; only response tokens are in the loss."
    if before is not None and after is not None:
        lead += f" Held-out responses went from {number(before)} to {number(after)} bits per byte."
    else:
        parts.append(missing("bits per byte of held-out responses under base and SFT"))
    return section("sft", "Supervised fine-tuning", lead, *parts)


def reward_model(report: dict, rows: list[dict], drawn: bool) -> str:
    """The pairwise loss and how often the better response of a pair scores higher."""
    parts = []
    trained = [row for row in steps(rows, "reward") if row.get("loss") is not None]
    if trained:
        parts += ['<div class="charts">', _loss(trained, "reward", "step", drawn)]
        parts += [_pair_accuracy(rows, drawn), "</div>"]
    else:
        parts.append(missing("the loss of the reward model"))
    accuracy, bayes = at(report, "reward.pair_accuracy", {}), at(report, "reward.linear_pair_accuracy")
    if accuracy:
        body = [[source, percent(value)] for source, value in accuracy.items()]
        if isinstance(bayes, (int, float)):
            body.append(["logistic regression on words and word pairs, for comparison", percent(bayes)])
        parts.append(html_table("Held-out pairs ranked as labelled", ["pairs from", "accuracy"], body))
    else:
        parts.append(missing("the reward model's accuracy on held-out pairs"))
    quality = at(report, "reward.quality", {})
    keys = ("calibration.error", "length.longer_wins", "length.model_prefers_longer", "length.accuracy_same_length")
    body = [[source, *(percent(at(row, key)) for key in keys)] for source, row in quality.items()]
    if body:
        head = ["pairs from", "calibration error", "longer is labelled better", "model prefers longer", "accuracy at equal length"]
        parts.append(html_table("Whether its probabilities hold, and what length alone explains", head, body))
    lead = (
        "Trained on pairs of which one response is better; chance is 50 %. "
        "Pairs called simulated were labelled by a rule with noise, all others by people."
    )
    if "films_unfavourable" in at(report, "reward.pair_accuracy", {}):
        lead += " Films_unfavourable asks for blame: far below 50 %, the model prefers praise whatever is asked for."
    return section("reward", "Reward model", lead, *parts)


def ppo(report: dict, rows: list[dict], drawn: bool) -> str:
    """What PPO optimises, what it costs in KL, and whether the updates are healthy."""
    trained = steps(rows, "ppo")
    views = [
        ("score", "Reward-model score", "mean over responses; what PPO is paid for"),
        ("reward", "Reward", "score less the KL penalty"),
        ("kl", "KL to SFT", "nats a response from the frozen SFT model"),
        ("kl_coef", "KL coefficient", "adapted so that KL stays near its target"),
        ("entropy", "Entropy", "nats a token; a collapse would show here"),
        ("length", "Response length", "tokens; length hacking would show here"),
        ("clip_fraction", "Clipped share", "of tokens whose ratio left the trust region"),
        ("ratio_max", "Largest ratio", "new over old probability in a batch"),
        ("explained_variance", "Explained variance", "of returns by the value head; 1 is perfect, 0 the mean"),
        ("value_loss", "Value loss", "clipped squared error"),
        ("policy_loss", "Policy loss", "clipped surrogate; its level has no meaning of its own"),
    ]
    parts = ['<div class="charts small">']
    for key, title, caption in views:
        line = [(row["step"], row[key]) for row in trained if row.get(key) is not None]
        if line:
            xs, ys = zip(*line, strict=True)
            chart = Chart(f"ppo-{key}", title, "step", key.replace("_", " "), [Series(title, xs, ys)], small=True)
            parts.append(block(chart, caption[0].upper() + caption[1:] + ".", drawn))
    parts.append("</div>")
    if len(parts) == 2:
        parts = [missing("the steps of PPO")]
    kl = at(report, "ppo.kl")
    lead = "The policy is paid by the reward model and held near the SFT model by a KL penalty a token."
    return section("ppo", "PPO", lead + (f" Final KL: {number(kl)} nats." if kl is not None else ""), *parts)


def reward_against_kl(report: dict, rows: list[dict], drawn: bool) -> str:
    """Proxy score and gold score against √KL, the axes of Gao et al. 2023, "Scaling laws for reward model
    overoptimization"."""
    trained = [row for row in steps(rows, "ppo") if row.get("kl") is not None]
    gold = at(report, "ppo.gold_curve") or trained
    charts = []
    for key, source, title, caption in [
        ("score", trained, "Proxy: the reward model", "What PPO optimises: it should rise with distance."),
        ("gold", gold, "Gold judge", "What is wanted: where this falls while the proxy rises, the reward is hacked."),
    ]:
        dots = [(math.sqrt(max(0.0, row["kl"])), row[key]) for row in source if row.get(key) is not None]
        if dots:
            xs, ys = zip(*sorted(dots), strict=True)
            chart = Chart(f"kl-{key}", title, "√KL to the SFT model", f"mean {key}",
                          [Series(key, xs, ys, points=True, colour=0 if key == "score" else 2)])  # fmt: skip
            charts.append(block(chart, caption, drawn))
        else:
            charts.append(missing(f"the {key} along PPO's way"))
    lead = "How much each score gains for the distance that PPO moves away from the SFT model (square root of KL)."
    return section("reward-kl", "Reward against KL", lead, '<div class="charts">', *charts, "</div>")


def entropy(report: dict, rows: list[dict], drawn: bool) -> str:
    """Entropy of the policies and the fall from SFT to PPO in numbers."""
    others = [stage for stage in MODELS if stage not in ("base", "sft", "ppo") and at(report, f"ppo.entropy.{stage}") is not None]
    known = {stage: at(report, f"ppo.entropy.{stage}") for stage in ("base", "sft", *others, "ppo")}
    parts = []
    lead = "Mean entropy of the next token, in nats, on each model's own responses."
    if known["sft"] and known["ppo"] is not None:
        change = (known["ppo"] - known["sft"]) / known["sft"]
        went = "fell" if change < 0 else "did not fall: it rose" if change > 0 else "did not change:"
        lead += (
            f" From SFT to PPO it {went} from {number(known['sft'])} to {number(known['ppo'])} nats a token "
            f"({100 * change:+.0f} %)."
        )
    if any(value is not None for value in known.values()):
        body = [[MODELS[stage], number(value)] for stage, value in known.items()]
        parts.append(html_table("Entropy of each stage", ["model", "nats a token"], body))
    absent = [MODELS[stage] for stage, value in known.items() if value is None]
    if absent:
        parts.append(missing(f"the entropy of {', '.join(absent)}"))
    return section("entropy", "Entropy", lead, *parts)


def _loss(trained: list[dict], stage: str, axis: str, drawn: bool) -> str:
    """Loss of a stage, each step and smoothed."""
    axis = axis if all(axis in row for row in trained) else "step"
    xs, ys = [row[axis] for row in trained], [row["loss"] for row in trained]
    span = max(1, len(ys) // 40)
    lines = [Series(f"mean of {span}", xs, smooth(ys, span))]
    if span > 1:
        lines.append(Series("each step", xs, ys, points=True, colour=5))
    unit = "loss" if stage == "reward" else "nats a token"
    caption = f"From {number(ys[0])} to {number(lines[0].ys[-1])} ({unit}, training batches)."
    return block(Chart(f"{stage}-loss", "Training loss", axis, unit, lines), caption, drawn)


def _held_out(report: dict, evaluated: list[dict], drawn: bool) -> str:
    """Held-out bits per byte over pretraining with xz's lines."""
    evaluated = [row for row in evaluated if row.get("bpb")]
    sources = list(dict.fromkeys(source for row in evaluated for source in row["bpb"]))
    if not sources:
        return missing("held-out bits per byte during pretraining")
    axis = "tokens" if all("tokens" in row for row in evaluated) else "step"
    xs = [row[axis] for row in evaluated]
    lines = [Series(source, xs, [row["bpb"].get(source) for row in evaluated]) for source in sources[:MOST_SERIES]]
    xz = at(report, "xz_bpb", {})
    marks = {f"xz -9, {line.label}": xz[line.label] for line in lines if xz.get(line.label) is not None}
    caption = "Each source's held-out text; the dashed line is what xz -9 needs for the same text alone."
    if len(sources) > MOST_SERIES:
        caption += f" {MOST_SERIES} of {len(sources)} sources are drawn; the table below has them all."
    return block(Chart("held-out", "Held-out bits per byte", axis, "bits per byte", lines, marks), caption, drawn)


def _step_health(trained: list[dict], drawn: bool) -> str:
    """Learning rate, gradient norm and speed, folded away."""
    parts = []
    views = [("lr", "Learning rate"), ("grad_norm", "Gradient norm"), ("tokens_per_s", "Tokens a second")]
    for key, title in views:
        line = [(row["step"], row[key]) for row in trained if row.get(key) is not None]
        if line:
            xs, ys = zip(*line, strict=True)
            caption = f"From {number(ys[0])} to {number(ys[-1])}."
            chart = Chart(f"pretrain-{key}", title, "step", title.lower(), [Series(title, xs, ys)], small=True)
            parts.append(block(chart, caption, drawn))
    inside = f'<div class="charts small">{"".join(parts)}</div>'
    return f"<details><summary>Learning rate, gradient norm, speed</summary>{inside}</details>" if parts else ""


def _pair_accuracy(rows: list[dict], drawn: bool) -> str:
    """Pair accuracy in training batches and on each held-out source."""
    trained = [row for row in steps(rows, "reward") if row.get("pair_accuracy") is not None]
    lines = []
    if trained:
        xs, ys = [row["step"] for row in trained], [row["pair_accuracy"] for row in trained]
        lines.append(Series("training batches, smoothed", xs, smooth(ys, max(1, len(ys) // 40)), colour=5))
    evaluated = [row for row in events(rows, "reward", "eval") if row.get("pair_accuracy")]
    for k, source in enumerate(dict.fromkeys(source for row in evaluated for source in row["pair_accuracy"])):
        ys = [row["pair_accuracy"].get(source) for row in evaluated]
        lines.append(Series(source, [row["step"] for row in evaluated], ys, colour=k))
    if not lines:
        return missing("pair accuracy during training")
    chart = Chart("pair-accuracy", "Pair accuracy", "step", "share of pairs", lines, {"chance": 0.5})
    return block(chart, "Training batches against held-out pairs; a gap that opens is overfitting.", drawn)
