"""The CUDA kernels on the CPU: csrc/*.cu compiled by the host's compiler against tests/emulator, as a module like nanorlhf._cuda
whose addresses are the CPU's. Objects are kept in build/emulator by what they are made of."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pybind11

from nanorlhf.ops import backend

ROOT = Path(__file__).resolve().parents[1]
EMULATOR, CSRC = ROOT / "tests" / "emulator", ROOT / "csrc"
FLAGS = [
    "-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-w", "-DNANORLHF_EMULATED", "-DNANORLHF_SM90",
    *os.environ.get("NANORLHF_EMULATOR_FLAGS", "").split(),
    *(f"-I{folder}" for folder in (EMULATOR, CSRC, pybind11.get_include(), sysconfig.get_path("include"))),
]  # fmt: skip


def _folder():
    folder = ROOT / "build" / "emulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="nanorlhf-emulator-"))
    return folder


@cache
def module():
    """The built and loaded module: what nanorlhf._cuda has, and ``seed``."""
    headers = [*sorted(CSRC.glob("*.cuh")), *sorted(CSRC.glob("*.h")), *sorted(EMULATOR.glob("*.h"))]
    shared = hashlib.sha256(" ".join(FLAGS).encode() + b"".join(h.read_bytes() for h in headers)).digest()
    folder, compiler = _folder(), os.environ.get("CXX", "g++").split()
    sources = [*sorted(CSRC.glob("*.cu")), *sorted(CSRC.glob("bind_cuda*.cpp")), *sorted(EMULATOR.glob("*.cpp"))]

    def compiled(source):
        key = hashlib.sha256(shared + source.read_bytes()).hexdigest()[:16]
        target = folder / f"{source.stem}-{key}.o"
        if not target.exists():
            beside = target.with_suffix(f".{os.getpid()}")
            subprocess.run([*compiler, *FLAGS, "-x", "c++", "-c", str(source), "-o", str(beside)], check=True)
            beside.replace(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / f"_cuda-{hashlib.sha256(' '.join(o.name for o in objects).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        beside = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*compiler, "-shared", *map(str, objects), "-o", str(beside)], check=True)
        beside.replace(library)
    spec = importlib.util.spec_from_file_location("_cuda", library)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules.pop("_cuda", None)
    spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def kernels(seed=1):
    """Within it the ops run the CUDA kernels on CPU tensors, with threads in the order of this seed."""
    cuda = module()
    cuda.seed(seed)
    before, forced = backend.emulate(cuda), backend.force("cuda")
    try:
        yield cuda
    finally:
        backend.force(forced)
        backend.emulate(before)
