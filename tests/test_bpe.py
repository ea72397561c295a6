"""Training and merging, against hand work, small reference implementations, Hugging Face and tiktoken."""

import json
import dataclasses
import random
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf import _C
from nanorlhf.pretokenize import PATTERNS, pieces
from nanorlhf.tokenizer import TIE_BREAKS, Tokenizer
from nanorlhf.tokenizer_json import BYTE_TO_CHAR

STDLIB = sorted(p for p in Path(sysconfig.get_paths()["stdlib"]).glob("*.py") if p.stat().st_size)[:60]
CODE = [p.read_text(encoding="utf-8") for p in STDLIB]


def merges_of(tok):
    """The merges of a trained tokenizer as pairs of bytes."""
    v = tok._vocabulary
    return [(v.tokens[a], v.tokens[b]) for a, b in v.merges]


def train_all(texts, pattern="gpt2", tie_break="hf", most=100000):
    """Merges until nothing is left to merge, or `most`."""
    training = _C.BpeTraining(1)
    training.add(pattern, [t.encode() if isinstance(t, str) else t for t in texts])
    training.finish(TIE_BREAKS.index(tie_break))
    return training.merges(most)


def train_reference(texts, tie_break, pattern="gpt2", most=100000):
    """The definition, written out: count all pairs again for every merge."""
    words = [list(piece) for text in texts for piece in pieces(pattern, text.encode())]
    merges = []
    while len(merges) < most:
        counts = Counter()
        for word in words:
            counts.update(zip(word, word[1:]))  # a Counter keeps the order in which pairs were first seen
        if not counts:
            break
        best = max(counts.values())
        ties = [pair for pair, count in counts.items() if count == best]
        pair = ties[0] if tie_break == "first" else min(ties)
        new = 256 + len(merges)
        merges.append(pair)
        words = [merge(word, pair, new) for word in words]
    return merges


def merge(word, pair, new):
    """Every occurrence of the pair, from left to right, replaced by the new id."""
    out, i = [], 0
    while i < len(word):
        found = tuple(word[i : i + 2]) == pair
        out.append(new if found else word[i])
        i += 2 if found else 1
    return out


def hugging_face_merges(texts, vocab_size):
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[], show_progress=False, initial_alphabet=alphabet
    )
    peer.train_from_iterator(texts, trainer)
    return [tuple(m) for m in json.loads(peer.to_str())["model"]["merges"]]


def spelled(token):
    return "".join(BYTE_TO_CHAR[b] for b in token)


def test_the_example_of_wikipedia():
    """aaabdaaabac: aa occurs 4 times (overlaps count), so aa -> Z gives ZabdZabac. Now Za and ab occur twice; under
    "first" Za is seen first, and (256, 97) is it; under "raw" the lower ids win, which is (97, 98). Either way the
    third merge joins what is left of Zab, and the text is XdXac."""
    assert train_all(["aaabdaaabac"], tie_break="first", most=3) == [(97, 97), (256, 97), (257, 98)]
    assert train_all(["aaabdaaabac"], tie_break="raw", most=3) == [(97, 97), (97, 98), (256, 257)]
    for tie_break in TIE_BREAKS:
        tok = Tokenizer.train(["aaabdaaabac"], 259, tie_break=tie_break)
        assert tok.encode("aaabdaaabac") == [258, 100, 258, 97, 99]


def test_ties_under_hf_follow_the_byte_level_alphabet():
    """In !, tab and tab, !, tab, ! both (tab, !) and (!, tab) occur twice. Tab is byte 9 and ! is 33, so raw ids prefer
    (tab, !). The alphabet spells tab as U+0109, after every printable character, so hf prefers (!, tab)."""
    texts = ["\t!\t!", "!\t"]
    for tie_break, expected in [("raw", (b"\t", b"!")), ("hf", (b"!", b"\t")), ("first", (b"\t", b"!"))]:
        tok = Tokenizer.train(texts, 257, pattern=r"[\s\S]+", tie_break=tie_break)
        assert merges_of(tok) == [expected]


def test_merges_equal_hugging_faces_on_source_code():
    tok = Tokenizer.train(CODE, 2000, pattern="gpt2", tie_break="hf")
    assert [(spelled(a), spelled(b)) for a, b in merges_of(tok)] == hugging_face_merges(CODE, 2000)


def test_merges_equal_hugging_faces_on_random_corpora():
    """Small alphabets make ties and overlaps the rule. Training runs to the end, which both must find at the same point."""
    rng = random.Random(0)
    for _ in range(100):
        alphabet = rng.sample("ab\x00\t !é中\xa0\xad~", rng.randint(1, 4))
        texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 30))) for _ in range(rng.randint(1, 6))]
        merges = train_all(texts)
        tokens = [bytes([b]) for b in range(256)]
        for a, b in merges:
            tokens.append(tokens[a] + tokens[b])
        assert [(spelled(tokens[a]), spelled(tokens[b])) for a, b in merges] == hugging_face_merges(texts, 5000), texts


@pytest.mark.parametrize("tie_break", ["raw", "first"])
def test_merges_equal_the_reference(tie_break):
    rng = random.Random(1)
    for _ in range(150):
        alphabet = rng.sample("abc xé", rng.randint(1, 4))
        texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(rng.randint(1, 4))]
        assert train_all(texts, tie_break=tie_break) == train_reference(texts, tie_break), texts
    text = [CODE[0][:20000]]
    assert train_all(text, tie_break=tie_break, most=60) == train_reference(text, tie_break, most=60)


@pytest.mark.parametrize("tie_break", TIE_BREAKS)
def test_merges_do_not_depend_on_the_number_of_threads(tie_break):
    texts = [("\n".join(CODE) * 2).encode(), *(c.encode() for c in CODE)]
    found = []
    for threads in (1, 2, 5):
        training = _C.BpeTraining(threads)
        training.add("cl100k", texts)
        found.append((training.finish(TIE_BREAKS.index(tie_break)), training.merges(500)))
    assert found[0] == found[1] == found[2]


def test_files_train_like_their_texts_and_lose_no_byte(tmp_path):
    data = [CODE[0].encode(), b"\xff\xfe bad \x80\x80\x80 bytes\r\n" * 5, CODE[1].encode()]
    paths = [tmp_path / str(i) for i in range(3)]
    for path, d in zip(paths, data):
        path.write_bytes(d)
    by_path, by_text, mixed = (Tokenizer.train(x, 400) for x in (paths, data, [data[0], paths[1], data[2]]))
    assert merges_of(by_path) == merges_of(by_text) == merges_of(mixed)
    assert by_path.decode_bytes(by_path.encode(data[1])) == data[1]
    by_regex = Tokenizer.train(paths, 400, pattern="(?:" + PATTERNS["cl100k"] + ")")
    assert merges_of(by_regex) == merges_of(by_path)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text("ab ", max_size=40), min_size=1, max_size=4), st.text("ab ", max_size=80), st.sampled_from(TIE_BREAKS)
)
def test_a_piece_that_is_a_token_merges_to_that_token(texts, text, tie_break):
    """Merging is a function of the bytes, so a token arises in one way only; looking it up whole changes nothing."""
    merges = train_all(texts, tie_break=tie_break)
    tokens = [bytes([b]) for b in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    assert len(set(tokens)) == len(tokens)
    results = list(range(256, len(tokens)))
    by_list, whole = (_C.BpeModel(tokens, [], merges, results, False, w, "gpt2") for w in (False, True))
    by_bytes = _C.BpeModel(tokens, [], [], [], True, True, "gpt2")
    expected = by_list.encode(text.encode(), [])
    assert whole.encode(text.encode(), []) == by_bytes.encode(text.encode(), []) == expected
    assert by_list.decode_bytes(expected) == text.encode()


def test_ranks_by_bytes_equal_tiktokens_on_vocabularies_that_no_training_gives():
    """Random tokens, many out of the reach of merges: only whole pieces find those. Lengths on both sides of every
    switch between ways to merge."""
    rng = random.Random(2)
    for trial in range(40):
        words = {"".join(rng.choices("abc", k=rng.randint(2, 6))).encode() for _ in range(40)}
        tokens = [bytes([b]) for b in range(256)] + rng.sample(sorted(words), len(words))
        peer = tiktoken.Encoding(
            "t", pat_str=r"[\s\S]+", mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={}
        )
        model = _C.BpeModel(tokens, [], [], [], True, True, "gpt2")
        for size in [1, 2, 3, 4, 5, 6, 8, 9, 16, 17, 20, 32, 33, 63, 64, 65, 66, 130, 200, 700, 3000]:
            text = "".join(rng.choices("abcd" if trial % 2 else "ab", k=size))
            assert model.encode_pieces([text.encode()]) == peer.encode_ordinary(text), (tokens[256:], text)


@pytest.mark.parametrize("whole", [False, True])
def test_merge_lists_equal_hugging_faces_in_any_order_of_merges(whole):
    """The merges of a trained vocabulary in shuffled order: a merge may be listed before those that make its parts."""
    rng = random.Random(3)
    for _ in range(40):
        pairs = train_all(["".join(rng.choices("abc", k=60)) for _ in range(4)], most=30)
        tokens = [bytes([b]) for b in range(256)]
        for a, b in pairs:
            tokens.append(tokens[a] + tokens[b])
        listed = list(zip(pairs, range(256, len(tokens))))
        rng.shuffle(listed)
        merges = [(spelled(tokens[a]), spelled(tokens[b])) for (a, b), _ in listed]
        vocab = {spelled(t): i for i, t in enumerate(tokens)}
        peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
        model = _C.BpeModel(tokens, [], [pair for pair, _ in listed], [new for _, new in listed], False, whole, "gpt2")
        for size in [1, 2, 3, 6, 8, 9, 30, 63, 64, 65, 66, 300, 2000]:
            text = "".join(rng.choices("abc", k=size))
            assert model.encode_pieces([text.encode()]) == peer.encode(text).ids, (merges, text)


def test_very_long_pieces_take_no_quadratic_time():
    letters = "".join(random.Random(4).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000))
    start = time.perf_counter()
    tok = Tokenizer.train(CODE[:10] + ["a" * 1_000_000, letters], 2000)
    for text in ["a" * 1_000_000, letters, " " * 1_000_000, "\n" * 1_000_000, "A" * 1_000_000, "!a" * 500_000]:
        for pattern in ("cl100k", "o200k"):
            other = Tokenizer(dataclasses.replace(tok._vocabulary, pattern=pattern))
            assert other.decode(other.encode(text)) == text
    # Anything quadratic takes hours here.
    assert time.perf_counter() - start < 30


def test_more_tokens_than_the_text_gives_are_an_error_that_says_how_many_there_are():
    """aaaa gives aa, then aaaa, and no more: 258 tokens and one special."""
    assert Tokenizer.train(["aaaa"], 259, special_tokens=["<s>"]).vocab_size == 259
    with pytest.raises(ValueError, match="at most 259, which is all that this text can give, got 260"):
        Tokenizer.train(["aaaa"], 260, special_tokens=["<s>"])


def test_tokens_longer_than_a_window_are_found_in_long_pieces():
    """Tokens of up to 1,500 bytes: windows of 64 bytes do not hold them, and those of 1,024 not all."""
    sizes = [2, 4, 8, 16, 32, 64, 128, 256, 300, 1200, 1500]
    tokens = [bytes([b]) for b in range(256)] + [b"a" * n for n in sizes] + [b"ab", b"abab", b"b" * 2, b"b" * 3]
    peer = tiktoken.Encoding("t", pat_str=r"[\s\S]+", mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={})
    model = _C.BpeModel(tokens, [], [], [], True, True, "gpt2")
    rng = random.Random(6)
    for text in ["a" * 5000, "ab" * 3000, "a" * 2999 + "b" * 100 + "a" * 700, *("".join(rng.choices("aaaab", k=4000)) for _ in range(9))]:
        assert model.encode_pieces([text.encode()]) == peer.encode_ordinary(text), text[:40]


def test_more_pieces_than_the_cache_holds_change_no_id():
    """Twice over a text of more distinct pieces, short and long, of few and of many ids, than there is room for."""
    rng = random.Random(8)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.choice((4, 7, 9, 14, 15, 16, 17, 40)))) for _ in range(300_000)]
    tok = Tokenizer.train(CODE[:20], 1000)
    text = " ".join(words)
    expected = tok._model.encode_pieces(pieces("cl100k", text.encode()))
    assert tok.encode(text) == expected == tok.encode(text)
    assert tok.decode(expected) == text
