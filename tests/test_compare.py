"""evals/compare.py: what each system is asked and what is taken of its answers."""

import math

import pytest
import torch

from nanorlhf import chat
from nanorlhf.assistant import Assistant
from nanorlhf.data.instruct import Example, few_shot
from nanorlhf.engine import Completion
from nanorlhf.engine.generate import ragged
from nanorlhf.evals import best_of_n
from nanorlhf.evals import compare as room
from nanorlhf.evals.compare import (best_answers, chat_answers, compare, complete_lines, fitting_document, mean_entropy,
                                    render_prompts)
from tiny import byte_tokenizer, model

TOK = byte_tokenizer()
END = TOK.special_tokens[chat.END]
EXAMPLES = [Example("word", f"Say {w}.", f"{w}!") for w in ("sun", "rain", "fog")]
TRAIN = [Example("word", f"Say {w}.", f"{w}!") for w in ("ice", "hail", "dew")]


def assistant(seed=1, **changes):
    return Assistant(model(seed, vocab_size=TOK.vocab_size, **{"context": 128, **changes}), TOK)


def scripted(monkeypatch, completions):
    """generate gives these; returns what it was asked."""
    asked = []

    def generate(model, prompts, max_new_tokens, n=1, stop=(), sampling=None, seed=0):
        asked.append({"prompts": prompts, "n": n, "stop": set(stop), "seed": seed})
        return completions

    for module in (room, best_of_n):
        monkeypatch.setattr(module, "generate", generate)
    return asked


def said(text, finished=True):
    ids = list(text.encode()) + ([END] if finished else [])
    return Completion(ids, [0.0] * len(ids), finished)


def test_entropy_is_the_mean_over_the_sampled_tokens_of_the_full_distribution():
    """By a loop over states: before each sampled token, −Σ p log p at the temperature."""
    a, prompts, drawn = assistant(), [[1, 2], [3]], [said("ab"), said("c", finished=False)]
    entropies = []
    with torch.no_grad():
        for p, c in zip(prompts, drawn):
            for t in range(len(c.ids)):
                logits = a.model(*ragged([p + c.ids[:t]]))[-1].double() @ a.model.head_weight.T.double()
                logp = (logits / 0.7).log_softmax(-1)
                entropies.append(-float((logp.exp() * logp).sum()))
    assert mean_entropy(a, prompts, drawn, 0.7) == pytest.approx(sum(entropies) / 4, rel=1e-4)


def test_the_entropy_of_an_even_model_is_the_logarithm_of_the_vocabulary_over_many_batches():
    a = assistant()
    with torch.no_grad():
        a.model.model.embed_tokens.weight.zero_()
    assert mean_entropy(a, [[1]] * 300, [said("a")] * 300, 1.0) == pytest.approx(math.log(TOK.vocab_size), rel=1e-5)


def test_a_base_model_continues_the_document_to_the_end_of_its_line(monkeypatch):
    a = assistant()
    asked = scripted(monkeypatch, [said(" sunny \nnext", False), said("", True)])
    answers = complete_lines(a, ["A", "B"], 16, 1.0, seed=4)
    assert answers.texts == ["sunny", ""] and answers.tokens == [12, 1]
    assert asked[0]["prompts"] == [[a.end_of_text, 65], [a.end_of_text, 66]]
    assert asked[0]["stop"] == {a.end_of_text, 10} and asked[0]["seed"] == 4


@pytest.mark.parametrize("max_new_tokens, kept", [(100, 27), (126, 1), (127, 0)])
def test_of_a_document_that_is_too_long_the_end_is_kept(monkeypatch, max_new_tokens, kept):
    """Context 128: room for 28, 2 and 1 prompt tokens, of which <|endoftext|> is one."""
    a, document = assistant(), "".join(chr(97 + i % 26) for i in range(150))
    asked = scripted(monkeypatch, [said("x")])
    complete_lines(a, [document], max_new_tokens, 1.0, 0)
    assert asked[0]["prompts"] == [[a.end_of_text, *document.encode()[150 - kept:]]]


def test_an_assistant_is_asked_in_the_chat_format_and_its_answer_is_stripped(monkeypatch):
    a = assistant()
    asked = scripted(monkeypatch, [said(" yes\n"), said("no", False), said("")])
    answers = chat_answers(a, EXAMPLES, 16, 1.0, seed=2)
    assert answers.texts == ["yes", "no", ""] and answers.tokens == [6, 2, 1] and answers.entropy > 0
    assert TOK.decode(asked[0]["prompts"][0]) == "<|user|>Say sun.<|end|><|assistant|>"
    assert asked[0]["prompts"] == render_prompts(a, EXAMPLES) and asked[0]["stop"] == {END}


def test_best_of_n_takes_the_highest_score_among_the_answers_that_ended_themselves(monkeypatch):
    """Scores by length; of the first prompt the longest did not end, of the second none did: then the longest is taken."""
    drawn = [said("aa"), said("b"), said("cccc", False), said("d", False), said("ee", False), said("fff", False)]
    asked = scripted(monkeypatch, drawn)
    scored = []

    def score(sequences):
        scored.extend(sequences)
        return torch.tensor([float(len(s)) for s in sequences])

    answers = best_answers(assistant(), EXAMPLES[:2], 3, score, 16, 1.0, 0)
    assert answers.texts == ["aa", "fff"] and answers.tokens == [3, 3] and asked[0]["n"] == 3
    prompts = asked[0]["prompts"]
    assert scored == [prompts[i // 3] + c.ids for i, c in enumerate(drawn)]  # with the end-of-turn token


def test_the_prompted_base_sees_as_many_whole_examples_as_fit():
    """One token a byte: two examples make the longer document, one the shorter; with room for neither the prompt is
    alone."""
    a = assistant()
    two, one, none = (few_shot(EXAMPLES[0], TRAIN, k, 7) for k in (2, 1, 0))
    assert fitting_document(a, EXAMPLES[0], TRAIN, 2, 7, len(two.encode())) == two
    assert fitting_document(a, EXAMPLES[0], TRAIN, 2, 7, len(two.encode()) - 1) == one
    assert fitting_document(a, EXAMPLES[0], TRAIN, 2, 7, len(one.encode()) - 1) == none


def test_every_system_answers_every_prompt_and_the_prompted_base_sees_examples():
    base, sft, ppo = assistant(1, context=256), assistant(2), assistant(3)
    systems = {"base": base, "sft": sft, "ppo": ppo}
    found = compare(systems, EXAMPLES, TRAIN, lambda s: torch.zeros(len(s)), 2, 2, 8, 1.0, seed=5)
    assert list(found) == ["base", "base_prompted", "sft", "best_of_n", "ppo"]
    assert all(len(a.texts) == len(a.tokens) == 3 and max(a.tokens) <= 8 for a in found.values())
    shown = few_shot(EXAMPLES[0], TRAIN, 2, 5 * 1_000_003)
    assert shown.count("Response:") == 3 and shown.endswith("Instruction: Say sun.\nResponse:")
    again = compare(systems, EXAMPLES, TRAIN, lambda s: torch.zeros(len(s)), 2, 2, 8, 1.0, seed=5)
    assert {k: a.texts for k, a in again.items()} == {k: a.texts for k, a in found.items()}
