"""Build nanorlhf._C, the C++ floor. No compiler flag depends on the CPU of the machine that builds:
the instruction set is chosen at run time. torch is not needed to build."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile("NPY_NUM_BUILD_JOBS", default=2).install()

native = Pybind11Extension(
    "nanorlhf._C",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h") + glob("csrc/*.inc")),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-Wall", "-Wextra"],
    # libgomp is found by its name: after torch is imported this is torch's own, so both share one thread pool.
    extra_link_args=["-fopenmp"],
)

setup(ext_modules=[native])
