"""The tokenizer in plain Python and the native one, held to each other."""

import random
import sysconfig
from pathlib import Path

import pytest

from nanorlhf import _C
from nanorlhf.pretokenize import PATTERNS
from nanorlhf.tokenizer import TIE_BREAKS, Tokenizer
from nanorlhf.tokenizer_json import Vocabulary
from nanorlhf.tokenizer_twin import Twin, merge_everywhere, steps, train

CODE = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("tie_break", TIE_BREAKS)
def test_both_learn_the_same_merges(tie_break):
    rng = random.Random(0)
    for alphabet in ("ab", "abc ", "aé 中\n", "ab1'"):
        texts = ["".join(rng.choices(alphabet, k=60)).encode() for _ in range(5)]
        training = _C.BpeTraining(2)
        training.add("cl100k", texts)
        training.finish(TIE_BREAKS.index(tie_break))
        assert train(texts, 40, tie_break=tie_break) == training.merges(40)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_give_the_same_ids(pattern):
    tokenizer = Tokenizer.train([CODE], 1200, pattern=pattern)
    twin = Twin(tokenizer)
    for text in (CODE[:20_000], "Ünï 中文 don't\n\n  123456 \x00", "a" * 300, ""):
        assert twin.encode(text) == tokenizer.encode(text)


def test_both_read_ranks_by_bytes_alike():
    """Tokens out of the reach of merges are taken only as whole pieces."""
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"xyz", b"cab", b"abc"]
    tokenizer = Tokenizer(Vocabulary(tokens, {}, "gpt2", None))
    twin = Twin(tokenizer)
    for text in ("abc", "xyz", "xyzx", "cabc", "abcabcab"):
        assert twin.encode(text) == tokenizer.encode(text), text
    assert twin.encode("xyz") == [257] and twin.encode("xyzx") == list(b"xyzx")


def test_each_step_joins_two_neighbours_and_loses_no_byte():
    twin = Twin(Tokenizer.train([CODE], 600))
    states = list(steps(b"argument", twin.rank))
    assert states[0] == [bytes([b]) for b in b"argument"]
    assert all(b"".join(s) == b"argument" and len(s) == 8 - i for i, s in enumerate(states))
    assert twin.draw("argument").splitlines()[0] == "a|r|g|u|m|e|n|t"


def test_overlapping_pairs_merge_from_the_left():
    assert merge_everywhere([1, 1, 1, 1, 1], (1, 1), 9) == [9, 9, 1]
    assert merge_everywhere([], (1, 1), 9) == []
