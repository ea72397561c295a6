"""The native automaton on networks written by hand (csrc/automaton.h)."""

import numpy as np
import pytest

from nanorlhf.ops.token_mask import Automaton

A, B, C = b"abc"


def made(states, edges=(), jumps=(), calls=(), ends=(), start=0):
    arrays = (np.array(arcs, np.int32).reshape(-1, n) for arcs, n in ((edges, 4), (jumps, 2), (calls, 3)))
    return Automaton(states, start, *arrays, list(ends))


def whole(machine, text):
    node = machine.walk(machine.start(), text)
    return node >= 0 and machine.complete(node)


def test_two_ways_that_begin_alike_are_followed_at_once():
    # 0 -a-> 1 -b-> 3 and 0 -a-> 2 -c-> 3
    machine = made(4, [(0, A, A, 1), (0, A, A, 2), (1, B, B, 3), (2, C, C, 3)], ends=[3])
    assert [whole(machine, text) for text in (b"", b"a", b"ab", b"ac", b"abc", b"b")] == [False, False, True, True, False, False]
    assert machine.row(machine.walk(machine.start(), b"a")) == [(B, C, machine.walk(machine.start(), b"ab"))]
    assert machine.walk(machine.start(), b"ab") == machine.walk(machine.start(), b"ac"), "equal sets are one node"


def test_calls_count_without_bound():
    """Rule 0: "a" rule "b" | nothing, which is a^n b^n."""
    machine = made(4, [(0, A, A, 1), (2, B, B, 3)], jumps=[(0, 3)], calls=[(1, 0, 2)], ends=[3])
    for n in (0, 1, 7, 300):
        assert whole(machine, b"a" * n + b"b" * n)
        assert not whole(machine, b"a" * n + b"b" * (n + 1))
        assert not whole(machine, b"a" * (n + 1) + b"b" * n)


def test_a_call_at_the_end_of_its_rule_keeps_the_stack():
    """Rule 0: "a" rule | nothing. However long the text, there are two nodes: the empty text's and that after an a."""
    machine = made(3, [(0, A, A, 1)], jumps=[(0, 2)], calls=[(1, 0, 2)], ends=[2])
    assert whole(machine, b"a" * 1000)
    assert machine.size() <= 2


def test_what_must_follow():
    machine = made(5, [(0, A, A, 1), (1, B, B, 2), (2, A, C, 3), (3, A, A, 4)], ends=[4, 3])
    assert machine.forced(machine.start(), 10) == b"ab"
    assert machine.forced(machine.start(), 1) == b"a"
    assert machine.forced(machine.walk(machine.start(), b"abc"), 10) == b"", "the text may end here"


def test_readings_share_their_stacks():
    """Rule 0: "a" | "a" rule then one of two states to come back to, each by a byte of its own: 2^n stacks after n times a."""
    machine = made(5, [(0, A, A, 4), (0, A, A, 1), (2, B, B, 4), (3, C, C, 4)], calls=[(1, 0, 2), (1, 0, 3)], ends=[4])
    assert whole(machine, b"a" * 300 + b"bc" * 149 + b"b")
    assert not whole(machine, b"a" * 300 + b"bc" * 150)
    assert machine.size() < 1000


def test_stacks_of_different_depth_are_told_apart():
    """Rule 0: "a" rule "b" | "a" rule | nothing: at most as many b as there are a."""
    machine = made(5, [(0, A, A, 1), (0, A, A, 4), (2, B, B, 3)], jumps=[(0, 3)], calls=[(1, 0, 2), (4, 0, 3)], ends=[3])
    for n in range(8):
        for m in range(10):
            assert whole(machine, b"a" * n + b"b" * m) == (m <= n)


@pytest.mark.parametrize("wrong", [
    dict(edges=[(0, A, A, 9)]), dict(edges=[(0, 3, 2, 1)]), dict(edges=[(0, 0, 256, 1)]), dict(jumps=[(-1, 0)]), dict(calls=[(0, 0, 7)]),
    dict(ends=[5]), dict(start=4),
])  # fmt: skip
def test_arcs_of_no_network_are_errors(wrong):
    with pytest.raises(ValueError, match="automaton: expected"):
        made(2, **wrong)


def test_nodes_that_were_not_given_out_are_errors():
    machine = made(2, [(0, A, A, 1)], ends=[1])
    for node in (-1, 99):
        with pytest.raises(ValueError, match="a node that it has given out"):
            machine.row(node)
