"""engine/filters.py and the sampler that applies them: against Hugging Face's processors, by hand, and by frequencies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings as how
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from nanorlhf.engine import Sampler, SamplingConfig, entropy, generate, top_logprobs
from nanorlhf.engine.filters import LogitBias, RepetitionPenalty
from test_sample import CHI2, LOGITS, warped
from tiny import model

SEEN = [6, 0, 0, 5]
BIAS = ((1, 1.25), (4, 3.0), (0, -0.5), (7, -math.inf))
OPTIONS = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.7, "logit_bias": BIAS, "mask": 0b11011111}
COMBINED = [*({name: x} for name, x in OPTIONS.items()), {"repetition_penalty": 0.6}, {"repetition_penalty": 1.7, "logit_bias": BIAS},
            {"repetition_penalty": 1.7, "mask": 0b11011111}, {"temperature": 0.7, "repetition_penalty": 1.7, "top_k": 5},
            {"temperature": 1.5, "logit_bias": BIAS, "top_p": 0.9}, {k: x for k, x in OPTIONS.items() if k != "mask"}, OPTIONS]  # fmt: skip


def processed(logits, seen, repetition_penalty=1.0, logit_bias=()):
    """Logits (B, V) in fp64 after Hugging Face's processors, in generate()'s order. Its bias takes no -inf: it is added apart."""
    ids, scores = torch.tensor([seen] * len(logits)), logits.double()
    finite = {(token,): float(x) for token, x in logit_bias if x > -math.inf}
    if finite:
        scores = SequenceBiasLogitsProcessor(finite)(ids, scores)
    for token, x in logit_bias:
        scores[:, token] += x if x == -math.inf else 0
    if repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(repetition_penalty)(ids, scores)
    return scores


def expected_of(options):
    """Probabilities (8,) in fp64: the mask, Hugging Face's processors, its warpers."""
    options = dict(options)
    mask = options.pop("mask", 255)
    allowed = torch.tensor([bool(mask >> j & 1) for j in range(8)])
    own = {k: options.pop(k) for k in ("repetition_penalty", "logit_bias") if k in options}
    scores = processed(LOGITS[None], SEEN, **own).masked_fill(~allowed, -math.inf)
    return warped(scores, **options).softmax(-1)[0]


def drawn(options, count=20_000, vocab_size=8):
    options = dict(options)
    mask = options.pop("mask", None)
    mask = mask if mask is None else torch.tensor([[mask]], dtype=torch.int32).expand(count, -1)
    sampler = Sampler([SamplingConfig(**options)] * count, 5, vocab_size, [SEEN] * count)
    return sampler.draw(LOGITS.repeat(count, 1), torch.arange(count), torch.zeros(count, dtype=torch.int64), mask)


@pytest.mark.parametrize("options", COMBINED, ids=str)
def test_tokens_come_as_often_as_hugging_faces_processors_say(options):
    """Pearson's χ² of 20,000 draws against the expected counts, below the point that chance passes once in 1,000; and each token's
    log-probability, its share before any filter, and what the mask kept, in fp64."""
    tokens, logprobs, unfiltered, kept = drawn(options)[:4]
    p = expected_of(options)
    counts, expected = np.bincount(tokens.numpy(), minlength=8), 20_000 * p.numpy()
    live = expected > 0
    assert counts[~live].sum() == 0
    assert ((counts[live] - expected[live]) ** 2 / expected[live]).sum() < CHI2[live.sum() - 1]
    torch.testing.assert_close(logprobs.double(), p.log()[tokens], rtol=1e-6, atol=1e-6)
    temperature = options.get("temperature", 1.0)
    torch.testing.assert_close(unfiltered.double(), (LOGITS.double() / temperature).log_softmax(-1)[tokens], rtol=1e-6, atol=1e-6)
    own = {k: options[k] for k in ("repetition_penalty", "logit_bias") if k in options}
    whole = (processed(LOGITS[None], SEEN, **own) / temperature).softmax(-1)[0]
    share = sum(float(x) for j, x in enumerate(whole) if options.get("mask", 255) >> j & 1)
    assert kept.unique().tolist() == pytest.approx([share])


def test_rows_that_ask_for_nothing_keep_their_logits_and_others_have_their_own():
    configs = [SamplingConfig(), SamplingConfig(repetition_penalty=2.0), SamplingConfig(logit_bias=((2, 1.0),)), SamplingConfig(),
               SamplingConfig(repetition_penalty=0.5, logit_bias=((5, -2.0), (0, 1.0)))]  # fmt: skip
    seen = [[1], [2, 2, 3], [], [4], [0, 5]]
    logits = 3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    filters = Sampler(configs, 0, 8, seen).filters
    changed = logits.clone()
    for f in filters:
        f.apply(changed)
    assert changed[0].equal(logits[0]) and changed[3].equal(logits[3])
    for row in (1, 2, 4):
        c = configs[row]
        exact = processed(logits[row][None], seen[row] or [7], c.repetition_penalty, c.logit_bias)
        torch.testing.assert_close(changed[row].double(), exact[0], rtol=1e-6, atol=1e-6)
    assert [f.rows.tolist() for f in filters] == [[2, 4], [1, 4]]
    for f in reversed(filters):
        f.undo(changed)
    assert changed.equal(logits)


@given(st.integers(1, 6), st.sampled_from([1, 31, 32, 33, 4097]), st.integers(0, 2**31), st.data())
@how(max_examples=50, deadline=None)
def test_the_penalty_is_hugging_faces_for_any_history(B, V, seed, data):
    """Step after step: what was drawn counts as seen from then on, more of it than there was room for at first."""
    g = torch.Generator().manual_seed(seed)
    penalties = [data.draw(st.sampled_from([0.5, 1.0, 1.3, 4.0])) for _ in range(B)]
    seen = [torch.randint(0, V, (data.draw(st.integers(0, 40)),), generator=g).tolist() for _ in range(B)]
    penalty = RepetitionPenalty(penalties, seen, V)
    for _ in range(40):
        logits = torch.randn(B, V, generator=g, dtype=torch.float64)
        ours = logits.clone()
        penalty.apply(ours)
        for row, p in enumerate(penalties):
            theirs = RepetitionPenaltyLogitsProcessor(p)(torch.tensor([seen[row]], dtype=torch.int64), logits[row][None])
            torch.testing.assert_close(ours[row], theirs[0], rtol=1e-12, atol=0)
        tokens = torch.randint(0, V, (B,), generator=g)
        penalty.see(tokens)
        seen = [[*ids, token] for ids, token in zip(seen, tokens.tolist())]


def test_one_sampler_for_all_rows_draws_what_each_rows_own_does():
    """Bit for bit, over several steps, logits in bf16 too; seeds of their own, one beyond 2^63."""
    configs = [SamplingConfig(t, k, p, m, r, b) for t, k, p, m, r, b in
               [(0.7, 0, 1, 0, 1, ()), (1, 3, 1, 0, 1.5, ()), (0, 0, 1, 0, 1.2, ((3, 2.0),)), (1.3, 0, 0.9, 0.1, 1, ((0, -1.0), (9, 4.0)))]]
    seeds, seen = [1, 2**63 + 5, -4, 1], [[1], [2, 3], [4], [5]]
    for dtype in (torch.float32, torch.bfloat16):
        together = Sampler(configs, seeds, 300, seen)
        alone = [Sampler([c], s, 300, [ids]) for c, s, ids in zip(configs, seeds, seen)]
        requests = torch.tensor([7, 8, 9, 7])
        for step in range(6):
            logits = (3 * torch.randn(4, 300, generator=torch.Generator().manual_seed(step))).to(dtype)
            steps = torch.full((4,), step)
            each = [a.draw(logits[i : i + 1].clone(), requests[i : i + 1], steps[i : i + 1]) for i, a in enumerate(alone)]
            before = logits.clone()
            drawn = together.draw(logits, requests, steps)
            assert logits.equal(before)
            for i in (0, 1, 3):
                assert drawn[i].equal(torch.cat([one[i] for one in each]))
            torch.testing.assert_close(drawn.unfiltered, torch.cat([one.unfiltered for one in each]), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("options", COMBINED, ids=str)
def test_top_logprobs_and_entropy_are_those_of_what_is_drawn_from(options):
    p, options = expected_of(options), dict(options)
    mask = options.pop("mask", None)
    sampler = Sampler([SamplingConfig(**options), SamplingConfig(0)], 5, 8, [SEEN] * 2)
    given = LOGITS.repeat(2, 1), torch.tensor([0, 1]), torch.tensor([0, 0])
    drawn = sampler.draw(*given, mask if mask is None else torch.tensor([[mask]] * 2, dtype=torch.int32), top=3, with_entropy=True)
    alone = Sampler([SamplingConfig(**options)], 5, 8, [SEEN]).draw(LOGITS[None].clone(), *(x[:1] for x in given[1:]),
        mask if mask is None else torch.tensor([[mask]], dtype=torch.int32), top=3, with_entropy=True)  # fmt: skip
    for ids, logprobs, spread in ((drawn.top[0][0], drawn.top[1][0], drawn.entropy[0]), (alone.top[0][0], alone.top[1][0], alone.entropy[0])):
        expected = p.sort(descending=True)[0][:3]
        assert logprobs.exp().tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        assert p[ids].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        assert float(spread) == pytest.approx(-sum(x * math.log(x) for x in p.tolist() if x), rel=1e-5)
    assert drawn.top[0][1, 0] == 0 and drawn.top[1][1].tolist() == [0, -math.inf, -math.inf] and drawn.entropy[1] == 0


def test_settings_that_all_rows_share_stay_numbers():
    sampler = Sampler([SamplingConfig(0.5, 3), SamplingConfig(0.5, 4)], [9, 9], 8)
    assert sampler.seed == 9 and sampler.settings["temperature"] == 0.5 and sampler.settings["top_k"].tolist() == [3, 4]
    assert set(sampler.settings) == {"temperature", "top_k"} and sampler.filters == []
    assert Sampler([], [], 8).settings == {}


def test_entropy_and_top_logprobs_by_hand():
    """Probabilities ½, ¼, ⅛, ⅛: 1.75 bits. Without the second, ⅔, ⅙, ⅙; top-k 2, ⅔ and ⅓; at temperature 0 nothing is left open."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]]))
    assert entropy(logits).item() == pytest.approx(1.75 * math.log(2))
    assert entropy(logits, temperature=0.0).item() == 0
    third = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert entropy(logits, top_k=2).item() == pytest.approx(third)
    mask = torch.tensor([[0b1101]], dtype=torch.int32)
    ids, logprobs = top_logprobs(logits, 4, mask=mask)
    assert ids[0, 0] == 0 and sorted(ids[0, 1:3].tolist()) == [2, 3]
    assert logprobs.exp()[0].tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6, 0])
    ids, logprobs = top_logprobs(logits.expand(2, -1), 2, temperature=torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert ids.tolist() == [[0, 1]] * 2 and logprobs[1].exp().tolist() == pytest.approx([16 / 22, 4 / 22])


def test_generate_heeds_bias_and_penalty():
    """Greedy tokens of the model, each step's logits processed by hand from what has been said."""
    net, prompts = model(), [[1, 2, 3], [4, 5]]
    sampling = SamplingConfig(0, repetition_penalty=1.8, logit_bias=((2, 1.0), (3, -math.inf)))
    for prompt, answer in zip(prompts, generate(net, prompts, 8, sampling=sampling, seed=1), strict=True):
        ids = list(prompt)
        for token in answer.ids:
            with torch.no_grad():
                hidden = net(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
            scores = processed((hidden[-1] @ net.head_weight.T)[None].detach(), ids, 1.8, sampling.logit_bias)
            assert float(scores[0, token]) >= float(scores.max()) - 1e-4
            ids.append(token)
        assert answer.ids != generate(net, [prompt], 8, sampling=SamplingConfig(0))[0].ids


@pytest.mark.parametrize("options, sentence", [
    (dict(repetition_penalty=0.0), "repetition_penalty: expected a finite number above 0, got 0.0"),
    (dict(repetition_penalty=math.inf), "repetition_penalty: expected a finite number above 0, got inf"),
    (dict(repetition_penalty=math.nan), "repetition_penalty: expected a finite number above 0, got nan"),
    (dict(logit_bias=((-1, 1.0),)), "logit_bias: expected ids of 0 or more, each once, got -1"),
    (dict(logit_bias=((3, 1.0), (3, 2.0))), "logit_bias: expected ids of 0 or more, each once, got 3 again"),
    (dict(logit_bias=((3, math.inf),)), "logit_bias: expected numbers below inf, got inf for id 3"),
    (dict(logit_bias=((3, math.nan),)), "logit_bias: expected numbers below inf, got nan for id 3"),
    (dict(logit_bias=((3, -1e300),)), r"logit_bias: expected -inf or a number from -1e\+30 to 1e\+30, got -1e\+300 for id 3"),
    (dict(repetition_penalty=1e-300), r"repetition_penalty: expected a number from 1e-06 to 1e\+06, got 1e-300"),
    (dict(temperature=1e300), r"sample: expected a temperature of at most 1e\+30, got 1e\+300"),
    (dict(top_k=1 << 63), r"sample: expected top_k to be a whole number below 2\^63, got 9223372036854775808"),
    (dict(top_k=1.5), r"sample: expected top_k to be a whole number below 2\^63, got 1.5"),
])  # fmt: skip
def test_settings_out_of_range_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        SamplingConfig(**options)


def test_ids_outside_the_vocabulary_and_what_is_missing_are_named():
    with pytest.raises(ValueError, match=r"^logit_bias: expected ids in \[0, V = 8\), got 8$"):
        LogitBias([(), ((8, 1.0),)], 8)
    with pytest.raises(ValueError, match=r"^repetition_penalty: expected ids in \[0, V = 8\), got 9$"):
        RepetitionPenalty([1.0, 2.0], [[99], [1, 9]], 8)
    with pytest.raises(ValueError, match=r"^repetition_penalty: expected the ids that each row has seen$"):
        Sampler([SamplingConfig(repetition_penalty=2.0)], 0, 8)
    with pytest.raises(ValueError, match=r"^top_logprobs: expected k from 1 to V = 8, got 9$"):
        top_logprobs(torch.zeros(1, 8), 9)
    with pytest.raises(ValueError, match="temperature of 0 or more, got -1"):
        entropy(torch.zeros(1, 8), temperature=-1.0)
    everything = Sampler([SamplingConfig(logit_bias=tuple((j, -math.inf) for j in range(8)))], 0, 8)
    with pytest.raises(ValueError, match="all -inf, got row 0"):
        everything.draw(torch.zeros(1, 8), torch.tensor([0]), torch.tensor([0]))
