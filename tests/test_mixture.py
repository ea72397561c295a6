"""The held-out split, packing, and the mixture's order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.data.mixture import Mixture, default_weights, pack, split_held_out
from nanorlhf.data.sources import make_source

EOT = 0


def stream(first, documents, length):
    """Documents of ids first, first+1, …, each between two EOT."""
    ids, offsets = np.arange(documents * length) + first, np.arange(documents + 1) * length
    return pack(ids, offsets, EOT)


def source(name, documents, keys=()):
    return make_source(name, "code", "file", "none", "1", documents, keys=keys)


def test_packing_opens_and_closes_every_document_also_an_empty_one():
    assert pack(np.array([5, 6, 7]), np.array([0, 2, 2, 3]), EOT).tolist() == [EOT, 5, 6, EOT, EOT, EOT, EOT, 7, EOT]
    assert pack(np.array([], np.int32), np.array([0]), EOT).dtype == np.int32


def test_the_held_out_split_is_disjoint_complete_and_within_its_cap():
    documents = [f"document {i} " + "x" * 100 for i in range(2000)]
    train, held = split_held_out([source("a", documents)], cap=3000)["a"]
    assert sorted(train + held) == sorted(documents) and not set(train) & set(held)
    assert 2000 < sum(map(len, held)) <= 3000


def test_a_document_stays_on_its_side_when_others_come_and_go():
    """A stable hash orders the documents, so adding text moves only the boundary: the held-out set of the smaller
    source is, with the same number held out, no random other set."""
    documents = [f"document {i} " + "x" * 1000 for i in range(500)]
    small = split_held_out([source("a", documents)])["a"][1]
    large = split_held_out([source("a", documents[::-1])])["a"][1]
    assert set(small) == set(large)


def test_a_copy_of_a_held_out_document_is_not_trained_on():
    documents = [f"document {i % 50} " + "x" * 50 for i in range(100)]
    train, held = split_held_out([source("a", documents)])["a"]
    assert held and not set(train) & set(held)


def test_sources_with_shared_keys_never_train_on_what_another_holds_out():
    keys = [f"module{i}" for i in range(300)]
    code = source("code", [f"code {i} " + "x" * 1000 for i in range(300)], keys)
    docs = source("docs", [f"doc {i} " + "x" * 300 for i in range(300)], keys)
    parts = split_held_out([code, docs])
    for held, other in (("code", "doc"), ("docs", "code")):
        numbers = {document.split()[1] for document in parts[held][1]}
        trained = {document.split()[1] for document in parts["docs" if other == "doc" else "code"][0]}
        assert numbers and not numbers & trained


def test_at_least_one_document_is_held_out_unless_there_is_but_one():
    assert len(split_held_out([source("a", ["x" * 900, "y" * 900])])["a"][1]) == 1
    assert split_held_out([source("a", ["only"])])["a"] == (["only"], [])


def test_a_batch_depends_on_seed_and_step_alone():
    streams = {"a": stream(1, 40, 5), "b": stream(1000, 90, 3)}
    make = lambda seed: Mixture(streams, {"a": 0.3, "b": 0.7}, 16, seed, EOT)
    forward, fresh = make(3), make(3)
    expected = [forward.batch(step, 4) for step in range(30)]
    tokens, cu_seqlens = fresh.batch(29, 4)
    assert tokens.equal(expected[29][0]) and cu_seqlens.equal(expected[29][1])
    assert fresh.batch(2, 4)[0].equal(expected[2][0])  # backwards, over an epoch boundary
    assert not make(4).batch(29, 4)[0].equal(tokens)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 9), st.integers(0, 2**31))
def test_sequences_start_at_every_opening_end_of_text_and_at_every_row(row_tokens, rows, step, seed):
    mixture = Mixture({"a": stream(1, 12, 4), "b": stream(100, 3, 1)}, {"a": 1, "b": 1}, row_tokens, seed, EOT)
    tokens, cu_seqlens = mixture.batch(step, rows)
    assert tokens.shape == (rows * row_tokens,) and str(tokens.dtype) == "torch.int64"
    ids = tokens.tolist()
    wanted = {*range(0, rows * row_tokens + 1, row_tokens),
              *(i for i in range(1, len(ids)) if ids[i] == ids[i - 1] == EOT)}
    assert cu_seqlens.tolist() == sorted(wanted) and str(cu_seqlens.dtype) == "torch.int32"


def test_proportions_hold_in_every_prefix():
    """With a Kronecker sequence the count of a source in n rows differs from its share by O(log n) rows, where
    independent draws would differ by √n: here at most 6 of 2000, against a standard deviation of 20."""
    streams = {"a": np.full(4000, 1), "b": np.full(4000, 2), "c": np.full(4000, 3)}
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    mixture = Mixture(streams, weights, 4, 7, EOT)
    firsts = mixture.batch(0, 2000)[0].view(2000, 4)[:, 0].numpy()
    for value, name in ((1, "a"), (2, "b"), (3, "c")):
        off = np.abs(np.cumsum(firsts == value) - weights[name] * np.arange(1, 2001))
        assert off.max() < 6


def test_an_epoch_shows_every_row_once_and_the_next_one_in_another_order():
    """200 ids without EOT and rows of 10: (200 + 1) // 10 − 1 = 19 rows an epoch, shifted by 0 to 10."""
    mixture = Mixture({"a": np.arange(1, 201)}, {"a": 1}, 10, 0, EOT)
    first, second = (mixture.batch(step, 19)[0].tolist() for step in (0, 1))
    assert len(set(first)) == len(set(second)) == 190 and first != second
    assert max(first) - min(first) == 189  # one contiguous stretch
    assert mixture.epochs(2, 19) == {"a": pytest.approx(1.9)}


def test_a_stream_shorter_than_a_row_repeats():
    tokens, _ = Mixture({"a": np.array([1, 2, EOT])}, {"a": 1}, 7, 0, EOT).batch(0, 1)
    assert tokens.tolist() == [1, 2, EOT, 1, 2, EOT, 1]


def test_default_weights_are_those_of_the_sources_that_are_there():
    weights = default_weights(["wiki", "plays", "bible", "mine"])
    assert sum(weights.values()) == pytest.approx(1) and weights["wiki"] / weights["plays"] == pytest.approx(2.4)
    assert weights["mine"] > weights["wiki"]


def test_bad_streams_weights_and_rows_are_refused():
    with pytest.raises(ValueError, match="expected at least one stream"):
        Mixture({"a": np.arange(9)}, {"b": 1.0}, 4, 0, EOT)
    with pytest.raises(ValueError, match="none empty"):
        Mixture({"a": np.array([], np.int32)}, {"a": 1.0}, 4, 0, EOT)
    with pytest.raises(ValueError, match="row_tokens of at least 2, got 1"):
        Mixture({"a": np.arange(9)}, {"a": 1.0}, 1, 0, EOT)
    with pytest.raises(ValueError, match="got -1 and 4"):
        Mixture({"a": np.arange(9)}, {"a": 1.0}, 4, 0, EOT).batch(-1, 4)
