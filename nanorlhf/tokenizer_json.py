"""The file formats of a tokenizer: Hugging Face's tokenizer.json and OpenAI's .tiktoken rank files.

A vocabulary in either format becomes a `Vocabulary`: plain data, from which `tokenizer.Tokenizer` builds itself.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from nanorlhf import _C
from nanorlhf.pretokenize import PATTERNS, SPELLINGS


@dataclass
class Vocabulary:
    """Everything that a tokenizer is. tokens[id] is b"" where no token has that id."""

    tokens: list[bytes]
    special_tokens: dict[str, int]
    pattern: str  # a name in PATTERNS or a regular expression
    merges: list[tuple[int, int]] | None  # None: any two tokens merge if they make a token, the lowest id first
    results: list[int] = field(default_factory=list)  # the id that each merge makes
    whole_piece_first: bool = True  # a piece that is a token is taken whole, whatever the merges say
    nfc: bool = False  # text is brought to Unicode normal form C first


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in tokenizer.json: itself if printable, else the next from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
    return [characters[b] for b in range(256)]


BYTE_TO_CHAR = _byte_alphabet()
_MOST_TOKENS = 1 << 24  # a larger id is a damaged file, and would ask for that much memory
CHAR_TO_BYTE = {c: b for b, c in enumerate(BYTE_TO_CHAR)}


def _spell(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[b] for b in token)


def _unspell(text: str) -> bytes:
    try:
        return bytes(CHAR_TO_BYTE[c] for c in text)
    except KeyError as error:
        raise ValueError(f"Tokenizer.load: expected tokens in the byte-level alphabet, got {text!r}") from error


def all_splits(tokens: list[bytes]) -> list[tuple[int, int]]:
    """Every split of a token into two tokens, in the order of the ids: ranks by bytes, written as a merge list."""
    ids = {t: i for i, t in enumerate(tokens) if t}
    halves = ((token[:k], token[k:]) for token in tokens for k in range(1, len(token)))
    return [(ids[left], ids[right]) for left, right in halves if left in ids and right in ids]


def to_json(v: Vocabulary) -> dict:
    """The vocabulary as a tokenizer.json object, which Hugging Face tokenizers reads to the same ids."""
    special_ids = set(v.special_tokens.values())
    ordinary = [b"" if i in special_ids else t for i, t in enumerate(v.tokens)]
    vocab = {_spell(t): i for i, t in enumerate(ordinary) if t}
    twice = [text for text in v.special_tokens if text in vocab]
    if twice:
        raise ValueError(f"Tokenizer.save: expected special tokens that no ordinary token is spelled like, got {twice[0]!r}")
    if sorted(special_ids) != list(range(len(vocab), len(vocab) + len(special_ids))):
        # Special tokens that do not simply follow keep their ids only if the vocabulary lists them.
        vocab |= v.special_tokens
    merges = all_splits(ordinary) if v.merges is None else v.merges
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"Regex": PATTERNS.get(v.pattern, v.pattern)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            | {"special": True}
            for text, i in sorted(v.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": "NFC"} if v.nfc else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": v.whole_piece_first,
            "vocab": vocab,
            "merges": [[_spell(v.tokens[a]), _spell(v.tokens[b])] for a, b in merges],
        },
    }


def _by_id(pairs: Iterable[tuple[int, bytes]]) -> list[bytes]:
    """Tokens at the places of their ids, b"" where there is none."""
    pairs = list(pairs)
    most = max((i for i, _ in pairs), default=-1)
    if any(i < 0 or not token for i, token in pairs) or most >= _MOST_TOKENS:
        raise ValueError(f"Tokenizer.load: expected non-empty tokens with ids from 0 to {_MOST_TOKENS - 1}, got others")
    tokens = [b""] * (most + 1)
    for i, token in pairs:
        tokens[i] = token
    return tokens


def _pattern_of(pre_tokenizer: dict | None) -> str:
    """The split rule of a tokenizer.json: ByteLevel alone, or Split followed by ByteLevel."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [s and s.get("type") for s in steps]
    known = kinds in (["ByteLevel"], ["Split", "ByteLevel"]) and not steps[-1].get("add_prefix_space")
    if known and kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt2"
    if known and kinds == ["Split", "ByteLevel"] and not steps[-1].get("use_regex", True):
        regex = steps[0]["pattern"].get("Regex")
        # Two ways to say the same: keep what matches and what lies between, or remove all but what matches.
        if regex and (steps[0]["behavior"], steps[0]["invert"]) in (("Isolated", False), ("Removed", True)):
            return SPELLINGS.get(regex, regex)
    got = json.dumps(pre_tokenizer)[:200]
    raise ValueError(f"Tokenizer.load: expected a byte-level split without prefix space, got {got}")


def from_json(data: dict) -> Vocabulary:
    """Reads a tokenizer.json object. Raises ValueError for anything but a plain byte-level BPE."""
    model, normalizer = data.get("model", {}), data.get("normalizer")
    plain = model.get("type") == "BPE" and "vocab" in model and "merges" in model and not any(
        model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    if not plain or normalizer not in (None, {"type": "NFC"}):
        raise ValueError(
            f"Tokenizer.load: expected a byte-level BPE with no normalizer or NFC, got model {model.get('type')} "
            f"and normalizer {normalizer}"
        )
    special_tokens = {t["content"]: t["id"] for t in data.get("added_tokens") or []}
    vocab = {text: i for text, i in model["vocab"].items() if special_tokens.get(text) != i}
    ordinary = [(i, _unspell(text)) for text, i in vocab.items()]
    tokens = _by_id(ordinary + [(i, text.encode()) for text, i in special_tokens.items()])
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    try:
        merges = [(vocab[a], vocab[b]) for a, b in pairs]
        results = [vocab[a + b] for a, b in pairs]
    except (KeyError, ValueError) as error:
        raise ValueError(f"Tokenizer.load: expected merges of tokens of the vocabulary, got {error}") from error
    pattern = _pattern_of(data.get("pre_tokenizer"))
    whole = bool(model.get("ignore_merges", False))
    return Vocabulary(tokens, special_tokens, pattern, merges, results, whole, nfc=normalizer is not None)


def read_tiktoken(path: Path, pattern: str) -> Vocabulary:
    """Reads a rank file: on each line the base64 of a token, a space and its rank, which is its id."""
    tokens, bad = _C.read_ranks(path.read_bytes())
    if bad:
        raise ValueError(f"Tokenizer.load: expected base64, a space and a rank on line {bad} of {path}")
    return Vocabulary(tokens, {}, pattern, merges=None)


def add_special_tokens(v: Vocabulary, special_tokens: dict[str, int]) -> None:
    """Adds tokens to a vocabulary, at ids that are free."""
    for text, i in special_tokens.items():
        known = v.special_tokens.get(text, i)
        taken = 0 <= i < len(v.tokens) and v.tokens[i] and v.special_tokens.get(text) != i
        if not text or known != i or taken or not 0 <= i < _MOST_TOKENS:
            raise ValueError(f"Tokenizer.load: expected special tokens with ids that are free, got {i} for {text!r}")
        v.tokens += [b""] * (i + 1 - len(v.tokens))
        v.tokens[i] = text.encode()
        v.special_tokens[text] = i


def write_tiktoken(v: Vocabulary, path: Path) -> None:
    """Writes a rank file of the ordinary tokens; it holds neither special tokens nor the split rule.

    Raises ValueError when ranks by bytes would not give this vocabulary's ids.
    """
    special_ids = set(v.special_tokens.values())
    ranks = {i: token for i, token in enumerate(v.tokens) if token and i not in special_ids}
    if v.nfc or (v.merges is None and not v.whole_piece_first):
        raise ValueError(f"Tokenizer.save: expected no normalizer and whole pieces first for the rank file {path}")
    if v.merges is not None:
        # A merge list is the same as ranks by bytes if its results rise and the bytes of each token merge to that token:
        # by induction over their length, each token is then made by the same pair in both.
        model = _C.BpeModel(v.tokens, sorted(special_ids), v.merges, v.results, False, False, "")
        odd = next((i for i, token in ranks.items() if model.encode_pieces([token]) != [i]), None)
        if odd is None and any(a >= b for a, b in zip(v.results, v.results[1:])):
            odd = next(b for a, b in zip(v.results, v.results[1:]) if a >= b)
        if odd is not None:
            raise ValueError(
                f"Tokenizer.save: expected merges that are ranks by bytes for the rank file {path}, got token {odd} "
                f"({v.tokens[odd]!r}), which is not made so; a folder can hold it"
            )
    lines = (base64.b64encode(token) + b" %d\n" % i for i, token in ranks.items())
    _replace(path, b"".join(lines))


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_bytes(data)
    os.replace(fresh, path)


def write_json(v: Vocabulary, path: Path) -> None:
    """Writes a tokenizer.json file."""
    _replace(path, json.dumps(to_json(v), ensure_ascii=False).encode())


def write_folder(v: Vocabulary, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads too."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if "<|endoftext|>" in v.special_tokens:
        config["eos_token"] = "<|endoftext|>"
    # Only for this package: tells ranks by bytes from the merge list that spells them out.
    config["nanorlhf"] = {"ranks_by_bytes": v.merges is None}
    write_json(v, folder / "tokenizer.json")
    _replace(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())


def read_folder(folder: Path) -> Vocabulary:
    """Reads what write_folder or Hugging Face wrote."""
    v = read_json(folder / "tokenizer.json")
    config = folder / "tokenizer_config.json"
    if config.exists() and json.loads(config.read_text(encoding="utf-8")).get("nanorlhf", {}).get("ranks_by_bytes"):
        v.merges, v.results = None, []
    return v


def read_json(path: Path) -> Vocabulary:
    """Reads a tokenizer.json file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"Tokenizer.load: expected a tokenizer at {path}, got no such file") from error
    except ValueError as error:
        raise ValueError(f"Tokenizer.load: expected JSON in {path}, got {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"Tokenizer.load: expected a JSON object in {path}, got {type(data).__name__}")
    return from_json(data)
