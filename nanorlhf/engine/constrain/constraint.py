"""Languages over a vocabulary: from the text so far to the tokens that may come next.

A mask allows every token whose bytes lead on in the language, so that every way of cutting a matching text into tokens is allowed,
not the tokenizer's own alone; the model chooses. Special tokens stand for no text. End tokens are allowed exactly where the
text is whole. Masks are worked out when a state is first met and kept, so that another visit is a look into a dictionary.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np

from nanorlhf.engine.constrain.language import Language
from nanorlhf.engine.constrain.network import automaton
from nanorlhf.ops.token_mask import Automaton, Masks, MaskVocabulary
from nanorlhf.tokenizer import Tokenizer

_ROW_BYTES = 1 << 26  # of masks that one constraint keeps
_NODES = 1 << 17  # of an automaton, beyond which it is begun anew: some 100 MB
_KEPT = 256  # constraints of a vocabulary
_SHOWN = 40  # characters of the text before a place


class Constraint(Protocol):
    """What may come next, as a pure function of states, which are hashable. The engine sees only this."""

    vocab_size: int

    def start(self) -> Hashable:
        """The state of the empty text."""

    def mask(self, state) -> np.ndarray:
        """int32 (ceil(V / 32),), not to be written to: bit j % 32 of word j // 32 is set where token j may come next. Raises ValueError, with
        the place, where no token may."""

    def advance(self, state, token: int):
        """The state after a token. Raises ValueError, with the place, for one that the mask forbids."""

    def complete(self, state) -> bool:
        """Whether the text so far is whole: the end tokens are then in the mask."""


class State(NamedTuple):
    """A node of the automaton, -1 after an end token; which automaton, where it was begun anew, -1 where that is not known; the text so far."""

    node: int
    epoch: int
    text: bytes


class _Walked(NamedTuple):
    """What grows while texts are walked: one value, so that threads that share a constraint never see parts of two."""

    epoch: int
    automaton: Automaton
    masks: Masks

    def node(self, state: State) -> int:
        """Of a state, also one of another epoch, by walking its text."""
        if state.epoch == self.epoch or state.node < 0:
            return state.node
        return self.automaton.walk(self.automaton.start(), state.text)


class Vocabulary:
    """A tokenizer's tokens as the masks need them. `of` gives one a tokenizer, with the constraints made for it."""

    _known: weakref.WeakKeyDictionary[Tokenizer, dict[int, Vocabulary]] = weakref.WeakKeyDictionary()

    def __init__(self, tokens: Sequence[bytes]):
        """tokens: what each id stands for, b"" for no text."""
        self.tokens = list(tokens)
        self.trees = MaskVocabulary(self.tokens)
        self.constraints: OrderedDict[Hashable, TokenConstraint] = OrderedDict()  # the longest unasked-for first
        self.lock = Lock()  # of these

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int | None = None) -> Vocabulary:
        """vocab_size: of the model, where it has more ids than the tokenizer; these stand for no text."""
        size = tokenizer.vocab_size if vocab_size is None else vocab_size
        if size < tokenizer.vocab_size:
            raise ValueError(f"constrain: expected vocab_size of at least the tokenizer's {tokenizer.vocab_size}, got {size}")
        sizes = cls._known.setdefault(tokenizer, {})
        if size not in sizes:
            special = set(tokenizer.special_tokens.values())
            tokens = [b"" if j in special else token for j, token in enumerate(tokenizer.vocabulary.tokens)]
            sizes[size] = cls(tokens + [b""] * (size - len(tokens)))
        return sizes[size]


def constrain(language: Language, tokenizer: Tokenizer | Vocabulary, ends: Iterable[int], vocab_size: int | None = None) -> TokenConstraint:
    """The language over a tokenizer's vocabulary, from a cache where it was asked for before.

    ends: the ids that may end a text. Raises ValueError for a language without a text, and for ends that the vocabulary does
    not have.

    >>> from nanorlhf.engine.constrain import choice
    >>> tok = Tokenizer.train(["yes no"], 260, special_tokens=["<|end|>"])
    >>> answer = constrain(choice(["yes", "no"]), tok, [tok.special_tokens["<|end|>"]])
    >>> state = answer.start()
    >>> sorted(tok.decode([j]) for j in answer.allowed(state))
    ['n', 'no', 'y', 'yes']
    >>> answer.complete(answer.advance(state, tok.encode("no")[0]))
    True
    """
    vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else Vocabulary.of(tokenizer, vocab_size)
    key = (language, ends := tuple(ends))
    with vocabulary.lock:
        found = vocabulary.constraints.pop(key, None) or TokenConstraint(language, vocabulary, ends)
        vocabulary.constraints[key] = found
        if len(vocabulary.constraints) > _KEPT:
            vocabulary.constraints.popitem(last=False)
    return found


class TokenConstraint:
    """A Constraint by this package's own automata. Use `constrain`, which keeps them."""

    def __init__(self, language: Language, vocabulary: Vocabulary, ends: Sequence[int]):
        self.language, self.vocabulary, self.ends = language, vocabulary, tuple(ends)
        self.vocab_size = len(vocabulary.tokens)
        if not all(isinstance(end, (int, np.integer)) and 0 <= end < self.vocab_size for end in self.ends):
            raise ValueError(f"constrain: expected end ids from 0 to {self.vocab_size - 1}, got {list(ends)}")
        self._beginning, self._walked = Lock(), self._begun(0)

    def _begun(self, epoch: int) -> _Walked:
        machine = automaton(self.language)
        return _Walked(epoch, machine, Masks(self.vocabulary.trees, machine, self.ends, _ROW_BYTES))

    def _bounded(self) -> _Walked:
        """Begun anew where it has grown too large."""
        walked = self._walked
        if walked.automaton.size() > _NODES:
            with self._beginning:
                if self._walked is walked:
                    self._walked = self._begun(walked.epoch + 1)
                walked = self._walked
        return walked

    def start(self) -> State:
        walked = self._walked
        return State(walked.automaton.start(), walked.epoch, b"")

    def mask(self, state: State) -> np.ndarray:
        """As in Constraint. After an end token, end tokens alone."""
        walked = self._walked
        row = walked.masks.mask(walked.node(state))
        if row is None:
            raise ValueError(f"constrain: nothing can follow {self._place(state)}: no token of the vocabulary leads on, nor can it end")
        return row

    def known(self, state: State) -> bool:
        """Whether the mask was worked out before, and is kept."""
        walked = self._walked
        return walked.masks.known(walked.node(state))

    def cursor(self, state: State) -> tuple[Masks, int]:
        """What ``ops.decode_run`` takes to walk on from a state by itself."""
        walked = self._bounded()
        return walked.masks, walked.node(state)

    def moved(self, state: State, masks: Masks, node: int, tokens: Iterable[int]) -> State:
        """Where it has come to from a cursor into these masks, by these tokens, of which each was allowed."""
        walked = self._walked
        return State(node, walked.epoch if masks is walked.masks else -1, state.text + b"".join([self.vocabulary.tokens[j] for j in tokens]))

    def allowed(self, state: State) -> list[int]:
        """The ids in the mask."""
        return np.flatnonzero(np.unpackbits(self.mask(state).view(np.uint8), bitorder="little")).tolist()

    def advance(self, state: State, token: int) -> State:
        """As in Constraint."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"constrain: expected a token from 0 to {self.vocab_size - 1}, got {token}")
        walked = self._bounded()
        node, text = walked.node(state), self.vocabulary.tokens[token]
        if node >= 0 and text:
            after = walked.automaton.walk(node, text)
            if after >= 0:
                return State(after, walked.epoch, state.text + text)
        if token in self.ends and (node < 0 or walked.automaton.complete(node)):
            return State(-1, walked.epoch, state.text)
        raise ValueError(f"constrain: expected a token that the mask allows, got {token} ({text!r}) {self._place(state)}")

    def complete(self, state: State) -> bool:
        """As in Constraint."""
        walked = self._walked
        return state.node < 0 or walked.automaton.complete(walked.node(state))

    def forced(self, state: State, most: int = 256) -> bytes:
        """The text, of at most so many bytes, that must come next whatever else does: none where there is a choice, the end
        included. Its bytes, not its tokens: a token of the model's choice may reach beyond them."""
        walked = self._walked
        return b"" if state.node < 0 else walked.automaton.forced(walked.node(state), most)

    def matches(self, text: str | bytes) -> bool:
        """Whether a text is in the language."""
        machine = self._walked.automaton
        node = machine.walk(machine.start(), text.encode() if isinstance(text, str) else text)
        return node >= 0 and machine.complete(node)

    def _place(self, state: State) -> str:
        before = state.text.decode(errors="replace")
        return f"at byte {len(state.text)} of a text of {self.language.source}, after {before[-_SHOWN:]!r}"
