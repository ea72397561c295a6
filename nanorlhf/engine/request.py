"""What is asked of the engine, and what comes back."""

import math
from dataclasses import dataclass, field
from typing import Any, Callable, List, Optional, Protocol, Sequence, Tuple

import numpy as np

from ..tokenizer import Tokenizer
from .sample import SamplingConfig
from .stops import TextStream


class Constraint(Protocol):
    """What may come next, as the engine sees it; a state is hashable."""

    vocab_size: int

    def start(self) -> Any:
        """The state of the empty text."""

    def mask(self, state: Any) -> np.ndarray:
        """int32 (ceil(V / 32),), not to be written to: bit j % 32 of word j // 32 is set where token j may come next."""

    def advance(self, state: Any, token: int) -> Any:
        """The state after a token. Raises ValueError for one that the mask forbids."""


@dataclass(frozen=True, eq=False)
class Request:
    """One continuation of one prompt."""

    prompt: Sequence[int]  # ids
    max_new_tokens: int  # fewer where the model's context ends
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    stream: int = 0  # the tokens are a function of (seed, stream, step) and the model alone
    stop: Tuple[int, ...] = ()  # ids that end it, the last of its tokens
    stop_text: Tuple[str, ...] = ()  # texts that end it, which its text does not contain
    constraint: Optional[Constraint] = None
    top_logprobs: int = 0  # how many of the most probable tokens are reported at every step
    entropy: bool = False  # whether it is reported at every step
    on_token: Optional[Callable[[int], None]] = None  # called with each id as it is drawn
    on_text: Optional[Callable[[str], None]] = None  # with each piece of text that is sure to stay, never a part of a character

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.top_logprobs < 0:
            raise ValueError(f"engine: max_new_tokens must be at least 1 and top_logprobs at least 0, got {self.max_new_tokens} "
                             f"and {self.top_logprobs}")
        if isinstance(self.stop_text, str) or not all(self.stop_text):
            raise ValueError(f"engine: stop_text is a list of texts that are not empty, got {self.stop_text!r}")
        for name, numbers in (("max_new_tokens, seed, stream and top_logprobs", (self.max_new_tokens, self.seed, self.stream, self.top_logprobs)),
                              ("stop", tuple(self.stop))):
            if not all(isinstance(x, (int, np.integer)) for x in numbers):
                raise ValueError(f"engine: expected whole numbers for {name}, got {numbers}")


@dataclass
class Completion:
    """One continuation; one entry a token in the lists. ``ids`` ends in the stop token, if one ended it."""

    ids: List[int] = field(default_factory=list)
    logprobs: List[float] = field(default_factory=list)  # under what was drawn from: masked, filtered
    finished: bool = False  # it ended itself, by a stop token or a stop text
    finish_reason: str = field(default="", compare=False)  # stop, length, cancelled or error
    unfiltered: List[float] = field(default_factory=list, compare=False)  # log-probs under softmax(logits / temperature), of softmax(logits) where that is 0
    kept: List[float] = field(default_factory=list, compare=False)  # the share of that which the constraint's mask allows
    entropy: List[float] = field(default_factory=list, compare=False)  # of that, in nats, if asked for
    top_logprobs: List[List[Tuple[int, float]]] = field(default_factory=list, compare=False)  # of that, if asked for
    text: str = field(default="", compare=False)  # without special tokens and the stop text, if the engine has a tokenizer


class Handle:
    """A request that was submitted. ``completion`` is None until it has ended."""

    def __init__(self, request: Request, room: int, stream: Optional[TextStream]):
        self.request, self.room, self.text = request, room, stream
        self.prompt = np.array(request.prompt, np.int64)
        self.state, self.mask, self.masks, self.advanced = None, None, None, 0
        self.banned = [i for i, bias in request.sampling.logit_bias if bias == -math.inf] if request.constraint is not None else []
        if request.constraint is not None:
            self.state = request.constraint.start()
            self.mask = self._mask()
        self.drawn = np.zeros(0, np.int64)  # what it had when it last left the batch
        self.marks: Optional[np.ndarray] = None  # and what is known of these tokens
        self.top: List[List[Tuple[int, float]]] = []
        self.pieces: List[str] = []
        self.completion: Optional[Completion] = None
        self.error: Optional[BaseException] = None

    @property
    def attended(self) -> bool:
        """Whether each of its tokens has to be looked at before the next is drawn."""
        r = self.request
        return self.text is not None or r.on_token is not None or r.top_logprobs > 0 or r.constraint is not None and not self.walks

    @property
    def walks(self) -> bool:
        """Whether its constraint can go along natively."""
        return hasattr(self.request.constraint, "cursor")

    def context(self) -> np.ndarray:
        """(T,): what its next token follows."""
        return np.concatenate((self.prompt, self.drawn))

    def say(self, piece: str) -> None:
        """More text of it is sure."""
        self.pieces.append(piece)
        if piece and self.request.on_text is not None:
            self.request.on_text(piece)

    def advance(self, token: int) -> None:
        """Its constraint goes on to the next token's mask."""
        self.state, self.advanced = self.request.constraint.advance(self.state, token), self.advanced + 1
        self.mask = self._mask()

    def _mask(self) -> np.ndarray:
        mask = self.request.constraint.mask(self.state)
        if self.banned:
            left = mask.view(np.uint32).copy()
            np.bitwise_and.at(left, [i // 32 for i in self.banned], [~np.uint32(1 << i % 32) for i in self.banned])
            if not left.any():
                raise ValueError(f"engine: logit_bias bans every token that the constraint allows after {self.advanced} tokens")
        return mask

    def cursor(self) -> Optional[tuple]:
        """For its constraint to go along natively, if it has one: its masks, and where it is in them."""
        if self.request.constraint is None:
            return None
        self.masks, node = self.request.constraint.cursor(self.state)
        return self.masks, node

    def moved(self, node: int, tokens: Sequence[int]) -> None:
        """Its constraint has gone along natively."""
        self.state = self.request.constraint.moved(self.state, self.masks, node, tokens)
        self.mask = self.request.constraint.mask(self.state)

    def complete(self, ids: np.ndarray, marks: Optional[np.ndarray], reason: str, tokenizer: Optional[Tokenizer]) -> None:
        """It has ended with these tokens."""
        marks = np.zeros((4, 0)) if marks is None else marks
        entropy = marks[3].tolist() if self.request.entropy else []
        self.completion = Completion(ids.tolist(), marks[0].tolist(), reason == "stop", reason, marks[1].tolist(), marks[2].tolist(),
                                     entropy, self.top)
        if self.text is not None:
            self.say(self.text.finish())
            self.completion.text = "".join(self.pieces)
        elif tokenizer is not None:
            special = set(tokenizer.special_tokens.values())
            self.completion.text = tokenizer.decode([i for i in self.completion.ids if i < tokenizer.vocab_size and i not in special])

    def result(self) -> Completion:
        """The completion, or the error that ended it."""
        if self.error is not None:
            raise self.error
        return self.completion
