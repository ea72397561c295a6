"""A checkpoint with its tokenizer and the engine: what ``nr.load`` returns."""

from functools import cached_property
from pathlib import Path
from typing import Callable, List, Optional, Sequence

import torch

from . import chat as chat_format
from .checkpoint import load_model
from .engine import Completion, Constraint, Engine, Ranker, SamplingConfig, by_likelihood, generate
from .engine.constrain import Language, TokenConstraint, constrain
from .engine.generate import ragged
from .model import Model
from .ops import backend
from .tokenizer import Tokenizer

Message = dict  # {"role": "user" | "assistant" | "system", "content": str}


class Assistant:
    """``model`` and ``tokenizer``, with the calls that a user makes. ``engine`` remembers the beginnings of earlier prompts, so that a
    conversation that goes on is not read again from its start."""

    def __init__(self, model: Model, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        special = tokenizer.special_tokens
        self.end_of_text = special[chat_format.END_OF_TEXT]
        self.end = special[chat_format.END]

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer)

    def complete(self, prompt: str, n: int = 1, max_new_tokens: int = 128, temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, stop: str | Sequence[str] = "", seed: int = 0, min_p: float = 0.0,
                 constraint: Optional[Constraint] = None, best_of: int = 0, ranker: Ranker = by_likelihood(1.0)) -> List[str]:
        """n continuations of a document that begins with ``prompt``, each up to the first of the texts ``stop`` (not included).
        constraint: what they have to keep to. best_of: how many to draw, of which the ranker's n first are returned; n unless given.
        Errors: ValueError for best_of below n, and what the engine refuses."""
        if best_of and not 1 <= n <= best_of:
            raise ValueError(f"complete: best_of must be at least n, and n at least 1, got {best_of} and {n}")
        ids = [self.end_of_text] + self.tokenizer.encode(prompt)
        drawn = self._drawn(ids, best_of or n, max_new_tokens, SamplingConfig(temperature, top_k, top_p, min_p), seed, stop, constraint)
        order = ranker(drawn)[:n] if best_of else range(n)
        return [drawn[i].text for i in order]

    def chat(self, messages: Sequence[Message], max_new_tokens: int = 128, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, on_text: Optional[Callable[[str], None]] = None,
             min_p: float = 0.0, stop: str | Sequence[str] = "", constraint: Optional[Constraint] = None) -> str:
        """The assistant's answer to a conversation, up to the first of the texts ``stop`` (not included). on_text(piece) is called as
        the answer grows, never with a part of a character or of a stop text. constraint: what the answer has to keep to.
        Errors: ValueError when the conversation leaves no room in the model's context."""
        ids, _ = chat_format.render(self.tokenizer, list(messages), generation_prompt=True)
        sampling = SamplingConfig(temperature, top_k, top_p, min_p)
        return self._drawn(ids, 1, max_new_tokens, sampling, seed, stop, constraint, on_text)[0].text

    def _drawn(self, ids: List[int], n: int, max_new_tokens: int, sampling: SamplingConfig, seed: int, stop: str | Sequence[str],
               constraint: Optional[Constraint], on_text: Optional[Callable[[str], None]] = None) -> List[Completion]:
        texts = (stop,) if isinstance(stop, str) and stop else tuple(stop)
        return generate(self.model, [ids], max_new_tokens, n, [self.end, self.end_of_text], sampling, seed, engine=self.engine,
                        stop_text=texts, constraint=constraint, on_text=on_text)

    def constrain(self, language: Language) -> TokenConstraint:
        """The language over this model's vocabulary, for ``complete`` and ``chat``: choice, regex, json_schema, grammar or template of
        nanorlhf.engine.constrain. Where its texts end, the model's end tokens may come."""
        return constrain(language, self.tokenizer, (self.end, self.end_of_text), self.model.config.vocab_size)

    @torch.no_grad()
    def logprobs(self, text: str) -> torch.Tensor:
        """float32 (T−1,): the log-probability of each token of ``text`` after the first."""
        tokens, cu_seqlens = ragged([self.tokenizer.encode(text)], self.model.device)
        return self.model.logprobs(tokens, cu_seqlens)[0]

    def text(self, completion: Completion) -> str:
        """A completion's text, without special tokens."""
        special = set(self.tokenizer.special_tokens.values())
        return self.tokenizer.decode([i for i in completion.ids if i < self.tokenizer.vocab_size and i not in special])

    def tokens_with(self, piece: str) -> List[int]:
        """Ids of the ordinary tokens whose bytes contain ``piece``."""
        special, wanted = set(self.tokenizer.special_tokens.values()), piece.encode()
        return [i for i in range(self.tokenizer.vocab_size)
                if i not in special and wanted in self.tokenizer.decode_bytes([i])]


def load(path: str | Path, device: str = "auto", dtype: str = "auto", deterministic: bool = False) -> Assistant:
    """The assistant of a stage's folder, for example ``runs/first/ppo``. deterministic: turns ``ops.backend.deterministic`` on,
    for the whole process.

    Errors: ValueError, in one sentence, for a folder without a model, of another version, or with a reward model.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if deterministic:
        backend.deterministic(True)
    model = load_model(Path(path), dtype, device)
    if hasattr(model, "score"):
        raise ValueError(f"{path} holds a reward model, which scores answers and gives none")
    return Assistant(model, Tokenizer.load(path))
