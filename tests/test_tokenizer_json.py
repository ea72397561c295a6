"""The formats that `Tokenizer.save` writes, read by those who made them. Everything that a folder holds is in
test_tokenizer.py; here are the single files, and what a rank file cannot hold."""

import base64
import gzip
from importlib.resources import files

import pytest
import tiktoken
import tiktoken.load
import tokenizers

from nanorlhf.pretokenize import PATTERNS
from nanorlhf.tokenizer import Tokenizer
from nanorlhf.tokenizer_json import Vocabulary

SAMPLE = "It's a test, we'll see: 1234 tests tested 漢字かな 'naïve'\n\n  x == y;\t\tend " * 3
BYTES = [bytes([b]) for b in range(256)]


def ranks_of(path):
    return tiktoken.load.load_tiktoken_bpe(str(path))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tie_break", ["hf", "raw", "first"])
def test_a_trained_vocabulary_is_a_rank_file_to_tiktoken(pattern, tie_break, tmp_path):
    tok = Tokenizer.train([SAMPLE], 300, pattern=pattern, special_tokens=["<|end|>"], tie_break=tie_break)
    tok.save(tmp_path / "x.tiktoken")
    peer = tiktoken.Encoding("t", pat_str=PATTERNS[pattern], mergeable_ranks=ranks_of(tmp_path / "x.tiktoken"), special_tokens={})
    again = Tokenizer.load(tmp_path / "x.tiktoken", pattern=pattern)
    for text in (SAMPLE, SAMPLE[::-1], "tes" * 100):
        assert tok.encode(text) == again.encode(text) == peer.encode_ordinary(text)
    assert again.special_tokens == {} and again.vocab_size == tok.vocab_size - 1


def test_a_rank_file_comes_out_as_it_went_in(tmp_path):
    package = pytest.importorskip("bpe_openai", reason="it carries the vocabularies")
    text = gzip.decompress((files(package) / "data/cl100k_base.tiktoken.gz").read_bytes())
    (tmp_path / "a.tiktoken").write_bytes(text)
    Tokenizer.load(tmp_path / "a.tiktoken", pattern="cl100k").save(tmp_path / "b.tiktoken")
    assert (tmp_path / "b.tiktoken").read_bytes() == text


def test_a_rank_file_gets_its_special_tokens_when_it_is_read(tmp_path):
    tok = Tokenizer.train([SAMPLE], 300, pattern="cl100k")
    tok.save(tmp_path / "new" / "x.tiktoken")
    specials = {"<|endoftext|>": 310, "<|end|>": 300}
    again = Tokenizer.load(tmp_path / "new" / "x.tiktoken", "cl100k", specials)
    peer = tiktoken.Encoding("t", pat_str=PATTERNS["cl100k"], mergeable_ranks=ranks_of(tmp_path / "new" / "x.tiktoken"),
                             special_tokens=specials)
    text = "<|end|>" + SAMPLE + "<|endoftext|>"
    assert again.encode(text, "all") == peer.encode(text, allowed_special="all")
    assert again.special_tokens == specials and again.vocab_size == 311
    again.save(tmp_path / "folder")
    assert Tokenizer.load(tmp_path / "folder", special_tokens={"<|more|>": 305}).encode("<|more|>", "all") == [305]
    for wrong in ({"<|a|>": 97}, {"<|a|>": -1}, {"": 400}):
        with pytest.raises(ValueError, match="expected special tokens with ids that are free"):
            Tokenizer.load(tmp_path / "folder", special_tokens=wrong)


def test_a_json_file_comes_back_and_loads_in_hugging_face(tmp_path):
    tok = Tokenizer.train([SAMPLE], 300, special_tokens=["<|end|>"])
    tok.save(tmp_path / "x.json")
    text = SAMPLE + "<|end|>"
    expected = tok.encode(text, "all")
    assert Tokenizer.load(tmp_path / "x.json").encode(text, "all") == expected
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "x.json")).encode(text).ids == expected
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "tokens, merges, results, got",
    [
        # "abc" can only be made of a and bc, but ab comes first: the bytes of "abc" never become it.
        ([b"ab", b"bc", b"abc"], [(97, 98), (98, 99), (97, 257)], [256, 257, 258], "token 258"),
        # The list makes "ab" last, its id would make it first.
        ([b"ab", b"bc"], [(98, 99), (97, 98)], [257, 256], "token 256"),
    ],
)
def test_a_merge_list_that_is_no_ranking_is_an_error(tokens, merges, results, got, tmp_path):
    tok = Tokenizer(Vocabulary(BYTES + tokens, {}, "gpt2", merges, results))
    with pytest.raises(ValueError, match=f"expected merges that are ranks by bytes .*, got {got}"):
        tok.save(tmp_path / "x.tiktoken")
    assert not list(tmp_path.iterdir())
    tok.save(tmp_path / "folder")
    assert Tokenizer.load(tmp_path / "folder").encode("abc abc") == tok.encode("abc abc")


def test_a_normalizer_is_not_lost_in_a_rank_file(tmp_path):
    tok = Tokenizer(Vocabulary(BYTES, {}, "qwen2", [], [], nfc=True))
    with pytest.raises(ValueError, match="expected no normalizer"):
        tok.save(tmp_path / "x.tiktoken")


def test_a_pair_listed_twice_has_its_last_place_as_in_hugging_face(tmp_path):
    tok = Tokenizer(Vocabulary(BYTES + [b"ab", b"bc"], {}, "gpt2", [(97, 98), (98, 99), (97, 98)], [256, 257, 256], False))
    tok.save(tmp_path / "x.json")
    assert tok.encode("abc") == tokenizers.Tokenizer.from_file(str(tmp_path / "x.json")).encode("abc").ids == [97, 257]


def test_special_tokens_are_found_before_text_is_normalised(tmp_path):
    tok = Tokenizer(Vocabulary(BYTES + [b"<|e|>"], {"<|e|>": 256}, "qwen2", [], [], nfc=True))
    tok.save(tmp_path / "x.json")
    text = "xe\u0301<|e|>\u0338e\u0301"
    assert tok.encode(text, "all") == tokenizers.Tokenizer.from_file(str(tmp_path / "x.json")).encode(text).ids
    with pytest.raises(ValueError, match="without the special token"):
        tok.encode(text, disallowed_special="all")


def test_what_a_file_would_say_twice_is_an_error(tmp_path):
    (tmp_path / "x.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate([*BYTES, b"ab", b"ab"])))
    with pytest.raises(ValueError, match="expected distinct tokens, got the same bytes for ids 256 and 257"):
        Tokenizer.load(tmp_path / "x.tiktoken", "gpt2")
    tok = Tokenizer.train(["ab ab ab"], 258, "gpt2", special_tokens=["ab"])
    with pytest.raises(ValueError, match="that no ordinary token is spelled like, got 'ab'"):
        tok.save(tmp_path / "x.json")
