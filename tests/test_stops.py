"""engine/stops.py: what is streamed is the text before the first stop text, in whole characters, whatever the tokens are."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.engine.stops import TextStream


class Pieces:
    """A tokenizer whose ids are the pieces of one text."""

    def __init__(self, pieces):
        self.pieces, self.special_tokens, self.vocab_size = pieces, {"<|end|>": len(pieces)}, len(pieces) + 1

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i] for i in ids)


def streamed(pieces, stop):
    """(what was given out with each piece, whether a stop text came, how many pieces were taken)."""
    stream, out = TextStream(Pieces(pieces), stop), []
    for i in range(len(pieces)):
        text, stopped = stream.push(i)
        out.append(text)
        if stopped:
            return out, True, i + 1
    return [*out, stream.finish()], False, len(pieces)


def test_a_beginning_of_a_stop_text_is_held_back_until_it_is_none():
    assert streamed([b"say S", b"TO", b"RE"], ["STOP"]) == (["say ", "", "STORE", ""], False, 3)
    assert streamed([b"say S", b"TO", b"Px"], ["STOP"]) == (["say ", "", ""], True, 3)
    assert streamed([b"aa", b"ab"], ["aab"]) == (["", "a"], True, 2)  # aaab: the stop text begins at the second a


def test_the_stop_text_that_is_complete_first_counts_and_of_those_the_longest():
    assert streamed([b"abcd"], ["abcd", "c"]) == (["ab"], True, 1)
    assert streamed([b"abc"], ["c", "bc"]) == (["a"], True, 1)


def test_characters_come_whole_and_an_unfinished_one_is_replaced():
    assert streamed([b"\xe2", b"\x82", b"\xac!", b"\xe2\x82"], []) == (["", "", "€!", "", "\ufffd"], False, 4)
    assert streamed([b"\xe2\x82", b"!"], ["!"]) == (["", "\ufffd"], True, 2)


def test_special_tokens_are_no_text():
    stream = TextStream(Pieces([b"a", b"b"]), ["ab"])
    assert [stream.push(i) for i in (0, 2, 1)] == [("", False), ("", False), ("", True)]


@settings(deadline=None)
@given(st.text("ab€", max_size=20), st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3), st.data())
def test_however_a_text_is_cut_into_tokens(text, stop, data):
    """The end of a stop text is looked for character by character."""
    whole = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    out, stopped, _ = streamed([whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)])], stop)
    expected = text
    for end in range(len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            expected = text[:end - max(map(len, hits))]
            break
    assert "".join(out) == expected and stopped == any(s in text for s in stop)
    assert not any("\ufffd" in piece for piece in out)
