"""``python -m pytest tests/conformance --adapter=module:object`` judges another library; without it, this package."""

import importlib
import os
import sys

import pytest
import torch

DEFAULT = "conformance.adapters_ours:OURS"
collect_ignore = ["adapters_trl.py", "adapters_torchtune.py"]  # import what need not be installed


def pytest_addoption(parser):
    parser.addoption("--adapter", default=DEFAULT, help=f"module:object under judgement; {DEFAULT} unless given")


@pytest.fixture(scope="session")
def adapter(request):
    # Collected from a folder above, this conftest comes too late to add its option: then the default holds.
    module, _, name = request.config.getoption("--adapter", default=DEFAULT).partition(":")
    if not name:
        raise pytest.UsageError(f"--adapter: expected module:object, got {module!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        pytest.exit(f"--adapter={module}:{name}: {error}", returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture(scope="session")
def is_ours(request):
    return request.config.getoption("--adapter", default=DEFAULT) == DEFAULT


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are only slowed down by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
