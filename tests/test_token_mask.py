"""The walk of all tokens at once against a walk of each alone."""

import random

import constrained
import numpy as np
import pytest

from nanorlhf.engine.constrain import json_schema, regex
from nanorlhf.engine.constrain.network import automaton
from nanorlhf.ops.token_mask import Masks, MaskVocabulary, token_mask_reference

PIECES = [b"a", b"b", b" ", b"yz", b'"', b"\\", b"\n", b"\x7f", "é".encode(), "日".encode(), "😀".encode(), b"\xc3", b"\xa9", b"\xf0\x9f", b"\xed\xa0\x80",
          b"\xe0\x80\x80", b"\xf4\x90\x80\x80", b"0", b",", b"aaaaaaa", b"ab" * 40]  # fmt: skip


def vocabulary(rng, size=700):
    tokens = [b"".join(rng.choices(PIECES, k=rng.randint(1, 5))) for _ in range(size)]
    tokens[3], tokens[50], tokens[-1] = b"", tokens[7], b""  # no text, and a token twice
    return tokens


LANGUAGES = [
    json_schema({"type": "string"}),
    *(json_schema({"type": "string", "maxLength": n}) for n in (3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 90)),
    json_schema({"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 30}}),
    json_schema({}),
    regex(r".*"),
    regex(r"[^\x00-\x7f]*|[ab ]{0,20}"),
    regex(r'(?:[^"]{2}|a"){0,6}'),
    regex(r"(?:a|é|日.){3,9}\n?"),
]


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.source[:50])
def test_masks_are_those_of_each_token_alone(language):
    rng = random.Random(language.source)
    tokens = vocabulary(rng)
    trees, machine, node = MaskVocabulary(tokens), automaton(language), None
    for _ in range(60):
        if node is None:
            node = machine.start()
        mask = trees.mask(machine, node)
        expected = token_mask_reference(tokens, machine, node)
        assert np.array_equal(mask, expected)
        allowed = np.flatnonzero(constrained.bits(mask, len(tokens)))
        node = machine.walk(node, tokens[rng.choice(allowed)]) if len(allowed) else None


def test_the_last_word_is_padded_with_zeros():
    machine = automaton(regex("a"))
    mask = MaskVocabulary([b"a"] * 33).mask(machine, machine.start())
    assert mask.dtype == np.int32 and mask.tolist() == [-1, 1]


def test_an_empty_vocabulary_has_an_empty_mask():
    machine = automaton(regex("a"))
    assert MaskVocabulary([]).mask(machine, machine.start()).shape == (0,)
    assert MaskVocabulary([b"", b""]).mask(machine, machine.start()).tolist() == [0]


def test_kept_masks_have_the_end_tokens_where_a_text_is_whole():
    """Tokens a, b, ab, an end, and one of c, which nothing allows."""
    tokens, machine = [b"a", b"b", b"ab", b"", b"c"], automaton(regex("(ab)*"))
    masks = Masks(MaskVocabulary(tokens), machine, [3], 2 * 4)
    start, a = machine.start(), machine.walk(machine.start(), b"a")
    assert [masks.mask(node).tolist() for node in (start, a, -1)] == [[0b01101], [0b00010], [0b01000]]
    assert [masks.known(node) for node in (start, a, -1)] == [False, True, True] and len(masks) == 2
    none = Masks(MaskVocabulary([b"c", b""]), machine, [], 0)
    assert none.mask(start) is None and none.known(start)
    with pytest.raises(ValueError, match="a node that the automaton has given out, got 99999"):
        masks.mask(99999)
    for end in (99, 5, -1):  # two of them in the same word as tokens that there are
        with pytest.raises(IndexError):
            Masks(MaskVocabulary(tokens), machine, [end], 1)
