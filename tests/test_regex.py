"""Own regular expressions against Python's, on random patterns and texts."""

import random
import re

import constrained
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.engine.constrain import regex
from nanorlhf.engine.constrain.network import automaton
from nanorlhf.engine.constrain.regex import expression

LETTERS = "abé日😀_ 7\n-."
ATOMS = st.sampled_from(["a", "b", "é", "日", "😀", r"\.", r"\-", ".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", r"\n", r"\x61", r"\u00e9",
                         "[ab]", "[^ab]", "[a-é]", r"[\d_]", r"[^\s日]", "[]a]", "[a-]", r"[^\W7]", "[.]"])  # fmt: skip
BOUNDS = st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,2}", "{,1}", "{1,3}", "*?", "+?", "??", "{1,2}?"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "(?:" + "|".join(parts) + ")"),
        st.tuples(inner, BOUNDS).map(lambda pair: f"({pair[0]}){pair[1]}"),
        inner.map(lambda part: f"(?P<name>{part}|)" if "(?P" not in part else part),
    ),
    max_leaves=6,
).map(lambda pattern: pattern.replace("(?P<name>", "(?P<first>", 1).replace("(?P<name>", "("))  # names are given once


def sampled(language, rng, most=12):
    """A text of the language by a random walk, or None."""
    machine = automaton(language)
    node, text = machine.start(), b""
    for _ in range(4 * most):
        if machine.complete(node) and rng.random() < 0.3:
            return text.decode()
        row = machine.row(node)
        if not row:
            return text.decode()
        low, high, node = rng.choice(row)
        text += bytes([rng.randint(low, high)])
    return None


@settings(max_examples=300, deadline=None)
@given(PATTERNS, st.lists(st.text(LETTERS, max_size=6), min_size=8, max_size=8), st.integers(0, 1 << 30))
def test_texts_match_as_python_has_it(pattern, texts, seed):
    oracle, language = re.compile(pattern, re.ASCII), regex(pattern)
    machine, rng = automaton(language), random.Random(seed)
    for text in texts:
        node = machine.walk(machine.start(), text.encode())
        assert (node >= 0 and machine.complete(node)) == bool(oracle.fullmatch(text)), text
        if node >= 0:
            assert machine.complete(node) or machine.row(node), "where a text goes on, it can end"
    for _ in range(8):
        text = sampled(language, rng)
        assert text is None or oracle.fullmatch(text), text


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "^a", "b$", "^ab$", "a|^b", "^", "$", "ab?$|b"]), min_size=1, max_size=1), st.text("ab", max_size=5))
def test_a_search_is_as_python_has_it(pattern, text):
    language = regex("")
    object.__setattr__(language, "expr", expression(pattern[0], search=True))
    assert constrained.accepts(language, text) == bool(re.search(pattern[0], text))


def test_anchors_change_nothing_in_a_whole_match():
    for pattern in ("^ab$", "^ab", "ab$", "^a|b$"):
        found = constrained.texts(regex(pattern), 3)
        assert found == ({"ab"} if "|" not in pattern else {"a", "b"})


@pytest.mark.parametrize("pattern, place", [
    ("(?=a)", 0), ("(?!a)", 0), ("(?<=a)b", 0), ("(?>a)", 0), ("(?i)a", 0), (r"(a)\1", 3), (r"a\b", 1), (r"\Ba", 0), (r"\p{L}", 0), ("a*+", 1), ("a++", 1),
    ("a**", 2), ("a{2}{3}", None), ("*a", 0), ("a|+b", 2), ("(a", 2), ("a)", 1), ("[a", 0), ("[^\\s\\S]", 0), ("[b-a]", 2), (r"[a-\d]", 2), (r"\x6", 0), (r"\u12", 0),
    (r"\ud800", 0), (r"\q", 0), ("a{x}", 1), ("a{,}", 1), ("a{3,2}", 1), ("a{999999}", 1), ("a^b", 1), ("a$b", 1), ("(^a)", 1), ("(a$)", 2), ("a\\", 1),
    ("(?P<1>a)", 4), ("(?P<ab", 4), (r"\01", 0),
])  # fmt: skip
def test_what_is_not_in_the_syntax_is_an_error_with_its_place(pattern, place):
    if place is None:  # Python refuses it as well, but its meaning is plain
        assert constrained.texts(regex(pattern), 6) == {"a" * 6}
        return
    with pytest.raises(ValueError, match=rf"^regex: expected [^\n]+ at place {place} of "):
        regex(pattern)


def test_a_pattern_that_is_no_text_is_an_error():
    with pytest.raises(ValueError, match="regex: expected a pattern as a str, got bytes"):
        regex(b"a")
    with pytest.raises(ValueError, match="regex: expected less nesting"):
        regex("(" * 20_000 + ")" * 20_000)
    with pytest.raises(ValueError, match="expected texts without surrogates, which are no characters, got '.ud800'"):
        constrained.texts(regex("\ud800"), 3)
