"""Requests that come and go at random through an engine that is too small for all: what they draw, and what is left."""

import numpy as np
import pytest

from nanorlhf.engine import Engine, Request, SamplingConfig
from test_engine import GREEDY, TOK, Alternating, V, deterministic, empty  # noqa: F401
from tiny import model


def workload(count, seed):
    """Requests of every kind; a and b, in stop texts, are likely where they are asked for."""
    rng = np.random.default_rng(seed)
    starts = [[*b"Once upon a time"], [*b"system: be kind. "], [5], [*b"user: "]]
    requests = []
    for i in range(count):
        prompt = starts[rng.integers(4)] + rng.integers(0, 256, rng.integers(1, 20)).tolist()
        kind = rng.integers(6)
        sampling = [SamplingConfig(), GREEDY, SamplingConfig(0.7, 5), SamplingConfig(top_p=0.8, min_p=0.05),
                    SamplingConfig(1.3, repetition_penalty=1.8), SamplingConfig(logit_bias=((97, 9.0), (98, 9.0), (99, 8.0)))][kind]
        requests.append(Request(
            prompt, int(rng.integers(1, 13)), sampling, int(rng.integers(3)), i, (3, 8, 97) if i % 3 == 0 and kind != 5 else (),
            ("ab", "cab", "bb") if kind == 5 else (), Alternating(8) if kind == 0 and i % 3 == 0 else None,
            top_logprobs=2 * (i % 7 == 0), entropy=i % 5 == 0))
    return requests


def scheduled(engine, requests, rng, cancels=0.05):
    """Submit at random moments and cancel at random; (handles, the share of them that were cancelled)."""
    handles, left = [], list(requests)
    while left or engine.waiting or engine.batch.size:
        for _ in range(rng.poisson(0.9)):
            if left:
                handles.append(engine.submit(left.pop(0)))
        if rng.random() < cancels and handles:
            engine.cancel(handles[max(0, len(handles) - 1 - rng.integers(8))])
        engine.step()
    return handles


def same(got, expected, exact):
    """Of completions or their values: without the setting of deterministic a float may differ where it was recomputed or a prefix is shared."""
    if exact:
        return got == expected
    if isinstance(got, (list, tuple)):
        return len(got) == len(expected) and all(same(x, y, False) for x, y in zip(got, expected))
    return abs(got - expected) < 1e-4 if isinstance(got, float) else got == expected


def check_schedule(count, distinct, seed, exact=True):
    """The same tokens, log-probs and text as one by one, through an engine that is too small; beginnings of them where cancelled. Where
    sums are not always in one order, a draw or top-p may be decided by the last bit: in one of a thousand requests."""
    net, rng = model(1, loud=False, vocab_size=V, context=48), np.random.default_rng(seed)
    kinds = workload(distinct, seed)
    one = Engine(net, TOK, slots=1, keep=False)
    alone = [one.run([r])[0] for r in kinds]
    chosen = rng.integers(0, distinct, count) if count > distinct else np.arange(count)
    engine, put_off = Engine(net, TOK, slots=8, pool_tokens=112, page_size=4), []
    engine._put_off, original = lambda row: (put_off.append(row), original(row)), engine._put_off
    cancelled = different = 0
    for handle, which in zip(scheduled(engine, [kinds[i] for i in chosen], rng), chosen, strict=True):
        got, expected = handle.result(), alone[which]
        if got.finish_reason == "cancelled":
            cancelled += 1
            n = len(got.ids)
            different += not same((got.ids, got.logprobs, got.kept), (expected.ids[:n], expected.logprobs[:n], expected.kept[:n]), exact)
        else:
            different += not same([*vars(got).values()], [*vars(expected).values()], exact)
        assert different <= (0 if exact else count / 1000), kinds[which]
    reasons = [c.finish_reason for c in alone]
    assert 0.3 * distinct < reasons.count("length") and 0.15 * distinct < reasons.count("stop")
    assert count / 100 < cancelled < count / 5 and len(put_off) > count / 50
    assert empty(engine) and empty(one)


def test_requests_that_come_and_go_at_random_draw_what_they_draw_one_by_one(deterministic):
    check_schedule(300, 300, 0)


def test_and_do_so_natively():
    check_schedule(300, 300, 0, exact=False)


@pytest.mark.slow
def test_ten_thousand_requests_that_come_and_go_at_random(deterministic):
    check_schedule(10_000, 1000, 1)


@pytest.mark.slow
def test_ten_thousand_requests_natively():
    check_schedule(10_000, 1000, 1, exact=False)
