"""What setup.py decides about the CUDA kernels, with an nvcc that is a few lines of shell: nothing is compiled."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[1]

# Its objects are empty, and it fails on sources whose name has what FAIL holds. %s: the release.
NVCC = """#!/bin/sh
for last; do :; done
while [ $# -gt 0 ]; do case "$1" in
--version) echo "Cuda compilation tools, release %s, V1"; exit 0;;
--dryrun) echo '#$ INCLUDES="-I/cuda/include"' >&2; echo '#$ LIBRARIES=  "-L/cuda/lib/stubs" "-L/cuda/lib"' >&2; exit 0;;
-c) source=$2;;
-o) object=$2;; esac; shift; done
echo "$source" >> "$NVCC_LOG"
case "$source" in *$FAIL*) echo "$source(3): error: it cannot"; exit 1;; esac
echo "ptxas info    : Compiling entry function '_Z1kPf' for 'sm_80'" >&2
echo "ptxas info    : Function properties for _Z1kPf" >&2
echo "    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads" >&2
echo "ptxas info    : Used 40 registers, used 1 barriers" >&2
: > "$object"
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """setup.py as a module, in a folder with three kernels and bindings that do not exist otherwise."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("rows.cu", "attention.cu", "attention_sm90.cu", "bind_cuda.cpp", "bind_cuda_rows.cpp", "device.cuh"):
        (tmp_path / "csrc" / name).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NVCC_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAIL", "no such file")
    for name in ("CUDA_PATH", "NANORLHF_CUDA", "CXX"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("house_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.shutil.which  # of this machine's own nvcc nothing is to be seen
    monkeypatch.setattr(module.shutil, "which", lambda name, path=None: found(name, path=path) if path == str(tmp_path / "bin") else None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return module


def nvcc(folder, release):
    path = folder / "bin" / "nvcc"
    path.write_text(NVCC.replace("%s", release))
    path.chmod(0o755)


def build(module, monkeypatch):
    """(the record, the names of the objects that were linked)."""
    linked = []
    command = module.Build(Distribution({"name": "nanorlhf", "ext_modules": [e for e in module.extensions() if e.name.endswith("_cuda")]}))
    command.finalize_options()
    compiler = SimpleNamespace(
        compiler_so=[sys.executable, "-c", "import sys; open(sys.argv[-1], 'w')"], include_dirs=[],
        link_shared_object=lambda objects, built, **options: linked.extend(sorted(Path(o).name for o in objects)),
    )  # fmt: skip

    def run(self):
        self.compiler = compiler
        for extension in self.extensions:
            self.build_extension(extension)

    monkeypatch.setattr(module.build_ext, "run", run)
    command.run()
    return json.loads(Path(command.build_lib, "nanorlhf", "_cuda_build.json").read_text()), linked


def compiled(folder):
    log = folder / "log"
    names = sorted(Path(line).name for line in log.read_text().split()) if log.exists() else []
    log.unlink(missing_ok=True)
    return names


def test_without_nvcc_the_record_says_so(house, monkeypatch):
    record, linked = build(house, monkeypatch)
    assert "no nvcc was found" in record["reason"] and record["nvcc"] is None and not linked


def test_it_can_be_turned_off(house, tmp_path, monkeypatch):
    nvcc(tmp_path, "13.0")
    monkeypatch.setenv("NANORLHF_CUDA", "0")
    record, linked = build(house, monkeypatch)
    assert "NANORLHF_CUDA=0" in record["reason"] and not linked and not compiled(tmp_path)


def test_it_can_be_insisted_on(house, tmp_path, monkeypatch):
    monkeypatch.setenv("NANORLHF_CUDA", "1")
    with pytest.raises(SystemExit, match="NANORLHF_CUDA=1: no nvcc was found"):
        build(house, monkeypatch)
    nvcc(tmp_path, "13.0")
    monkeypatch.setenv("FAIL", "rows")
    with pytest.raises(SystemExit, match=r"NANORLHF_CUDA=1: not everything compiles: csrc/rows.cu: .*error: it cannot"):
        build(house, monkeypatch)
    monkeypatch.setenv("NANORLHF_CUDA", "yes")
    with pytest.raises(SystemExit, match="NANORLHF_CUDA: expected 0, 1 or nothing, got 'yes'"):
        build(house, monkeypatch)


def test_all_is_built_and_recorded(house, tmp_path, monkeypatch):
    nvcc(tmp_path, "13.0")
    record, linked = build(house, monkeypatch)
    assert record["reason"] is None and record["nvcc"] == "13.0" and record["left_out"] == [] and record["warnings"] == []
    assert record["archs"] == ["compute_80", "sm_80", "sm_90", "sm_90a"]
    figures = {"registers": 40, "stack": 8, "spill_stores": 4, "spill_loads": 2}
    assert {k: v for k, v in record["kernels"]["_Z1kPf"].items() if k != "file"} == figures
    assert linked == ["attention.cu.o", "attention_sm90.cu.o", "bind_cuda.cpp.o", "bind_cuda_rows.cpp.o", "rows.cu.o"]


def test_only_what_changed_is_compiled_again(house, tmp_path, monkeypatch):
    nvcc(tmp_path, "13.0")
    first = build(house, monkeypatch)
    assert compiled(tmp_path) == ["attention.cu", "attention_sm90.cu", "rows.cu"]
    assert build(house, monkeypatch) == first and compiled(tmp_path) == []
    later = (tmp_path / "build/cuda/rows.cu.o").stat().st_mtime + 5
    os.utime(tmp_path / "csrc/rows.cu", (later, later))
    build(house, monkeypatch)
    assert compiled(tmp_path) == ["rows.cu"]
    later += 5
    os.utime(tmp_path / "csrc/device.cuh", (later, later))
    build(house, monkeypatch)
    assert compiled(tmp_path) == ["attention.cu", "attention_sm90.cu", "rows.cu"]


@pytest.mark.parametrize(("release", "archs"), [("11.4", ["compute_80", "sm_80"]), ("11.8", ["compute_80", "sm_80", "sm_90"])])
def test_an_old_nvcc_leaves_out_what_it_cannot_compile(house, tmp_path, monkeypatch, release, archs):
    nvcc(tmp_path, release)
    record, linked = build(house, monkeypatch)
    assert record["archs"] == archs and "attention_sm90.cu.o" not in linked
    assert record["left_out"] == [{"file": "csrc/attention_sm90.cu", "reason": f"nvcc {release} knows no sm_90a: 12.0 or newer does"}]
    assert "NANORLHF_SM90" not in (tmp_path / "build/cuda/rows.cu.command").read_text()


def test_one_that_is_too_old_builds_nothing(house, tmp_path, monkeypatch):
    nvcc(tmp_path, "10.2")
    record, linked = build(house, monkeypatch)
    assert record["reason"] == "nvcc 10.2 is too old: 11.0 or newer compiles the kernels" and not linked


def test_where_hoppers_files_fail_the_others_are_told_that_they_are_not_there(house, tmp_path, monkeypatch):
    nvcc(tmp_path, "13.0")
    monkeypatch.setenv("FAIL", "sm90")
    record, linked = build(house, monkeypatch)
    assert [row["file"] for row in record["left_out"]] == ["csrc/attention_sm90.cu"]
    assert "attention.cu.o" in linked and "attention_sm90.cu.o" not in linked
    assert "NANORLHF_SM90" not in (tmp_path / "build/cuda/attention.cu.command").read_text()


def test_bindings_of_what_is_left_out_are_left_out(house, tmp_path, monkeypatch):
    """bind_cuda_rows calls gpu::rows of rows.cu: without it the module would not load."""
    nvcc(tmp_path, "13.0")
    monkeypatch.setenv("FAIL", "/rows.cu")
    symbols = {("bind_cuda_rows.cpp.o", "--undefined-only"): "_ZN3gpu4rowsEv U\n_Znwm U\n", ("rows.cu.o", "--defined-only"): "_ZN3gpu4rowsEv T\n"}
    real = house.subprocess.run

    def run(command, **options):
        if command[0] != "nm":
            return real(command, **options)
        return house.subprocess.CompletedProcess(command, 0, symbols.get((Path(command[-1]).name, command[2]), ""), "")

    monkeypatch.setattr(house.subprocess, "run", run)
    record, linked = build(house, monkeypatch)
    assert [row["file"] for row in record["left_out"]] == ["csrc/bind_cuda_rows.cpp", "csrc/rows.cu"]
    assert linked == ["attention.cu.o", "attention_sm90.cu.o", "bind_cuda.cpp.o"]
    monkeypatch.setenv("FAIL", "no such file")
    assert "bind_cuda_rows.cpp.o" in build(house, monkeypatch)[1]


def test_a_module_of_an_earlier_build_does_not_stay(house, tmp_path, monkeypatch):
    nvcc(tmp_path, "13.0")
    monkeypatch.setenv("FAIL", ".cu")
    build(house, monkeypatch)
    stale = next(Path("build").glob("lib*/nanorlhf")) / "_cuda.cpython-3-x.so"
    stale.write_text("")
    record, _ = build(house, monkeypatch)
    assert record["reason"] == "nvcc 13.0 compiles none of the kernels" and not stale.exists()
    assert len(record["left_out"]) == 3


def test_nvcc_is_looked_for_in_the_path_first(house, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(house.shutil, "which", lambda name, path=None: asked.append(path))
    monkeypatch.setenv("CUDA_PATH", "elsewhere")
    assert house.find_nvcc() is None
    assert asked == [None, str(tmp_path / "bin"), os.path.join("elsewhere", "bin"), "/usr/local/cuda/bin"]


def test_every_kernel_travels_with_the_sources():
    spec = importlib.util.spec_from_file_location("house_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        spec.loader.exec_module(module)
        native, cuda = module.extensions()
    finally:
        os.chdir(before)
    files = {f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".inc")}
    assert {*native.sources, *native.depends, *cuda.sources, *cuda.depends} == files
    assert not any("cuda" in path for path in native.sources)
