"""evals/likelihood.py: bits per byte against loops that read one token at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf import chat
from nanorlhf.data.instruct import Example
from nanorlhf.engine.generate import ragged
from nanorlhf.evals import likelihood
from nanorlhf.evals.likelihood import document_bits, response_bits, summed_nats, windows
from tiny import byte_tokenizer, model

TOK = byte_tokenizer()
START = TOK.special_tokens[chat.END_OF_TEXT]


def small(seed=1, **changes):
    return model(seed, vocab_size=TOK.vocab_size, **changes)


@torch.no_grad()
def nats(net, ids, at):
    """−log p of ids[at] given what stands before it in ids, from the full softmax."""
    logits = net(*ragged([ids[:at]]))[-1].double() @ net.head_weight.T.double()
    return -float(logits.log_softmax(-1)[ids[at]])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 80), st.integers(2, 20), st.data())
def test_windows_score_every_token_but_the_first_exactly_once_with_context_before_it(length, context, data):
    overlap = data.draw(st.integers(1, context - 1))
    ids = list(range(length))
    scored = []
    for window, unscored in windows(ids, context, overlap):
        assert 1 <= unscored <= len(window) <= context
        assert window == ids[window[0]:window[0] + len(window)]  # a stretch of the document
        scored += window[unscored:]
        if window[0] > 0:
            assert unscored == overlap  # each scored token has at least that much context
    assert scored == ids[1:]


@pytest.mark.parametrize("overlap", [0, 4, 9])
def test_an_overlap_that_leaves_no_context_or_no_progress_is_refused(overlap):
    with pytest.raises(ValueError, match=f"windows: expected an overlap of 1 to 3 for a context of 4, got {overlap}"):
        windows([1, 2, 3, 4, 5, 6], 4, overlap)


def test_short_documents_cost_what_a_loop_over_their_bytes_says():
    """A byte is a token here. The first byte is predicted from <|endoftext|>; the end is not counted."""
    net, texts = small(), ["to be", "or", "ü"]
    total = 0.0
    for text in texts:
        ids = [START, *text.encode()]
        total += sum(nats(net, ids, at) for at in range(1, len(ids)))
    expected = total / math.log(2) / sum(len(text.encode()) for text in texts)
    assert document_bits(net, TOK, {"x": texts})["x"] == pytest.approx(expected, rel=1e-5)


def test_a_long_document_is_read_in_windows_that_overlap_by_a_quarter():
    """Context 32, overlap 8. 60 bytes and <|endoftext|> are 61 ids: [0, 32), scored from 1; then [24, 56), scored from
    32; then [48, 61), scored from 56."""
    net, text = small(), "".join(chr(97 + i * 7 % 26) for i in range(60))
    ids = [START, *text.encode()]
    total = 0.0
    for first, scored, end in ((0, 1, 32), (24, 32, 56), (48, 56, 61)):
        total += sum(nats(net, ids[first:end], at - first) for at in range(scored, end))
    got = document_bits(net, TOK, {"long": [text]})["long"]
    assert got == pytest.approx(total / math.log(2) / 60, rel=1e-5)


def test_an_even_model_needs_the_logarithm_of_its_vocabulary_for_a_byte():
    net = small()
    with torch.no_grad():
        net.model.embed_tokens.weight.zero_()
    expected = math.log2(TOK.vocab_size)
    assert document_bits(net, TOK, {"a": ["some text"], "b": ["x" * 100]}) == {
        "a": pytest.approx(expected), "b": pytest.approx(expected)}


def test_batches_do_not_change_the_sum(monkeypatch):
    net = small()
    pieces = [(list(range(n)), [0] + [1] * (n - 1)) for n in (2, 9, 5, 30, 1, 4)]
    whole = summed_nats(net, pieces)
    for tokens in (1, 10, 12):
        monkeypatch.setattr(likelihood, "_BATCH_TOKENS", tokens)
        assert summed_nats(net, pieces) == pytest.approx(whole, rel=1e-6)
    assert summed_nats(net, []) == 0.0 == summed_nats(net, [([5], [0])])


def test_a_response_costs_its_own_bytes_given_the_prompt_and_not_its_end_of_turn():
    """<|user|>Say x<|end|><|assistant|>xyz<|end|>: the three bytes of xyz, each from all that stands before it."""
    net, special = small(), TOK.special_tokens
    ids = [special[chat.USER], *b"Say x", special[chat.END], special[chat.ASSISTANT], *b"xyz", special[chat.END]]
    total = sum(nats(net, ids, at) for at in (8, 9, 10))
    got = response_bits(net, TOK, [Example("word", "Say x", "xyz")])
    assert got == pytest.approx(total / math.log(2) / 3, rel=1e-5)


def test_a_conversation_longer_than_the_context_is_left_out_of_both_nats_and_bytes():
    net, short = small(), Example("word", "Say x", "xyz")
    long = Example("word", "Say it", "y" * 40)
    assert response_bits(net, TOK, [short, long]) == pytest.approx(response_bits(net, TOK, [short]), rel=1e-6)


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="expected at least 1 byte"):
        response_bits(small(), TOK, [])
    with pytest.raises(ValueError, match="expected at least 1 byte"):
        document_bits(small(), TOK, {"empty": [""]})
