"""engine/engine.py: a request's tokens are its own, and every page comes back."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanorlhf.config import OptimConfig
from nanorlhf.engine import Engine, Request, SamplingConfig, generate
from nanorlhf.engine.cache import PagedCache
from nanorlhf.engine.constrain import TokenConstraint, Vocabulary, constrain, constraint, grammar, json_schema, regex
from nanorlhf.engine.generate import ragged
from nanorlhf.model import Model
from nanorlhf.ops import backend
from nanorlhf.optim import Optimizer
from tiny import byte_tokenizer, model, random_sequences

GREEDY = SamplingConfig(temperature=0)
TOK = byte_tokenizer()
V = TOK.vocab_size


@pytest.fixture
def deterministic():
    before = backend.deterministic(True)
    yield
    backend.deterministic(before)


class Alternating:
    """Ids of one parity, then the other; after 4 of them, ``end`` alone."""

    vocab_size = V

    def __init__(self, end):
        self.end = end

    def start(self):
        return 0

    def mask(self, state):
        word = np.uint32(0x55555555) if state % 2 else np.uint32(0xAAAAAAAA)
        words = np.full(-(-V // 32), word if state < 4 else 0, np.uint32)
        if state >= 4:
            words[self.end // 32] = 1 << self.end % 32
        return words.view(np.int32)

    def advance(self, state, token):
        if token % 2 == state % 2:
            raise ValueError(f"token {token} at {state}")
        return state + 1


def ran(net, prompts, slots=64, **engine):
    made = Engine(net, slots=slots, **engine)
    return made, [(c.ids, c.logprobs) for c in made.run([Request(p, 12, GREEDY) for p in prompts])]


def empty(engine):
    """Whether nobody but the tree holds a page, and all are free without it."""
    held = engine.pool.count - engine.pool.free
    fine = not engine.batch.size and not engine.waiting and held == len(engine.tree) == engine.pool.refs.sum()
    engine.tree.clear()
    return fine and engine.pool.free == engine.pool.count and not engine.pool.refs.any()


def test_greedy_tokens_are_the_same_bits_alone_in_company_with_shared_beginnings_and_after_eviction(deterministic):
    """64 prompts, of which most begin alike, through pools that hold all of them, a few, or hardly one."""
    net = model(1, context=64)
    starts = random_sequences(5, 30, seed=1, shortest=9)
    prompts = [starts[i % 5] + more for i, more in enumerate(random_sequences(64, 9, seed=2, shortest=1))]
    alone = [ran(net, [p], keep=False)[1][0] for p in prompts]
    for options in ({"keep": False, "pool_tokens": 64 * 64}, {"slots": 1}, {"pool_tokens": 64 * 64}, {"page_size": 4, "slots": 9},
                    {"pool_tokens": 200, "page_size": 4}, {"pool_tokens": 64, "page_size": 4}, {"pool_tokens": 64, "keep": False}):
        engine, drawn = ran(net, prompts, **options)
        assert drawn == alone, options
        again = [(c.ids, c.logprobs) for c in engine.run([Request(p, 12, GREEDY) for p in prompts[::7]])]
        assert again == alone[::7], options
        assert empty(engine)


def test_looking_at_the_tokens_every_few_steps_changes_nothing(deterministic):
    """As on a GPU: rows ride along after their stop token, and rows that end late keep the others from nothing."""
    net = model(1, loud=False)
    requests = [Request(p, 9, SamplingConfig(), 3, i, (3, 8)) for i, p in enumerate(random_sequences(20, 11, seed=4, shortest=1))]
    expected = Engine(net, slots=6).run(requests)
    for pool_tokens in (None, 48):
        engine = Engine(net, slots=6, pool_tokens=pool_tokens, page_size=4)
        engine.window = 4
        assert engine.run(requests) == expected and empty(engine)


def counted(monkeypatch):
    """How many tokens each forward pass runs."""
    counts = []
    for owner, name in ((Model, "hidden"), (PagedCache, "logits")):
        run, at = getattr(owner, name), 1 if name == "logits" else 0
        monkeypatch.setattr(owner, name, lambda self, *given, run=run, at=at: counts.append(len(given[at])) or run(self, *given))

    def several(self, *given, run=PagedCache.run, **settings):
        found = run(self, *given, **settings)
        counts.extend([found[0].shape[1]] * len(found[0]))
        return found

    monkeypatch.setattr(PagedCache, "run", several)
    return counts


def test_samples_of_a_prompt_run_it_once_and_hold_its_full_pages_once(monkeypatch):
    """64 samples of 516 tokens with 16 a page: 32 pages for all and, each, the 4 tokens that are left over, with 4 more, in one. That is
    576 + 1,024 tokens of cache where a row of its own each would hold 64 · 520 = 33,280."""
    net, counts = model(3, loud=False, context=600), counted(monkeypatch)
    prompt = random_sequences(1, 516, shortest=516)[0]
    engine = Engine(net, pool_tokens=600 + 64 * 16)
    engine.window = 1
    handles = [engine.submit(Request(prompt, 5, stream=i)) for i in range(64)]
    engine.step()
    assert counts == [516, 64] and engine.pool.count - engine.pool.free == 32 + 64
    while engine.step():
        pass
    assert len({tuple(h.result().ids) for h in handles}) == 64 and counts == [516, 64, 64, 64, 64]
    for h in handles[::21]:
        ids = prompt + h.result().ids
        with torch.no_grad():
            expected = net.logprobs(*ragged([ids]))[0][515:]
        torch.testing.assert_close(torch.tensor(h.result().logprobs), expected, atol=5e-5, rtol=0)


def test_what_has_been_read_is_not_read_again(monkeypatch):
    """A conversation that goes on, an edit of it, and prompts of one call that begin alike: only new tokens run, in whole pages of 4."""
    net, counts = model(1), counted(monkeypatch)
    engine = Engine(net, page_size=4)
    said = engine.run([Request([*range(10)], 3, GREEDY)])[0].ids
    assert counts == [10, 1, 1]
    engine.run([Request([*range(10), *said, 7], 1, GREEDY)])  # of the first 13 tokens 12 had keys, in 3 pages
    engine.run([Request([*range(9), 1, 1], 1, GREEDY)])  # the first two pages
    assert counts[3:] == [2, 3]
    engine.run([Request([9] * 8 + [i], 1, GREEDY) for i in range(5)])
    assert counts[5:] == [9 + 4]
    assert empty(engine)


def test_an_update_of_the_weights_is_seen_by_the_next_step_and_empties_the_tree():
    net = model(1)
    prompts = random_sequences(4, 20, seed=9, shortest=10)
    engine = Engine(net, page_size=4)
    engine.window = 1
    requests = [Request(p, 8, GREEDY) for p in prompts]
    before = engine.run(requests)
    assert len(engine.tree) and engine.run(requests) == before
    handles = [engine.submit(r) for r in requests]
    for _ in range(3):
        engine.step()
    version, optimizer = engine.version, Optimizer(net, OptimConfig(lr=0.5, muon_lr=0.5, warmup=0), 1)
    net.logprobs(*ragged(prompts))[0].sum().neg().backward()
    optimizer.step(0)
    assert engine.version > version
    while engine.step():
        pass
    fresh = Engine(net)
    for handle, old, prompt in zip(handles, before, prompts):
        ids = handle.result().ids
        assert ids[:4] == old.ids[:4]  # the fourth was drawn by the third step, after the prompt's own
        assert ids[4:] == fresh.run([Request(prompt + ids[:4], 4, GREEDY)])[0].ids
    after = engine.run(requests)
    assert [c.ids for c in after] != [c.ids for c in before] and [c.ids for c in after] == [c.ids for c in fresh.run(requests)]
    assert all(w.data_ptr() == p.data_ptr() for w, p in zip(engine.steps.weights(), net.parameters())) and empty(engine)


@torch.no_grad()
def test_what_is_reported_of_a_token_is_worked_out_from_the_whole_sequence():
    """Bias, then penalty, then the mask, then temperature and top-k, in fp64 over the logits without a cache."""
    net = model(1, vocab_size=V)
    sampling = SamplingConfig(0.6, 20, repetition_penalty=1.5, logit_bias=((4, 3.0), (200, -2.0)))
    request = Request([5, 6, 5, 9], 6, sampling, 3, 1, (8,), constraint=Alternating(8), top_logprobs=3, entropy=True)
    plain = Request([7, 7, 3], 6, SamplingConfig(), 3, 2)
    got, other = Engine(net).run([request, plain])
    assert len(got.ids) == 5 and got.ids[-1] == 8 and got.finish_reason == "stop"
    logits = (net(*ragged([list(request.prompt) + got.ids])).double() @ net.head_weight.T.double())[3:-1]
    for step, (row, token) in enumerate(zip(logits, got.ids)):
        policy = (row / 0.6).log_softmax(-1)
        shaped = row.clone()
        shaped[4] += 3
        shaped[200] -= 2
        for seen in {5, 6, 9, *got.ids[:step]}:
            shaped[seen] = shaped[seen] / 1.5 if shaped[seen] > 0 else shaped[seen] * 1.5
        allowed = [i for i in range(V) if i % 2 != step % 2] if step < 4 else [8]
        kept = (shaped / 0.6).softmax(-1)[allowed].sum()
        left = torch.full_like(shaped, -torch.inf)
        left[allowed] = shaped[allowed]
        least = left.sort(descending=True)[0][19]
        left[left < least] = -torch.inf
        found = got.logprobs[step], got.unfiltered[step], got.kept[step], got.entropy[step]
        expected = (left / 0.6).log_softmax(-1)[token], policy[token], kept, -(policy.exp() * policy).sum()
        assert found == pytest.approx([float(x) for x in expected], abs=2e-4)
        top = sorted(range(V), key=lambda i: -policy[i])[:3]
        assert [i for i, _ in got.top_logprobs[step]] == top
        assert [x for _, x in got.top_logprobs[step]] == pytest.approx(policy[top].tolist(), abs=2e-4)
    expected = net.logprobs(*ragged([[7, 7, 3] + other.ids]))[0][2:]
    assert other.unfiltered == pytest.approx(expected.tolist(), abs=5e-5) and other.logprobs == pytest.approx(other.unfiltered, abs=5e-5)
    assert other.kept == pytest.approx([1] * 6) and other.entropy == other.top_logprobs == []


def test_text_streams_without_its_stop_text_and_ends_there():
    net, heard, ids = model(1, loud=False, vocab_size=V), [], []
    sampling = SamplingConfig(logit_bias=((97, 9.0), (98, 9.0), (0xC3, 8.0), (0xA9, 9.0)))
    for seed in range(20):
        heard.clear(), ids.clear()
        got = Engine(net, TOK).run([Request([5], 20, sampling, seed, stop_text=("aab", "bb"), on_text=heard.append, on_token=ids.append)])[0]
        whole = bytes(i for i in got.ids if i < 256)
        ends = [e for e in range(len(whole) + 1) if whole[:e].endswith((b"aab", b"bb"))]
        cut = len(whole) if not ends else ends[0] - (3 if whole[:ends[0]].endswith(b"aab") else 2)
        assert got.text == whole[:cut].decode("utf-8", "replace") == "".join(heard) and ids == got.ids
        assert got.finished == bool(ends) and (not ends or ends[0] == len(whole))


def test_an_error_of_one_request_ends_it_alone():
    net = model(1, vocab_size=V)

    def fail(token):
        raise KeyError(token)

    engine = Engine(net, TOK)
    bad, good = engine.submit(Request([1], 5, on_token=fail)), engine.submit(Request([2], 5))
    while engine.step():
        pass
    assert len(good.result().ids) == 5 and len(bad.completion.ids) == 1 and empty(engine)
    with pytest.raises(KeyError):
        bad.result()
    with pytest.raises(KeyError):
        engine.run([Request([2], 5), Request([1], 5, on_token=fail), Request([3], 9)])
    assert empty(engine)


def test_a_callback_may_submit_and_cancel_whom_it_likes_and_not_decode():
    net, prompts = model(1, vocab_size=V), random_sequences(6, 9, V, 3)
    expected = [c.ids for c in generate(net, prompts, 12)]
    for who, victim, at in itertools.product(range(6), range(6), (1, 3, 6)):
        engine, handles, heard, more = Engine(net, TOK, page_size=4), [], [[] for _ in prompts], []

        def hear(i, token):
            heard[i].append(token)
            if i == who and len(heard[i]) == at:
                engine.cancel(handles[victim])
                more.append(engine.submit(Request(prompts[0], 12)))
                with pytest.raises(ValueError, match="a callback may submit and cancel requests, not decode"):
                    engine.step()

        for i, prompt in enumerate(prompts):  # two of the others end when the victim is cancelled
            handles.append(engine.submit(Request(prompt, 6 if i % 2 else 12, stream=i, on_token=lambda token, i=i: hear(i, token))))
        while engine.step():
            pass
        for i, handle in enumerate(handles):
            ids, room = handle.result().ids, 6 if i % 2 else 12
            assert ids == heard[i] == expected[i][:at if i == victim else room]
            assert handle.completion.finish_reason == ("cancelled" if i == victim and at < room else "length")
        assert more[0].result().ids == expected[0] and empty(engine)


def test_the_text_at_the_end_may_cancel_too():
    net, handles = model(1, vocab_size=V), []
    for victim in range(3):
        engine, heard = Engine(net, TOK, page_size=4), []
        half = Request([5], 1, SamplingConfig(logit_bias=((0xC3, 99.0),)), on_text=lambda piece: (heard.append(piece), engine.cancel(handles[victim])))
        handles = [engine.submit(r) for r in (Request([7], 12), half, Request([9], 12))]
        while engine.step():
            pass
        assert heard == ["\ufffd"] and empty(engine)
        assert [len(h.result().ids) == 12 for h in (handles[0], handles[2])] == [victim != 0, victim != 2]


def test_weights_that_a_callback_changes_are_those_of_the_next_token():
    net, prompts = model(1, vocab_size=V), random_sequences(2, 9, V, 3)

    @torch.no_grad()
    def change(token):
        net.model.embed_tokens.weight.mul_(0.5).add_(0.1)

    engine = Engine(net, TOK, page_size=4)
    ids = engine.run([Request(prompts[0], 1, GREEDY, on_token=change), Request(prompts[1], 12, GREEDY)])[1].ids
    assert ids[1:] == Engine(net).run([Request(prompts[1] + ids[:1], 11, GREEDY)])[0].ids and empty(engine)


def test_a_step_that_fails_where_a_page_begins_takes_no_second_page(monkeypatch):
    net, prompts = model(1), random_sequences(3, 9, seed=3)
    expected = [c.ids for c in generate(net, prompts, 12)]
    for fails in range(8):
        engine, calls = Engine(net, page_size=4), []
        for name in ("logits", "run"):
            run = getattr(PagedCache, name)
            monkeypatch.setattr(PagedCache, name, lambda *args, run=run, **settings: (calls.append(0), 1 / (len(calls) - 2 - fails), run(*args, **settings))[2])
        engine.window = 1
        handles = [engine.submit(Request(p, 12, stream=i)) for i, p in enumerate(prompts)]
        with pytest.raises(ZeroDivisionError):
            while engine.step():
                pass
        while engine.step():
            pass
        assert [h.result().ids for h in handles] == expected and empty(engine)


def test_tokens_that_a_window_lost_lead_to_no_page(monkeypatch):
    """As where a GPU, which nobody waits for, tells of logits that are no distribution only when the window is looked at. Asked for its
    entropy, a token is drawn by itself."""
    net, prompt = model(1), [1, 2, 3, 4]
    engine = Engine(net, slots=1, page_size=4)
    engine.window = 4
    first, second = (engine.run([Request(prompt, 12, stream=i)])[0].ids for i in (1, 2))
    engine.tree.clear()
    engine.run([Request(prompt, 12, stream=1)])
    draw, calls = engine.steps.draw, []

    def failing(*args):
        tokens, *more = draw(*args)
        calls.append(0)
        return tokens if len(calls) < 9 else torch.full_like(tokens, -1), *more

    with monkeypatch.context() as patch:
        patch.setattr(engine.steps, "draw", failing)
        with pytest.raises(ValueError, match="no distribution"):
            engine.run([Request(prompt, 12, stream=2, entropy=True)])
    asked = [Request(prompt + second[:5] + first[5:8] + [3], 5, GREEDY)]
    (got,), (wanted,) = engine.run(asked), Engine(net).run(asked)
    assert got.ids == wanted.ids and np.allclose(got.unfiltered, wanted.unfiltered, atol=1e-5) and empty(engine)


@pytest.mark.parametrize("language", [regex(r"[a-c]{2,9}(é|日)*;"), json_schema({"type": "array", "items": {"type": "string", "maxLength": 3}}),
                                      grammar('root ::= "x" root "y" | "ab"')], ids=["regex", "schema", "grammar"])
def test_a_constraint_that_goes_along_natively_draws_what_it_draws_step_by_step(language):
    """In company of rows without one; stepwise because a token's entropy is asked for. A text ends where the end token comes."""
    net, end = model(1, loud=False, vocab_size=V, context=64), TOK.special_tokens["<|end|>"]
    keeps = constrain(language, TOK, [end])
    requests = [Request(p, 30, stream=i, stop=(end,) if i % 2 else (), constraint=keeps if i % 3 else None) for i, p in enumerate(random_sequences(12, 9, V, 3))]
    native = Engine(net, TOK).run(requests)
    for got, expected in zip(native, Engine(net, TOK).run([replace(r, entropy=True) for r in requests])):
        assert (got.ids, got.finish_reason, got.text) == (expected.ids, expected.finish_reason, expected.text)
        assert np.allclose(got.logprobs, expected.logprobs, atol=1e-5) and np.allclose(got.kept, expected.kept, atol=1e-5)
    for got, r in zip(native, requests):
        assert r.constraint is None or not got.finished or keeps.matches(got.text)


def test_rows_between_whose_cursors_their_constraint_is_begun_anew_draw_the_same(monkeypatch):
    net, end = model(1, loud=False, vocab_size=V, context=64), TOK.special_tokens["<|end|>"]
    requests = [Request(p, 40, stream=i, stop=(end,)) for i, p in enumerate(random_sequences(6, 9, V, 3))]

    def found():
        keeps = TokenConstraint(json_schema({"type": "array", "items": {"enum": ["abcabc", "bcabca"]}, "minItems": 9}), Vocabulary.of(TOK), [end])
        return [c.ids for c in Engine(net, TOK).run([replace(r, constraint=keeps) for r in requests])], keeps

    expected, _ = found()
    monkeypatch.setattr(constraint, "_NODES", 9)
    ours, keeps = found()
    assert ours == expected and keeps._walked.epoch > 9


def test_a_native_constraint_after_which_nothing_can_come_ends_its_request_alone():
    """The vocabulary has no token for what has to follow "ab"."""
    end, words = V - 1, [b"a", b"b"] + [b""] * (V - 2)
    keeps = constrain(regex("abc"), Vocabulary(words), [end])
    engine = Engine(model(1, vocab_size=V))
    bad, good = engine.submit(Request([1], 9, constraint=keeps)), engine.submit(Request([2], 20))
    while engine.step():
        pass
    assert bad.completion.ids == [0, 1] and bad.completion.finish_reason == "error" and not bad.completion.finished
    with pytest.raises(ValueError, match="nothing can follow at byte 2 of a text of .*, after 'ab'"):
        bad.result()
    assert good.result().ids == Engine(model(1, vocab_size=V)).run([Request([2], 20)])[0].ids and empty(engine)


def test_a_bias_that_bans_what_the_constraint_asks_for_ends_that_request_alone():
    engine = Engine(model(1, vocab_size=V))
    bad = engine.submit(Request([1], 9, SamplingConfig(logit_bias=((8, -np.inf),)), constraint=Alternating(8)))
    good = engine.submit(Request([2], 9))
    while engine.step():
        pass
    assert len(good.result().ids) == 9 and len(bad.completion.ids) == 4 and empty(engine)
    with pytest.raises(ValueError, match="logit_bias bans every token that the constraint allows after 4 tokens"):
        bad.result()


def test_ids_that_the_tokenizer_does_not_have_are_no_text():
    net, sampling = model(1, vocab_size=V + 9), SamplingConfig(logit_bias=((V + 3, 99.0), (97, 98.0)))
    for options in ({}, {"stop_text": ("b",)}):
        got = Engine(net, TOK).run([Request([5], 20, sampling, **options)])[0]
        assert V + 3 in got.ids and 97 in got.ids and set(got.text) == {"a"}


def test_a_prompt_is_what_it_was_when_it_was_submitted():
    engine, prompt = Engine(model(1)), np.array([1, 2, 3])
    handle = engine.submit(Request(prompt, 5))
    prompt[:] = 7
    while engine.step():
        pass
    assert handle.result().ids == engine.run([Request([1, 2, 3], 5)])[0].ids


@pytest.mark.parametrize("window", [1, 2])
def test_a_pass_that_fails_leaves_the_engine_as_it_was(monkeypatch, window):
    """In the model and, because its states are no numbers, in the draw; each time a pass later."""
    net, prompt, passes = model(1), [1, 2, 3, 4, 5, 6], [(Model, "hidden"), (PagedCache, "logits"), (PagedCache, "run")]
    engine, expected = Engine(net, page_size=4), generate(net, [prompt, prompt[::-1]], 25, 2)
    engine.window = window
    handles = [engine.submit(Request(p, 25, stream=i)) for i, p in enumerate((prompt, prompt, prompt[::-1], prompt[::-1]))]
    for good in range(4):
        for error, broken in ((ZeroDivisionError, lambda: 1 / 0), (ValueError, lambda: None)):
            calls = []

            def failing(self, *args, run, **settings):
                calls.append(0)
                out = run(self, *args, **settings)
                if len(calls) <= good:
                    return out
                broken()
                if settings:  # a run draws itself
                    raise error
                return out * torch.nan

            with monkeypatch.context() as patch:
                for owner, name in passes:
                    patch.setattr(owner, name, lambda self, *args, run=getattr(owner, name), **settings: failing(self, *args, run=run, **settings))
                with pytest.raises(error):
                    while engine.step():
                        pass
    while engine.step():
        pass
    assert [h.result().ids for h in handles] == [c.ids for c in expected] and empty(engine)


def test_requests_of_a_run_that_fails_are_gone():
    net = model(1)
    engine = Engine(net)
    net.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="row 0"):
        engine.run([Request([1, 2], 3), Request([3], 3)])
    assert empty(engine)


def test_what_cannot_be_decoded_is_refused_in_one_sentence():
    engine = Engine(model(), pool_tokens=16, page_size=4)
    for request, message in (
        (Request([1] * 32, 3), "the prompt has 32 tokens; it needs 1 to 31 for a context of 32"),
        (Request([], 3), "the prompt has 0 tokens"),
        (Request([1] * 12, 6), "a prompt of 12 tokens and 6 new ones need 5 pages of 4 tokens; the pool has 4"),
        (Request([1, 23], 3), r"a prompt is a list of ids from 0 to 22, got \[1, 23\]"),
        (Request([1, -1], 3), r"a prompt is a list of ids from 0 to 22, got \[1, -1\]"),
        (Request([1.5], 3), r"a prompt is a list of ids from 0 to 22, got \[1.5\]"),
        (Request([1], 3, SamplingConfig(logit_bias=tuple((i, -np.inf) for i in range(23)))), "logit_bias bans every token"),
        (Request([1], 3, stop_text=("x",)), "stop_text and on_text need an engine with a tokenizer"),
        (Request([1], 3, constraint=Alternating(8)), "a constraint over 261 tokens does not fit a model of 23"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(request)
    assert len(engine.run([Request([1] * 12, 5)])[0].ids) == 5 and empty(engine)
    for options in (dict(max_new_tokens=2.5), dict(max_new_tokens=3, seed=1.5), dict(max_new_tokens=3, stop=("a",))):
        with pytest.raises(ValueError, match="engine: expected whole numbers for"):
            Request([1], **options)
    with pytest.raises(ValueError, match="slots, pool_tokens and page_size must be at least 1, got 0"):
        Engine(model(), slots=0)
