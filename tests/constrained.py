"""What the tests of constrained output share: vocabularies trained on the text that lies on the machine, and walks."""

import functools
import json
import random
import sysconfig
from pathlib import Path

import numpy as np

from nanorlhf.engine.constrain import Vocabulary
from nanorlhf.engine.constrain.network import automaton
from nanorlhf.tokenizer import Tokenizer

END = "<|end|>"


@functools.cache
def vocabulary(size=4096):
    """A tokenizer of that size, trained on Python's own library and some JSON, other alphabets and signs among it."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    files = [file for file in files if "site-packages" not in file.parts and file.stat().st_size]
    files = files[: 250 if size <= 4096 else 1800]
    rows = [json.dumps({"name": f"n{i}", "value": i, "tags": ["a", None, True, "é"], "in": {"x": i / 7}}, ensure_ascii=i % 2 == 0) for i in range(400)]
    return Tokenizer.train([*files, *rows, "ñandú größe日本語のテキスト 😀👍 ελληνικά русский " * 200], size, special_tokens=[END])


def ends(tokenizer):
    return (tokenizer.special_tokens[END],)


def byte_vocabulary():
    """One token a byte, and an end of number 256."""
    return Vocabulary([bytes([b]) for b in range(256)] + [b""])


def bits(mask, size):
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:size].astype(bool)


def random_walk(constraint, rng: random.Random, most=400, closing=None):
    """The text of tokens drawn from the masks alone, each as probable as any other, up to an end token; None if `most` came
    before. closing: a set of tokens drawn where one of them may come and `most` / 2 have come, so that texts end."""
    state, tokens = constraint.start(), []
    while len(tokens) < most:
        allowed = constraint.allowed(state)
        if closing and len(tokens) >= most // 2:
            allowed = [token for token in allowed if token in closing] or allowed
        token = rng.choice(allowed)
        state = constraint.advance(state, token)
        if token in constraint.ends:
            return tokens
        tokens.append(token)
    return None


def texts(language, longest):
    """Every text of a language of at most so many bytes, by trying all."""
    machine, found, waiting = automaton(language), set(), []
    waiting.append((machine.start(), b""))
    while waiting:
        node, text = waiting.pop()
        if machine.complete(node):
            found.add(text.decode())
        if len(text) < longest:
            waiting += [(to, text + bytes([byte])) for low, high, to in machine.row(node) for byte in range(low, high + 1)]
    return found


def acceptor(language):
    """Whether a text is in the language, as a function of the text."""
    machine = automaton(language)
    return lambda text: (node := machine.walk(machine.start(), text.encode())) >= 0 and machine.complete(node)


def accepts(language, text):
    return acceptor(language)(text)
