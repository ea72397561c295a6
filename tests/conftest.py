"""The one whole run that several tests look at."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanorlhf.config import preset
from nanorlhf.run import run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The tiny preset on text that every Python has: config, folder, report, notes, and the seconds that had gone by at
    each note. Tests that change its folder copy it first."""
    # float32, wherever the tests run: with bfloat16 the sampler and the trainer agree to two digits only.
    config = preset("tiny", out=str(tmp_path_factory.mktemp("runs") / "tiny"), dtype="float32")
    config = replace(config, data=replace(config.data, sources=("stdlib", "docstrings", "topics"), offline=True))
    notes, times, began = [], [], time.perf_counter()
    report = run(config, notify=lambda row: (notes.append(row), times.append(time.perf_counter() - began)))
    return SimpleNamespace(config=config, folder=Path(config.out), report=report, notes=notes,
                           times=times)
