"""The built CUDA module: what ptxas said of its kernels, and the instructions that are in them. It runs where nanorlhf._cuda was
built, a GPU or not; the readers are tried everywhere, on a few lines of text."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import sass

SPEC = importlib.util.find_spec("nanorlhf._cuda")
LIBRARY = Path(SPEC.origin) if SPEC and SPEC.origin else None
built = pytest.mark.skipif(LIBRARY is None or not shutil.which("nvcc"), reason="nanorlhf._cuda is not built, or nvcc is not here")

# Kernels whose speed depends on their registers: (stem of the source, name, whether the template's numbers are a tuned size).
SIZES = {64, 128}
ROWS = {"softmax", "loss", "norm", "swiglu", "rope"}
AUXILIARY = re.compile(r"maps?$|stats|plan|combine|convert|finish|round|join|sum|reduce|zero|delta")


def is_tuned(file, name):
    if AUXILIARY.search(name.name):
        return False
    if file.startswith("attention"):
        narrow = "fp32" not in file and ("decode" not in file or "bf16" in name.arguments)
        return narrow and bool(SIZES & {*name.numbers[:1]})
    return file in ROWS or file == "matmul" and "bf16" in name.arguments


def direction(file, name):
    return "backward" if re.search("backward|gradient", file + name.name) else "forward" if "forward" in name.name else ""


def source(record, name):
    return Path(record.get("file", "") or name.file).stem


@cache
def record():
    path = LIBRARY.with_name("_cuda_build.json")
    if not path.exists():
        pytest.skip("the build left no record")
    return json.loads(path.read_text(encoding="utf-8"))


def cuobjdump(*options):
    program = sass.tool("cuobjdump", "nvidia-cuda-cuobjdump")
    disassembler = sass.tool("nvdisasm", "nvidia-cuda-nvdisasm")
    if program is None or disassembler is None:
        pytest.skip("cuobjdump or nvdisasm is not here; pip install .[test] brings them")
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(disassembler).parent), os.environ.get("PATH", "")])}
    return subprocess.run([program, *options, str(LIBRARY)], capture_output=True, text=True, check=True, env=env).stdout


@cache
def code():
    """[(file, Name, Kernel)] of every kernel in the module. Files come from the build's record where the name does not say."""
    known = {symbol: row.get("file", "") for symbol, row in record()["kernels"].items()}
    found = []
    for kernel in sass.kernels(cuobjdump("-sass")):
        name = sass.parsed(kernel.symbol)
        found.append((name.file or Path(known.get(kernel.symbol, "")).stem, name, kernel))
    assert found, "cuobjdump finds no kernel"
    return found


def has_hopper():
    return any("90a" in str(arch) for arch in record()["archs"])


@built
def test_tuned_kernels_keep_everything_in_registers():
    tuned, wrong = 0, []
    for symbol, row in record()["kernels"].items():
        name = sass.parsed(symbol.split(" [")[0])
        if is_tuned(source(row, name), name):
            tuned += 1
            if row["stack"] or row["spill_stores"] or row["spill_loads"]:
                wrong.append(f"{symbol}: {row}")
    assert not wrong, "\n".join(wrong)
    assert tuned, "no kernel of the record is one of the tuned"


@built
def test_no_kernel_is_serialised():
    slow = [line for line in map(str, record()["warnings"]) if sass.SLOW.search(line)]
    assert not slow, "\n".join(slow)


@built
def test_no_tuned_kernel_touches_local_memory():
    wrong = [f"{k.arch} {k.symbol}" for file, name, k in code() if is_tuned(file, name) and k.count(r"(LDL|STL)\b")]
    assert not wrong, "\n".join(wrong)


@built
def test_machine_code_for_both_generations_and_ptx_for_the_rest():
    machine, ptx = sass.contents(cuobjdump("-lelf", "-lptx"))
    assert "sm_80" in machine and "sm_80" in ptx, (machine, ptx)
    if has_hopper():
        assert "sm_90a" in machine, machine


@built
def test_hopper_attention_multiplies_with_wgmma_and_loads_with_tma():
    if not has_hopper():
        pytest.skip("this nvcc cannot compile for sm_90a")
    complete = set()
    for file, name, kernel in code():
        if not file.startswith("attention_sm90"):
            continue
        products, loads, narrow = kernel.count(r"HGMMA"), kernel.count(r"UTMALDG|UBLKCP"), kernel.count(r"HMMA")
        assert not narrow, f"{kernel.symbol}: {narrow} products of the older kind"
        assert bool(products) == bool(loads) or AUXILIARY.search(name.name), f"{kernel.symbol}: {products} HGMMA, {loads} UTMALDG"
        if products and kernel.count("UTMALDG"):
            complete |= {(direction(file, name), D) for D in SIZES if D in name.numbers}
    assert complete == {(way, D) for way in ("forward", "backward") for D in SIZES}, f"only {sorted(complete)}"


@built
def test_portable_attention_uses_the_tensor_cores_and_loads_ahead():
    complete = set()
    for file, name, kernel in code():
        if file.startswith("attention_portable") and direction(file, name) and not AUXILIARY.search(name.name):
            assert kernel.count("HMMA"), f"{kernel.arch} {kernel.symbol}: no HMMA"
            if kernel.count("LDSM") and kernel.count("LDGSTS"):  # unlike what takes addresses that are no multiple of 16
                complete |= {(direction(file, name), D) for D in SIZES if D in name.numbers[:1]}
    assert complete == {(way, D) for way in ("forward", "backward") for D in SIZES}, f"only {sorted(complete)}"


@built
@pytest.mark.parametrize(("file", "product"), [("attention_portable", "HMMA"), ("attention_sm90", "HGMMA")])
def test_the_forward_has_a_loop_without_a_mask(file, product):
    chosen = [k for f, n, k in code() if f.startswith(file) and direction(f, n) == "forward" and SIZES & {*n.numbers[:1]}
              and k.count(product)]
    if not chosen:
        pytest.skip(f"no forward kernel of {file} is built")
    wrong = [f"{k.arch} {k.symbol}" for k in chosen if not sass.unmasked_loop(k.code, product)]
    assert not wrong, "\n".join(wrong)


@built
@pytest.mark.parametrize("file", sorted(ROWS))
def test_row_kernels_move_sixteen_bytes_at_a_time(file):
    mine = [(name, kernel) for f, name, kernel in code() if f == file]
    assert mine, f"no kernel of {file}.cu"
    wide = {op: [n.name for n, k in mine if k.count(rf"{op}\.E\b.*\.128")] for op in ("LDG", "STG")}
    for way in ("forward", "backward"):
        if any(way in name.name for name, _ in mine):
            assert any(way in name for name in wide["LDG"]), f"no 128-bit load in {file}'s {way} kernels"
            if (file, way) != ("loss", "forward"):  # which writes three numbers a row
                assert any(way in name for name in wide["STG"]), f"no 128-bit store in {file}'s {way} kernels"


@built
def test_the_module_imports_without_a_driver():
    needed = subprocess.run(["ldd", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libcuda\b|libcudart", needed), needed
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(LIBRARY.parents[1])}
    child = subprocess.run([sys.executable, "-c", "import nanorlhf, nanorlhf._cuda"], capture_output=True, text=True, env=hidden)
    assert child.returncode == 0, child.stderr


LISTING = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux

\tcode for sm_80
\t\tFunction : _ZN45_GLOBAL__N__f53624d4_12_attention_cu_b531323b11query_statsI4bf16Li32EEEvNS_12StatsProblemE
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                                 /* 0x00000a0000017a02 */
                                                                                          /* 0x000fe40000000f00 */
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ;                       /* 0x0000000402047981 */
        /*0020*/              @!P0 BRA 0x10 ;                                             /* 0x000000a000008947 */
        /*0030*/                   EXIT ;                                                 /* 0x000000000000794d */
\t\t..........

Fatbin elf code:
================
arch = sm_90a

\tcode for sm_90a
\t\tFunction : plain
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
"""


def test_a_listing_is_read():
    first, second = sass.kernels(LISTING)
    assert (first.arch, second.arch, second.symbol) == ("sm_80", "sm_90a", "plain")
    assert [i.opcode for i in first.code] == ["MOV", "LDG.E.128.CONSTANT", "BRA", "EXIT"]
    assert first.code[2] == (0x20, "!P0", "BRA", "0x10") and first.count(r"LDG\.E\b.*\.128") == 1 and second.count("HGMMA") == 1
    assert sass.parsed(first.symbol)[:3] == ("attention", "query_stats", (32,)) and "bf16" in sass.parsed(first.symbol).arguments


def test_names_are_taken_apart():
    assert sass.parsed("_Z5helloILi64ELb1EEvPf")[:3] == ("", "hello", (64,))
    assert sass.parsed("_ZN3gpu4copyEPf")[:3] == ("", "copy", ())
    assert sass.parsed("void (anonymous namespace)::forward<bf16, 128, false>(Problem, int)")[:3] == ("", "forward", (128,))
    assert sass.parsed("void gpu::forward<(int)64, true>(Problem)")[:3] == ("", "forward", (64,))
    assert sass.parsed("scan(Problem)")[:3] == ("", "scan", ())


def test_contents_are_read():
    listing = "ELF file    1: _cuda.1.sm_80.cubin\nELF file    2: _cuda.2.sm_90a.cubin\nPTX file    1: _cuda.1.sm_80.ptx\n"
    assert sass.contents(listing) == ({"sm_80", "sm_90a"}, {"sm_80"})


@pytest.mark.parametrize("line", [
    "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions",
    "ptxas warning : (C7508) setmaxnreg ignored to maintain minimum register requirements",
    "ptxas info : (C7519) Potential Performance Loss: wait was injected in function",
])  # fmt: skip
def test_warnings_of_slow_code_are_known(line):
    assert sass.SLOW.search(line)


def test_other_lines_are_no_warnings():
    assert not sass.SLOW.search("ptxas info    : Used 35 registers, used 0 barriers, 464 bytes cmem[0]")
    assert not sass.SLOW.search("warning #177-D: variable was declared but never referenced")


def loop_of(*lines):
    """A kernel of these instructions; {n} stands for the address of the n-th."""
    lines = [line if " " in line.removeprefix("@P1 ") else f"{line} R0, R1" for line in lines]
    text = "\n".join(f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines))
    for i in range(len(lines)):
        text = text.replace(f"{{{i}}}", hex(16 * i))
    return sass.kernels("\t\tFunction : f\n" + text)[0].code


def test_a_mask_in_the_loop_is_seen():
    work, back = ["HGMMA.64x64x16.F32.BF16"] + ["MUFU.EX2"] * 16, "@P0 BRA {0}"
    assert sass.unmasked_loop(loop_of(*work, back), "HGMMA")
    assert sass.unmasked_loop(loop_of(*work, "FSEL", back), "HGMMA")
    assert not sass.unmasked_loop(loop_of(*work, *["FSEL"] * 16, back), "HGMMA")
    assert not sass.unmasked_loop(loop_of(*work, *["@P1 MOV"] * 16, back), "HGMMA")
    assert not sass.unmasked_loop(loop_of(*work, "EXIT"), "HGMMA")
    assert not sass.unmasked_loop(loop_of(*work, back), "HMMA")


def test_a_mask_that_a_branch_goes_around_is_none():
    mask = ["@P1 BRA {6}", *["FSEL"] * 4, "FSEL"]
    around = loop_of(*mask, "HMMA.16816.F32.BF16", *["MUFU.EX2"] * 8, "@P0 BRA {0}")
    assert sass.unmasked_loop(around, "HMMA")
    into_it = loop_of("@P1 BRA {1}", *mask[1:], "HMMA.16816.F32.BF16", *["MUFU.EX2"] * 8, "@P0 BRA {0}")
    assert not sass.unmasked_loop(into_it, "HMMA")


def test_loops_end_in_a_branch_backwards():
    code = loop_of("MOV", "FADD", "@P1 BRA {1}", "@P1 BRA {0}")
    assert [[i.opcode for i in loop] for loop in sass.loops(code)] == [["MOV", "FADD", "BRA", "BRA"], ["FADD", "BRA"]]


def test_tuned_kernels_are_told_from_the_others():
    def tuned(file, symbol):
        return is_tuned(file, sass.parsed(symbol))

    assert tuned("attention_portable", "void forward_kernel<64>(P)") and not tuned("attention_portable", "void forward_kernel<96>(P)")
    assert tuned("attention_sm90", "void backward_kernel<128, true>(P)") and not tuned("attention", "make_tile_maps(P)")
    assert tuned("attention_decode", "void decode_parts<bf16, 64, false>(P)")
    assert not tuned("attention_decode", "void decode_parts<float, 64, false>(P)")
    assert tuned("softmax", "void softmax_forward_kernel<float, 4>(P)") and not tuned("gae", "gae_kernel(P)")
    assert tuned("matmul", "void matmul_kernel<bf16>(P)") and not tuned("matmul", "void matmul_kernel<float>(P)")
