"""The native scanners against the regular expressions that they stand for, as tiktoken and Hugging Face run them."""

import random
import sysconfig
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf import _C
from nanorlhf.pretokenize import PATTERNS, pieces
from nanorlhf.tokenizer import Tokenizer

# Characters that sit on the borders of the patterns' classes, and pieces of text that their alternatives fight over.
AWKWARD = [
    *"abcXYZ019 \t\n\r\v\x00\x1c'’sStTdDmMlLvVeErR.,!/-_",
    *["ſ", "'ſ", "'ll", "'RE", "'Ve", "\u00a0", "\u0085", "\u2028", "\u3000", "\u200b", "\ufeff", "\u180e", "\r\n", "  "],
    *["é", "e\u0301", "\u0301", "\u0903", "中", "の", "한", "ǅ", "ʰ", "ª", "Ⅷ", "٣", "²", "😀", "👩\u200d🚀", "İ", "ß", "ẞ", "Ж", "ж"],
    *["ʕ", "\u0378", "\U0001e4d0", "\U00016d40", "\U0002ffff", "ா", "த", "ﬆ", "K"],
]
CODE = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text(encoding="utf-8")
LANGUAGES = "Zażółć gęślą jaźń. Съешь ещё этих мягких булок. 敏捷的棕色狐狸，跳过了懒狗。\n　　いろはにほへと ちりぬるを\nतमिऴ் எழுத்து 2024年\n"


def awkward_strings(n, seed):
    rng = random.Random(seed)
    return ["".join(rng.choices(AWKWARD, k=rng.randint(1, 30))) for _ in range(n)]


def tiktoken_pattern(name, monkeypatch):
    """tiktoken's own spelling of a pattern; the rank files, which it would download, are left out."""
    constructor = {"gpt2": "r50k_base", "cl100k": "cl100k_base", "o200k": "o200k_base"}[name]
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    return getattr(tiktoken_ext.openai_public, constructor)()["pat_str"]


@pytest.mark.parametrize(
    "bit, pattern",
    [
        (1, r"\p{L}"),
        (2, r"\p{N}"),
        (4, r"\s"),
        (8, r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"),
        (16, r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"),
        (32, r"[\r\n]"),
    ],
)
def test_every_code_point_has_the_class_that_tiktoken_gives_it(bit, pattern):
    """An encoding of single bytes keeps only what its pattern matches, so it returns the members of the class."""
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    ranks = {bytes([b]): b for b in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    members = encoding.decode_bytes(encoding.encode_ordinary("".join(map(chr, points)))).decode()
    assert [c for c in points if _C.code_point_class(c) & bit] == list(map(ord, members))


@pytest.mark.parametrize("name", ["gpt2", "cl100k", "o200k"])
def test_ids_equal_tiktokens_on_awkward_strings(name, monkeypatch):
    """The vocabulary is trained on such strings, so most pieces are tokens and another split gives other ids."""
    tok = Tokenizer.train(awkward_strings(1000, seed=1) + [LANGUAGES], 2500, pattern=name)
    ranks = {tok.decode_bytes([i]): i for i in range(tok.vocab_size)}
    peer = tiktoken.Encoding(name, pat_str=tiktoken_pattern(name, monkeypatch), mergeable_ranks=ranks, special_tokens={})
    for text in [*awkward_strings(4000, seed=2), CODE, LANGUAGES]:
        assert tok.encode(text) == peer.encode_ordinary(text), repr(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_splits_equal_hugging_faces_on_awkward_strings(name):
    peer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERNS[name]), "isolated")
    for text in [*awkward_strings(4000, seed=3), CODE, LANGUAGES]:
        assert pieces(name, text.encode()) == [piece.encode() for piece, _ in peer.pre_tokenize_str(text)], repr(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_splits_equal_those_of_the_regex_module_where_unicode_versions_agree(name):
    same_rule = f"(?:{PATTERNS[name]})"  # a spelling that the package does not know, so it runs as a regular expression
    for text in [CODE, "Don't we'LL 12345 ça\u3000 va \n \n  ", "x\r\n\r\n\ty  ", "été 東京 日本\n"]:
        assert pieces(name, text.encode()) == pieces(same_rule, text.encode())


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("gpt2", "don't DON'T", ["don", "'t", " DON", "'", "T"]),  # contractions are lower case
        ("cl100k", "DON'T", ["DON", "'T"]),  # here they are of any case
        ("cl100k", "'store 'store", ["'s", "tore", " '", "store"]),  # and come before words, not before a space
        ("o200k", "don't 'store", ["don't", " '", "store"]),  # a contraction belongs to its word
        ("cl100k", "don'ſ", ["don", "'ſ"]),  # U+017F is an s whatever the case
        ("o200k", "中'ſ'Sa", ["中'ſ", "'Sa"]),  # only one contraction a word
        ("gpt2", "12345", ["12345"]),
        ("cl100k", "12345", ["123", "45"]),
        ("qwen2", "123", ["1", "2", "3"]),
        ("gpt2", "a  b", ["a", " ", " b"]),  # the last space goes with the word
        ("cl100k", "a\n \n", ["a", "\n \n"]),
        ("cl100k", "a\n ", ["a", "\n "]),  # \s++$ comes first
        ("llama3", "a\n ", ["a", "\n", " "]),  # \s*[\r\n]+ comes first
        ("llama3", "a.\n\nb", ["a", ".\n\n", "b"]),
        ("o200k", "a.\n/b", ["a", ".\n/", "b"]),
        ("o200k", "HTMLParser", ["HTMLParser"]),  # upper case, then lower case
        ("o200k", "parseHTML", ["parse", "HTML"]),
        ("o200k", "\u0301A", ["\u0301", "A"]),  # the first alternative matches the mark alone, as a lower-case character
        ("gpt2", "\u200b", ["\u200b"]),  # a zero-width space is no whitespace
    ],
)
def test_splits_worked_by_hand(name, text, expected):
    assert pieces(name, text.encode()) == [piece.encode() for piece in expected]


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=80))
def test_pieces_of_any_bytes_are_not_empty_and_join_to_the_input(name, text):
    split = pieces(name, text)
    assert b"".join(split) == text and all(split)


@pytest.mark.parametrize("bad", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xb8", b"\xf5"])
def test_bytes_that_are_not_utf8_split_like_punctuation(bad):
    """Overlong forms, surrogates, code points past the last and truncated characters are bytes of no class."""
    for name in PATTERNS:
        assert pieces(name, b"a 1" + bad + b" \n") == [b"a", *pieces(name, b" 1"), bad, b" \n"]


@pytest.mark.parametrize("name", PATTERNS)
def test_a_safe_cut_leaves_the_pieces_as_they_were(name):
    alphabet = ["a", "B", "s", " ", " ", "\n", "\n", "\r", ".", "/", "'", "1", "中", "。", "\u3000", "\u00a0", "é", "䷀", "\t"]
    rng = random.Random(4)
    cuts = 0
    for _ in range(20000):
        text = "".join(rng.choices(alphabet, k=12)).encode()
        cut = _C.safe_cut(text, rng.randint(0, 6))
        if cut < len(text):
            cuts += 1
            assert pieces(name, text[:cut]) + pieces(name, text[cut:]) == pieces(name, text), text
    assert cuts > 1000


def isas():
    """The instruction sets of this CPU that have a scanner of their own."""
    offered = dict(_C.cpu_features())
    return [name for name, needs in (("avx2", ("avx2",)), ("avx512", ("avx512bw", "avx512vl", "avx512dq")))
            if all(offered.get(feature) for feature in needs)]


@pytest.mark.parametrize("name", PATTERNS)
def test_scanners_of_blocks_split_like_the_scanner_of_characters(name):
    """On text much longer than a block, so that every rule meets a block's edge; on what is mostly ASCII, and on bytes."""
    rng = random.Random(7)
    plain = [*"aB1 \n", " the", "don't", "I'LL", "12345", "  \n\n ", "((", "!\n/", " = ", "\t\t", "camelCase", "x" * 70]
    texts = [CODE.encode(), LANGUAGES.encode() * 4]
    texts += ["".join(rng.choices(plain + AWKWARD * (i % 2), k=150)).encode() for i in range(1500)]
    texts += [bytes(rng.choices(range(256), k=300)) for _ in range(100)]
    texts += [unit * 90 for unit in (b"a", b" ", b"\n", b"1", b"'", b"'s", b"!", "é".encode(), "中".encode(), b"\xff")]
    assert isas() or not _C.isa().startswith("avx")
    for text in texts:
        expected = _C.pretokenize(name, text, "portable")
        assert b"".join(expected) == text
        for isa in isas():
            assert _C.pretokenize(name, text, isa) == expected, (isa, text)


@pytest.mark.parametrize("name", PATTERNS)
def test_scanners_of_blocks_know_every_code_point(name):
    """Each among letters, at every place that a window can cut, and before and after each of its neighbours."""
    points = [chr(c) for c in range(0x80, 0x30000) if not 0xD800 <= c < 0xE000]
    text = "".join(points[::-1]) + "".join(f"a{c}b {c}{c}'s{c}1" for c in points)
    expected = _C.pretokenize(name, text.encode(), "portable")
    for isa in isas():
        found = _C.pretokenize(name, text.encode(), isa)
        wrong = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), None)
        assert wrong is None and len(found) == len(expected), (isa, found[wrong], expected[wrong])


@pytest.mark.parametrize("name", PATTERNS)
def test_the_last_safe_cut_leaves_the_pieces_as_they_were(name):
    for text in [*awkward_strings(300, seed=5), "one two\nthree four. Five\nsix", CODE[:5000]]:
        data = text.encode()
        cut = _C.last_safe_cut(data)
        assert pieces(name, data[:cut]) + pieces(name, data[cut:]) == pieces(name, data)
    assert _C.last_safe_cut(b"one two three") == 7 and _C.last_safe_cut(b"") == _C.last_safe_cut(b"x" * 99) == 0
