"""The stages that align the SFT model with the reward model: PPO, RLOO, GRPO, REINFORCE and DPO. All start from the same two
checkpoints and end in the same table of the report."""

from dataclasses import replace
from typing import List

import torch

from . import chat as chat_format
from . import metrics, stages
from .assistant import Assistant
from .config import RunConfig
from .engine import SamplingConfig, generate
from .evals.compare import render_prompts
from .train.dpo import Pair, dpo
from .train.ppo import ppo
from .train.rloo import rloo
from .train.rollout import Judge

MEASURED = ("kl", "kl_exact", "score", "length", "entropy", "pair_accuracy", "margin")  # of the last steps, kept with the stage


def judge_of(run) -> Judge:
    """The run's reward model. Errors: ValueError where it has another tokenizer than the SFT model."""
    texts = [(run.folder / stage / "tokenizer.json").read_bytes() for stage in ("sft", "reward")]
    if texts[0] != texts[1]:
        raise ValueError(f"{run.folder}: the reward model has another tokenizer than the SFT model; it cannot judge its ids")
    judge = stages.load_ensemble(run)
    return Judge(judge, run.tokenizer.special_tokens[chat_format.END], judge.offsets[0])


def training_prompts(run, count: int, room: int) -> List[List[int]]:
    """Prompts that leave room for so many tokens, up to the assistant's turn. Errors: ValueError when none does."""
    assistant = Assistant(stages.load_stage(run, "sft"), run.tokenizer)
    asked = render_prompts(assistant, stages.questions(run, False, count, run.config.seed + 1))
    fitting = [p for p in asked if len(p) <= run.config.model.context - room]
    if not fitting:
        raise ValueError(f"none of {len(asked)} prompts leaves room for {room} more tokens in a context of {run.config.model.context}")
    return fitting


def finish(run, stage: str, policy, seconds: float) -> None:
    stages.save_stage(run, stage, policy)
    last = [row for row in metrics.read(run.folder)  # of all sittings
            if row["stage"] == stage and row.get("event", "stop") == "stop"][-5:]
    run.complete(stage, seconds, **{key: sum(r[key] for r in last) / len(last) for key in MEASURED if last and key in last[0]})


def ppo_models(run) -> tuple:
    """Policy, reference and value model as PPO starts from them; a shared value model is the policy."""
    config = run.config.ppo
    policy, ref = stages.load_stage(run, "sft", config.value == "shared"), stages.load_stage(run, "sft")
    if config.value == "shared":
        value = policy
    else:
        value = stages.load_stage(run, "reward") if config.value_init == "reward" else stages.load_stage(run, "sft", True)
    if config.value_init == "zero" or config.value == "shared":
        torch.nn.init.zeros_(value.score.weight)
    return policy, ref, value


def ppo_stage(run) -> None:
    state, config = run.state("ppo"), run.config.ppo
    policy, ref, value = ppo_models(run)
    prompts = training_prompts(run, config.distinct_prompts, config.max_new_tokens)
    ppo(policy, ref, value, judge_of(run), prompts, config, run.config.seed, state, run.log)
    if config.value == "shared":
        del policy.score
    finish(run, "ppo", policy, state.seconds)


def group_stage(kind: str):
    def stage(run) -> None:
        state, config = run.state(kind), replace(getattr(run.config, kind), advantage=kind)
        policy, ref = stages.load_stage(run, "sft"), stages.load_stage(run, "sft")
        prompts = training_prompts(run, config.distinct_prompts, config.max_new_tokens)
        rloo(policy, ref, judge_of(run), prompts, config, run.config.seed, state, run.log)
        finish(run, kind, policy, state.seconds)
    return stage


def dpo_stage(run) -> None:
    state, config = run.state("dpo"), run.config.dpo
    policy, ref = stages.load_stage(run, "sft"), stages.load_stage(run, "sft")
    pairs = sampled_pairs(run, policy)
    dpo(policy, ref, pairs, config, run.config.seed, state, run.log)
    finish(run, "dpo", policy, state.seconds)


def sampled_pairs(run, model) -> List[Pair]:
    """Of each prompt's samples the one that the reward model scores highest, and the lowest. As in the rankings of the reward stage,
    samples that ended themselves are compared; where fewer than two did, all are, each ended where it was cut off."""
    config, judge = run.config, judge_of(run)
    n, room = config.dpo.samples, config.ppo.max_new_tokens
    prompts = training_prompts(run, config.dpo.prompts, room + 1)
    drawn = generate(model, prompts, room, n, [judge.end], SamplingConfig(config.ppo.temperature), config.seed * 1_000_003 + 7)
    ended = [prompts[i // n] + c.ids + ([] if c.finished else [judge.end]) for i, c in enumerate(drawn)]
    scores = judge.score(ended).tolist()
    pairs = []
    for i, prompt in enumerate(prompts):
        every = sorted(range(i * n, i * n + n), key=lambda j: scores[j])
        finished = [j for j in every if drawn[j].finished]
        low, *_, high = finished if len(finished) > 1 else every
        if scores[high] > scores[low]:
            pairs.append(Pair(ended[high], ended[low], len(prompt)))
    return pairs


ALIGNMENTS = {"dpo": dpo_stage, "rloo": group_stage("rloo"), "grpo": group_stage("grpo"), "reinforce": group_stage("reinforce"),
              "ppo": ppo_stage}


def stages_of(config: RunConfig) -> dict:
    """The stages of a run in order: up to the reward model, what is compared with PPO, PPO."""
    return {**stages.STAGES, **{name: ALIGNMENTS[name] for name in config.compared}, "ppo": ppo_stage}
