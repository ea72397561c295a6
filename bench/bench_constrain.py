"""Microseconds a token mask of constrained output takes, ours and llguidance's in turns at every token of the same texts.

    pip install -e ".[bench]" && python bench/bench_constrain.py --json FILE [--texts 20]
    python bench/bench_constrain.py --decoding [--json FILE]

New text: every token of a text with a new automaton (a new matcher); first seen: of these, the states of ours that the text meets for
the first time; seen: the same text again on the same automaton. The masks are compared bit by bit on the way. One thread; the vocabularies are trained
on Python's library. llguidance is called by fill_next_token_bitmask, the fastest call that it has from Python, on a grammar
without forced tokens, so that both compute the same mask. Every text is timed `REPEATS` times, each with automata of its own, and each
token's least time counts, so that another program's turn on the processor is not counted.

--decoding: milliseconds a token of `ROWS` requests decoded together by the engine with and without a constraint, in turns: the same untrained
model, prompts and number of tokens. First: with an automaton that no text has met; again: with one that the same texts have met.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import llguidance
import numpy as np
import pytest
import torch
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from nanorlhf.engine.constrain import Vocabulary, grammar, guidance_json_schema, guidance_lark, guidance_regex, json_schema, regex
from nanorlhf.engine.constrain.constraint import TokenConstraint
from nanorlhf.engine.constrain.guidance import GuidanceConstraint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import constrained  # noqa: E402
from nanorlhf.config import ModelConfig  # noqa: E402
from nanorlhf.engine import Engine, Request  # noqa: E402
from nanorlhf.model import Model  # noqa: E402
from timing import in_turns, machine, middle_and_spread  # noqa: E402

REPEATS = 3
ROWS, PROMPT, NEW = 32, 64, 64  # of --decoding: requests, and tokens each
WORDS = "the of value parser Ünïcode time river answer people with 日本 about state between many return new list".split()
PERSON = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "tags", "home"],
    "properties": {
        "name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "tags": {"type": "array", "items": {"type": "string"}},
        "home": {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                 "required": ["street", "zip"], "additionalProperties": False},
    },
}  # fmt: skip
BOUNDED = {
    "type": "object", "additionalProperties": False, "required": ["title", "text", "score", "kind"],
    "properties": {"title": {"type": "string", "minLength": 3, "maxLength": 60}, "text": {"type": "string", "maxLength": 400},
                   "score": {"type": "number"}, "kind": {"enum": ["good", "bad", "neither"]}},
}  # fmt: skip
TREE = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"v": {"type": "integer"}, "sub": {
    "type": "array", "items": {"$ref": "#/$defs/n"}}}, "required": ["v", "sub"], "additionalProperties": False}}}
SUMS = 'root ::= term (("+" | "-") term)*\nterm ::= [0-9]+ | "(" root ")"'
SUMS_LARK = 'start: root\nroot: term (("+" | "-") term)*\nterm: NUMBER | "(" root ")"\nNUMBER: /[0-9]+/'


def words(rng, most):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def tree(rng, depth=0):
    return {"v": rng.randint(-99, 9999), "sub": [tree(rng, depth + 1) for _ in range(rng.randint(0, 3 if depth < 3 else 0))]}


def sums(rng, depth=0):
    return rng.choice("+-").join(f"({sums(rng, depth + 1)})" if depth < 4 and rng.random() < 0.4 else str(rng.randint(0, 9999))
                                 for _ in range(rng.randint(1, 4)))


def person(rng):
    return {"name": words(rng, 3), "age": rng.randint(0, 150), "tags": [words(rng, 2) for _ in range(rng.randint(0, 5))],
            "home": {"street": words(rng, 4), "zip": f"{rng.randint(0, 99999):05}"}}


def bounded(rng):
    return {"title": words(rng, 5) + "...", "text": words(rng, 30), "score": round(rng.uniform(-9, 9), 3), "kind": rng.choice(["good", "bad", "neither"])}


def dumps(make):
    return lambda rng: json.dumps(make(rng), separators=(",", ":"), ensure_ascii=False)


CASES = {
    "object, free strings": (lambda: json_schema(PERSON), lambda: guidance_json_schema(PERSON), dumps(person)),
    "object, bounded strings": (lambda: json_schema(BOUNDED), lambda: guidance_json_schema(BOUNDED), dumps(bounded)),
    "any JSON": (lambda: json_schema({}), lambda: guidance_json_schema({}), dumps(person)),
    "recursive schema": (lambda: json_schema(TREE), lambda: guidance_json_schema(TREE), dumps(tree)),
    "regex, a date and words": (lambda: regex(r"\d{4}-\d\d-\d\d: .*"), lambda: guidance_regex(r"\d{4}-\d\d-\d\d: .*"),
                                lambda rng: f"{rng.randint(1000, 9999)}-12-24: {words(rng, 12)}"),
    "grammar of sums": (lambda: grammar(SUMS), lambda: guidance_lark(SUMS_LARK), sums),
}


def measure(case, size, count):
    """{series: microseconds} of the masks of `count` texts, and of the time until a first mask."""
    make, theirs, text = CASES[case]
    tokenizer = constrained.vocabulary(size)
    ends, vocabulary = constrained.ends(tokenizer), Vocabulary.of(tokenizer)
    oracle = GuidanceConstraint(theirs(), tokenizer, ends)
    bits = allocate_token_bitmask(1, oracle._tokenizer.vocab_size)
    rng = random.Random(0)
    texts = [tokenizer.encode(text(rng)) for _ in range(count)]
    found = [least(text_times(make, theirs, tokens, vocabulary, ends, oracle._tokenizer, bits) for _ in range(REPEATS)) for tokens in texts]
    return {name: 1e6 * np.concatenate([times[name] for times in found]) for name in found[0]}


def least(runs):
    runs = list(runs)
    return {name: np.min([run[name] for run in runs], axis=0) for name in runs[0]}


def text_times(make, theirs, tokens, vocabulary, ends, their_tokenizer, bits):
    """{series: seconds} of one text with new automata."""
    times, now = {}, time.perf_counter
    begun = now()
    ours = TokenConstraint(make(), vocabulary, ends)
    ours.mask(ours.start())
    middle = now()
    matcher = llguidance.LLMatcher(their_tokenizer, theirs(), log_level=0)
    fill_next_token_bitmask(matcher, bits, 0)
    done = now()
    times["ours start"], times["llguidance start"] = [middle - begun], [done - middle]
    ours._begin()  # the first mask is timed with the others, too
    for turn in ("new text", "seen"):
        matcher = matcher if turn == "seen" else llguidance.LLMatcher(their_tokenizer, theirs(), log_level=0)
        matcher.reset()
        state, own, other, first = ours.start(), [], [], []
        for token in [*tokens, None]:
            new = not ours.known(state)
            begun = now()
            row = ours.mask(state)
            middle = now()
            fill_next_token_bitmask(matcher, bits, 0)
            done = now()
            assert np.array_equal(bits[0, : len(row)], row), state.text
            own.append(middle - begun), other.append(done - middle)
            first += [middle - begun] if new else []
            if token is not None:
                state = ours.advance(state, token)
                assert matcher.consume_token(token), state.text
        times[f"ours {turn}"], times[f"llguidance {turn}"] = own, other
        times.update({"ours first seen": first} if turn == "new text" else {})
    return {name: np.array(values) for name, values in times.items()}


@pytest.mark.parametrize("case", CASES)
def test_first_masks(benchmark, case):
    tokenizer = constrained.vocabulary(4096)
    vocabulary, language = Vocabulary.of(tokenizer), CASES[case][0]()

    def first():
        made = TokenConstraint(language, vocabulary, constrained.ends(tokenizer))
        return made.mask(made.start())

    benchmark(first)


def decoding(size, dtype, case):
    """[row of each contender]: a text of a list of the case's that is longer than what is decoded."""
    tokenizer = constrained.vocabulary(size)
    schema = {"type": "array", "minItems": NEW, "items": {"object, free strings": PERSON, "object, bounded strings": BOUNDED}[case]}
    ends, vocabulary, rng = constrained.ends(tokenizer), Vocabulary.of(tokenizer), random.Random(0)
    model = Model(ModelConfig(vocab_size=size, layers=10, context=256)).requires_grad_(False)
    model.compute_dtype = dtype
    engine = Engine(model, slots=ROWS, pool_tokens=ROWS * (PROMPT + NEW), keep=False)
    prompts = [[rng.randrange(size - 1) for _ in range(PROMPT)] for _ in range(ROWS)]
    make = lambda: TokenConstraint(json_schema(schema), vocabulary, ends)
    known = make()

    def run(constraint):
        made = [Request(prompt, NEW, seed=i, constraint=constraint) for i, prompt in enumerate(prompts)]
        begun = time.perf_counter()
        assert all(len(c.ids) == NEW for c in engine.run(made))
        return 1e3 * (time.perf_counter() - begun) / NEW

    took = in_turns({"free": lambda: run(None), "first": lambda: run(make()), "again": lambda: run(known)}, repeats=15)
    rows = []
    for name, ms in took.items():
        middle, spread = middle_and_spread(ms)
        slower, apart = middle_and_spread([100 * (mine / free - 1) for mine, free in zip(ms, took["free"])])
        print(f"{size:6} {str(dtype)[6:]:9} {case:24} {name:6} {middle:7.3f} ms a token ± {spread:.3f}, {slower:+5.1f} ± {apart:.1f} %", flush=True)
        rows.append({"vocabulary": size, "dtype": str(dtype), "case": case, "series": name, "ms": middle, "spread_ms": spread, "slower_percent": slower,
                     "spread_percent": apart})
    return rows


def show(label, times):
    p50, p99 = np.quantile(times, [0.5, 0.99])
    return f"{label:24} p50 {p50:9.2f} us   p99 {p99:9.2f} us   mean {times.mean():9.2f} us   n {len(times)}", {
        "p50": p50, "p99": p99, "mean": times.mean(), "n": len(times)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--decoding", action="store_true")
    given = parser.parse_args()
    print(json.dumps({**machine(), "llguidance": llguidance.get_version() if hasattr(llguidance, "get_version") else ""}))
    if given.decoding:
        rows = [row for size in (4096, 49152) for dtype in (torch.float32, torch.bfloat16) for case in list(CASES)[:2] for row in decoding(size, dtype, case)]
    else:
        rows = masks(given.texts)
    if given.json:
        Path(given.json).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


def masks(count):
    """Rows of every case, at two sizes of vocabulary."""
    rows = []
    for size in (4096, 49152):
        tokens = list(constrained.vocabulary(size).vocabulary.tokens)
        begun = time.perf_counter()
        Vocabulary(tokens)
        print(f"\n{size} tokens; our trees of them {1e3 * (time.perf_counter() - begun):.0f} ms")
        together = {}
        for case in CASES:
            found = measure(case, size, count)
            for name, times in found.items():
                together.setdefault(name, []).append(times)
            print(f"  {case}")
            for name, times in found.items():
                line, figures = show(name, times)
                rows.append({"vocabulary": size, "case": case, "series": name, **figures})
                print("    " + line, flush=True)
        print("  all")
        for name, times in together.items():
            line, figures = show(name, np.concatenate(times))
            rows.append({"vocabulary": size, "case": "all", "series": name, **figures})
            print("    " + line, flush=True)
    return rows


if __name__ == "__main__":
    main()
