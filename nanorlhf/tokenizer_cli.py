"""``nanorlhf tokenizer VERB``: train, encode, decode, inspect, bench."""

import json
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

Json = Annotated[bool, tyro.conf.arg(name="json")]
SAMPLES = "conversations.yml"  # of chatterbot-corpus: the same small talk in some twenty languages


def train(files: tyro.conf.Positional[Tuple[Path, ...]], out: str, vocab_size: int = 32768, pattern: str = "gpt4",
          special_token: Tuple[str, ...] = (), tie_break: str = "hf", threads: Optional[int] = None) -> None:
    """Learn a vocabulary from text files, which are read in pieces and need not fit in memory.

    Args:
        files: UTF-8 text files; bytes that are not UTF-8 are kept.
        out: The folder to write tokenizer.json to.
        vocab_size: All tokens: 256 bytes, merges, special tokens.
        pattern: How text is split: gpt2, gpt4 (cl100k), o200k, llama3, qwen2, or a regular expression.
        special_token: Texts that get an id of their own and never merge.
        tie_break: Among pairs of equal count: hf, raw or first.
        threads: That count the text.
    """
    began = time.perf_counter()
    tokenizer = Tokenizer.train(files, vocab_size, pattern, special_token, tie_break, threads, progress=True)
    tokenizer.save(out)
    megabytes = sum(f.stat().st_size for f in files) / 1e6
    print(f"{tokenizer.vocab_size} tokens from {megabytes:.1f} MB in {time.perf_counter() - began:.1f} s: {out}/tokenizer.json")


def encode(path: tyro.conf.Positional[str], text: tyro.conf.Positional[Optional[str]] = None,
           pattern: Optional[str] = None, special: bool = False) -> None:
    """Print the ids of a text, or of what comes on the standard input, as JSON.

    Args:
        path: A folder with a tokenizer, a tokenizer.json or a .tiktoken file.
        text: What to encode; without it, the standard input.
        pattern: The split rule, which a .tiktoken file does not hold.
        special: Take the texts of special tokens for those tokens.
    """
    data = sys.stdin.buffer.read() if text is None else text
    print(json.dumps(Tokenizer.load(path, pattern).encode(data, allowed_special="all" if special else ())))


def decode(path: tyro.conf.Positional[str], ids: tyro.conf.Positional[Tuple[int, ...]] = (),
           pattern: Optional[str] = None) -> None:
    """Write the text of ids to the standard output, byte for byte.

    Args:
        path: A folder with a tokenizer, a tokenizer.json or a .tiktoken file.
        ids: What to decode; without any, a JSON list on the standard input.
        pattern: The split rule, which a .tiktoken file does not hold.
    """
    if not ids:
        try:
            ids = tuple(json.load(sys.stdin))
        except (ValueError, TypeError) as error:
            raise ValueError(f"tokenizer decode: expected a JSON list of ids on the standard input ({error})") from error
    sys.stdout.buffer.write(Tokenizer.load(path, pattern).decode_bytes(ids))


def languages() -> dict[str, str]:
    """A sample of each language that the package chatterbot-corpus has small talk in; empty without it."""
    try:
        _, paths = package_files("chatterbot-corpus", SAMPLES)
    except Unavailable:
        return {}
    return {path.parent.name: path.read_text(encoding="utf-8", errors="replace") for path in paths}


def inspect(path: tyro.conf.Positional[str], text: tyro.conf.Positional[Optional[str]] = None,
            pattern: Optional[str] = None, json_: Json = False) -> None:
    """Show a vocabulary: its size, its split rule, bytes per token by language. With a text: its tokens, merge by merge.

    Args:
        path: A folder with a tokenizer, a tokenizer.json or a .tiktoken file.
        text: What to take apart.
        pattern: The split rule, which a .tiktoken file does not hold.
        json: Print everything as JSON.
    """
    tokenizer = Tokenizer.load(path, pattern)
    if text is not None:
        return _show_text(tokenizer, text, json_)
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
        pattern: The split rule, which a .tiktoken file does not hold.
        repeats: Timed passes; the median counts.
        json: Print the figures as JSON.
    """
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
