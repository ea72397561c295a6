"""The suite is run against adapters that are wrong on purpose, those of notes on well-known code among them, and has to fail on each."""

import inspect

import pytest
from _pytest.outcomes import Skipped

from . import test_items_data, test_items_reward, test_items_rollout, test_items_update, test_preferences_groups
from .adapters_ours import OURS
from .adapters_wrong import DEFECTS

MODULES = (test_items_data, test_items_reward, test_items_rollout, test_items_update, test_preferences_groups)
TESTS = {name: test for module in MODULES for name, test in vars(module).items() if name.startswith("test_")}


def cases(test):
    """Every combination of a test's parameters, as keyword arguments."""
    made = [{}]
    for mark in getattr(test, "pytestmark", []):
        names = [n.strip() for n in mark.args[0].split(",")]
        rows = [row if len(names) > 1 else (row,) for row in mark.args[1]]
        made = [{**one, **dict(zip(names, row))} for one in made for row in rows]
    return made


def failures(adapter, test):
    """How many of a test's cases the adapter fails; a skip is no failure."""
    failed = 0
    for case in cases(test):
        try:
            test(**({"adapter": adapter} if "adapter" in inspect.signature(test).parameters else {}), **case)
        except Skipped:
            pass
        except AssertionError:
            failed += 1
    return failed


@pytest.mark.parametrize("which", range(len(DEFECTS)), ids=[d.what for d in DEFECTS])
def test_a_wrong_adapter_is_caught(which, is_ours):
    if not is_ours:
        pytest.skip("tries the suite itself, not the adapter under judgement")
    defect = DEFECTS[which]
    for name in defect.caught_by:
        assert failures(defect.adapter, TESTS[name]) > 0, f"{name} passes {defect.what}"


def test_what_catches_the_wrong_ones_passes_the_right_one():
    for name in sorted({name for defect in DEFECTS for name in defect.caught_by} - {"test_item_27_nothing_comes_after_the_stop_token"}):
        assert failures(OURS, TESTS[name]) == 0, name


def test_every_item_has_a_test():
    """The numbers in the names of the tests are 1 to 54."""
    found = {int(part) for name in TESTS if name.startswith("test_item_") for part in name.split("_") if part.isdigit() and len(part) == 2}
    assert found >= set(range(1, 55))
