"""engine/speculate.py: whatever the small model proposes, the large one's distribution comes out."""

import importlib
import itertools
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

from nanorlhf.engine import SamplingConfig, generate, speculate
from nanorlhf.engine.generate import ragged
from nanorlhf.ops import backend
from tiny import model, random_sequences

VOCAB = 5
GREEDY = SamplingConfig(temperature=0)
MODULE = importlib.import_module("nanorlhf.engine.speculate")  # nanorlhf.engine.speculate is the function
PROMPTS = random_sequences(7, 11, seed=4, shortest=1)
SMALL_PROMPT = [1, 3, 0]


@pytest.fixture(params=["native", "by layer"])
def path(request, monkeypatch):
    """Both ways through the models."""
    if request.param == "by layer":
        layer_by_layer(monkeypatch)
    return request.param


def layer_by_layer(monkeypatch):
    monkeypatch.setattr(MODULE, "packed_decoder", lambda model: None)


def tiny_pair():
    """A large model and a small one that thinks otherwise, over few tokens, so that all continuations can be enumerated."""
    return model(1, vocab_size=VOCAB, loud=False), model(8, vocab_size=VOCAB, layers=1)


def chi_square_quantile(q, degrees):
    """Wilson and Hilferty 1931: the cube root of χ²/k is near normal. At 0.95 and 10 degrees 18.29, where tables have 18.31."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + NormalDist().inv_cdf(q) * spread**0.5) ** 3


def filtered(p, sampling):
    """The distribution that top-k, then top-p, then min-p leave of p (V,), by sorting; no two probabilities are equal here."""
    p, order = p.copy(), np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k:]] = 0
    p /= p.sum()
    if sampling.top_p < 1:
        before = np.concatenate(([0], np.cumsum(p[order])[:-1]))
        p[order[before >= sampling.top_p]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


@torch.no_grad()
def exact(net, prompt, count, sampling):
    """{continuation: probability} of all of ``count`` tokens, by the model without a cache."""
    found = {(): 1.0}
    for _ in range(count):
        longer = {}
        for ids, weight in found.items():
            logits = (net(*ragged([[*prompt, *ids]]))[-1] @ net.head_weight.T).double()
            for token, mass in enumerate(sorted_probabilities(logits, sampling)):
                longer[(*ids, token)] = weight * mass
        found = longer
    return found


def sorted_probabilities(logits, sampling):
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    return filtered((logits / sampling.temperature).softmax(-1).numpy(), sampling)


@pytest.mark.parametrize("sampling", [
    SamplingConfig(), SamplingConfig(temperature=0.6), SamplingConfig(top_k=3), SamplingConfig(top_p=0.7), SamplingConfig(min_p=0.3),
    SamplingConfig(1.4, top_k=4, top_p=0.9, min_p=0.05, logit_bias=((2, 0.7),))],
    ids=["plain", "temperature", "top_k", "top_p", "min_p", "all"])
@pytest.mark.parametrize("ahead", [1, 3])
def test_three_tokens_are_distributed_as_the_large_models(sampling, ahead, path):
    """Chi-square of the joint frequencies of three tokens against the enumerated distribution; cells expected less than 5 times go
    together. What cannot be drawn never is."""
    large, small = tiny_pair()
    count, n = 3, 4000
    expected = exact(large, SMALL_PROMPT, count, sampling)
    drawn = speculate(large, small, [SMALL_PROMPT], count, n, sampling=sampling, seed=11, ahead=ahead)
    seen = dict.fromkeys(itertools.product(range(VOCAB), repeat=count), 0)
    for c in drawn.completions:
        seen[tuple(c.ids)] += 1
    assert all(seen[ids] == 0 for ids, mass in expected.items() if mass == 0)
    often = [ids for ids, mass in expected.items() if mass * n >= 5]
    e = np.array([expected[ids] * n for ids in often] + [max(n - sum(expected[ids] * n for ids in often), 0)])
    o = np.array([seen[ids] for ids in often] + [n - sum(seen[ids] for ids in often)])
    e, o = e[e > 1e-6], o[e > 1e-6]
    assert len(e) > 3 and 0.05 < drawn.acceptance < 0.95
    assert ((o - e) ** 2 / e).sum() < chi_square_quantile(0.9999, len(e) - 1)


@pytest.mark.parametrize("ahead", [1, 2, 4, 9])
def test_greedy_tokens_are_those_of_plain_decoding(ahead, path):
    large, small = model(1), model(5, layers=1)
    plain = generate(large, PROMPTS, 12, 2, stop=(3,), sampling=GREEDY)
    found = speculate(large, small, PROMPTS, 12, 2, (3,), GREEDY, ahead=ahead)
    assert [(c.ids, c.finished) for c in found.completions] == [(c.ids, c.finished) for c in plain]


def test_a_draft_that_is_the_model_is_nearly_always_right():
    """The two differ by the rounding of passes of another shape. With 3 ahead and 12 tokens, three passes of 4 tokens."""
    found = speculate(model(1), model(1), PROMPTS, 12, 3, sampling=SamplingConfig(0.8), seed=2, ahead=3)
    assert found.acceptance > 0.999 and found.passes == 3 and all(len(c.ids) == 12 for c in found.completions)


@torch.no_grad()
def test_the_logprobs_are_the_large_models():
    large = model(1)
    for prompt, c in zip(PROMPTS, speculate(large, model(5), PROMPTS, 9, sampling=SamplingConfig(0.7), seed=3).completions):
        expected, _ = large.logprobs(*ragged([prompt + c.ids]), temperature=0.7)
        torch.testing.assert_close(torch.tensor(c.logprobs), expected[len(prompt) - 1:], atol=3e-5, rtol=0)


@pytest.mark.parametrize("sampling", [
    GREEDY, SamplingConfig(), SamplingConfig(0.7, top_k=9, top_p=0.9, min_p=0.02), SamplingConfig(logit_bias=((2, 0.7),))],
    ids=["greedy", "plain", "filtered", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_step_and_the_layers_say_the_same(sampling, dtype, monkeypatch):
    """The same tokens in fp32, where no number is as close to a border as rounding; log-probs to rounding as far as the tokens are the same."""
    large, small = model(1), model(5, layers=1)
    large.compute_dtype = small.compute_dtype = dtype
    assert MODULE.packed_decoder(large) is not None and MODULE.packed_decoder(small) is not None
    native = speculate(large, small, PROMPTS, 12, 3, sampling=sampling, seed=7, ahead=3)
    layer_by_layer(monkeypatch)
    layers = speculate(large, small, PROMPTS, 12, 3, sampling=sampling, seed=7, ahead=3)
    same = 0
    for a, b in zip(native.completions, layers.completions):
        length = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids)) if x != y), len(a.ids))
        same += length == len(a.ids)
        close = 2e-5 if dtype == torch.float32 else 0.15
        torch.testing.assert_close(torch.tensor(a.logprobs[:length]), torch.tensor(b.logprobs[:length]), atol=close, rtol=0)
    assert same == len(native.completions) if dtype == torch.float32 else same > len(native.completions) / 2
    if dtype == torch.float32:
        assert (native.proposed, native.accepted, native.passes) == (layers.proposed, layers.accepted, layers.passes)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig()], ids=["greedy", "sampled"])
def test_logits_that_are_no_distribution_are_an_error(sampling, path):
    """Wherever between two proposals they come up: here after a token that the draft cannot run."""
    large, small = model(1, tied=False), model(1, tied=False)
    likely = generate(large, PROMPTS[:1], 12, sampling=GREEDY)[0].ids[4]
    with torch.no_grad():
        small.model.embed_tokens.weight[likely] = torch.nan
    with pytest.raises(ValueError, match="sample: expected logits|no distribution"):
        speculate(large, small, PROMPTS[:1], 20, 20, sampling=sampling)


def test_what_a_draft_that_fails_has_not_proposed_is_not_settled():
    """It cannot run the second token, so it proposes two of three; then one token is left, which nobody proposes."""
    large, small = model(1, tied=False), model(1, tied=False)
    plain = generate(large, PROMPTS[:1], 4, sampling=GREEDY)[0].ids
    assert plain[1] not in (*PROMPTS[0], plain[0])
    with torch.no_grad():
        small.model.embed_tokens.weight[plain[1]] = torch.nan
    found = speculate(large, small, PROMPTS[:1], 4, sampling=GREEDY, ahead=3)
    assert found.completions[0].ids == plain and (found.proposed, found.accepted, found.passes) == (2, 2, 2)


def test_a_request_draws_the_same_alone_and_in_company():
    large, small = model(1), model(5, layers=1)
    together = speculate(large, small, PROMPTS, 8, sampling=SamplingConfig(), seed=5).completions
    assert speculate(large, small, PROMPTS[:1], 8, sampling=SamplingConfig(), seed=5).completions[0].ids == together[0].ids
    assert [c.ids for c in speculate(large, small, PROMPTS, 8, sampling=SamplingConfig(), seed=5).completions] == [c.ids for c in together]


def test_a_stop_token_and_the_end_of_the_context_end_a_continuation():
    large, small = model(1), model(5)
    stopped = speculate(large, small, PROMPTS, 20, 4, (3, 8), SamplingConfig(1.5), 1).completions
    assert any(c.finished for c in stopped)
    for c in stopped:
        assert c.finished == (c.ids[-1] in (3, 8)) and not set(c.ids[:-1]) & {3, 8} and len(c.ids) == len(c.logprobs)
    long = random_sequences(1, 30, seed=1, shortest=30)
    assert len(speculate(large, small, long, 20).completions[0].ids) == 2  # a context of 32


@pytest.mark.parametrize("context", [12, 13, 17])
def test_where_the_drafts_context_ends_the_large_model_goes_on_alone(context, path):
    """Prompts of up to 11 tokens, and 20 more."""
    large, small = model(1), model(5, layers=1, context=context)
    plain = generate(large, PROMPTS, 20, 2, sampling=GREEDY)
    found = speculate(large, small, PROMPTS, 20, 2, sampling=GREEDY, ahead=3)
    assert [(c.ids, c.finish_reason) for c in found.completions] == [(c.ids, c.finish_reason) for c in plain]
    assert found.proposed and all(len(c.ids) == 20 for c in found.completions)


@torch.no_grad()
def test_in_bf16_the_output_matrix_is_rounded_as_the_engine_rounds_it():
    """From hidden states that are the same bits with and without a cache, in fp64."""
    large = model(1, hidden_size=32, heads=4)
    large.compute_dtype = torch.bfloat16
    before = backend.deterministic(True)
    try:
        drawn = speculate(large, model(5), PROMPTS, 9, seed=3).completions
        for prompt, c in zip(PROMPTS, drawn):
            hidden = large(*ragged([prompt + c.ids[:-1]]))[len(prompt) - 1:].double()
            exact = (hidden @ large.head_weight.bfloat16().double().T).log_softmax(-1)
            torch.testing.assert_close(torch.tensor(c.logprobs).double(), exact[torch.arange(len(c.ids)), c.ids], atol=2e-5, rtol=0)
    finally:
        backend.deterministic(before)


@pytest.mark.parametrize("changes, sentence", [
    (dict(draft=model(vocab_size=7)), "vocabularies of different sizes, 23 and 7"), (dict(prompts=[[]]), "prompt 0 has 0 tokens"),
    (dict(prompts=[[1] * 32]), "prompt 0 has 32 tokens"), (dict(ahead=0), "ahead must be at least 1"),
    (dict(max_new_tokens=0), "max_new_tokens, n and ahead must be at least 1, got 0"),
    (dict(sampling=replace(GREEDY, logit_bias=((23, 1.0),))), "logit_bias names id 23; the models have 23"),
    (dict(sampling=replace(GREEDY, repetition_penalty=1.2)), "repetition penalty")])
def test_what_cannot_be_is_refused_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        speculate(**{**dict(model=model(), draft=model(5), prompts=[[1]], max_new_tokens=4), **changes})
