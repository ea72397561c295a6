"""engine/prefill.py: which prompts run, on which pages."""

from collections import deque

import numpy as np
import torch

from nanorlhf.engine import Request
from nanorlhf.engine.pages import PagePool, PrefixTree
from nanorlhf.engine.prefill import Prefill, plan_next
from nanorlhf.engine.request import Handle


def planned(prompts, pages=20, slots=9, tokens=100, known=()):
    pool = PagePool(pages, 2)
    tree, waiting = PrefixTree(pool), deque(Handle(Request(p, 3), 3, None) for p in prompts)
    if known:
        taken = pool.take(len(known) // 2)
        tree.insert(np.array(known), taken)
        pool.release(taken)
    return plan_next(waiting, slots, tokens, pool, tree, pool.take, True), waiting, pool


def test_a_prompt_is_run_once_after_what_is_known_of_it():
    """Pages of 2. [1 2][3 4] is known, pages 0 and 1. a goes on from both, b (twice) from nothing, c from b's first page, which the
    same pass fills; d is known but for its last token, which has to be run."""
    a, b, c, d = [1, 2, 3, 4, 5], [7, 7, 8], [7, 7, 9, 9], [1, 2, 3, 4]
    plans, waiting, pool = planned([a, b, c, b, d], known=[1, 2, 3, 4])
    assert not waiting and [(p.context.tolist(), p.matched, [t.tolist() for t in p.tables]) for p in plans] == [
        (a, 2, [[0, 1, 2]]), (b, 0, [[3, 4], [3, 6]]), (c, 1, [[3, 5]]), (d, 1, [[0, 7]])]
    assert pool.refs[:8].tolist() == [3, 2, 1, 4, 1, 1, 1, 1]
    run = Prefill(plans, 2, torch.from_numpy)
    assert run.tokens.tolist() == [*b, 5, 9, 9, 3, 4] and run.positions.tolist() == [0, 1, 2, 4, 2, 3, 2, 3]
    assert run.slots.tolist() == [6, 7, 8, 4, 10, 11, 14, 15] and run.cu_seqlens.tolist() == [0, 3]
    assert run.last.tolist() == [2, 2, 3, 5, 7] and [x.tolist() for x in run.copies] == [[4], [6]]
    assert [p.context.tolist() for p in plans] == [b, a, c, d]  # the order of ``last``
    pages, lengths, owner = run.rows.prefix
    assert lengths.tolist() == [4, 2, 2] and owner.tolist() == [0, 1, 1, 2, 2] and pages[:, 0].tolist() == [0, 3, 0]
    assert run.rows.lengths.tolist() == [1, 1, 2, 1, 2] and run.rows.pages[:, 0].tolist() == [2, 5, 5, 7, 7]


def test_prompts_wait_where_slots_pages_or_tokens_run_out():
    prompts = [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    for limits in ({"slots": 2}, {"pages": 5}, {"tokens": 4}):
        plans, waiting, pool = planned(prompts, **limits)
        assert [p.context.tolist() for p in plans] == prompts[:2] and len(waiting) == 1 and pool.count - pool.free == 4
    plans, waiting, pool = planned([[1, 1, 1], [1, 1, 2]], pages=2)  # the second's page was found, and is let go again
    assert len(plans) == len(waiting) == 1 and pool.refs.tolist() == [2, 1]
