"""Build nanorlhf._C, the C++ floor, and with nvcc nanorlhf._cuda, the kernels for NVIDIA GPUs. No compiler flag depends on the
CPU or the GPU of the machine that builds: both choose at run time. torch is not needed to build.

NANORLHF_CUDA=0 builds no CUDA kernels, 1 makes it an error if they cannot be built. Otherwise what this nvcc cannot compile is
left out and the installation goes on; nanorlhf/_cuda_build.json says what was built, what was not and why.
"""

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

JOBS = int(os.environ.get("NPY_NUM_BUILD_JOBS") or 2)
HEADERS = sorted(path for ending in ("h", "inc", "cuh") for path in glob(f"csrc/*.{ending}"))
KERNELS, BINDINGS = sorted(glob("csrc/*.cu")), sorted(glob("csrc/bind_cuda*.cpp"))
# The oldest nvcc that compiles C++17 for sm_80; for sm_90; for sm_90a, with Hopper's own instructions.
OLDEST, OLDEST_90, OLDEST_90A = (11, 0), (11, 8), (12, 0)
RECORD = "_cuda_build.json"


class CudaError(Exception):
    """Why there is no nanorlhf._cuda, in one sentence."""


def find_nvcc():
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return next(filter(None, (shutil.which("nvcc", path=path) for path in [None, *folders, "/usr/local/cuda/bin"])), None)


def nvcc_version(nvcc):
    """(major, minor)."""
    try:
        shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CudaError(f"{nvcc} --version fails: {error}") from error
    found = re.search(r"release (\d+)\.(\d+)", shown)
    if not found:
        raise CudaError(f"{nvcc} --version names no release")
    return int(found[1]), int(found[2])


def toolkit(nvcc):
    """nvcc's own options that find its headers and libraries: (-I..., -L...)."""
    shown = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    options = [flag.strip('"') for flag in re.findall(r'"-(?:I|isystem|L)[^"]*"|"/[^"]*"', "\n".join(
        line for line in shown.splitlines() if re.match(r"#\$ (INCLUDES|SYSTEM_INCLUDES|LIBRARIES)=", line)))]
    includes = ["-I" + flag.removeprefix("-I") for flag in options if flag[:2] != "-L" and flag != "-isystem"]
    return includes, [flag for flag in options if flag[:2] == "-L"]


def is_hopper(source):
    return "_sm90" in Path(source).stem


def targets(source, version):
    """Which GPUs a source is compiled for: machine code for two generations, and PTX from which drivers make the others'."""
    if is_hopper(source):
        return ["arch=compute_90a,code=sm_90a"]
    both = ["arch=compute_80,code=[sm_80,compute_80]"]
    return both + ["arch=compute_90,code=sm_90"] if version >= OLDEST_90 else both


def figures(log, source):
    """{kernel: what ptxas -v says of it}, the most over the architectures."""
    kernels, name = {}, None
    for line in log.splitlines():
        entry = re.search(r"(?:Compiling entry function|Function properties for) '?([\w$]+)", line)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        used = re.search(r"Used (\d+) registers", line)
        if entry:
            name = entry[1]
            if "entry function" in line:
                kernels.setdefault(name, {"registers": 0, "stack": 0, "spill_stores": 0, "spill_loads": 0, "file": source})
        found = dict(zip(("stack", "spill_stores", "spill_loads"), frame.groups())) if frame else {}
        found.update({"registers": used[1]} if used else {})
        for key, value in found.items():
            if name in kernels:
                kernels[name][key] = max(kernels[name][key], int(value))
    return kernels


def unresolved(objects):
    """Those of the object files that call a function of namespace gpu that none of them has, and those that call into them."""
    def symbols(path, *options):
        shown = subprocess.run(["nm", "-P", *options, path], capture_output=True, text=True).stdout
        return {line.split()[0] for line in shown.splitlines() if line.startswith("_ZN3gpu")}

    defined = {path: symbols(path, "--defined-only") for path in objects}
    wanted = {path: symbols(path, "--undefined-only") for path in objects}
    left_out = []
    while True:
        there = set().union(*(defined[path] for path in objects if path not in left_out), set())
        more = [path for path in objects if path not in left_out and wanted[path] - there]
        if not more:
            return left_out
        left_out += more


class Cuda:
    """One build of _cuda. Objects are kept in ``folder`` with the command that made each and what the compiler said."""

    def __init__(self, nvcc, folder, compiler, includes):
        self.nvcc, self.folder, self.version = nvcc, Path(folder), nvcc_version(nvcc)
        if self.version < OLDEST:
            raise CudaError(f"nvcc {self.release()} is too old: {'.'.join(map(str, OLDEST))} or newer compiles the kernels")
        self.compiler, self.includes = compiler, includes
        self.cuda_includes, self.library_folders = toolkit(nvcc)
        self.left_out, self.logs = [], {}

    def release(self):
        return ".".join(map(str, self.version))

    def command(self, source, hopper):
        macros = ["-DNANORLHF_SM90"] if hopper else []
        if source.endswith(".cpp"):
            flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *self.cuda_includes]
            return [*self.compiler, *flags, *(f"-I{path}" for path in self.includes), "-Icsrc", *macros, "-c", source]
        host = ["-ccbin", os.environ["CXX"].split()[0]] if os.environ.get("CXX") else []
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "-Icsrc", *macros, *host]
        return [self.nvcc, *flags, *(flag for target in targets(source, self.version) for flag in ("-gencode", target)), "-c", source]

    def compile(self, source, hopper):
        """The object of a source, or None; compiled unless it is newer than all that it is made of."""
        target = self.folder / (Path(source).name + ".o")
        log, told = target.with_suffix(".log"), target.with_suffix(".command")
        command = [*self.command(source, hopper), "-o", str(target)]
        newest = max(os.path.getmtime(path) for path in (source, *HEADERS))
        fresh = all(path.exists() for path in (target, log, told)) and target.stat().st_mtime > newest
        if not fresh or told.read_text(encoding="utf-8") != "\n".join(command):
            target.unlink(missing_ok=True)
            done = subprocess.run(command, capture_output=True, text=True)
            said = done.stdout + done.stderr
            if done.returncode:
                why = next((line for line in said.splitlines() if "error" in line), said.strip() or f"exit status {done.returncode}")
                self.left_out.append({"file": source, "reason": why.strip()[:300]})
                target.unlink(missing_ok=True)
                return None
            log.write_text(said, encoding="utf-8")
            told.write_text("\n".join(command), encoding="utf-8")
        self.logs[source] = log.read_text(encoding="utf-8")
        return str(target)

    def objects(self):
        """Of all that compiles. Hopper's files go together: the others are told by a macro whether they are there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        special = [source for source in KERNELS if is_hopper(source)]
        hopper = bool(special) and self.version >= OLDEST_90A
        if not hopper:
            self.left_out += [{"file": s, "reason": f"nvcc {self.release()} knows no sm_90a: 12.0 or newer does"} for s in special]
        while True:
            sources = [source for source in (*KERNELS, *BINDINGS) if hopper or not is_hopper(source)]
            with ThreadPoolExecutor(JOBS) as pool:
                made = dict(zip(sources, pool.map(lambda source: self.compile(source, hopper), sources)))
            failed = [source for source in special if hopper and made[source] is None]
            if not failed:
                break
            hopper, self.logs = False, {}
            known = [row["file"] for row in self.left_out]
            self.left_out = [row for row in self.left_out if row["file"] in special]  # the others are tried again
            self.left_out += [{"file": s, "reason": f"goes with {failed[0]}"} for s in special if s not in known]
        if made["csrc/bind_cuda.cpp"] is None or not any(made[source] for source in sources if source in KERNELS):
            raise CudaError(f"nvcc {self.release()} compiles none of the kernels" if KERNELS else "there are no kernels")
        of = {path: source for source, path in made.items() if path}
        for path in unresolved(list(of)) if self.left_out else []:
            self.left_out.append({"file": of.pop(path), "reason": "calls what was left out"})
        return list(of)

    def record(self, reason=None):
        archs = sorted({arch for source in self.logs for arch in re.findall(r"sm_\w+|compute_80(?=])", str(self.command(source, False)))})
        kernels, logs = {}, dict(sorted(self.logs.items()))  # several are compiled at a time, in no order
        for source, log in logs.items():
            kernels.update(figures(log, source))
        said = [line for log in logs.values() for line in log.splitlines()]
        warnings = [line for line in said if re.search(r"warning|C75\d\d", line)]
        return {"reason": reason, "nvcc": self.release(), "archs": archs, "left_out": sorted(self.left_out, key=str), "warnings": warnings,
                "kernels": kernels}


class Build(build_ext):
    """build_ext that knows nvcc. _cuda is optional unless it was asked for; its record is written either way."""

    def run(self):
        self.record = {"reason": None, "nvcc": None, "archs": [], "left_out": [], "warnings": [], "kernels": {}}
        super().run()
        package = Path(self.get_ext_fullpath("nanorlhf._cuda")).parent
        package.mkdir(parents=True, exist_ok=True)
        (package / RECORD).write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        if self.record["reason"]:
            for stale in package.glob("_cuda.*.so"):  # of an earlier build: these are not its kernels any more
                stale.unlink()

    def build_extension(self, extension):
        if extension.name != "nanorlhf._cuda":
            return super().build_extension(extension)
        wanted, cuda = os.environ.get("NANORLHF_CUDA", ""), None
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"NANORLHF_CUDA: expected 0, 1 or nothing, got {wanted!r}")
        built = Path(self.build_lib, self.get_ext_filename(extension.name))
        built.unlink(missing_ok=True)
        try:
            if wanted == "0":
                raise CudaError("it was built with NANORLHF_CUDA=0")
            nvcc = find_nvcc()
            if nvcc is None:
                raise CudaError("no nvcc was found when it was built, in PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda")
            compiler = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
            includes = [pybind11.get_include(), *self.compiler.include_dirs]
            cuda = Cuda(nvcc, Path("build", "cuda"), compiler, includes)
            self.link(cuda.objects(), cuda.library_folders, str(built))
            self.record = cuda.record()
            if wanted and cuda.left_out:
                raise CudaError("not everything compiles: " + "; ".join("{file}: {reason}".format(**row) for row in cuda.left_out))
        except CudaError as error:
            if wanted == "1":
                raise SystemExit(f"NANORLHF_CUDA=1: {error}") from error
            self.record = {**(cuda.record() if cuda else self.record), "reason": str(error)}
            self.announce(f"nanorlhf._cuda is left out: {error}", level=3)

    def link(self, objects, folders, built):
        """With the runtime inside and without libcuda, so that it imports where there is no driver."""
        from distutils.errors import LinkError

        try:
            libraries = ["cudart_static", "rt", "dl", "pthread"]
            options = [*folders, "-Wl,--exclude-libs,ALL"]
            self.compiler.link_shared_object(objects, built, libraries=libraries, extra_postargs=options, target_lang="c++")
        except LinkError as error:
            raise CudaError(f"the objects do not link: {error}") from error


def extensions():
    native = Pybind11Extension(
        "nanorlhf._C",
        [path for path in sorted(glob("csrc/*.cpp")) if path not in BINDINGS],
        depends=[path for path in HEADERS if not path.endswith(".cuh")],
        include_dirs=["csrc"],
        cxx_std=17,
        extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-Wall", "-Wextra"],
        # libgomp is found by its name: after torch is imported this is torch's own, so both share one thread pool.
        extra_link_args=["-fopenmp"],
    )
    cuda = Extension("nanorlhf._cuda", [*KERNELS, *BINDINGS], depends=HEADERS, optional=True)
    return [native, cuda]


if __name__ == "__main__":
    ParallelCompile("NPY_NUM_BUILD_JOBS", default=2).install()
    setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
