"""CUDA kernels are used after they have agreed with the reference. There is no GPU here: a module that computes as the CPU's, or
wrongly, stands in for them, and the CPU for the GPU."""

import ctypes
import json
import math
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from nanorlhf import _C, ops
from nanorlhf.ops import backend, trust

CPU = torch.device("cpu")


class Kernels:
    """_C's functions under the interface of _cuda, each changed by one of ``faults`` (name: function of the arguments)."""

    def __init__(self, build="a", variants=None, **faults):
        self.build, self.faults, self.calls, self.variant, self.variants = build, faults, [], "auto", variants
        if variants:
            self.attention_variants, self.attention_variant = (lambda: variants), lambda name: setattr(self, "variant", name)
        self.softmax_workspace = self.attention_workspace = self.attention_backward_workspace = self.norm_workspace = lambda *_: 64

    def __getattr__(self, name):
        if name not in ("softmax", "norm", "attention_forward", "attention_backward"):
            raise AttributeError(name)
        return lambda *args: self.call(name, *args)

    def call(self, name, *args):
        self.calls.append((name, self.variant))
        fault = self.faults.get(name)
        if fault is None or not fault(self, *args):
            getattr(_C, name)(*args[:-1], 1)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """(uses(kernels, major=9): the CPU is a GPU with them from now on, in a new process; the cache's file)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = backend.emulate(None)

    def use(kernels, major=9):
        backend.emulate(kernels)
        monkeypatch.setattr(trust, "_known", {})
        monkeypatch.setattr(trust, "environment", lambda device: f"GPU, build {kernels.build}")
        monkeypatch.setattr(backend, "properties", lambda device: SimpleNamespace(major=major, minor=0, name="GPU"))
        return kernels

    yield use, tmp_path / "nanorlhf" / "cuda_checks.json"
    backend.emulate(before)


def adds_one(kernels, is_backward, rows, columns, dtype, x, dy, out, lane):
    """A softmax whose first element is off by a hundredth, in fp32."""
    _C.softmax(is_backward, rows, columns, dtype, x, dy, out, 1)
    if dtype == 0:
        ctypes.c_float.from_address(out).value += 0.01
    return True


def does_nothing(kernels, is_backward, rows, columns, dtype, x, dy, out, lane):
    """And the memory for its result holds NaN, not by chance what is right."""
    width = (4, 2)[dtype]
    first = torch.frombuffer((ctypes.c_char * (rows * columns * width)).from_address(out), dtype=(torch.float32, torch.bfloat16)[dtype])
    assert first.isnan().all()
    return True


def test_a_right_kernel_is_trusted_and_the_verdict_remembered(gpu):
    use, path = gpu
    kernels = use(Kernels())
    assert trust.verdict("softmax", CPU) == (True, "agrees with the reference", True)
    assert {name for name, _ in kernels.calls} == {"softmax"}
    assert json.loads(path.read_text())["GPU, build a"]["softmax"]["ok"] is True
    kernels = use(Kernels())  # a new process reads the verdict
    assert trust.verdict("softmax", CPU)[0] and not kernels.calls


@pytest.mark.parametrize("fault", [adds_one, does_nothing])
def test_a_wrong_kernel_is_refused_with_one_warning(gpu, fault):
    use, _ = gpu
    use(Kernels(softmax=fault))
    with pytest.warns(UserWarning, match=r"the CUDA kernel of softmax is not used on GPU, build a: rows in float32: result 0 is off by"):
        ok, reason, settled = trust.verdict("softmax", CPU)
    assert not ok and settled and "is off by" in reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not trust.verdict("softmax", CPU)[0]
    kernels = use(Kernels(softmax=fault))
    with pytest.warns(UserWarning):  # once more in the next process, which does not try again
        assert not trust.verdict("softmax", CPU)[0] and not kernels.calls


def test_a_kernel_that_raises_is_refused(gpu):
    use, _ = gpu

    def raises(*args):
        raise RuntimeError("softmax: an illegal memory access")

    use(Kernels(softmax=raises))
    with pytest.warns(UserWarning):
        assert trust.verdict("softmax", CPU)[1] == "RuntimeError: softmax: an illegal memory access"


def test_a_wrong_gradient_is_found(gpu):
    use, _ = gpu
    use(Kernels(norm=lambda kernels, is_backward, *args: is_backward))  # backward does nothing
    with pytest.warns(UserWarning, match="of norm is not used.*result 1"):
        assert not trust.verdict("norm", CPU)[0]


def test_workspaces_hold_nan_while_it_is_tried(gpu, monkeypatch):
    use, _ = gpu
    seen = []
    use(Kernels(softmax=lambda kernels, *args: seen.append(args[-1].workspace.view(torch.float32).isnan().all().item())))
    assert trust.verdict("softmax", CPU)[0] and len(seen) == 4 and seen[0] and seen[2]


def test_another_build_is_tried_anew(gpu):
    use, path = gpu
    use(Kernels("a"))
    trust.verdict("softmax", CPU)
    use(Kernels("b", softmax=does_nothing))
    with pytest.warns(UserWarning):
        assert not trust.verdict("softmax", CPU)[0]
    assert set(json.loads(path.read_text())) == {"GPU, build a", "GPU, build b"}
    kernels = use(Kernels("a"))
    assert trust.verdict("softmax", CPU)[0] and not kernels.calls


@pytest.mark.parametrize("content", ["", "{", "[]", '{"GPU, build a": 3}', '{"GPU, build a": {"softmax": {"ok": "yes"}}}', "\0\1"])
def test_a_file_that_makes_no_sense_is_as_good_as_none(gpu, content):
    use, path = gpu
    path.parent.mkdir()
    path.write_text(content)
    use(Kernels())
    assert trust.verdict("softmax", CPU)[0]
    assert json.loads(path.read_text())["GPU, build a"]["softmax"]["ok"] is True


def test_a_cache_that_cannot_be_written_is_no_error(gpu):
    use, path = gpu
    path.parent.write_text("a file where the folder should be")
    use(Kernels())
    assert trust.verdict("softmax", CPU) == (True, "agrees with the reference", True)


def test_only_the_latest_environments_are_kept(gpu):
    use, path = gpu
    for build in range(trust.KEPT + 3):
        use(Kernels(str(build)))
        trust.verdict("softmax", CPU)
    assert list(json.loads(path.read_text()))[0] == "GPU, build 3"


def test_nothing_is_tried_while_a_graph_is_captured(gpu, monkeypatch):
    use, path = gpu
    kernels = use(Kernels())
    monkeypatch.setattr(trust, "capturing", lambda: True)
    ok, reason, settled = trust.verdict("softmax", CPU)
    assert not ok and not settled and "captured" in reason and not kernels.calls and not path.exists()
    monkeypatch.setattr(trust, "capturing", lambda: False)
    assert trust.verdict("softmax", CPU)[0]
    monkeypatch.setattr(trust, "capturing", lambda: True)
    assert trust.verdict("softmax", CPU)[0]


def test_no_memory_says_nothing_of_the_kernel(gpu):
    use, path = gpu

    def full(*args):
        raise torch.OutOfMemoryError("none left")

    use(Kernels(softmax=full))
    ok, reason, settled = trust.verdict("softmax", CPU)
    assert not ok and not settled and "none left" in reason and not path.exists()


@pytest.mark.parametrize(("bad", "major", "ok", "variant"), [
    (set(), 9, True, "sm90"), ({"sm90"}, 9, True, "portable"), ({"sm90", "portable"}, 9, False, None), (set(), 8, True, "portable"),
])  # fmt: skip
def test_attention_falls_back_to_the_portable_kernel(gpu, bad, major, ok, variant):
    use, _ = gpu

    def make():
        return Kernels(variants=["portable", "sm90"], attention_forward=lambda kernels, *args: kernels.variant in bad)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernels = use(make(), major)
        found, reason, _ = trust.verdict("attention", CPU)
        assert found == ok and ("sm90: " in reason) == ("sm90" in bad)
        assert not ok or kernels.variant == variant
        again = use(make(), major)
        assert trust.verdict("attention", CPU)[0] == ok and not again.calls
        assert not ok or again.variant == variant  # the verdict brings the kernel that it is about


def test_what_runs_within_a_check_is_not_checked(gpu):
    use, _ = gpu
    kernels = Kernels(softmax=lambda *args: seen.append(trust.verdict("norm", CPU)))
    seen = []
    use(kernels)
    assert trust.verdict("softmax", CPU)[0]
    assert set(seen) == {(True, "being tried", False)} and not trust.under_trial()


def test_threads_wait_for_one_check(gpu):
    use, _ = gpu
    kernels, found = use(Kernels()), []
    threads = [threading.Thread(target=lambda: found.append(trust.verdict("softmax", CPU)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4 and len(kernels.calls) == 4  # forward and backward, in two types


def test_every_op_has_a_check_that_the_cpu_kernels_pass():
    assert set(trust.CASES) == set(backend.KERNELS)
    for op in trust.CASES:
        assert trust._disagreement(op, CPU) is None, op


def test_a_compiled_function_takes_the_verdict_for_a_constant(gpu):
    use, _ = gpu
    use(Kernels())
    compiled = torch.compile(lambda x: x + 1 if trust.verdict("softmax", CPU)[0] else x - 1, fullgraph=True, backend="eager")
    assert compiled(torch.ones(1)).item() == 2


def test_not_a_number_and_shapes_are_disagreements():
    x = torch.ones(2, 3)
    assert "off by nan" in trust.compare(lambda x: x * math.nan, lambda x: x * 1, [x], torch.float32)
    assert "has shape" in trust.compare(lambda x: x[:1], lambda x: x * 1, [x], torch.float32)
    assert trust.compare(ops.softmax, lambda x: x.softmax(-1), [x], torch.float32) is None
