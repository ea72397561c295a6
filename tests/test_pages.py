"""engine/pages.py: who holds which page, and what is found again."""

import numpy as np
import pytest

from nanorlhf.engine.pages import PagePool, PrefixTree


def test_a_page_is_free_again_when_its_last_holder_lets_go():
    pool = PagePool(4, 2)
    pages = pool.take(3)
    assert pages.tolist() == [0, 1, 2] and pool.free == 1 and pool.take(2) is None
    pool.share(pages[:2])
    pool.release(pages)
    assert pool.free == 2 and pool.refs.tolist() == [1, 1, 0, 0]
    pool.release(pages[:2])
    assert pool.free == 4 and sorted(pool.take(4)) == [0, 1, 2, 3]


def test_a_page_that_nobody_holds_cannot_be_released():
    pool = PagePool(2, 2)
    with pytest.raises(AssertionError, match="page 1 was released by more"):
        pool.release([1])


def grown(*sequences, pages=12, size=2):
    """A tree that holds these alone, and the pages of each."""
    pool = PagePool(pages, size)
    tree, own = PrefixTree(pool), []
    for ids in map(np.array, sequences):
        taken = pool.take(len(ids) // size)
        own.append(tree.insert(ids, taken))
        pool.release(own[-1])
    return pool, tree, own


def test_a_beginning_is_found_up_to_its_last_whole_page_and_only_after_the_same_tokens():
    _, tree, (pages,) = grown([1, 2, 3, 4, 5, 6])
    assert tree.match(np.array([1, 2, 3, 4, 5])) == pages[:2] and tree.match(np.array([1, 2, 3, 4, 5, 6, 7])) == pages
    assert tree.match(np.array([3, 4, 5, 6])) == tree.match(np.array([1])) == tree.match(np.array([], np.int64)) == []


def test_what_two_sequences_have_in_common_is_kept_once():
    """[1 2][3 4] and [1 2][5 6]: three pages, not four."""
    pool, tree, (one, other) = grown([1, 2, 3, 4], [1, 2, 5, 6])
    assert one[0] == other[0] and one[1] != other[1]
    assert len(tree) == 3 and pool.free == 9 and pool.refs.sum() == 3


def test_the_longest_unused_go_first_and_never_before_what_goes_on_from_them():
    pool, tree, _ = grown([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 9, 9])
    tree.match(np.array([1, 2, 3, 4]))  # used after [5 6][7 8], and so is its parent
    for left, found in ((4, [1, 2, 2]), (3, [0, 2, 2]), (2, [0, 2, 1]), (1, [0, 1, 1])):
        assert tree.evict(1) == 1 and len(tree) == left
        assert [depth(tree, ids) for ids in ([5, 6, 7, 8], [1, 2, 3, 4], [1, 2, 9, 9])] == found
    assert tree.evict(5) == 1 and pool.free == 12


def depth(tree, ids):
    """How many pages are there, without using them."""
    parent, depth = -1, 0
    for i in range(0, len(ids), 2):
        parent = tree._page.get((parent, np.array(ids[i:i + 2], np.int64).tobytes()))
        if parent is None:
            break
        depth += 1
    return depth


def test_pages_that_somebody_else_holds_are_not_evicted():
    pool, tree, (pages,) = grown([1, 2, 3, 4])
    pool.share(pages[:1])
    assert tree.evict(9) == 1 and len(tree) == 1
    tree.clear()
    assert len(tree) == 0 and pool.free == 11
    pool.release(pages[:1])
    assert pool.free == 12


def test_ten_thousand_random_steps_keep_the_books():
    """Holders come and go, with whole pages left to the tree; a dictionary of counts is kept beside."""
    rng = np.random.default_rng(0)
    pool = PagePool(40, 2)
    tree, held, put = PrefixTree(pool), [], 0
    for _ in range(10_000):
        if held and rng.random() < 0.5:
            ids, pages = held.pop(rng.integers(len(held)))
            pool.release(tree.insert(ids, pages) + list(pages[len(ids) // 2:]))
            put += 1
            continue
        ids = rng.integers(0, 2, rng.integers(1, 12))
        known = tree.match(ids)
        pool.share(known)
        needed = -(-len(ids) // 2) - len(known)
        if pool.free < needed:
            tree.evict(needed - pool.free)
        fresh = pool.take(needed)
        if fresh is None:
            pool.release(known)
        else:
            held.append((ids, np.concatenate((np.array(known, np.int32), fresh))))
        counts = np.bincount(np.concatenate([p for _, p in held] + [list(tree._page.values())]).astype(int), minlength=40)
        assert (counts == pool.refs).all() and pool.free == (counts == 0).sum()
    assert put > 1000
    for _, pages in held:
        pool.release(pages)
    tree.clear()
    assert pool.free == 40
