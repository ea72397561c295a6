"""The public class: encoding, special tokens, decoding, files, and what is refused."""

import base64
import json
import pickle
import subprocess
import sys
import weakref
import sysconfig
import threading
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.pretokenize import PATTERNS
from nanorlhf.tokenizer import Tokenizer
from nanorlhf.tokenizer_json import BYTE_TO_CHAR

SPECIALS = ["<|endoftext|>", "<|end|>", "<|end|>of"]
CODE = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text(encoding="utf-8")
SAMPLE = CODE[:8000] + "\nЗдравствуй, мир! 你好，世界。\r\n\n  naïve e\u0301 12345 don't DON'T <|end|> x \t\n "
TOK = Tokenizer.train([SAMPLE], 600, special_tokens=SPECIALS)


def tiktoken_twin(tok):
    specials = tok.special_tokens
    ranks = {tok.decode_bytes([i]): i for i in range(tok.vocab_size) if i not in specials.values()}
    return tiktoken.Encoding("twin", pat_str=PATTERNS[tok.pattern], mergeable_ranks=ranks, special_tokens=specials)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_round_trips(text):
    assert TOK.decode(TOK.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_round_trip(data):
    assert TOK.decode_bytes(TOK.encode(data)) == data
    assert TOK.decode(TOK.encode(data)) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["", "\x00", "a\x00b", " ", "\n", "a", "é", "😀", "\ufeff", "\U0010ffff"])
def test_small_texts_round_trip_and_equal_tiktokens(text):
    assert TOK.decode(TOK.encode(text)) == text
    assert TOK.encode(text) == tiktoken_twin(TOK).encode_ordinary(text)


@pytest.mark.parametrize("text", ["\ud83d", "a\ud83db", "\ude00\ud83d", "\ud83d\ude00 joined", "\udcff"])
def test_surrogates_are_repaired_as_tiktoken_does(text):
    """A pair becomes its character, a lone one U+FFFD."""
    assert TOK.encode(text) == tiktoken_twin(TOK).encode(text)
    assert TOK.encode("\ud83d") == TOK.encode("\ufffd")


def test_special_text_is_plain_text_unless_it_is_named():
    ids = TOK.special_tokens
    assert not set(TOK.encode("a<|endoftext|>")) & set(ids.values())
    assert TOK.encode("a<|endoftext|>b", {"<|endoftext|>"}) == [97, ids["<|endoftext|>"], 98]
    assert TOK.encode("a<|end|>", {"<|endoftext|>"}) == TOK.encode("a<|end|>")
    assert TOK.encode("<|end|>", allowed_special="<|end|>") == [ids["<|end|>"]]
    with pytest.raises(ValueError, match="expected allowed_special among .*, got '<|nope|>'"):
        TOK.encode("a", {"<|nope|>"})


def test_special_tokens_in_a_text_are_an_error_when_asked_for():
    assert TOK.encode("no <|end> here", disallowed_special="all") == TOK.encode("no <|end> here")
    for banned in ("all", ["<|end|>"], "<|end|>"):
        with pytest.raises(ValueError, match=r"expected a text without the special token '<\|end\|>'; name it in allowed"):
            TOK.encode("a<|end|>b", disallowed_special=banned)
    assert TOK.encode("a<|end|>", "all", disallowed_special="all") == TOK.encode("a<|end|>", "all")
    with pytest.raises(ValueError, match="without the special token"):
        TOK.encode(b"a<|end|>", "all", disallowed_special="<|end|>")
    with pytest.raises(ValueError, match="expected disallowed_special among"):
        TOK.encode("a", disallowed_special=["<|nope|>"])


def test_a_tokenizer_goes_when_its_last_user_does():
    tok = Tokenizer.train([SAMPLE], 300)
    gone, encode = weakref.ref(tok), tok.encode
    del tok
    assert gone() is None
    assert encode("abc") == encode(text="abc") == [97, 98, 99]


def test_of_special_tokens_at_one_place_the_longest_is_parsed():
    ids = TOK.special_tokens
    assert TOK.encode("<|end|>of<|end|> of", "all")[:2] == [ids["<|end|>of"], ids["<|end|>"]]


@pytest.mark.parametrize("pattern", ["gpt4", "(?:" + PATTERNS["cl100k"] + ")"])
def test_special_tokens_cut_the_text_before_it_is_split(pattern):
    """Whitespace before a special token is at the end of its text. A pattern that runs in Python gives the same ids."""
    tok = Tokenizer.train([SAMPLE], 600, pattern=pattern, special_tokens=SPECIALS[:2])
    for text in ["a \n <|end|>  b<|endoftext|><|end|>", "<|end|>", "<|en<|end|>d|>", SAMPLE * 2]:
        assert tok.encode(text, "all") == tiktoken_twin(TOK_TWO).encode(text, allowed_special="all")
        assert tok.encode(text) == TOK_TWO.encode(text)


TOK_TWO = Tokenizer.train([SAMPLE], 600, special_tokens=SPECIALS[:2])


def test_a_batch_equals_its_texts_one_by_one_for_any_number_of_threads():
    texts = [SAMPLE * 100, "", "a", SAMPLE, "中。\n" * 100_000, "", " x" * 300_000, ""]
    expected = [TOK.encode(text) for text in texts]
    for threads in (1, 2, 5, None):
        ids, offsets = TOK.encode_batch(texts, threads=threads)
        assert ids.dtype == np.int32 and offsets.dtype == np.int64 and offsets[-1] == len(ids)
        assert [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:])] == expected
    ids, offsets = TOK.encode_batch([])
    assert ids.shape == (0,) and offsets.tolist() == [0]


def test_a_batch_under_a_regular_expression_equals_its_texts_one_by_one():
    tok = Tokenizer.train([SAMPLE], 300, pattern=r"\w+")
    ids, offsets = tok.encode_batch(["one two", "", SAMPLE])
    assert offsets.tolist() == [0, len(tok.encode("one two")), len(tok.encode("one two")), len(ids)]
    assert tok.decode(ids) == "one two" + SAMPLE  # what the pattern does not match is kept
    assert ids.dtype == np.int32 and tok.encode_batch([])[1].tolist() == [0]


def test_threads_may_share_a_tokenizer():
    expected, wrong = TOK.encode(SAMPLE), []

    def work():
        wrong.extend(1 for _ in range(50) if TOK.encode(SAMPLE) != expected)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


@pytest.mark.parametrize("ids", [[-1], [97, 600], [10**12], [2**31 + 97]])
def test_decoding_an_unknown_id_is_a_key_error(ids):
    with pytest.raises(KeyError, match=f"Tokenizer.decode: expected ids of the vocabulary, got {ids[-1]}"):
        TOK.decode(ids)


def test_decoding_takes_lists_and_arrays_of_integers_only():
    ids = TOK.encode(SAMPLE)
    assert TOK.decode(np.array(ids, np.int32)) == TOK.decode(tuple(ids)) == SAMPLE and TOK.decode([]) == ""
    with pytest.raises(ValueError, match="expected integer ids, got float"):
        TOK.decode([1.5])


def test_token_byte_lengths_add_up_to_the_text():
    lengths = TOK.token_byte_lengths
    assert lengths.dtype == np.int32 and lengths.shape == (TOK.vocab_size,)
    assert lengths[TOK.encode(SAMPLE)].sum() == len(SAMPLE.encode())
    assert not lengths[list(TOK.special_tokens.values())].any()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOK.vocab_size - 1), max_size=40))
def test_a_stream_gives_the_text_of_any_ids_and_never_a_broken_character(ids):
    stream = TOK.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == TOK.decode(ids)
    assert "".join(map(stream.push, TOK.encode("né中😀"))) == "né中😀" and stream.finish() == ""


def test_a_stream_that_ends_inside_a_character_says_so():
    stream = Tokenizer.train([], 256).stream()
    assert [stream.push(b) for b in "😀".encode()[:3]] == ["", "", ""] and stream.finish() == "\ufffd"
    assert stream.push(97) == "a"  # it starts anew


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\p{L}+|\s|[^\p{L}\s]+"])
def test_a_saved_tokenizer_loads_here_and_in_hugging_face_with_the_same_ids(pattern, tmp_path):
    tok = Tokenizer.train([SAMPLE], 500, pattern=pattern, special_tokens=SPECIALS)
    tok.save(tmp_path / "new" / "folder")
    file = tmp_path / "new" / "folder" / "tokenizer.json"
    text = SAMPLE * 2 + "<|endoftext|>x"
    expected = tok.encode(text, "all")
    again = Tokenizer.load(tmp_path / "new" / "folder")
    assert again.pattern == tok.pattern and again.special_tokens == tok.special_tokens
    assert again.encode(text, "all") == Tokenizer.load(str(file)).encode(text, "all") == expected
    assert pickle.loads(pickle.dumps(tok)).encode(text, "all") == expected
    assert tokenizers.Tokenizer.from_file(str(file)).encode(text).ids == expected
    assert transformers.PreTrainedTokenizerFast(tokenizer_file=str(file)).encode(text) == expected
    auto = transformers.AutoTokenizer.from_pretrained(file.parent)
    assert auto.encode(text) == expected and auto.decode(expected) == text
    assert len(auto) == tok.vocab_size and auto.eos_token == "<|endoftext|>"


def write_ranks(path, tokens):
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))


def test_a_rank_file_means_what_it_means_to_tiktoken_and_survives_saving(tmp_path):
    """Bytes in another order, as OpenAI's files have them; a token out of the reach of merges; a hole in the ids."""
    tokens = [bytes([255 - b]) for b in range(256)] + [b"he", b"ll", b"hell", b"unreachable", b" w", b"or", b"lo"]
    write_ranks(tmp_path / "x.tiktoken", tokens)
    with open(tmp_path / "x.tiktoken", "ab") as file:
        file.write(base64.b64encode(b"hello") + b" 300\n")
    tok = Tokenizer.load(tmp_path / "x.tiktoken", pattern="gpt2")
    ranks = {t: i for i, t in enumerate(tokens)} | {b"hello": 300}
    twin = tiktoken.Encoding("t", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={})
    tok.save(tmp_path / "saved")
    saved = Tokenizer.load(tmp_path / "saved")
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    for text in ["hello hellos unreachable unreachables world " * 3, SAMPLE]:
        expected = twin.encode_ordinary(text)
        assert tok.encode(text) == saved.encode(text) == peer.encode(text).ids == expected
    assert tok.vocab_size == 301 and tok.token_byte_lengths[290] == 0
    with pytest.raises(KeyError, match="got 290"):
        tok.decode([290])


@pytest.mark.parametrize("use_regex", [True, False])
def test_a_tokenizer_of_hugging_faces_own_making_loads(use_regex, tmp_path):
    """Another byte order, old-style merges, special tokens first, Split with `removed`, and NFC."""
    pre = tokenizers.pre_tokenizers
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    if use_regex:
        peer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    else:
        split = pre.Split(tokenizers.Regex(PATTERNS["qwen2"]), "removed", invert=True)
        peer.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
        peer.normalizer = tokenizers.normalizers.NFC()
    peer.train_from_iterator(
        [SAMPLE],
        tokenizers.trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<s>"], show_progress=False, initial_alphabet=pre.ByteLevel.alphabet()
        ),
    )
    data = json.loads(peer.to_str())
    data["model"]["merges"] = [" ".join(m) for m in data["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tok = Tokenizer.load(tmp_path)
    assert tok.pattern == ("gpt2" if use_regex else "qwen2") and tok.special_tokens == {"<s>": 0}
    text = SAMPLE + "<s>e\u0301" + "a" * 100
    assert tok.encode(text, "all") == peer.encode(text).ids
    tok.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode(text, "all") == peer.encode(text).ids


def test_the_byte_alphabet_is_that_of_hugging_face():
    assert sorted(BYTE_TO_CHAR) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    (piece, _), = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é \n")
    assert piece == "".join(BYTE_TO_CHAR[b] for b in "é \n".encode())


@pytest.mark.parametrize(
    "arguments, match",
    [
        ((["a"], 255), "expected vocab_size of at least 256, got 255"),
        ((["a"], 256, "gpt2", ["x"]), "expected vocab_size of at least 257, got 256"),
        ((["a"], 300, "gpt5"), "expected one of gpt2, .* or a regular expression, got 'gpt5'"),
        ((["a"], 300, "(a"), "expected a regular expression, got '\\(a'"),
        ((["a"], 300, "gpt2", ["x", "x"]), "expected distinct, non-empty special tokens"),
        ((["a"], 300, "gpt2", [""]), "expected distinct, non-empty special tokens"),
        ((["a"], 256, "gpt2", [], "random"), "expected tie_break among hf, raw, first, got 'random'"),
        (("a text", 256), "expected a list of texts or paths, got str"),
        (([7], 256), "expected str or bytes, got int"),
        ((["abc"], 300), "expected vocab_size of at most 258, which is all that this text can give, got 300"),
    ],
)
def test_bad_arguments_of_train_are_errors_of_one_sentence(arguments, match):
    with pytest.raises(ValueError, match=match):
        Tokenizer.train(*arguments)


@pytest.mark.parametrize("pattern", ["gpt2", r"\w+"])
def test_files_that_are_missing_or_empty_are_errors(pattern, tmp_path):
    (tmp_path / "empty").touch()
    for name, match in [("empty", "expected text in .*empty, got an empty file"), ("nowhere", "expected a readable file")]:
        with pytest.raises(ValueError, match=match):
            Tokenizer.train([tmp_path / name], 256, pattern=pattern)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda d: d["model"].update(type="Unigram"), "expected a byte-level BPE"),
        (lambda d: d["model"].update(byte_fallback=True), "expected a byte-level BPE"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "with no normalizer or NFC"),
        (lambda d: d.update(pre_tokenizer=None), "expected a byte-level split without prefix space, got null"),
        (lambda d: d["model"]["vocab"].pop("Ā"), "expected a token for every byte, got none for 0"),
        (lambda d: d["model"]["merges"].append(["a", "§"]), "expected merges of tokens of the vocabulary"),
        (lambda d: d["model"]["vocab"].update({"a b": 700}), "expected tokens in the byte-level alphabet, got 'a b'"),
        (lambda d: d["model"]["vocab"].update({"zzz": 10**12}), "expected non-empty tokens with ids from 0 to"),
        (lambda d: d["added_tokens"][0].update(content=""), "expected non-empty tokens"),
    ],
)
def test_files_that_mean_something_else_are_errors(change, match, tmp_path):
    TOK.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=match):
        Tokenizer.load(tmp_path)


def test_files_that_cannot_be_read_are_errors(tmp_path):
    (tmp_path / "x.json").write_text("{")
    (tmp_path / "y.json").write_text("[]")
    (tmp_path / "x.tiktoken").write_text("!!! 0\n")
    for name, pattern, match in [
        ("nowhere", None, "got no such file"),
        ("nowhere.tiktoken", "gpt2", "got no such file"),
        ("x.json", None, "expected JSON in"),
        ("y.json", None, "expected a JSON object"),
        ("x.tiktoken", None, "expected a pattern for the rank file"),
        ("x.tiktoken", "gpt2", "expected base64, a space and a rank on line 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            Tokenizer.load(tmp_path / name, pattern=pattern)


def test_bad_texts_are_errors():
    with pytest.raises(ValueError, match="Tokenizer: expected str or bytes, got int"):
        TOK.encode(7)
    with pytest.raises(ValueError, match="Tokenizer.encode_batch: expected a list of texts, got str"):
        TOK.encode_batch("text")
    with pytest.raises(ValueError, match="expected threads of at least 1, got 0"):
        TOK.encode_batch(["a"], threads=0)


def test_lists_that_change_while_they_are_read_do_no_harm():
    class Clears:
        def __index__(self):
            ids.clear()
            return 65

    ids = [Clears(), *[66] * 999]
    with pytest.raises(ValueError, match="a list that changed"):
        TOK.decode(ids)
    texts = [b"a b " * 1_000_000 for _ in range(4)]
    expected = len(TOK.encode(texts[0]))
    thread = threading.Thread(target=texts.clear)
    thread.start()
    ids, offsets = TOK.encode_batch(texts, threads=1)
    thread.join()
    assert set(np.diff(offsets).tolist()) <= {expected} and len(ids) == offsets[-1]


@pytest.mark.parametrize("id", [10**22, -(10**22), -1])
def test_an_id_of_any_size_is_named(id):
    with pytest.raises(KeyError, match=f"got {id}"):
        TOK.decode([id])


STARVED = """
import random, resource, string
from nanorlhf.tokenizer import Tokenizer
tok = Tokenizer.train([], 256, "cl100k")
texts = [("hello world " * 50_000)] * 4
expected = tok.encode_batch(texts, 1)[0].tolist()
rng = random.Random(1)
words = ["".join(rng.choices(string.ascii_lowercase, k=6)) + " " for _ in range(400_000)]
tok.encode("x")
hold = [Tokenizer.train([], 256, "cl100k") for _ in range(20)]
[h.encode("y") for h in hold]
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), -1))
starved = False
for _ in range(2):
    for first in range(0, len(words), 500):
        text = "".join(words[first:first + 500])
        try:
            assert tok.encode(text) == list(text.encode()), first
        except MemoryError:
            starved = True
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20), -1))
try:
    assert tok.encode_batch(texts, 200)[0].tolist() == expected
except MemoryError:
    pass
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert starved and tok.encode_batch(texts, 200)[0].tolist() == expected
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does")
def test_too_little_memory_or_threads_is_an_error_and_no_wrong_ids_after_it():
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
