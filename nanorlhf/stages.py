"""What each stage of a run takes and leaves: the wiring between the text, the training loops and the folder."""

import json
from dataclasses import replace
from typing import List

import numpy as np
import torch

from . import chat as chat_format
from . import parallel
from .assistant import Assistant
from .checkpoint import StageState, load_model, save_model, write_json
from .data.corpus import head
from .data.films import labelled_reviews, review_groups, same_film_pairs
from .data.instruct import FAVOURABLE, UNFAVOURABLE, Example, blend, film_prompt, film_questions, prompts, word_bounds
from .data.labeller import Labeller
from .data.sentiment import Sentiment, pair_accuracy
from .data.sources import document_bytes
from .engine import SamplingConfig, generate
from .evals import reward_quality as quality
from .evals.bits import xz_bits_per_byte
from .evals.compare import render_prompts
from .evals.likelihood import document_bits, response_bits
from .model import Model, compute_dtype
from .tokenizer import Tokenizer
from .train.pretrain import pretrain
from .train.reward import Ensemble, Ranking, normalise, train_reward
from .train.reward import pair_accuracy as model_pair_accuracy
from .train.sft import sft

DONE = "score-mean.json"  # marks a member that is trained while others are not
SAMPLE_PROMPTS = ("The ", "ROMEO\n", "def read(")  # the same at every point of pretraining


def tokenizer_stage(run) -> None:
    state, config = run.state("tokenizer"), run.config.tokenizer
    tokenizer = Tokenizer.train(run.corpus.tokenizer_texts(), config.vocab_size, config.pattern,
                                chat_format.SPECIAL_TOKENS)
    if parallel.first():
        tokenizer.save(run.folder / "tokenizer")
    density = {}
    for name, documents in run.corpus.held_out.items():
        data = [document_bytes(d) for d in documents]
        density[name] = sum(map(len, data)) / len(tokenizer.encode_batch(data)[0])
    run.complete("tokenizer", state.seconds, bytes_per_token=density)


def save_stage(run, stage: str, model: Model) -> None:
    """Model and tokenizer side by side, so that the folder is a checkpoint of its own."""
    if parallel.first():
        run.tokenizer.save(run.folder / stage)
    save_model(run.folder / stage, model)


def load_stage(run, stage: str, scalar_head: bool = False) -> Model:
    return load_model(run.folder / stage, run.config.dtype, str(run.device), scalar_head)


def base_stage(run) -> None:
    state, config = run.state("base"), run.config
    tokenizer, corpus = run.tokenizer, run.corpus
    end_of_text = tokenizer.special_tokens[chat_format.END_OF_TEXT]
    mixture = corpus.mixture(tokenizer, end_of_text)
    shape = replace(config.model, vocab_size=tokenizer.vocab_size)
    model = Model(shape, dtype=compute_dtype(config.dtype, run.device), seed=config.seed).to(run.device)
    quick = {name: head(documents, 16_000) for name, documents in corpus.held_out.items()}

    def draw(model: Model) -> list:
        assistant = Assistant(model, tokenizer)
        return [(p, assistant.complete(p, max_new_tokens=80, temperature=0.8, seed=config.seed)[0])
                for p in SAMPLE_PROMPTS]

    pretrain(model, mixture, config.pretrain, state, lambda m: document_bits(m, tokenizer, quick), draw, run.log)
    trained = state.seconds
    save_stage(run, "base", model)
    bpb = document_bits(model, tokenizer, corpus.held_out)
    xz = {name: xz_bits_per_byte(b"".join(map(document_bytes, documents)))
          for name, documents in corpus.held_out.items()}
    steps, size = config.pretrain.steps, config.pretrain.rows * config.pretrain.row_tokens
    run.complete("base", state.seconds, tokens=steps * size, tokens_per_s=steps * size / trained,
                 epochs=mixture.epochs(steps, config.pretrain.rows),
                 parameters=sum(p.numel() for p in model.parameters()), bpb=bpb, xz_bpb=xz)


def questions(run, held_out: bool, n: int, seed: int) -> List[Example]:
    """Prompts of the reinforcement learning and of its comparison: a favourable line about a film, from training films or
    from test films; without the film corpus, a sentence with a word.

    The other families are left to SFT. A reward model of this size learns what praise is; it does not learn to turn its
    judgement round when the prompt asks for blame, or to look whether a word occurs.
    """
    films, examples = run.corpus.films, run.corpus.demonstrations[held_out]
    if films is None:
        return prompts(examples, ("word",), n, seed)
    bounds = word_bounds(run.corpus.demonstrations[0])[FAVOURABLE]
    return film_questions(films.test if held_out else films.train, FAVOURABLE, bounds, n, seed)


def conversation(example: Example) -> List[dict]:
    return [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.response}]


def sft_stage(run) -> None:
    state, config = run.state("sft"), run.config
    train, held_out = run.corpus.demonstrations
    room = config.model.context
    rendered = [(e.family, chat_format.render(run.tokenizer, conversation(e))) for e in blend(train, config.sft.examples)]
    families = [family for family, (ids, _) in rendered if len(ids) <= room]
    rendered = [r for _, r in rendered if len(r[0]) <= room]
    held = [e for e in prompts(held_out, None, 600, config.seed)]
    model = load_stage(run, "base")
    before = response_bits(model, run.tokenizer, held)
    sft(model, rendered, config.sft, config.seed, state, lambda m: response_bits(m, run.tokenizer, held), run.log)
    save_stage(run, "sft", model)
    after = response_bits(model, run.tokenizer, held)
    run.complete("sft", state.seconds, response_bpb={"base": before, "sft": after}, examples=len(rendered),
                 families={f: families.count(f) for f in sorted(set(families))})


def human_rankings(run, films, k: int, seed: int) -> List[Ranking]:
    """Reviews of one film as answers to the prompt for a favourable line, or an unfavourable one."""
    rankings = []
    for group in review_groups(films, k, seed, run.config.reward.unfavourable):
        prompt = film_prompt(group.prompt_kind, group.title, f"{seed} {group.completions[0]}")
        sequences = [chat_format.render(run.tokenizer, [{"role": "user", "content": prompt},
                                                        {"role": "assistant", "content": text}])[0]
                     for text in group.completions]
        rankings.append(Ranking("films", sequences, list(group.ranks)))
    return rankings


def sampled_rankings(run, model: Model, examples: List[Example], seed: int) -> List[Ranking]:
    """K samples of the SFT model for each prompt, ranked by the simulated labeller."""
    config, assistant = run.config, Assistant(model, run.tokenizer)
    k, starts = config.reward.k, render_prompts(assistant, examples)
    drawn = generate(model, starts, config.ppo.max_new_tokens, k, [assistant.end],
                     SamplingConfig(config.ppo.temperature), seed)
    films = run.corpus.films
    labeller = Labeller.fit(films.train if films else [], config.reward.labeller_temperature)
    rankings = []
    for i, (example, start) in enumerate(zip(examples, starts)):
        every = drawn[i * k:(i + 1) * k]
        mine = [c for c in every if c.finished]
        if len(mine) < 2:  # an early model seldom ends its turn: its turns are then ended where they were cut off
            mine = every
        ranks = labeller.rank(example, [assistant.text(c).strip() for c in mine], seed)
        ended = [start + c.ids + ([] if c.finished else [assistant.end]) for c in mine]
        clear = [labeller.utility(example, assistant.text(c).strip()) for c in mine]
        rankings.append(Ranking("simulated", ended, list(ranks), clear))
    return [r for r in rankings if len(set(r.ranks)) > 1]


def reward_stage(run) -> None:
    state, config, films = run.state("reward", rows=""), run.config, run.corpus.films
    policy, seed = load_stage(run, "sft"), config.seed
    simulated = sampled_rankings(run, policy, questions(run, False, config.reward.simulated_prompts, seed), seed)
    tests = {"films": film_pairs(run, films.test, FAVOURABLE),
             "films_unfavourable": film_pairs(run, films.test, UNFAVOURABLE)} if films else {}
    tests["simulated"] = sampled_rankings(run, policy, questions(run, True, 64, seed), seed + 1)
    facts, epochs = {}, [list(simulated) for _ in range(config.reward.epochs)]
    if films is not None:
        epochs = [human_rankings(run, films.train, config.reward.k, seed * 1000 + e) + part
                  for e, part in enumerate(epochs)]
        linear = Sentiment().fit(*labelled_reviews(films.train))
        facts["linear_pair_accuracy"] = pair_accuracy(linear.log_odds, same_film_pairs(films.test, seed))
    every = [s for r in simulated or epochs[0] for s in r.sequences]
    models = [reward_member(run, m, epochs, every, tests, state if not m else None) for m in range(config.reward.members)]
    judge = Ensemble(*zip(*models), config.reward.member_score)
    found = {name: reward_quality(judge, rankings) for name, rankings in tests.items() if rankings}
    run.complete("reward", state.seconds, pair_accuracy={name: q["accuracy"] for name, q in found.items()}, quality=found,
                 score_means=[offset for _, offset in models],
                 rankings={"films": len(epochs[0]) - len(simulated), "simulated": len(simulated)}, **facts)
    for member in range(len(models)):
        (run.folder / member_folder(member) / DONE).unlink(missing_ok=True)  # by whichever rank comes first


def member_folder(member: int) -> str:
    return "reward" if not member else f"reward/member-{member}"


def load_ensemble(run) -> Ensemble:
    """The complete stage's models, whose scores have mean 0 on samples of SFT."""
    means = run.facts("reward")["score_means"]
    return Ensemble([load_stage(run, member_folder(m)) for m in range(len(means))], means, run.config.reward.member_score)


def reward_member(run, member: int, epochs: List[List[Ranking]], samples: List[List[int]], tests: dict,
                  state: StageState | None) -> tuple[Model, float]:
    """One trained reward model of the ensemble, normalised on the samples, and what is to be subtracted of its scores. One that an
    earlier sitting completed is read. state: the stage's, which the first member's training is saved in."""
    config, seed = run.config.reward, run.config.seed + 1000 * member
    folder = member_folder(member)
    done = run.folder / folder / DONE
    if done.is_file():
        return load_stage(run, folder), json.loads(done.read_text())
    stage = "reward" if not member else f"reward-{member}"
    state = state or run.state(folder, rows="")
    run.metrics.truncate_after(stage, state.saved_step())  # this member's rows; those of complete ones stay
    model = load_stage(run, "sft", scalar_head=True)
    if member:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator) / (model.config.hidden_size + 1) ** 0.5)
    if config.normalise == "both":
        normalise(model, samples)
    measure = lambda m: {name: model_pair_accuracy(m, rankings) for name, rankings in tests.items() if rankings}
    train_reward(model, epochs, config, seed, state, measure, run.log, stage)
    offset = normalise(model, samples) if config.normalise != "none" else 0.0
    save_stage(run, folder, model)
    state.clear()
    write_json(done, offset)
    return model, offset


def reward_quality(judge: Ensemble, rankings: List[Ranking]) -> dict:
    """How far the scores of held-out rankings can be trusted: see evals/reward_quality.py."""
    scores = judge([s for r in rankings for s in r.sequences]).double().numpy()
    bounds = [0, *np.cumsum([len(r.ranks) for r in rankings]).tolist()]
    better, worse = quality.pairs([rank for r in rankings for rank in r.ranks], bounds)
    gap = scores[better] - scores[worse]
    lengths = np.array([len(s) for r in rankings for s in r.sequences])
    found = {"accuracy": quality.accuracy(gap), "pairs": len(gap), "calibration": quality.calibration(gap),
             "length": quality.length_check(scores, lengths, better, worse)}
    clear = [u for r in rankings for u in (r.utilities or [])]
    if len(clear) == len(scores):  # the labeller tells how clear a pair is
        sure = np.abs(np.array(clear)[better] - np.array(clear)[worse])
        found["by_confidence"] = quality.accuracy_by(sure, gap)
    return found


def film_pairs(run, films, kind: str) -> List[Ranking]:
    """Every test film as one ranking: its fresh reviews over its rotten ones, or under for the unfavourable prompt."""
    best, worst = (0, 1) if kind == FAVOURABLE else (1, 0)
    rankings = []
    for film in films:
        if film.fresh and film.rotten:
            prompt = film_prompt(kind, film.title, film.title)
            sequences = [chat_format.render(run.tokenizer, [{"role": "user", "content": prompt},
                                                            {"role": "assistant", "content": text}])[0]
                         for text in film.fresh + film.rotten]
            rankings.append(Ranking("films", sequences, [best] * len(film.fresh) + [worst] * len(film.rotten)))
    return rankings


STAGES = {"tokenizer": tokenizer_stage, "base": base_stage, "sft": sft_stage, "reward": reward_stage}
