"""stages.py: what each stage takes from the text and hands to its training loop."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from nanorlhf import chat, stages
from nanorlhf.assistant import load
from nanorlhf.checkpoint import load_model
from nanorlhf.data.films import Film
from nanorlhf.data.instruct import FAVOURABLE, UNFAVOURABLE, Example, film_prompt
from nanorlhf.data.sources import document_bytes
from nanorlhf.engine import Completion
from nanorlhf.run import open_run
from nanorlhf.train.reward import score_all
from tiny import byte_tokenizer, model

TOK = byte_tokenizer()
END = TOK.special_tokens[chat.END]
FILMS = [Film(f"Film {i}", "A plot.", tuple(f"Good line {i}{j}." for j in range(3)),
              tuple(f"Bad line {i}{j}." for j in range(2))) for i in range(4)]  # fmt: skip


def made_run(tmp_path=None, k=3):
    """As much of a run as the rankings need."""
    config = SimpleNamespace(reward=SimpleNamespace(k=k, labeller_temperature=0.0, unfavourable=0.5),
                             ppo=SimpleNamespace(max_new_tokens=8, temperature=1.0), dtype="float32")
    return SimpleNamespace(tokenizer=TOK, config=config, folder=tmp_path, device="cpu",
                           corpus=SimpleNamespace(films=None))


def said(text, finished=True):
    return Completion([*text.encode(), *([END] if finished else [])], [], finished)


def sampled(monkeypatch, completions, examples):
    monkeypatch.setattr(stages, "generate", lambda *_, **__: completions)
    return stages.sampled_rankings(made_run(), model(vocab_size=TOK.vocab_size), examples, seed=0)


def turns(ids):
    """(prompt, response) of a conversation's ids, and whether it ends its turn."""
    text = TOK.decode(ids)
    prompt, response = text.removeprefix("<|user|>").split("<|end|><|assistant|>")
    return prompt, response.removesuffix("<|end|>"), response.endswith("<|end|>")


def test_every_stage_starts_from_the_folder_of_the_one_before(tmp_path):
    assert list(stages.STAGES) == ["tokenizer", "base", "sft", "reward"]
    run, net = made_run(tmp_path), model(3, vocab_size=TOK.vocab_size)
    stages.save_stage(run, "sft", net)
    again = stages.load_stage(run, "sft", scalar_head=True)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    assert again.score.weight.shape == (1, 16) and load(tmp_path / "sft").tokenizer.vocab_size == TOK.vocab_size


def test_the_better_answer_of_the_labeller_is_ranked_first(monkeypatch):
    """Without noise: a sentence with the word is worth more than one without, and that more than a stutter."""
    example = Example("word", "Use the word “rain” in a sentence.", "", {"word": "rain", "bounds": (4, 12)})
    answers = ["The sun is over the sea.", "The rain is over the sea.", "sun sun sun sun sun sun"]
    (ranking,) = sampled(monkeypatch, [said(a) for a in answers], [example])
    assert [turns(ids) for ids in ranking.sequences] == [(example.prompt, a, True) for a in answers]
    assert ranking.ranks == [1, 0, 2] and ranking.source == "simulated"


def test_answers_that_did_not_end_are_ranked_only_where_fewer_than_two_did(monkeypatch):
    """The first prompt has two ended answers, which are ranked; the second has one, so all are, each ended where it
    was cut off, so that the reward model reads the end-of-turn token of every sequence; the third says one thing
    thrice, which is no ranking."""
    asked = [Example("word", f"Use the word “{w}”.", "", {"word": w, "bounds": (2, 9)}) for w in ("rain", "sun", "fog")]
    drawn = [said("The rain falls."), said("A cut ra", False), said("No."),
             said("The sun sets."), said("A cut su", False), said("Cut", False), said("Fog."), said("Fog."), said("Fog.")]
    first, second = sampled(monkeypatch, drawn, asked)
    assert [turns(ids)[1:] for ids in first.sequences] == [("The rain falls.", True), ("No.", True)]
    assert [turns(ids)[1:] for ids in second.sequences] == [("The sun sets.", True), ("A cut su", True), ("Cut", True)]
    assert len(set(second.ranks)) == 3 and second.ranks[0] == 0


def test_human_rankings_put_the_label_that_was_asked_for_first():
    labels = {text: kind for film in FILMS for kind, texts in (("good", film.fresh), ("bad", film.rotten)) for text in texts}
    rankings = stages.human_rankings(made_run(), FILMS, 4, seed=1)
    assert rankings and all(r.source == "films" for r in rankings)
    seen = set()
    for ranking in rankings:
        prompts, texts, ended = zip(*map(turns, ranking.sequences))
        assert len(set(prompts)) == 1 and all(ended) and len({t.split()[2][0] for t in texts}) == 1  # one prompt, one film
        best = {labels[t] for t, rank in zip(texts, ranking.ranks) if rank == 0}
        worst = {labels[t] for t, rank in zip(texts, ranking.ranks) if rank > 0}
        assert {tuple(best), tuple(worst)} == {("good",), ("bad",)}
        phrasings = {kind: {film_prompt(kind, f"Film {texts[0].split()[2][0]}", str(i)) for i in range(60)}
                     for kind in (FAVOURABLE, UNFAVOURABLE)}
        wanted = FAVOURABLE if best == {"good"} else UNFAVOURABLE
        assert prompts[0] in phrasings[wanted]
        seen.add(wanted)
    assert seen == {FAVOURABLE, UNFAVOURABLE}


def test_a_test_film_is_all_of_its_good_lines_over_all_of_its_bad_ones():
    films = [*FILMS, Film("Unloved", "", (), ("Bad.",))]
    rankings, turned = (stages.film_pairs(made_run(), films, kind) for kind in (FAVOURABLE, UNFAVOURABLE))
    assert len(rankings) == len(turned) == 4 and all(r.ranks == [1, 1, 1, 0, 0] for r in turned)
    for ranking in rankings:
        assert ranking.ranks == [0, 0, 0, 1, 1]
        assert [turns(ids)[1].split()[0] for ids in ranking.sequences] == ["Good"] * 3 + ["Bad"] * 2


# --- what the stages of a whole run leave ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def opened(tiny_run):
    return open_run(tiny_run.config, resume=True)


def facts(tiny_run, stage):
    return json.loads((tiny_run.folder / stage / "stage.json").read_text())


def test_bytes_per_token_are_those_of_the_held_out_text(tiny_run, opened):
    density = facts(tiny_run, "tokenizer")["bytes_per_token"]
    for name, documents in opened.corpus.held_out.items():
        data = [document_bytes(d) for d in documents]
        tokens = sum(len(opened.tokenizer.encode(d)) for d in data)
        assert density[name] == pytest.approx(sum(map(len, data)) / tokens) and density[name] > 1.3


def test_the_base_stage_counts_its_tokens_and_its_parameters(tiny_run):
    base, config = facts(tiny_run, "base"), tiny_run.config.pretrain
    assert base["tokens"] == config.steps * config.rows * config.row_tokens
    assert base["tokens_per_s"] >= base["tokens"] / base["seconds"]
    assert base["parameters"] == sum(p.numel() for p in load_model(tiny_run.folder / "base").parameters())
    assert set(base["xz_bpb"]) == set(base["bpb"]) == {"stdlib", "docstrings", "topics"}
    assert all(0 < bits < 8 for bits in (*base["bpb"].values(), *base["xz_bpb"].values()))


def test_the_sft_stage_uses_the_demonstrations_that_fit_and_says_of_which_families(tiny_run):
    found = facts(tiny_run, "sft")
    assert sum(found["families"].values()) == found["examples"] <= tiny_run.config.sft.examples
    assert found["families"]["docstring"] > 0 and found["families"]["word"] > 0


def test_the_reward_stage_leaves_scores_that_are_normalised_on_the_sft_models_samples(tiny_run, opened):
    """The samples are drawn again; less their mean, which the stage wrote down, their scores have mean 0, deviation 1."""
    found, config = facts(tiny_run, "reward"), tiny_run.config
    scorer, policy = stages.load_stage(opened, "reward"), stages.load_stage(opened, "sft")
    asked = stages.questions(opened, False, config.reward.simulated_prompts, config.seed)
    simulated = stages.sampled_rankings(opened, policy, asked, config.seed)
    scores = score_all(scorer, [s for r in simulated for s in r.sequences]) - found["score_means"][0]
    assert found["rankings"] == {"films": 0, "simulated": len(simulated)}
    assert float(scores.mean()) == pytest.approx(0, abs=1e-3) and float(scores.std(unbiased=False)) == pytest.approx(1, abs=1e-3)
    assert math.isfinite(found["pair_accuracy"]["simulated"])
    quality = found["quality"]["simulated"]
    assert quality["accuracy"] == pytest.approx(found["pair_accuracy"]["simulated"]) and 0 <= quality["calibration"]["error"] <= 0.5
    assert sum(row["n"] for row in quality["by_confidence"]) == quality["pairs"]


def test_ppo_leaves_a_policy_that_has_moved_and_no_scalar_head(tiny_run):
    before, after = load_model(tiny_run.folder / "sft"), load_model(tiny_run.folder / "ppo")
    assert not hasattr(after, "score")
    assert any(not torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values()))
