"""data/dialogue.py: the YAML of conversation files, against hand-written cases."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorlhf.data.dialogue import parse_conversations


@pytest.mark.parametrize("body, expected", [
    ("- - Hi\n  - Hello\n- - Bye\n  - See you\n", [["Hi", "Hello"], ["Bye", "See you"]]),
    ("- - A question that\n    goes on\n  - Yes\n", [["A question that goes on", "Yes"]]),
    ("- - 'it''s'\n  - \"a \\\"b\\\"\"\n", [["it's", 'a "b"']]),
    ("- - >\n    folded\n    text\n  - |\n    two\n    lines\n", [["folded text", "two\nlines"]]),
    ("- - one\n  -\n", [["one"]]),  # a turn without text is dropped
    ("", []),
])  # fmt: skip
def test_conversations_are_read_turn_by_turn(body, expected):
    assert parse_conversations(f"categories:\n- x\nconversations:\n{body}") == expected


def test_nothing_before_the_heading_is_a_conversation():
    assert parse_conversations("- - Hi\n  - Hello\n") == []


TURN = st.text(alphabet="abc XYZ.?!,", min_size=1, max_size=20).map(lambda s: " ".join(s.split())).filter(
    lambda s: s and s[0].isalpha())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(TURN, min_size=1, max_size=4), min_size=1, max_size=5))
def test_plain_turns_come_back_as_they_were_written(conversations):
    lines = [f"{'- - ' if i == 0 else '  - '}{turn}" for turns in conversations for i, turn in enumerate(turns)]
    assert parse_conversations("conversations:\n" + "\n".join(lines) + "\n") == conversations
