"""From expressions to a network of states over bytes (csrc/automaton.h), without the states from which no text ends.

Thompson's construction (1968), with a call where an expression names a rule. A part that is long and repeated often becomes
a rule of its own, so that "up to 1000 characters of a JSON string" is a thousand calls and not as many copies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from nanorlhf.engine.constrain.language import Alt, Both, Chars, Expr, Language, Repeat, Rule, Seq, Text, nesting_bounded
from nanorlhf.ops.token_mask import Automaton

MOST_STATES = 1_000_000  # of a network: some 100 MB while it is built
_MOST_EMPTY = 2000  # calls of a rule that may be empty: all are open at once, in memory that is the square of their number
_COPIED = 64  # states that the copies of a repeated part may take before it becomes a rule


class NoText(ValueError):
    """A language without a text."""


@dataclass
class Network:
    """Arcs between states 0, 1, …: (from, low, high, to) for bytes, (from, to), (from, rule's first state, back)."""

    states: int = 0
    start: int = 0
    edges: list[tuple[int, int, int, int]] = field(default_factory=list)
    jumps: list[tuple[int, int]] = field(default_factory=list)
    calls: list[tuple[int, int, int]] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)  # the last state of the rule that starts at a state

    def state(self) -> int:
        if self.states >= MOST_STATES:
            raise ValueError(f"constrain: expected a language of at most {MOST_STATES} states, got more; bound its repetitions lower")
        self.states += 1
        return self.states - 1


def automaton(language: Language) -> Automaton:
    """The automaton of a language. ValueError if no text is in it (NoText), it is too large, or a rule begins with itself by way of another."""
    with nesting_bounded("constrain"):
        network = _Builder(language).network
    if network.calls:
        _check_left_recursion(network, language)
    if network.start not in (alive := _alive(network)):
        raise NoText(f"constrain: expected a language with a text in it, got none that satisfies {language.source}")
    edges = [e for e in network.edges if e[0] in alive and e[3] in alive]
    jumps = [j for j in network.jumps if j[0] in alive and j[1] in alive]
    calls = [c for c in network.calls if all(state in alive for state in c)]
    arrays = (np.array(arcs, np.int32).reshape(-1, columns) for arcs, columns in ((edges, 4), (jumps, 2), (calls, 3)))
    return Automaton(network.states, network.start, *arrays, sorted(network.ends.values()))


class _Builder:
    def __init__(self, language: Language):
        self.language = language
        self.network = Network()
        self.rules: dict[str | Expr, int] = {}  # first states, by name or, of parts that became rules, by themselves
        self.waiting: list[tuple[int, Expr]] = []
        self.network.start = self.rule("", language.expr)
        while self.waiting:
            start, body = self.waiting.pop()
            self.build(body, start, self.network.ends[start])

    def rule(self, key: str | Expr, body: Expr) -> int:
        if key not in self.rules:
            self.rules[key] = start = self.network.state()
            self.network.ends[start] = self.network.state()
            self.waiting.append((start, body))
        return self.rules[key]

    def build(self, expr: Expr, start: int, end: int) -> None:
        """The texts of the expression lead from start to end. Arcs into start and out of end are the caller's."""
        net = self.network
        match expr:
            case Text(text):
                data = self.utf8(text)
                for k, byte in enumerate(data):
                    start, here = (end if k + 1 == len(data) else net.state()), start
                    net.edges.append((here, byte, byte, start))
                if not data:
                    net.jumps.append((start, end))
            case Chars(ranges):
                self.characters(ranges, start, end)
            case Seq(parts):
                for k, part in enumerate(parts):
                    start, here = (end if k + 1 == len(parts) else net.state()), start
                    self.build(part, here, start)
                if not parts:
                    net.jumps.append((start, end))
            case Alt(parts):
                for part in parts:
                    self.build(part, start, end)
            case Repeat(part, low, high):
                self.repeat(part, low, high, start, end)
            case Rule(name):
                if name not in self.language.rules:
                    raise ValueError(f"constrain: expected the rule {name} to be defined, got {', '.join(self.language.rules) or 'no rules'}")
                net.calls.append((start, self.rule(name, self.language.rules[name]), end))
            case Both():
                self.product(expr, start, end)

    def utf8(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"constrain: expected texts without surrogates, which are no characters, got {text!r}") from error

    def repeat(self, part: Expr, low: int, high: int | None, start: int, end: int) -> None:
        net, copies = self.network, low + 1 if high is None else high
        called = self.rules.get(part)

        def copy(here: int, there: int) -> None:
            nonlocal called
            if called is not None:
                net.calls.append((here, called, there))
                return
            before = net.states
            self.build(part, here, there)
            if not isinstance(part, Rule) and (net.states - before) * copies > _COPIED:
                called = self.rule(part, part)  # this copy stays, the others call

        for _ in range(low):
            copy(start, start := net.state())
        if high is None:
            loop = net.state()  # of its own, so that nothing that leaves start or enters end is in the loop
            net.jumps += [(start, loop), (loop, end)]
            copy(loop, loop)
        else:
            for _ in range(high - low):
                net.jumps.append((start, end))
                copy(start, start := net.state())
            net.jumps.append((start, end))

    def characters(self, ranges: tuple[tuple[int, int], ...], start: int, end: int) -> None:
        shared: dict[tuple, int] = {}  # the states before the same continuation bytes
        for low, high in ranges:
            for pairs in byte_ranges(low, high):
                here = start
                for k, (first, last) in enumerate(pairs):
                    rest = pairs[k + 1 :]
                    if not rest:
                        there = end
                    elif all(pair == (0x80, 0xBF) for pair in rest):
                        if rest not in shared:
                            shared[rest] = self.network.state()
                            self._continuation(rest, shared, end)
                        self.network.edges.append((here, first, last, shared[rest]))
                        break
                    else:
                        there = self.network.state()
                    self.network.edges.append((here, first, last, there))
                    here = there

    def _continuation(self, rest: tuple, shared: dict[tuple, int], end: int) -> None:
        here = shared[rest]
        if len(rest) == 1:
            self.network.edges.append((here, *rest[0], end))
            return
        if rest[1:] not in shared:
            shared[rest[1:]] = self.network.state()
            self._continuation(rest[1:], shared, end)
        self.network.edges.append((here, *rest[0], shared[rest[1:]]))

    def product(self, expr: Both, start: int, end: int) -> None:
        """The pairs of nodes of two automata, walked side by side."""
        try:
            one = automaton(Language("one side", expr.part))
        except NoText:
            return
        try:
            two = automaton(Language("the other side", expr.second))
        except NoText:
            two = None
        first = (one.start(), two.start() if two else -1)
        states, waiting = {first: self.network.state()}, [first]
        self.network.jumps.append((start, states[first]))
        while waiting:
            a, b = pair = waiting.pop()
            if one.complete(a) and (b >= 0 and two.complete(b)) == expr.other:
                self.network.jumps.append((states[pair], end))
            followers = two.row(b) if b >= 0 else []
            for low, high, to in one.row(a):
                for left, right, other in _cut(low, high, followers):
                    if other < 0 and expr.other:
                        continue
                    if (to, other) not in states:
                        states[to, other] = self.network.state()
                        waiting.append((to, other))
                    self.network.edges.append((states[pair], left, right, states[to, other]))


def _cut(low: int, high: int, followers: list[tuple[int, int, int]]):
    """(first, last, next node or -1) of the bytes from low to high, after the other automaton's arcs."""
    for first, last, to in followers:
        if last < low or first > high:
            continue
        if first > low:
            yield low, first - 1, -1
        yield max(low, first), min(high, last), to
        low = last + 1
    if low <= high:
        yield low, high, -1


def byte_ranges(low: int, high: int) -> list[tuple[tuple[int, int], ...]]:
    """The UTF-8 of the code points from low to high, none of them a surrogate: sequences of ranges of bytes.

    >>> byte_ranges(0x7E, 0x81)
    [((126, 127),), ((194, 194), (128, 129))]
    """
    for limit in (0x7F, 0x7FF, 0xFFFF):  # the last of each length
        if low <= limit < high:
            return byte_ranges(low, limit) + byte_ranges(limit + 1, high)
    first, last = chr(low).encode(), chr(high).encode()
    for k in range(len(first) - 1, 0, -1):  # cut where the bytes after k do not run from 80 to BF on both sides
        mask = (1 << 6 * k) - 1
        if first[: len(first) - k] != last[: len(last) - k]:
            if low & mask:
                return byte_ranges(low, low | mask) + byte_ranges((low | mask) + 1, high)
            if high & mask != mask:
                return byte_ranges(low, (high & ~mask) - 1) + byte_ranges(high & ~mask, high)
    return [tuple(zip(first, last, strict=True))]


def _alive(network: Network, bytes_too: bool = True) -> set[int]:
    """The states from which the end of their rule can be reached; a call needs that of the rule called, too."""
    into: dict[int, list[int]] = defaultdict(list)
    for source, _, _, target in network.edges if bytes_too else ():
        into[target].append(source)
    for source, target in network.jumps:
        into[target].append(source)
    backs, users = defaultdict(list), defaultdict(list)
    for call in network.calls:
        backs[call[2]].append(call)
        users[call[1]].append(call)
    alive, waiting = set(), list(network.ends.values())
    while waiting:
        state = waiting.pop()
        if state in alive:
            continue
        alive.add(state)
        waiting += into[state]
        # A call is a way only when both its rule and the state after it are alive: whichever comes second opens it.
        waiting += [source for source, rule, _ in backs[state] if rule in alive]
        waiting += [source for source, _, back in users[state] if back in alive]
    return alive


def _check_left_recursion(network: Network, language: Language) -> None:
    """ValueError if a rule can call itself before it has taken a byte, which would push for ever."""
    jumps, calls = defaultdict(list), defaultdict(list)
    for source, target in network.jumps:
        jumps[source].append(target)
    for source, rule, back in network.calls:
        calls[source].append((rule, back))
    at_end = _alive(network, bytes_too=False)
    empty = {start for start in network.ends if start in at_end}  # of rules that may be empty
    if max(Counter(rule for _, rule, _ in network.calls if rule in empty).values(), default=0) > _MOST_EMPTY:
        raise ValueError(f"constrain: expected what may be empty to be repeated at most {_MOST_EMPTY} times, got more in {language.source}")
    reached = {start: _without_bytes(start, jumps, calls, empty) for start in network.ends}
    first = {start: {rule for state in states for rule, _ in calls[state]} for start, states in reached.items()}
    beginners = defaultdict(list)
    for start, rules in first.items():
        for rule in rules:
            beginners[rule].append(start)
    left = {start: len(rules) for start, rules in first.items()}
    done = [start for start, count in left.items() if not count]
    for rule in done:  # rules that begin with none but those done; what is left begins with itself
        for start in beginners[rule]:
            left[start] -= 1
            if not left[start]:
                done.append(start)
    if len(done) < len(first):
        raise ValueError(f"constrain: expected no rule that begins with itself by way of another or of an empty one, got such a rule in "
                         f"{language.source}; write it as a repetition")


def _without_bytes(start: int, jumps, calls, empty: set[int]) -> set[int]:
    seen, waiting = {start}, [start]
    while waiting:
        state = waiting.pop()
        for target in [*jumps[state], *(back for rule, back in calls[state] if rule in empty)]:
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen
