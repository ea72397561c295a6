"""data/stdlib.py: this Python's own files, and their documented functions."""

import inspect
import json
import sysconfig
from pathlib import Path

from nanorlhf.data.stdlib import documented_functions, stdlib_files


def test_the_files_are_the_librarys_own_and_their_bytes_are_kept():
    files = dict(stdlib_files())
    root = Path(sysconfig.get_paths()["stdlib"])
    assert len(files) > 200 and list(files) == sorted(files) and "json/decoder.py" in files
    for key in ("json/decoder.py", "textwrap.py"):
        assert files[key].encode("utf-8", "surrogateescape") == (root / key).read_bytes()
    assert not any(part in ("test", "tests", "site-packages") for key in files for part in Path(key).parts)


def test_functions_agree_with_what_inspect_says_of_a_module():
    """The functions of json/__init__.py that have a docstring, their docstrings being those that inspect cleans."""
    functions = documented_functions(dict(stdlib_files())["json/__init__.py"])
    names = [function.removeprefix("def ").partition("(")[0] for function in functions]
    assert names == [name for name in ("dump", "dumps", "load", "loads") if inspect.getdoc(getattr(json, name))]
    for name, function in zip(names, functions):
        body = function.partition('"""')[2].removesuffix('"""')
        assert inspect.cleandoc(body) == inspect.getdoc(getattr(json, name)).strip()


def test_functions_without_a_docstring_and_strings_that_are_none_make_no_stub():
    text = 'def f():\n    return 1\n\ndef g():\n    x = """no"""\n\nclass A:\n    """no"""\n\nasync def h(a):\n    """Yes."""\n'
    assert documented_functions(text) == ['def h(a):\n    """Yes."""']
