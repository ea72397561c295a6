"""The standard library of this Python as text: its files and the docstrings of its functions."""

import functools
import inspect
import os
import re
import sysconfig
from pathlib import Path

# Tests, generated tables and vendored copies: not code that a person wrote to be read.
_SKIPPED_FOLDERS = frozenset("test tests idlelib site-packages dist-packages pydoc_data encodings lib2to3 ensurepip "
                             "__pycache__ turtledemo __phello__".split())


@functools.lru_cache(maxsize=1)
def stdlib_files():
    """(relative path, text) of the standard library's own files that hold text, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in _SKIPPED_FOLDERS]  # site-packages alone is far larger
        paths = [Path(folder, name) for name in files if name.endswith(".py")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    texts = ((key, path.read_bytes().decode("utf-8", "surrogateescape")) for key, path in sorted(found))
    return tuple((key, text) for key, text in texts if text.strip())


# A function's header (brackets nested at most twice) directly followed by a docstring. A pattern, not ast: it reads
# the whole library in a fraction of a second, and a run needs no more than the functions that it does find.
_DOCUMENTED = re.compile(r'''^[ \t]*(?:async[ ]+)?def[ ]+(\w+)'''
                         r'''(\((?:[^()#]|\((?:[^()#]|\([^()#]*\))*\))*\))[^\n:]*:\s*\n'''
                         r'''[ \t]+[rR]?"""(.*?)"""''', re.M | re.S)


def documented_functions(text):
    """The documented functions of a module (header and docstring at the left margin), in order.

    >>> documented_functions("class A:\\n  def f(self,\\n    x):\\n    " + '"' * 3 + "Return x." + '"' * 3)
    ['def f(self, x):\\n    \"""Return x.\"""']
    """
    found = []
    for name, arguments, doc in _DOCUMENTED.findall(text):
        lines = inspect.cleandoc(doc).splitlines()
        if lines:
            body = "\n".join(("    " + line).rstrip() for line in lines).lstrip()
            found.append(f'def {name}{" ".join(arguments.split())}:\n    """{body}"""')
    return found
