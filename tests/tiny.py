"""Small things that the tests share: a model, a tokenizer, and a way to interrupt a loop."""

import torch

from nanorlhf.chat import SPECIAL_TOKENS
from nanorlhf.checkpoint import StageState
from nanorlhf.config import ModelConfig, OptimConfig
from nanorlhf.model import Model
from nanorlhf.tokenizer import Tokenizer

SHAPE = ModelConfig(vocab_size=23, hidden_size=16, layers=2, heads=2, kv_heads=1, head_size=8, intermediate_size=24,
                    context=32)
OPTIM = OptimConfig(lr=0.01, muon_lr=0.01)


class Killed(Exception):
    """Stands for a kill in the middle of a training loop."""


def model(seed=0, scalar_head=False, loud=True, **changes):
    """A model of SHAPE. loud: embeddings of deviation 1 instead of 0.02, so that its predictions are far from even."""
    made = Model(ModelConfig(**{**SHAPE.__dict__, **changes}), scalar_head, seed=seed)
    if loud:
        with torch.no_grad():
            made.model.embed_tokens.weight.mul_(25)
    return made


def byte_tokenizer():
    """256 bytes and the special tokens of the chat format, no merges."""
    return Tokenizer.train([], 256 + len(SPECIAL_TOKENS), special_tokens=SPECIAL_TOKENS)


def random_sequences(count, longest, vocab=SHAPE.vocab_size, seed=0, shortest=2):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def saving(folder):
    """A stage's state that is saved after every step."""
    return StageState(folder / "state.safetensors", every=0.0)


def killed_at(step, rows=None):
    """A log that raises Killed when a step's row comes, before that step is saved."""

    def log(row):
        if rows is not None:
            rows.append(row)
        if "event" not in row and row["step"] == step:
            raise Killed

    return log


def same_weights(one, other):
    """Whether two models hold the same bits."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
