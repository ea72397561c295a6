"""engine/batch.py: rows of arrays, and which of them are attended together."""

import numpy as np
import torch

from nanorlhf.engine import Request
from nanorlhf.engine.batch import LENGTH, POSITION, STEP, STOPS, Batch, shared_prefixes
from nanorlhf.engine.request import Handle


def test_rows_that_share_leading_pages_are_attended_together_where_it_saves_the_most():
    """Rows a, b begin with [1 2 3], c with [1 2], d with [1], e with nothing known. a and b save 3 · ½ pages each as a pair, and
    2 · ⅔ with c: they pair. c is alone then, and so is d."""
    table = np.array([[1, 2, 3, 9], [1, 2, 3, 8], [1, 2, 7, 0], [1, 6, 0, 0], [5, 4, 0, 0]])
    depth, owner, leaders = shared_prefixes(table, np.array([3, 3, 3, 2, 2]), 10)
    assert depth.tolist() == [3, 3, 0, 0, 0] and owner.tolist() == [0, 0, -1, -1, -1] and leaders.tolist() == [0]
    # Four rows of one system prompt of three pages, of which two pairs share one page more: 3 · ¾ is more than 4 · ½.
    table = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 5]])
    depth, owner, leaders = shared_prefixes(table, np.array([4] * 4), 10)
    assert depth.tolist() == [3] * 4 and owner.tolist() == [0] * 4 and len(leaders) == 1


def test_a_group_has_its_pages_in_common_and_only_full_ones():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        tree = {(): 0}  # pages are named by the path that leads to them, as in the prefix tree
        table, full = np.zeros((6, 5), np.int64), rng.integers(0, 6, 6)
        for row in table:
            path = ()
            for c in range(5):
                path += (int(rng.integers(2)),)
                row[c] = tree.setdefault(path, len(tree))
        depth, owner, leaders = shared_prefixes(table, full, 64)
        assert (depth <= full).all() and ((depth > 0) == (owner >= 0)).all() and len(leaders) == owner.max() + 1
        for g, leader in enumerate(leaders):
            members = np.flatnonzero(owner == g)
            found += len(members)
            assert len(members) > 1 and leader in members
            assert (table[members, :depth[leader]] == table[leader, :depth[leader]]).all() and (depth[members] == depth[leader]).all()
    assert found > 300


def handle(stop=(), stream=0, drawn=()):
    made = Handle(Request([1, 2, 3], 9, stop=stop, stream=stream), 9, None)
    made.drawn, made.marks = np.array(drawn, np.int64), np.full((4, len(drawn)), 0.5, np.float32)
    return made


def test_a_row_has_its_place_its_table_and_its_record():
    """Pages of 2 tokens. Row a has 3 tokens in pages 4 and 6, with two more of room; row b 4 tokens in 4 and 5, and needs a page."""
    batch = Batch(4, 12, 10, 8, 2, torch.device("cpu"))
    a, b = handle((5,)), handle((7, 99), -1, drawn=[9])
    batch.join(a, np.array([4, 6], np.int32), 3)
    batch.join(b, np.array([4, 5], np.int32), 4)
    batch.compose()
    assert batch.depth.tolist() == [1, 1] and batch.prefix[0].tolist() == [[4]] and batch.prefix[1].tolist() == [2]
    assert batch.ints[[POSITION, LENGTH, STEP], :2].T.tolist() == [[2, 1, 0], [3, 2, 1]]
    assert batch.lacking(1).tolist() == [1] and batch.lacking(2).tolist() == [0, 1] and batch.lacking(4).tolist() == [0, 0, 1, 1]
    batch.add_pages(np.array([1]), np.array([7], np.int32))
    assert not len(batch.lacking(1))
    (positions, rows), slots = batch.next(), batch.next_slots()
    assert positions.tolist() == [3, 4] and slots.tolist() == [13, 14] and rows.lengths.tolist() == [2, 3]
    assert rows.pages[0, 0] == 6 and rows.pages[1, :2].tolist() == [5, 7]
    bits = batch.stop_bits[batch.ints[STOPS, :2]]
    assert [np.flatnonzero(x).tolist() for x in bits] == [[5], [7]]
    assert batch.drawn(1, 1)[0].tolist() == [9] and batch.pages(1).tolist() == [4, 5, 7]
    batch.keep(np.array([1]))
    assert batch.handles == [b] and batch.drawn(0, 1)[0].tolist() == [9] and batch.pages(0).tolist() == [4, 5, 7]
    sampler, streams = batch.sampler_from(0)
    assert streams.tolist() == [-1] and sampler.seed == 0
    batch.keep(np.array([], np.int64))
    for _ in range(4):  # every record is there again
        batch.join(handle(), np.array([1, 2], np.int32), 3)


def test_a_table_grows_past_the_columns_that_were_spare():
    batch = Batch(1, 40, 10, 30, 2, torch.device("cpu"))
    batch.join(handle(), np.array([3], np.int32), 2)
    for page in range(4, 20):
        batch.compose()
        batch.add_pages(batch.lacking(1), np.array([page], np.int32))
        batch.compose()
        for _ in range(2):
            rows, slots = batch.next()[1], batch.next_slots()
            batch.advance(1)
        assert rows.pages[0, :page - 2].tolist() == list(range(3, page + 1)) and slots.tolist() == [2 * page + 1]
        assert rows.lengths.tolist() == [2 * (page - 2)]
