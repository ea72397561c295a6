"""Languages over a vocabulary: ends, special tokens, places in errors, caches."""

import random
import sys
import threading

import constrained
import numpy as np
import pytest

from nanorlhf.engine.constrain import TokenConstraint, Vocabulary, choice, constrain, grammar, json_schema, regex
from nanorlhf.engine.constrain import constraint as room
from nanorlhf.tokenizer import Tokenizer


def after(constraint, text):
    state = constraint.start()
    for byte in text:
        state = constraint.advance(state, byte)
    return state


def test_ends_are_allowed_just_where_the_text_is_whole():
    constraint = constrain(regex("ab?"), constrained.byte_vocabulary(), [256])
    for text, allowed in ((b"", [97]), (b"a", [98, 256]), (b"ab", [256])):
        state = after(constraint, text)
        assert constraint.allowed(state) == allowed
        assert constraint.complete(state) == (256 in allowed)


def test_after_an_end_there_are_ends_alone():
    vocabulary = Vocabulary([b"a", b"", b""])
    constraint = constrain(regex("a*"), vocabulary, [1, 2])
    assert constraint.allowed(constraint.start()) == [0, 1, 2]
    state = constraint.advance(after(constraint, [0]), 2)
    assert constraint.complete(state) and constraint.allowed(state) == [1, 2] and constraint.forced(state) == b""
    with pytest.raises(ValueError, match="a token that the mask allows, got 0"):
        constraint.advance(state, 0)


def test_an_end_that_is_text_is_text_where_it_may_be():
    vocabulary = Vocabulary([b"a", b"\n"])
    constraint = constrain(regex("a\n?"), vocabulary, [1])
    state = after(constraint, [0])
    assert constraint.allowed(state) == [1]
    state = constraint.advance(state, 1)
    assert state.text == b"a\n"
    assert constraint.advance(state, 1).node == -1


def test_special_tokens_are_no_text():
    tokenizer = Tokenizer.train([], 258, special_tokens=["<|end|>", "<"])
    constraint = constrain(regex(".*"), tokenizer, [256])
    assert constraint.allowed(constraint.start()) == [*range(10), *range(11, 128), *range(0xC2, 0xF5), 256]
    spelled = b"<|end|>"
    assert constraint.complete(after(constraint, spelled)), "their spelling is"


def test_every_way_of_cutting_a_text_is_allowed():
    vocabulary = Vocabulary([b"a", b"b", b"ab", b"abc", b"ba", b"c", b"abd", b"ab"])
    constraint = constrain(choice(["abc"]), vocabulary, [])
    assert constraint.allowed(constraint.start()) == [0, 2, 3, 7]
    assert constraint.allowed(after(constraint, [0])) == [1]


def test_a_model_with_more_ids_than_the_tokenizer():
    tokenizer = Tokenizer.train([], 256)
    constraint = constrain(regex("a"), tokenizer, [299], vocab_size=300)
    assert constraint.vocab_size == 300 and constraint.mask(constraint.start()).shape == (10,)
    assert constraint.allowed(after(constraint, b"a")) == [299]
    with pytest.raises(ValueError, match="vocab_size of at least the tokenizer's 256, got 255"):
        constrain(regex("a"), tokenizer, [], vocab_size=255)


def test_a_token_that_is_not_allowed_is_an_error_with_its_place():
    constraint = constrain(regex("né[a-c]+"), constrained.byte_vocabulary(), [256])
    state = after(constraint, "néab".encode())
    with pytest.raises(ValueError, match=r"^constrain: expected a token that the mask allows, got 120 \(b'x'\) at byte 5 of a text of /né\[a-c\]\+/, after 'néab'$"):
        constraint.advance(state, ord("x"))
    with pytest.raises(ValueError, match=r"got 256 \(b''\) at byte 3"):
        constraint.advance(after(constraint, "né".encode()), 256)
    for token in (-1, 257):
        with pytest.raises(ValueError, match=f"a token from 0 to 256, got {token}"):
            constraint.advance(state, token)


def test_an_empty_mask_is_an_error_with_its_place():
    """A vocabulary without a "c" cannot write abc; one without an end token cannot end."""
    vocabulary = Vocabulary([b"a", b"b", b""])
    constraint = constrain(choice(["abc"]), vocabulary, [2])
    with pytest.raises(ValueError, match=r"^constrain: nothing can follow at byte 2 of a text of choice \['abc'\], after 'ab'"):
        constraint.mask(after(constraint, [0, 1]))
    endless = constrain(choice(["ab"]), vocabulary, [])
    with pytest.raises(ValueError, match="nothing can follow at byte 2"):
        endless.mask(after(endless, [0, 1]))


def test_ends_that_the_vocabulary_does_not_have_are_an_error():
    for ends in ([-1], [257], ["<|end|>"]):
        with pytest.raises(ValueError, match="constrain: expected end ids from 0 to 256"):
            constrain(regex("a"), constrained.byte_vocabulary(), ends)


def test_masks_are_kept_and_who_asks_gets_a_copy():
    constraint = constrain(regex("[ab]*"), constrained.byte_vocabulary(), [256])
    row = constraint.mask(constraint.start())
    assert constraint.known(after(constraint, b"ab")) and not constraint.known(constraint.advance(constraint.start(), 256))
    before = row.copy()
    row[:] = 0
    assert (constraint.mask(constraint.start()) == before).all()


def test_constraints_and_trees_are_built_once_a_vocabulary(monkeypatch):
    tokenizer = Tokenizer.train([], 257, special_tokens=["<|end|>"])
    made = constrain(regex("a"), tokenizer, [256])
    assert constrain(regex("a"), tokenizer, (256,)) is made and Vocabulary.of(tokenizer) is Vocabulary.of(tokenizer)
    assert constrain(regex("a"), tokenizer, []) is not made is not constrain(regex("b"), tokenizer, [256])
    assert constrain(regex("a"), Tokenizer.train([], 257, special_tokens=["<|end|>"]), [256]) is not made
    monkeypatch.setattr(room, "_KEPT", 2)
    constrain(regex("c"), tokenizer, [])
    assert constrain(regex("a"), tokenizer, [256]) is made or len(Vocabulary.of(tokenizer).constraints) <= 4


def test_kept_masks_are_bounded(monkeypatch):
    monkeypatch.setattr(room, "_ROW_BYTES", 5 * 36)  # nine words a row
    constraint = TokenConstraint(regex("a{40}"), constrained.byte_vocabulary(), [256])
    state = constraint.start()
    for n in range(40):
        assert constraint.allowed(state) == [97]
        state = constraint.advance(state, 97)
        assert len(constraint._walked.masks) <= 5


def test_an_automaton_that_is_begun_anew_has_the_same_masks(monkeypatch):
    """States of before go on, by their texts."""
    language = json_schema({"type": "array", "items": {"type": "array", "items": {"type": "string", "maxLength": 9}}})
    steady = TokenConstraint(language, constrained.byte_vocabulary(), [256])
    monkeypatch.setattr(room, "_NODES", 60)
    restless = TokenConstraint(language, constrained.byte_vocabulary(), [256])
    rng, kept = random.Random(0), []
    one, other = steady.start(), restless.start()
    for _ in range(150):
        assert np.array_equal(steady.mask(one), restless.mask(other)) and steady.complete(one) == restless.complete(other)
        kept.append((one, other))
        one, other = rng.choice(kept) if rng.random() < 0.1 else (one, other)
        token = rng.choice(steady.allowed(one))
        if token == 256:
            one, other = steady.start(), restless.start()
        else:
            one, other = steady.advance(one, token), restless.advance(other, token)
    assert restless._walked.epoch > 2


def test_a_state_of_masks_that_were_begun_anew_on_the_way_goes_on_by_its_text(monkeypatch):
    """As where another row's or thread's cursor is taken between a cursor and where it has come to."""
    monkeypatch.setattr(room, "_NODES", 3)
    constraint = TokenConstraint(regex("(abcdef)*"), constrained.byte_vocabulary(), [256])
    state = after(constraint, b"abc")
    masks, _ = constraint.cursor(state)
    constraint.cursor(constraint.advance(state, ord("d")))  # the walk, or the one before, has begun anew
    assert constraint.cursor(state)[0] is not masks
    assert constraint.allowed(constraint.moved(state, masks, 10**6, b"de")) == [ord("f")]


def test_threads_may_share_a_constraint(monkeypatch):
    monkeypatch.setattr(room, "_NODES", 3)
    constraint = TokenConstraint(regex("([0-9]{3}-)*x"), constrained.byte_vocabulary(), [256])
    before, failed = sys.getswitchinterval(), []

    def walk(seed):
        rng = random.Random(seed)
        try:
            for _ in range(60):
                state = constraint.start()
                for i in range(12):
                    allowed = constraint.allowed(state)
                    digits = list(range(48, 58))
                    assert allowed == ([45] if i % 4 == 3 else digits if i % 4 else [*digits, 120]), (state, allowed)
                    state = constraint.advance(state, rng.choice(allowed[:10]))
                    masks, node = constraint.cursor(state)
                    state = constraint.moved(state, masks, node, [])
        except BaseException as error:
            failed.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=walk, args=(seed,)) for seed in range(4)]
        [t.start() for t in threads], [t.join() for t in threads]
    finally:
        sys.setswitchinterval(before)
    assert not failed and constraint._walked.epoch > 5


def test_whole_texts_match():
    constraint = constrain(grammar('root ::= "é" root | ""'), constrained.byte_vocabulary(), [256])
    assert constraint.matches("éé") and constraint.matches(b"") and not constraint.matches("é"[:1] + "e")


def test_states_are_hashable_and_pure():
    constraint = constrain(regex("a*b"), constrained.byte_vocabulary(), [256])
    start = constraint.start()
    one, two = constraint.advance(start, 97), constraint.advance(start, 98)
    assert {start, one, two} and constraint.allowed(start) == [97, 98] and constraint.allowed(two) == [256] and constraint.allowed(one) == [97, 98]
