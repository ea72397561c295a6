"""Reads what nvcc made: names of kernels, what ptxas said of them, and the machine code as cuobjdump writes it out."""

import re
import shutil
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import NamedTuple

# ptxas has put waits between asynchronous products, or has ignored a demand for registers: the kernel is right and half as fast.
SLOW = re.compile(r"C75(08|10|11|15|17|18|19)\b|serializ|wait\w* (was |were |is |are )?injected|setmaxnreg.* ignored", re.I)
_FILE = re.compile(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+)_cu_[0-9a-f]+")
_ANONYMOUS = re.compile(r"\(anonymous namespace\)::|<unnamed>::|_GLOBAL__N_\w+::|[a-zA-Z_]\w*::")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


class Name(NamedTuple):
    file: str  # stem of the source, where the name says it
    name: str  # of the function alone
    numbers: tuple  # its template's whole numbers, in order
    arguments: str  # all that follows the name


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate that it depends on, or ""
    opcode: str
    operands: str


class Kernel(NamedTuple):
    arch: str
    symbol: str
    code: tuple  # of Instruction

    def count(self, pattern):
        return sum(bool(re.match(pattern, i.opcode)) for i in self.code)


def tool(name, package):
    """The path of a program, inside an installed package of the index or on PATH; None where there is none."""
    try:
        found = [f.locate() for f in files(package) or () if f.name == name and f.parent.name == "bin"]
    except PackageNotFoundError:
        found = []
    return str(Path(found[0]).resolve()) if found else shutil.which(name)


def parsed(symbol):
    """A mangled or a demangled name of a kernel in parts."""
    return _mangled(symbol) if symbol.startswith("_Z") else _demangled(symbol)


def _mangled(symbol):
    at, parts = 2 + (symbol[2:3] == "N"), []
    while match := re.match(r"(?:L)?(\d+)", symbol[at:]):
        begin = at + match.end()
        at = begin + int(match[1])
        parts.append(symbol[begin:at])
    rest = symbol[at:]
    file = next((m[1] for m in map(_FILE.match, parts) if m), "")
    numbers = tuple(int(n) for n in re.findall(r"L[ilmjxy](\d+)E", rest)) if rest.startswith("I") else ()
    return Name(file, parts[-1] if parts else symbol, numbers, rest)


def _demangled(symbol):
    bare = _ANONYMOUS.sub("", symbol.removeprefix("void "))
    match = re.match(r"(\w+)(.*)", bare)
    template = re.match(r"<(.*?)>\(", match[2])
    numbers = tuple(int(n) for n in re.findall(r"(?<![\w.])(?:\(\w[\w ]*\))?(\d+)(?![\w.])", template[1])) if template else ()
    return Name("", match[1], numbers, match[2])


def kernels(text):
    """The functions in what ``cuobjdump -sass`` prints."""
    found, arch, symbol, code = [], "", None, []

    def close():
        if symbol is not None:
            found.append(Kernel(arch, symbol, tuple(code)))

    for line in text.splitlines():
        if "/*" in line:
            match = _LINE.match(line)
            if match:
                code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4].strip()))
        elif "Function :" in line:
            close()
            symbol, code = line.split("Function :")[1].strip(), []
        elif line.startswith("arch = ") or "code for sm_" in line:
            close()
            symbol, arch = None, re.search(r"sm_\w+", line)[0] if "sm_" in line else arch
    close()
    return found


def loops(code):
    """The loops of a kernel, each the instructions from the target of a branch backwards to the branch."""
    spans = {(target, i.address) for i in code if (target := _target(i)) is not None and target < i.address}
    return [[i for i in code if begin <= i.address <= end] for begin, end in sorted(spans)]


def _target(i):
    match = re.search(r"0x([0-9a-f]+)", i.operands) if i.opcode.startswith("BRA") else None
    return int(match[1], 16) if match else None


def unmasked_loop(code, product):
    """Whether a loop has a way through it that multiplies and takes exponentials of scores without choosing between a score and
    minus infinity. A mask is a choice a score, so fewer than one for four exponentials are something else."""
    return any(any(i.opcode.startswith(product) for i in loop) and _most_unmasked(loop) >= 8 for loop in loops(code))


def _most_unmasked(loop):
    """The most, over all ways through, of exponentials less four times the choices."""
    best = {loop[0].address: 0}  # of the ways that lead to an instruction
    for i, after in zip(loop, loop[1:], strict=False):
        if i.address not in best:
            continue  # only to be reached from outside
        chooses = i.opcode.startswith(("FSEL", "SEL")) or bool(i.guard) and i.opcode.startswith("MOV")
        score = best[i.address] + i.opcode.startswith("MUFU.EX2") - 4 * chooses
        stays = not i.guard and (i.opcode == "BRA" and "," not in i.operands or i.opcode in ("EXIT", "RET"))
        for address in (None if stays else after.address, _target(i)):
            if address is not None and address > i.address:
                best[address] = max(best.get(address, score), score)
    return best.get(loop[-1].address, 0)


def contents(listing):
    """Of what ``cuobjdump -lelf -lptx`` lists: the architectures of machine code and of PTX."""
    return tuple({m for m in re.findall(rf"{kind} file\s+\d+: \S*?\b(sm_\d+[af]?)\.", listing)} for kind in ("ELF", "PTX"))
