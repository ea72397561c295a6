"""engine/generate.py: a request's continuation is its own, whoever shares its batch."""

import numpy as np
import pytest
import torch

from nanorlhf.engine import Completion, SamplingConfig, generate
from nanorlhf.engine.generate import ragged
from tiny import model, random_sequences

GREEDY = SamplingConfig(temperature=0)
PROMPTS = random_sequences(9, 11, seed=4, shortest=1)


def test_sequences_lie_end_to_end_also_empty_ones():
    tokens, cu_seqlens = ragged([[5], [], [6, 7]])
    assert tokens.tolist() == [5, 6, 7] and cu_seqlens.tolist() == [0, 1, 1, 3]
    assert tokens.dtype == torch.int64 and cu_seqlens.dtype == torch.int32
    assert ragged([])[1].tolist() == [0]


@torch.no_grad()
def test_greedy_decoding_is_the_argmax_of_the_uncached_forward():
    net = model(1)
    for prompt, drawn in zip(PROMPTS, generate(net, PROMPTS, 12, sampling=GREEDY)):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int((net(*ragged([ids]))[-1] @ net.head_weight.T).argmax()))
        assert drawn.ids == ids[len(prompt):] and not drawn.finished


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cached_logprobs_are_those_of_the_model_without_a_cache(temperature):
    net = model(1)
    for prompt, drawn in zip(PROMPTS, generate(net, PROMPTS, 12, sampling=SamplingConfig(temperature), seed=2)):
        expected, _ = net.logprobs(*ragged([prompt + drawn.ids]), temperature=temperature)
        torch.testing.assert_close(torch.tensor(drawn.logprobs), expected[len(prompt) - 1:], atol=3e-5, rtol=0)


@torch.no_grad()
def test_with_top_k_the_logprob_is_renormalised_over_the_tokens_that_were_kept():
    net = model(1)
    for prompt, drawn in zip(PROMPTS, generate(net, PROMPTS, 6, sampling=SamplingConfig(top_k=3), seed=2)):
        logits = (net(*ragged([prompt + drawn.ids])) @ net.head_weight.T)[len(prompt) - 1:-1]
        kept, order = logits.topk(3)
        expected = kept.log_softmax(-1)[order == torch.tensor(drawn.ids)[:, None]]
        torch.testing.assert_close(torch.tensor(drawn.logprobs), expected, atol=3e-5, rtol=0)


def sampled(prompts, n=1, seed=7, batch=384, tokens=10, stop=(3, 8)):
    return generate(model(1, loud=False), prompts, tokens, n, stop, SamplingConfig(), seed, batch)


def test_a_request_draws_the_same_tokens_whatever_the_size_of_its_batch():
    whole = sampled(PROMPTS, n=3)
    assert len({tuple(c.ids) for c in whole}) > 20  # 27 continuations, not copies of one
    for batch in (1, 3, 6, 7, 30):
        again = sampled(PROMPTS, n=3, batch=batch)
        assert [c.ids for c in again] == [c.ids for c in whole]
        assert [c.finished for c in again] == [c.finished for c in whole]


def test_a_request_alone_draws_what_it_draws_in_company():
    """Request i depends on (seed, i, its prompt): the first of a batch is the first of any other."""
    whole = sampled(PROMPTS)
    assert sampled(PROMPTS[:1])[0] == Completion(whole[0].ids, pytest.approx(whole[0].logprobs, abs=1e-5), whole[0].finished)
    assert [c.ids for c in sampled(PROMPTS[:4])] == [c.ids for c in whole[:4]]


def test_n_continuations_of_a_prompt_are_those_of_the_prompt_written_n_times():
    many = sampled(PROMPTS[:3], n=4)
    one = sampled([p for p in PROMPTS[:3] for _ in range(4)])
    assert [c.ids for c in many] == [c.ids for c in one]
    assert len({tuple(c.ids) for c in many[:4]}) == 4


def test_many_greedy_samples_that_share_a_prompt_are_that_of_the_prompt_alone():
    """20 of each, more than are decoded one by one; some requests end early and drop out."""
    net = model(1)
    alone = generate(net, PROMPTS, 12, 1, (3, 8), GREEDY)
    for one, many in zip(alone, range(0, 180, 20)):
        for drawn in generate(net, PROMPTS, 12, 20, (3, 8), GREEDY)[many:many + 20:19]:
            assert drawn.ids == one.ids
            assert drawn.logprobs == pytest.approx(one.logprobs, abs=1e-5)


def test_another_seed_draws_other_tokens():
    assert [c.ids for c in sampled(PROMPTS)] != [c.ids for c in sampled(PROMPTS, seed=8)]


def test_a_continuation_ends_with_its_first_stop_token_and_not_before():
    """Without stop tokens the same requests go on; with them each is cut after the first stop token in it."""
    free, cut = sampled(PROMPTS, n=4, tokens=20, stop=()), sampled(PROMPTS, n=4, tokens=20)
    for whole, drawn in zip(free, cut):
        hits = [i for i, token in enumerate(whole.ids) if token in (3, 8)]
        assert drawn.ids == (whole.ids[:hits[0] + 1] if hits else whole.ids)
        assert drawn.finished == bool(hits) and len(drawn.logprobs) == len(drawn.ids)
    assert 0 < sum(c.finished for c in cut) < len(cut)


def test_a_continuation_is_cut_where_the_context_ends_and_the_others_go_on():
    """Context 32: prompts of 31, 28 and 1 tokens leave room for 1, 4 and the 10 that are asked for."""
    prompts = [[1] * 31, [2] * 28, [3]]
    drawn = sampled(prompts, n=2, stop=())
    assert [len(c.ids) for c in drawn] == [1, 1, 4, 4, 10, 10] and not any(c.finished for c in drawn)
    alone = [c.ids for c in sampled(prompts[:1], n=2, stop=())]
    assert [c.ids for c in drawn[:2]] == alone


def test_tokens_are_announced_as_they_are_drawn():
    heard = {}
    net = model(1, loud=False)
    drawn = generate(net, PROMPTS, 6, 2, [3], seed=1, batch=5, on_token=lambda r, t: heard.setdefault(r, []).append(t))
    assert [heard[r] for r in range(18)] == [c.ids for c in drawn]


def test_tokens_come_as_often_as_the_model_says():
    """2,000 first tokens after one prompt: χ² with 22 degrees of freedom, below its 0.1 % point, 48.27."""
    net = model(3, loud=False)
    net.model.embed_tokens.weight.data.mul_(8)
    drawn = generate(net, [[5, 6]], 1, 2000, seed=11)
    with torch.no_grad():
        p = (net(*ragged([[5, 6]]))[-1] @ net.head_weight.T).softmax(-1).double().numpy()
    counts = np.bincount([c.ids[0] for c in drawn], minlength=23)
    assert p.max() > 2 / 23  # far from even
    assert ((counts - 2000 * p) ** 2 / (2000 * p)).sum() < 48.27


def test_bfloat16_decoding_returns_finite_logprobs_close_to_the_trainers():
    net = model(1)
    net.compute_dtype = torch.bfloat16
    for prompt, c in zip(PROMPTS, generate(net, PROMPTS, 6, seed=2)):
        with torch.no_grad():
            expected, _ = net.logprobs(*ragged([prompt + c.ids]))
        torch.testing.assert_close(torch.tensor(c.logprobs), expected[len(prompt) - 1:], atol=0.25, rtol=0)


def test_bad_requests_are_refused_in_one_sentence():
    net = model()
    with pytest.raises(ValueError, match="generate: prompt 1 has 0 tokens; it needs 1 to 31 for a context of 32"):
        generate(net, [[1], []], 3)
    with pytest.raises(ValueError, match="generate: prompt 0 has 32 tokens"):
        generate(net, [[1] * 32], 3)
    with pytest.raises(ValueError, match="max_new_tokens and n must be at least 1, got 0 and 1"):
        generate(net, [[1]], 0)
    assert generate(net, [], 3) == []
