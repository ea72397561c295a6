"""metrics.jsonl: one JSON object a line, for every step that a run logs; it survives a kill at any moment.

A row has "stage" (str), "step" (int) and whatever that stage measures. Units are those of the stage's docstring.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from . import parallel


class MetricsLog:
    """Appends rows to FOLDER/metrics.jsonl, creating both.

    A line that a kill tore (it has no line end) is cut off when the log is opened, so that the next row
    starts a line of its own.

    >>> import tempfile
    >>> log = MetricsLog(tempfile.mkdtemp())
    >>> log.append({"stage": "sft", "step": 1, "loss": 2.5})
    >>> log.append({"stage": "sft", "step": 2, "loss": 2.25})
    >>> log.truncate_after("sft", 1)
    >>> read(log.path.parent)
    [{'stage': 'sft', 'step': 1, 'loss': 2.5}]
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and parallel.first():
            whole = self.path.read_bytes()
            os.truncate(self.path, whole.rfind(b"\n") + 1)

    def append(self, row: Mapping) -> None:
        """Write one row, in one write call, to the operating system: a killed process loses at most this row.

        Scalars of torch and numpy become Python's. JSON has no NaN or infinity: they are written as null.

        Raises ValueError on a row without "stage" and an integer "step".
        """
        plain = _plain(row)
        if not isinstance(plain.get("stage"), str) or type(plain.get("step")) is not int:
            raise ValueError(f"metrics: expected a row with a stage name and an integer step, got {plain}")
        if not parallel.first():
            return
        line = json.dumps(plain, allow_nan=False) + "\n"  # ASCII: lone surrogates, too, survive as escapes
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode("ascii"))

    def truncate_after(self, stage: str, step: int) -> None:
        """Drop the rows of `stage` past `step`, and its events at `step`: a run resumed from `step` writes them again.

        Rows of other stages stay. The new file is written beside the old one, synced, and renamed over it.
        """
        if not parallel.first():
            return
        kept = [row for row in read(self.path.parent) if row["stage"] != stage or row["step"] < step or (row["step"] == step and "event" not in row)]
        fresh = self.path.with_suffix(".jsonl.tmp")
        with open(fresh, "w", encoding="ascii") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path)


def read(folder: str | Path) -> list[dict]:
    """The rows of FOLDER/metrics.jsonl in order; none if there is no such file. A torn last line is dropped.

    Raises ValueError on any other line that is no row, naming its number.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end is empty, or torn
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"metrics: expected JSON in line {number} of {path}, got {line[:60]!r}") from error
        if not isinstance(row, dict) or "stage" not in row or "step" not in row:
            raise ValueError(f"metrics: expected a stage and a step in line {number} of {path}, got {line[:60]!r}")
        rows.append(row)
    return rows


def _plain(value):
    """The value in JSON's own types, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a scalar of torch or numpy
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
