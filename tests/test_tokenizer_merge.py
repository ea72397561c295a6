"""Merging, on every instruction set: pieces of all lengths against tiktoken, whose loop is another."""

import json
import os
import random
import subprocess
import sys

import pytest
import tiktoken

from nanorlhf import _C
from nanorlhf.pretokenize import PATTERNS
from nanorlhf.tokenizer import Tokenizer
from nanorlhf.tokenizer_json import Vocabulary

WORDS = ("the quick brown foxes jumped over lazy dogs while international characters characterise "
         "Überraschung наконец последовательность 漢字かな交じり文 ") * 4
ALPHABETS = ["abcdefghijklmnopqrstuvwxyz", "ab", "etaoin", "последвтьн", "char", "漢字かな"]
ENCODE = """
import json, sys
from nanorlhf.tokenizer import Tokenizer
print(json.dumps(Tokenizer.load(sys.argv[1]).encode_lists(json.load(open(sys.argv[2])), threads=1)))
"""


@pytest.fixture(scope="module")
def pieces():
    """One piece each: letters only, 1 to 600 of them, from alphabets that make short and long tokens."""
    rng = random.Random(7)
    made = ["".join(rng.choices(rng.choice(ALPHABETS), k=rng.choice([*range(1, 80), 130, 600]))) for _ in range(1500)]
    words = WORDS.split()
    made += ["".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(500)]
    return made + ["a" * n for n in (15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 5000)]


@pytest.fixture(scope="module")
def trained():
    rng = random.Random(11)
    text = " ".join("".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 12))) for _ in range(20_000))
    return Tokenizer.train([WORDS, text, "ab" * 3000, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa " * 50], 4000, pattern="gpt2")


@pytest.fixture(scope="module")
def shuffled(trained):
    """The same with other ids, so that ids and ranks are not the same."""
    v = trained.vocabulary
    places = list(range(len(v.tokens)))
    random.Random(3).shuffle(places)
    tokens = [b""] * len(places)
    for i, place in enumerate(places):
        tokens[place] = v.tokens[i]
    merges = [(places[a], places[b]) for a, b in v.merges]
    return Tokenizer(Vocabulary(tokens, {}, v.pattern, merges, [places[r] for r in v.results])), places


def available():
    features = dict(_C.cpu_features())
    return ["portable", *(["avx2"] if features["avx2"] and features["fma"] else []),
            *(["avx512"] if all(features[f] for f in ("avx512f", "avx512bw", "avx512vl", "avx512dq")) else [])]


@pytest.mark.parametrize("isa", available())
def test_every_instruction_set_merges_as_tiktoken_does(isa, pieces, trained, shuffled, tmp_path):
    ranks = {t: i for i, t in enumerate(trained.vocabulary.tokens)}
    peer = tiktoken.Encoding("t", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={})
    expected = [peer.encode_ordinary(piece) for piece in pieces]
    (tmp_path / "pieces.json").write_text(json.dumps(pieces))
    other, places = shuffled
    for tokenizer, wanted in ((trained, expected), (other, [[places[i] for i in ids] for ids in expected])):
        tokenizer.save(tmp_path / "tok")
        done = subprocess.run([sys.executable, "-c", ENCODE, str(tmp_path / "tok"), str(tmp_path / "pieces.json")],
                              env=os.environ | {"NANORLHF_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        ids = json.loads(done.stdout)
        wrong = [(piece, got, want) for piece, got, want in zip(pieces, ids, wanted) if got != want]
        assert len(ids) == len(pieces) and wrong[:1] == []


def test_pieces_that_many_others_push_out_are_still_right(trained):
    """More distinct pieces than the cache holds, twice over, in a changing order."""
    rng = random.Random(1)
    made = [" ".join("".join(rng.choices("abcdeflou", k=rng.randint(1, 20))) for _ in range(20_000)) for _ in range(40)]
    one_by_one = [Tokenizer(trained.vocabulary).encode(text) for text in made[:3]]
    twice = trained.encode_lists(made + made[::-1], threads=1)
    assert twice[:3] == one_by_one and twice[:40] == twice[:39:-1]
