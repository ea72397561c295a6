"""The rules that keep the house small and its floors apart. Each rule is a function from a checkout's root to the
list of its violations; each is tried on a made-up house that breaks it, then on this one."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Imports of nanorlhf go down or stay on their floor.
FLOORS = [
    {"_C", "_cuda"},
    {"ops", "tokenizer", "tokenizer_json", "tokenizer_twin", "pretokenize", "chat"},
    {"model", "lora", "quant", "data", "optim", "checkpoint", "parallel", "interop", "config", "metrics"},
    {"engine", "assistant"},
    {"train", "evals"},
    {"serve", "assist", "run", "stages", "alignment", "comparison", "progress"}
    | {"report", "report_charts", "report_page", "report_results", "report_training"},
    {"__main__", "tokenizer_cli", "lab"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
STAGES = {"pretrain", "sft", "reward", "ppo", "rloo", "grpo", "dpo", "best_of_n"}  # these never import one another
NATIVE_ROOMS = {"ops", "tokenizer", "tokenizer_json", "pretokenize", "chat", "__init__"}  # the only ones that touch _C and _cuda

# A native file is tested under its own stem, or under that of the Python module which is its public face.
FACES = {"bpe": "tokenizer", "decode_run": "decode_step", "merge": "tokenizer", "pretokenize": "tokenizer", "scan": "tokenizer", "split": "tokenizer", "isa": "backend"}
# Compiled once an instruction set from the same code, which is tested where it is called.
PER_ISA = re.compile(r"_(portable|sse\w*|avx\w*|amx\w*|neon|sve\w*|sm\d+\w*)$")

FILE_CAP, FUNCTION_CAP = 500, 90
# Every op has its contract, reference and gradient in Python, its kernels for five instruction sets in C++, and for GPUs in CUDA.
PYTHON_BUDGET, NATIVE_BUDGET, CUDA_BUDGET = 15200, 9700, 7000
NAMELESS = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}

# Written in pieces so that this file does not match itself.
PLACES = ["work", "home", "root", "Users", "tmp", "mnt", "scratch"]
MACHINE_PATH = re.compile(r"(?<![\w.$}~*])/(?:" + "|".join(PLACES) + ")/")
HOSTS = [r"pypi\." + "org", "python" + "hosted", r"download\.pytorch\." + "org", "--(extra-)?index" + "-url"]
INDEX_HOST = re.compile("|".join(HOSTS))
UNFINISHED = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error"]) + r")\b")


def python_files(root: Path) -> list[Path]:
    return sorted((root / "nanorlhf").rglob("*.py"))


def native_files(root: Path, *suffixes: str) -> list[Path]:
    suffixes = suffixes or (".h", ".inc", ".cpp", ".cu", ".cuh", ".py")
    return [path for path in sorted((root / "csrc").glob("*")) if path.suffix in suffixes]


def product_files(root: Path) -> list[Path]:
    """Everything that is shipped or read, but the tests."""
    pages = [path for suffix in ("html", "css", "js") for path in (root / "nanorlhf").rglob(f"*.{suffix}")]
    top = [root / name for name in ("setup.py", "pyproject.toml", "README.md", ".ci/run") if (root / name).exists()]
    return [*python_files(root), *native_files(root), *sorted(pages), *sorted((root / "bench").glob("*.py")), *top]


def all_files(root: Path) -> list[Path]:
    return product_files(root) + sorted((root / "tests").rglob("*.py"))


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def dotted(root: Path, path: Path) -> list[str]:
    """The module's name in parts: ["nanorlhf", "train", "sft"]; a package's own file ends in __init__."""
    return list(path.relative_to(root).with_suffix("").parts)


def imports(root: Path, path: Path) -> list[tuple[int, list[str]]]:
    """(line, name in parts) of every import of nanorlhf in a file, relative ones resolved, in functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = dotted(root, path)[: -node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            found += [(node.lineno, [*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # importlib.import_module("nanorlhf._C") and the like
            if re.fullmatch(r"nanorlhf(\.\w+)+", node.value):
                found.append((node.lineno, node.value.split(".")))
    return [(line, name) for line, name in found if name[0] == "nanorlhf" and len(name) > 1]


def upward_imports(root: Path) -> list[str]:
    rooms = {path.stem for path in (root / "nanorlhf").glob("*") if path.suffix == ".py" or path.is_dir()}
    wrong = []
    for path in python_files(root):
        here = dotted(root, path)[1]
        if here == "__init__":  # the package's public names come from every floor
            continue
        if here not in FLOOR:
            wrong.append(f"{path.relative_to(root)}: give the room {here} a floor in FLOORS")
            continue
        for line, name in imports(root, path):
            target = name[1]
            if target in FLOOR and FLOOR[target] > FLOOR[here]:
                floors = f"floor {FLOOR[here]} imports {'.'.join(name)} of floor {FLOOR[target]}"
                wrong.append(f"{path.relative_to(root)}:{line}: {floors}")
            elif target not in FLOOR and target in rooms:
                wrong.append(f"{path.relative_to(root)}:{line}: {target} has no floor")
    return wrong


def stages_that_import_stages(root: Path) -> list[str]:
    wrong = []
    for path in sorted((root / "nanorlhf" / "train").glob("*.py")):
        if path.stem == "__init__":
            continue
        for line, name in imports(root, path):
            if name[1] == "train" and len(name) > 2 and name[2] in STAGES - {path.stem}:
                wrong.append(f"{path.relative_to(root)}:{line}: imports the stage {name[2]}")
    return wrong


def native_touched_above_its_floor(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line}: touches {name[1]}"
        for path in python_files(root)
        if dotted(root, path)[1] not in NATIVE_ROOMS
        for line, name in imports(root, path)
        if name[1] in FLOORS[0]
    ]


def files_over_the_cap(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}: {line_count(path)} lines, at most {FILE_CAP}"
        for path in all_files(root)
        if line_count(path) > FILE_CAP and not ("csrc" in path.parts and "unicode" in path.name)
    ]


def functions_over_the_cap(root: Path) -> list[str]:
    wrong = []
    for path in (path for path in all_files(root) if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_CAP:
                    where = f"{path.relative_to(root)}:{node.lineno}"
                    wrong.append(f"{where}: {node.name} has {length} lines, at most {FUNCTION_CAP}")
    return wrong


def nameless_modules(root: Path) -> list[str]:
    files = [*python_files(root), *native_files(root)]
    parts = {(path, part) for path in files for part in (path.stem, path.parent.name)}
    return sorted(f"{path.relative_to(root)}: {part} names no noun" for path, part in parts if part in NAMELESS)


def untested_files(root: Path) -> list[str]:
    """Files without a test named after their stem, or after a leading part of it (report_page: test_report)."""
    tests = {path.stem for path in (root / "tests").rglob("test_*.py")}

    def tested(stem: str) -> bool:
        words = stem.strip("_").split("_")
        heads = ["_".join(words[: k + 1]) for k in range(len(words))]
        return any(f"test_{name}" in tests for head in heads for name in (head, FACES.get(head, head)))

    native = [path for path in native_files(root, ".cpp", ".cu") if not path.stem.startswith("bind")]
    native = [path for path in native if "unicode" not in path.stem and not PER_ISA.search(path.stem)]
    modules = [path for path in python_files(root) if path.stem != "__init__"]
    return [
        f"{path.relative_to(root)}: expected tests/test_{path.stem.strip('_')}.py"
        for path in native + modules
        if not tested(path.stem)
    ]


def over_budget(root: Path) -> list[str]:
    """Lines of Python without lab/ and tests, of C++ without the generated Unicode tables, of CUDA with its bindings."""
    python = sum(line_count(p) for p in python_files(root) if dotted(root, p)[1] != "lab")
    native = [p for p in native_files(root) if p.suffix != ".py" and "unicode" not in p.name]
    cuda = [p for p in native if p.suffix in (".cu", ".cuh") or p.stem.startswith(("bind_cuda", "gpu"))]
    cpu = sum(line_count(p) for p in native if p not in cuda)
    sizes = [("Python", python, PYTHON_BUDGET), ("C++", cpu, NATIVE_BUDGET), ("CUDA", sum(map(line_count, cuda)), CUDA_BUDGET)]
    return [f"{name}: {lines} lines, at most {budget}" for name, lines, budget in sizes if lines > budget]


def lines_that_match(pattern: re.Pattern, files: list[Path]) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()[:100]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def paths_of_a_machine(root: Path) -> list[str]:
    return lines_that_match(MACHINE_PATH, all_files(root))


def index_hosts(root: Path) -> list[str]:
    return lines_that_match(INDEX_HOST, all_files(root))


def unfinished_lines(root: Path) -> list[str]:
    return lines_that_match(UNFINISHED, product_files(root))


BROKEN = [
    (upward_imports, "nanorlhf/model.py", "from nanorlhf.train import loss\n"),
    (upward_imports, "nanorlhf/model.py", "def f():\n    from .engine.cache import Cache\n"),
    (upward_imports, "nanorlhf/ops/loss.py", "from .. import config\n"),
    (upward_imports, "nanorlhf/data/mixture.py", "import nanorlhf.run as run\n"),
    (upward_imports, "nanorlhf/novelty.py", ""),
    (stages_that_import_stages, "nanorlhf/train/ppo.py", "from .sft import step\n"),
    (stages_that_import_stages, "nanorlhf/train/loss.py", "from nanorlhf.train import reward\n"),
    (native_touched_above_its_floor, "nanorlhf/model.py", "from nanorlhf import _C\n"),
    (native_touched_above_its_floor, "nanorlhf/optim.py", 'C = importlib.import_module("nanorlhf._cuda")\n'),
    (files_over_the_cap, "nanorlhf/model.py", "x = 1\n" * 501),
    (files_over_the_cap, "csrc/loss.cpp", "//\n" * 501),
    (files_over_the_cap, "tests/test_model.py", "x = 1\n" * 501),
    (functions_over_the_cap, "nanorlhf/model.py", "def f():\n" + "    x = 1\n" * 90),
    (nameless_modules, "nanorlhf/data/utils.py", ""),
    (nameless_modules, "csrc/common.h", ""),
    (nameless_modules, "nanorlhf/helpers/thing.py", ""),
    (untested_files, "nanorlhf/model.py", ""),
    (untested_files, "nanorlhf/train/ppo.py", ""),
    (untested_files, "csrc/loss.cu", ""),
    (untested_files, "csrc/bpe_train.cpp", ""),
    (over_budget, "nanorlhf/model.py", "x = 1\n" * (PYTHON_BUDGET + 1)),
    (over_budget, "csrc/loss.cpp", "//\n" * (NATIVE_BUDGET + 1)),
    (over_budget, "csrc/loss.cu", "//\n" * (CUDA_BUDGET + 1)),
    (over_budget, "csrc/bind_cuda_rows.cpp", "//\n" * (CUDA_BUDGET + 1)),
    (paths_of_a_machine, "nanorlhf/run.py", 'folder = "/' + 'home/me/data"\n'),
    (index_hosts, "setup.py", 'index = "https://pypi.' + 'org/simple"\n'),
    (unfinished_lines, "nanorlhf/model.py", "# TO" + "DO: later\n"),
    (unfinished_lines, "nanorlhf/model.py", "raise NotImplemented" + "Error\n"),
]

SOUND = {
    "nanorlhf/__init__.py": "from nanorlhf import _C\nfrom nanorlhf.run import run\n",
    "nanorlhf/ops/loss.py": "from nanorlhf import _C\n",
    "nanorlhf/model.py": '"""No nanorlhf._C here."""\nfrom nanorlhf.ops import loss\nfrom .config import Config\n',
    "nanorlhf/config.py": "x = 1\n" * 500,
    "nanorlhf/train/loss.py": "import torch\n",
    "nanorlhf/train/ppo.py": "from .loss import policy_loss\nfrom nanorlhf.engine import generate\n",
    "nanorlhf/run.py": "from nanorlhf.train import ppo, sft\nlog = '../work/x'\n",
    "nanorlhf/lab/scaling.py": "def f():\n" + "    x = 1\n" * 89,
    "csrc/bind.cpp": "", "csrc/loss.cpp": "", "csrc/bpe_train.cpp": "", "csrc/kernels_avx2.cpp": "",
    "csrc/unicode_tables.h": "//\n" * 9000,
    **{f"tests/test_{name}.py": "" for name in ("loss", "model", "config", "ppo", "run", "scaling", "tokenizer")},
}  # fmt: skip

RULES = list(dict.fromkeys(rule for rule, *_ in BROKEN))


def build(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_house_keeps_the_rule(rule):
    assert not rule(ROOT), "\n".join(rule(ROOT))


@pytest.mark.parametrize("rule, name, content", BROKEN)
def test_a_house_that_breaks_the_rule_is_caught(rule, name, content, tmp_path):
    violations = rule(build(tmp_path, {name: content}))
    assert violations
    assert Path(name).name in " ".join(violations) or rule is over_budget  # which accuses no single file


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_house_is_not_accused(rule, tmp_path):
    assert rule(build(tmp_path, SOUND)) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rooms_that_are_not_built_yet_break_no_rule(rule, tmp_path):
    assert rule(tmp_path) == []
