"""``nanorlhf tokenizer VERB``: train, encode, decode, inspect, bench."""

import json
import os
import sys
import sysconfig
import time
from pathlib import Path
from typing import Annotated, Optional, Tuple

import tyro
from rich.console import Console
from rich.table import Table

from .data.archive import Unavailable
from .data.sources import package_files
from .tokenizer import Tokenizer
from .tokenizer_twin import Twin

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print everything as JSON.")]
SAMPLES = "conversations.yml"  # of chatterbot-corpus: the same small talk in some twenty languages


def train(files: tyro.conf.Positional[Tuple[Path, ...]], out: Path, vocab_size: int = 32768, pattern: str = "gpt4",
          special_token: tyro.conf.UseAppendAction[Tuple[str, ...]] = (), tie_break: str = "hf",
          threads: Optional[int] = None) -> None:
    """Learn a vocabulary from text files, which are read in pieces and need not fit in memory.

    Args:
        files: UTF-8 text files, at least one; bytes that are not UTF-8 are kept.
        out: A folder, which gets a tokenizer.json, or a file that ends in .json or .tiktoken (without special tokens).
        vocab_size: All tokens: 256 bytes, merges, special tokens.
        pattern: How text is split: gpt2, gpt4 (cl100k), o200k, llama3, qwen2, or a regular expression.
        special_token: A text that gets an id of its own and never merges; may be given several times.
        tie_break: Which of several pairs of equal count merges first: hf, as Hugging Face's trainer does; raw, the lowest
            ids; first, the first in the text.
        threads: How many threads count the text; as many as there are cores unless given.
    """
    if not files:
        raise ValueError("tokenizer train: expected text files, got none")
    _make_room(out)
    began = time.perf_counter()
    tokenizer = Tokenizer.train(files, vocab_size, pattern, special_token, tie_break, threads, progress=True)
    tokenizer.save(out)
    megabytes = sum(f.stat().st_size for f in files) / 1e6
    print(f"{tokenizer.vocab_size} tokens from {megabytes:.1f} MB in {time.perf_counter() - began:.1f} s: {out}")


def _make_room(out: Path) -> None:
    """Finds out before the training whether its result can be written."""
    is_file = out.suffix in (".json", ".tiktoken")
    folder = out.parent if is_file else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"tokenizer train: expected a place to write to, got {out} ({error.strerror})") from error
    if not os.access(folder, os.W_OK) or (is_file and out.is_dir()):
        raise ValueError(f"tokenizer train: expected a place to write to, got {out}")


def encode(path: tyro.conf.Positional[str], text: tyro.conf.Positional[Tuple[str, ...]] = (),
           pattern: Optional[str] = None, special: bool = False) -> None:
    """Print the ids of a text, or of what comes on the standard input, as JSON.

    Args:
        path: A folder with a tokenizer, a tokenizer.json or a .tiktoken file.
        text: What to encode, words joined by a space (behind -- if it starts with --); without any, the standard input.
        pattern: The split rule (gpt2, gpt4, o200k, llama3, qwen2 or a regular expression): a .tiktoken file needs it, in place
            of what another holds.
        special: Take the texts of special tokens for those tokens.
    """
    data = " ".join(text) if text else sys.stdin.buffer.read()
    print(json.dumps(Tokenizer.load(path, pattern).encode(data, allowed_special="all" if special else ())))


def decode(path: tyro.conf.Positional[str], ids: tyro.conf.Positional[Tuple[str, ...]] = ()) -> None:
    """Write the text of ids to the standard output, byte for byte.

    Args:
        path: A folder with a tokenizer, a tokenizer.json or a .tiktoken file.
        ids: What to decode, as a JSON list or with spaces or commas between; without any, the standard input.
    """
    given = " ".join(ids) if ids else sys.stdin.read()
    try:
        numbers = [int(word) for word in given.replace("[", " ").replace("]", " ").replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"tokenizer decode: expected ids, got {given[:40].strip()!r}") from error
    any_pattern = "gpt2" if path.endswith(".tiktoken") else None  # which decoding does not ask for
    sys.stdout.buffer.write(Tokenizer.load(path, any_pattern).decode_bytes(numbers))


def languages() -> dict[str, str]:
    """A sample of each language that the package chatterbot-corpus has small talk in; empty without it."""
    try:
        _, paths = package_files("chatterbot-corpus", SAMPLES)
    except Unavailable:
        return {}
    return {path.parent.name: path.read_text(encoding="utf-8", errors="replace") for path in paths}


def inspect(path: tyro.conf.Positional[str], text: tyro.conf.Positional[Tuple[str, ...]] = (),
            pattern: Optional[str] = None, json_: Json = False) -> None:
    """Show a vocabulary: its size, its split rule, bytes per token by language (with the package chatterbot-corpus, which is in
    the extra [data]). With a text: its tokens, merge by merge.

    Args:
        path: A folder with a tokenizer, a tokenizer.json or a .tiktoken file.
        text: What to take apart, words joined by a space.
        pattern: The split rule; a .tiktoken file needs it.
    """
    tokenizer = Tokenizer.load(path, pattern)
    if text:
        return _show_text(tokenizer, " ".join(text), json_)
    samples = {"Python code": Path(json.__file__).read_text(encoding="utf-8"), **languages()}
    density = {name: len(t.encode()) / len(tokenizer.encode(t)) for name, t in samples.items() if t}
    lengths = tokenizer.token_byte_lengths
    longest = [tokenizer.decode([int(i)]) for i in lengths.argsort()[::-1][:5]]
    facts = {"vocab_size": tokenizer.vocab_size, "pattern": tokenizer.pattern, "special_tokens": tokenizer.special_tokens,
             "longest": longest, "bytes_per_token": density}
    if json_:
        print(json.dumps(facts))
        return
    print(f"{tokenizer.vocab_size} tokens, split by {tokenizer.pattern}; special: {tokenizer.special_tokens or 'none'}")
    print("longest: " + "  ".join(map(repr, longest)))
    table = Table("text", "bytes per token", box=None)
    for name, value in density.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)


def _show_text(tokenizer: Tokenizer, text: str, json_: bool) -> None:
    ids = tokenizer.encode(text)
    pieces = [tokenizer.decode([i]) for i in ids]
    if json_:
        print(json.dumps({"ids": ids, "pieces": pieces}))
        return
    print("  ".join(f"{i}:{p!r}" for i, p in zip(ids, pieces)))
    twin = Twin(tokenizer)
    for piece in twin.split(text):
        print()
        print(twin.draw(piece))


def bench(path: tyro.conf.Positional[str], pattern: Optional[str] = None, repeats: int = 5, json_: Json = False) -> None:
    """Time this vocabulary on the text of Python's own library, one thread.

    Args:
        path: A folder with a tokenizer, a tokenizer.json or a .tiktoken file.
        pattern: The split rule; a .tiktoken file needs it.
        repeats: Timed passes; the median counts.
    """
    if repeats < 1:
        raise ValueError(f"tokenizer bench: expected repeats of at least 1, got {repeats}")
    tokenizer = Tokenizer.load(path, pattern)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [f.read_text(encoding="utf-8", errors="replace") for f in files]
    size = sum(len(t.encode()) for t in texts)
    ids = tokenizer.encode_batch(texts, threads=1)[0]

    def rate(run) -> float:
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return size / sorted(times)[len(times) // 2] / 1e6

    figures = {"bytes": size, "tokens": len(ids),
               "encode_numpy_MB_s": rate(lambda: tokenizer.encode_batch(texts, threads=1)),
               "encode_lists_MB_s": rate(lambda: tokenizer.encode_lists(texts, threads=1)),
               "decode_MB_s": rate(lambda: tokenizer.decode(ids))}
    if json_:
        print(json.dumps(figures))
        return
    print(f"{size / 1e6:.1f} MB of Python, {len(ids):,} tokens, one thread, median of {repeats}: "
          f"encode {figures['encode_numpy_MB_s']:.0f} MB/s to NumPy, {figures['encode_lists_MB_s']:.0f} MB/s to lists; "
          f"decode {figures['decode_MB_s']:.0f} MB/s")


VERBS = {"train": train, "encode": encode, "decode": decode, "inspect": inspect, "bench": bench}
