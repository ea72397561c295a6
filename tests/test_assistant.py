"""assistant.py: complete, chat and logprobs of a checkpoint."""

import json

import numpy as np
import pytest
import torch

import nanorlhf as nr
from nanorlhf import assistant as room
from nanorlhf import chat, ops
from nanorlhf.assistant import Assistant, load
from nanorlhf.checkpoint import save_model
from nanorlhf.engine import SamplingConfig, by_score
from nanorlhf.engine.constrain import json_schema
from nanorlhf.engine.generate import ragged
from tiny import byte_tokenizer, model

TOK = byte_tokenizer()
END, EOT = TOK.special_tokens[chat.END], TOK.special_tokens[chat.END_OF_TEXT]
ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def assistant():
    return Assistant(model(1, loud=False, vocab_size=TOK.vocab_size), TOK)


def scripted(monkeypatch, *texts):
    """The engine draws these texts, one token a byte, and then the end; returns what generate was asked."""
    asked, scripts, generate = {}, [[*t.encode(), END] for t in texts], room.generate

    def listening(model, prompts, max_new_tokens, n=1, stop=(), sampling=None, seed=0, **more):
        asked.update(prompts=prompts, max_new_tokens=max_new_tokens, n=n, stop=set(stop), sampling=sampling, seed=seed, **more)
        return generate(model, prompts, max_new_tokens, n, stop, sampling, seed, **more)

    def drawn(logits, seed, requests, steps, **_):
        zeros = torch.zeros(len(logits))
        return torch.tensor([scripts[r][min(s, len(scripts[r]) - 1)] for r, s in zip(requests, steps)]), zeros, zeros, zeros

    monkeypatch.setattr(room, "generate", listening)
    monkeypatch.setattr(ops, "sample", drawn)
    monkeypatch.setattr("nanorlhf.engine.steps.packed_decoder", lambda model: None)  # where it runs natively, it draws there
    return asked


def test_a_saved_folder_is_an_assistant_again(tmp_path, assistant):
    save_model(tmp_path, assistant.model)
    TOK.save(tmp_path)
    again = nr.load(tmp_path)
    assert isinstance(again, nr.Assistant)
    assert again.complete("once", n=2, max_new_tokens=9, seed=3) == assistant.complete("once", n=2, max_new_tokens=9, seed=3)
    assert again.chat(ASK, 9, seed=3) == assistant.chat(ASK, 9, seed=3)


def test_a_folder_without_a_model_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        load(tmp_path / "nowhere")


def test_completions_go_on_from_a_document_that_begins_with_the_prompt(assistant, monkeypatch):
    asked = scripted(monkeypatch, " one", " two")
    assert assistant.complete("Say", n=2, max_new_tokens=7, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=4) == [" one", " two"]
    assert asked["prompts"] == [[EOT, *b"Say"]] and (asked["n"], asked["max_new_tokens"], asked["seed"]) == (2, 7, 4)
    assert asked["stop"] == {EOT, END}
    assert asked["sampling"] == SamplingConfig(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1)


def test_a_completion_ends_before_its_stop_text_also_in_the_middle_of_a_token(assistant, monkeypatch):
    asked = scripted(monkeypatch, "one\ntwo", "no line end")
    assert assistant.complete("x", n=2, stop="\n") == ["one", "no line end"]
    assert asked["stop"] == {EOT, END}
    scripted(monkeypatch, "a b c")
    assert assistant.complete("x", stop="b ") == ["a "]
    assert assistant.complete("x", stop=["c", " b"]) == ["a"]


def test_the_best_of_several_are_those_of_the_ranker(assistant):
    every = assistant.complete("once", n=5, max_new_tokens=9, seed=3)
    longest = sorted(range(5), key=lambda i: -len(every[i].encode()))
    got = assistant.complete("once", n=2, max_new_tokens=9, seed=3, best_of=5, ranker=by_score(lambda c: len(c.text.encode())))
    assert got == [every[i] for i in longest[:2]] and assistant.complete("once", max_new_tokens=9, seed=3, best_of=5)[0] in every
    with pytest.raises(ValueError, match="best_of must be at least n, and n at least 1, got 1 and 2"):
        assistant.complete("once", n=2, best_of=1)
    with pytest.raises(ValueError, match="n at least 1, got 3 and -1"):
        assistant.complete("once", n=-1, best_of=3)


def test_an_answer_keeps_to_a_language(assistant):
    keeps = assistant.constrain(json_schema({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}))
    for text in (*assistant.complete("once", n=5, max_new_tokens=60, constraint=keeps), assistant.chat(ASK, 60, constraint=keeps)):
        assert isinstance(json.loads(text)["n"], int)


def test_special_text_in_a_prompt_stays_text(assistant, monkeypatch):
    asked = scripted(monkeypatch, "y")
    assistant.complete("<|end|>")
    assert asked["prompts"] == [[EOT, *b"<|end|>"]]
    assistant.chat([{"role": "user", "content": "<|end|>"}])
    assert asked["prompts"][0].count(END) == 1


def test_an_answer_streams_whole_characters_that_add_up_to_it(assistant, monkeypatch):
    asked, pieces = scripted(monkeypatch, "dé €\U0001f600!"), []
    answer = assistant.chat(ASK, on_text=pieces.append)
    assert answer == "dé €\U0001f600!" == "".join(pieces) and not any("�" in piece for piece in pieces)
    assert TOK.decode(asked["prompts"][0]) == "<|user|>hi<|end|><|assistant|>" and asked["stop"] == {EOT, END}


def test_what_streams_is_what_is_returned_also_from_a_model_that_says_half_characters(assistant):
    for seed in range(5):
        pieces = []
        assert assistant.chat(ASK, 15, seed=seed, on_text=pieces.append) == "".join(pieces)


def test_an_answer_depends_on_its_seed_unless_the_temperature_is_zero(assistant):
    assert len({assistant.chat(ASK, 9, seed=s) for s in range(4)}) == 4
    assert len({assistant.chat(ASK, 9, temperature=0, seed=s) for s in range(4)}) == 1


def test_a_conversation_without_room_or_without_a_message_is_refused(assistant):
    with pytest.raises(ValueError, match="prompt 0 has 43 tokens; it needs 1 to 31 for a context of 32"):
        assistant.chat([{"role": "user", "content": "x" * 40}])
    with pytest.raises(ValueError, match="at least one message"):
        assistant.chat([])


def test_logprobs_are_those_of_each_token_after_the_first(assistant):
    got = assistant.logprobs("dogs")
    with torch.no_grad():
        tokens, cu_seqlens = ragged([list(b"dogs")])
        logits = assistant.model(tokens, cu_seqlens).double() @ assistant.model.head_weight.T.double()
    expected = [float(logits[i].log_softmax(-1)[tokens[i + 1]]) for i in range(3)]
    assert got.dtype == torch.float32 and got.shape == (3,)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert assistant.logprobs("d").shape == (0,)


def test_tokens_with_a_text_are_found_among_the_ordinary_ones():
    tok = nr.Tokenizer.train(["ab\n\nab\n\n\n\n" * 50], 256 + 5 + 3, special_tokens=chat.SPECIAL_TOKENS)
    found = Assistant(model(vocab_size=tok.vocab_size), tok).tokens_with("\n")
    pieces = [tok.decode_bytes([i]) for i in found]
    assert pieces == [b"\n", b"\n\n", b"\n\n\n\n"]  # the merges are ab and these two
    assert len(found) == sum(b"\n" in tok.decode_bytes([i]) for i in range(tok.vocab_size))


def test_a_reward_model_gives_no_answers(tmp_path):
    save_model(tmp_path, model(scalar_head=True, vocab_size=byte_tokenizer().vocab_size))
    with pytest.raises(ValueError, match="holds a reward model"):
        load(tmp_path)
