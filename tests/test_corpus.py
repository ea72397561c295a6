"""data/corpus.py: the text of a run, from local files so that the tests know every byte."""

from dataclasses import replace

import numpy as np
import pytest

from nanorlhf.config import DataConfig, TokenizerConfig, preset
from nanorlhf.data import corpus as room
from nanorlhf.data.corpus import Corpus, cut, head
from nanorlhf.data.sources import document_bytes
from tiny import byte_tokenizer

TOPICS = ("topics",)  # a small source that every Python has


def text(name, documents=60, size=400):
    return "<|endoftext|>".join(f"{name} {i} ".ljust(size, "abcdefg "[i % 8]) + "\n" for i in range(documents))


def corpus(tmp_path, contents, **data):
    files = []
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
        files.append(str(tmp_path / name))
    tiny = preset("tiny")
    data = DataConfig(**{"sources": TOPICS, "files": tuple(files), "offline": True, **data})
    return Corpus(replace(tiny, data=data, tokenizer=TokenizerConfig(vocab_size=300, train_bytes=20_000)))


def test_files_stand_beside_the_sources_and_every_document_is_on_one_side(tmp_path):
    made = corpus(tmp_path, {"one.txt": text("one"), "two.txt": text("two")})
    assert list(made.sources) == ["topics", "one", "two"]
    for name in ("one", "two"):
        train, held = made.parts[name]
        assert sorted(train + held) == sorted(made.sources[name].documents) and train and held
        assert not set(train) & set(held)


def test_two_sources_of_one_name_are_refused_instead_of_losing_one(tmp_path):
    with pytest.raises(ValueError, match="corpus: two sources are called 'a'; rename one of the files"):
        corpus(tmp_path, {"x/a.txt": text("x"), "y/a.txt": text("y")})
    with pytest.raises(ValueError, match="corpus: two sources are called 'topics'"):
        corpus(tmp_path, {"topics.txt": text("x")})


@pytest.mark.parametrize("content, sentence", [(None, "expected a file, got .*none.txt"), ("  \n", "got an empty file")])
def test_a_file_that_is_missing_or_empty_is_refused_in_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "none.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        Corpus(replace(preset("tiny"), data=DataConfig(sources=TOPICS, files=(str(path),), offline=True)))


def test_no_source_at_all_is_refused_with_the_reasons(monkeypatch):
    monkeypatch.setattr(room, "load_sources", lambda *_: ([], ["wiki: not installed", "films: offline"]))
    with pytest.raises(ValueError, match="no source of text is left: wiki: not installed; films: offline"):
        Corpus(preset("tiny"))


def test_what_cannot_be_had_is_left_out_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("NANORLHF_CACHE", str(tmp_path / "no cache"))
    made = corpus(tmp_path, {}, sources=("topics", "films"))
    assert list(made.sources) == ["topics"] and made.films is None
    assert len(made.left_out) == 1 and made.left_out[0].startswith("films: ")


def test_a_large_source_is_cut_in_training_and_not_in_what_is_held_out(tmp_path):
    whole = corpus(tmp_path, {"one.txt": text("one")})
    small = corpus(tmp_path, {"one.txt": text("one")}, max_source_bytes=2000)
    assert small.parts["one"][1] == whole.parts["one"][1]
    train = small.train_documents("one")
    assert train == whole.train_documents("one")[:len(train)]
    assert 1600 < sum(len(d.encode()) for d in train) <= 2000


def test_held_out_text_is_bounded_and_a_source_without_any_is_not_listed(tmp_path):
    made = corpus(tmp_path, {"one.txt": text("one"), "single.txt": "A single document.\n"}, held_out_bytes=500)
    assert set(made.held_out) == {"topics", "one"}
    assert sum(len(d) for d in made.held_out["one"]) == 500


def test_the_tokenizer_reads_training_text_in_the_mixtures_proportions(tmp_path):
    """topics weighs 0.02 and a file 0.5 before they are made to sum to 1: of 20,000 bytes 769 and 19,231."""
    made = corpus(tmp_path, {"one.txt": text("one")})
    texts = made.tokenizer_texts()
    own = {document_bytes(d) for d in made.train_documents("one")}
    assert all(isinstance(t, bytes) for t in texts)
    mine = sum(len(t) for t in texts if t in own)
    assert 19_231 - 400 < mine <= 19_231
    held = {document_bytes(d) for _, documents in made.parts.values() for d in documents}
    assert not held & set(texts)


def test_the_mixture_holds_the_encoded_training_documents(tmp_path):
    tok = byte_tokenizer()
    end = tok.special_tokens["<|endoftext|>"]
    made = corpus(tmp_path, {"one.txt": text("one")})
    stream = made.mixture(tok, end).streams["one"]
    documents = made.train_documents("one")
    assert len(stream) == sum(len(d.encode()) + 2 for d in documents)
    first = stream[:len(documents[0].encode()) + 2].tolist()
    assert first == [end, *documents[0].encode(), end]
    tokens, cu_seqlens = made.mixture(tok, end).batch(0, 4)
    assert len(tokens) == 4 * preset("tiny").pretrain.row_tokens and int(cu_seqlens[-1]) == len(tokens)
    assert np.isin(tokens.numpy(), np.arange(tok.vocab_size)).all()


def test_the_data_card_says_what_was_read(tmp_path):
    made = corpus(tmp_path, {"one.txt": text("one")})
    card = {row["source"]: row for row in made.data_card({"one": 1.5})}
    assert card["one"]["epochs"] == 1.5 and card["topics"]["epochs"] == 0.0
    assert card["one"]["documents"] == 60 and len(card["one"]["sha256"]) == 64 and card["topics"]["licence"] == "PSF-2.0"
    assert card["one"]["bytes"] == sum(len(d.encode()) for d in made.sources["one"].documents)


def test_a_cut_keeps_whole_documents_and_at_least_one():
    assert cut(["abc", "de", "f"], 5) == ["abc", "de"] and cut(["abc", "de"], 4) == ["abc"]
    assert cut(["abc", "de"], 0) == ["abc"] and cut([], 5) == []
    assert cut(["éé", "a"], 4) == ["éé"]  # bytes, not characters


def test_a_head_ends_inside_a_document_where_it_must():
    assert head(["abc", "defg", "h"], 4) == ["abc", "d"] and head(["abc"], 9) == ["abc"] and head(["abc"], 0) == []
