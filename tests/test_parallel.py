"""csrc/parallel.h: forks, numbers of threads, several callers at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
IMPORTS = """
import multiprocessing, os, sys, threading
sys.path[1:1] = [os.path.dirname(os.getcwd())]
import torch
from every_op import everything, same, tasks
"""


def python(code, seconds=60):
    """What a Python of its own prints that runs the code: "held" once it came to its end, with every assertion in it."""
    done = subprocess.run([sys.executable, "-c", f"{IMPORTS}\n{code}\nprint('held')"], capture_output=True, text=True, timeout=seconds, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@needs_fork
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_forked_child_computes_with_as_many_threads_as_its_parent_and_so_does_the_parent_afterwards(threads):
    code = f"""
torch.set_num_threads({threads})
expected = everything()
for _ in range(3):
    child = os.fork()
    if not child:
        os._exit(0 if torch.get_num_threads() == {threads} and same(everything(), expected) and tasks() >= {threads} else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert same(everything(), expected) and torch.get_num_threads() == {threads}
"""
    assert python(code) == "held"


@needs_fork
def test_forked_workers_and_their_children_compute():
    assert python("""
torch.set_num_threads(2)
expected = everything()
def grandchild(_):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return everything() and pool.apply(everything)
class Worker(multiprocessing.get_context("fork").Process):
    def run(self):
        child = os.fork() if same(everything(), expected) else sys.exit(1)
        if not child:
            os._exit(0 if same(everything(), expected) else 1)
        sys.exit(os.waitpid(child, 0)[1])
workers = [Worker() for _ in range(2)]
for w in workers: w.start()
for w in workers: w.join()
assert [w.exitcode for w in workers] == [0, 0]
""") == "held"


@needs_fork
def test_a_fork_while_other_threads_compute_hangs_neither_side():
    assert python("""
torch.set_num_threads(2)
expected, done = everything(), threading.Event()
def work():
    while not done.is_set(): everything()
busy = threading.Thread(target=work)
busy.start()
for _ in range(5):
    child = os.fork()
    if not child:
        os._exit(0 if same(everything(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert same(everything(), expected)
done.set()
busy.join()
""") == "held"


def test_one_thread_starts_no_other():
    """Counted by the system, over every op forward; the autograd engine's own thread is not asked for."""
    pytest.importorskip("resource")
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("threads are counted in /proc")
    assert python("""
torch.set_num_threads(1)
before = tasks()
everything()
assert tasks() == before, (before, tasks())
""") == "held"


def test_callers_at_once_get_what_each_gets_alone():
    assert python("""
torch.set_num_threads(2)
expected, wrong = everything(), []
def work():
    for _ in range(10):
        if not same(everything(), expected): wrong.append(1)
callers = [threading.Thread(target=work) for _ in range(4)]
for t in callers: t.start()
for t in callers: t.join()
assert not wrong
""") == "held"
