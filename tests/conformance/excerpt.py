"""Arithmetic that a library has only in the middle of a long method: its own lines are run, on names that the adapter fills in."""

import textwrap


def excerpt(source: str, first: str, stop: str) -> str:
    """The lines of a source from the one that holds ``first`` to the one before the next that holds ``stop``, moved to the left.

    ValueError where one of them is not there: the library has changed, and the adapter has to be read again.

    >>> excerpt("def f():\\n    # 1.\\n    x = 2\\n    # 2.\\n", "# 1.", "# 2.")
    '# 1.\\nx = 2'
    """
    lines = source.splitlines()
    begin = next((i for i, line in enumerate(lines) if first in line), None)
    end = next((i for i, line in enumerate(lines) if begin is not None and i > begin and stop in line), None)
    if end is None:
        raise ValueError(f"excerpt: the source has no lines from {first!r} to {stop!r}")
    return textwrap.dedent("\n".join(lines[begin:end]))


def ran(code: str, **names):
    """The names after the code has run on these.

    >>> ran("y = x + 1", x=1)["y"]
    2
    """
    exec(code, names)
    return names
