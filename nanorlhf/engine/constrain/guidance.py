"""llguidance as an engine of constraints: the whole of its Lark dialect and of its JSON Schema. Installed by the extra ``grammar``.

Its masks agree with this package's own where the languages do (tests/test_constrain_guidance.py). The own automata are faster on
what they know; this is for grammars that they refuse.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from nanorlhf.engine.constrain.constraint import Vocabulary
from nanorlhf.tokenizer import Tokenizer

_MATCHERS = 64  # states whose parser is kept as it is; others are parsed again from the start


# Without it a mask holds, where the text is forced, the tokenizer's own next token alone; here as elsewhere any will do.
_NO_FORCING = '%llguidance {"no_forcing": true}\n'


def guidance_lark(text: str) -> str:
    """A grammar in llguidance's dialect of Lark, for `GuidanceConstraint`."""
    return _library().LLMatcher.grammar_from_lark(_NO_FORCING + text)


def guidance_json_schema(schema: dict, **options) -> str:
    """A JSON Schema for `GuidanceConstraint`; without white space unless the options, which are llguidance's, say otherwise."""
    told = {**schema, "x-guidance": {"whitespace_flexible": False, **options}}
    return guidance_lark(f"start: %json {json.dumps(told)}")


def guidance_regex(pattern: str) -> str:
    r"""A regular expression for `GuidanceConstraint`, with ``\d \w \s`` in ASCII as in regex.py."""
    _library()
    from llguidance._lib import regex_to_lark

    return guidance_lark(f"start: /{regex_to_lark(pattern, 'dws')}/")


def _library():
    try:
        import llguidance
    except ImportError as error:
        raise ValueError('constrain: expected llguidance, which is not installed; run pip install "nanorlhf[grammar]"') from error
    return llguidance


class GuidanceConstraint:
    """A Constraint by llguidance. Its states are the tokens so far."""

    def __init__(self, grammar: str, tokenizer: Tokenizer | Vocabulary, ends: Iterable[int], vocab_size: int | None = None):
        """grammar: of one of the functions above. Raises ValueError for one that llguidance refuses."""
        library, self.ends = _library(), tuple(ends)
        if not self.ends:
            raise ValueError("constrain: expected at least one end id for llguidance, got none")
        vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else Vocabulary.of(tokenizer, vocab_size)
        self._tokens, self.vocab_size = vocabulary.tokens, len(vocabulary.tokens)
        self._tokenizer = library.LLTokenizer(library.TokenizerWrapper(_Wrapped(vocabulary.tokens, self.ends)), eos_token=list(self.ends))
        self._grammar, self._library = grammar, library
        self._matchers: OrderedDict[tuple[int, ...], object] = OrderedDict()
        self._at(())

    def _at(self, state: tuple[int, ...]):
        """A matcher that has read the state's tokens."""
        if state not in self._matchers:
            matcher = self._library.LLMatcher(self._tokenizer, self._grammar, log_level=0)
            if matcher.is_error():
                raise ValueError(f"constrain: expected a grammar that llguidance takes, got {matcher.get_error().splitlines()[0]}")
            if state and not matcher.consume_tokens(list(state)):
                raise ValueError(f"constrain: expected tokens that the grammar allows, got {matcher.get_error().splitlines()[0]}")
            self._keep(state, matcher)
        self._matchers.move_to_end(state)
        return self._matchers[state]

    def _keep(self, state: tuple[int, ...], matcher) -> None:
        self._matchers[state] = matcher
        if len(self._matchers) > _MATCHERS:
            self._matchers.popitem(last=False)

    def start(self) -> tuple[int, ...]:
        return ()

    def mask(self, state: tuple[int, ...]) -> np.ndarray:
        """As in Constraint."""
        bits = np.zeros(-(-self.vocab_size // 32), np.int32)
        if state and state[-1] in self.ends:
            for end in self.ends:
                bits.view(np.uint32)[end // 32] |= np.uint32(1 << end % 32)
            return bits
        found = self._at(state).compute_bitmask()
        bits[:] = np.frombuffer(found, np.int32)[: len(bits)]  # one bit more than tokens
        if not bits.any():
            raise ValueError(f"constrain: nothing can follow {self._place(state)}")
        return bits

    def advance(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        """As in Constraint."""
        after = (*state, token)
        if not 0 <= token < self.vocab_size or not self.mask(state)[token // 32] >> token % 32 & 1:
            raise ValueError(f"constrain: expected a token that the mask allows, got {token} {self._place(state)}")
        if token not in self.ends:
            matcher = self._at(state).deep_copy()
            matcher.consume_token(token)
            self._keep(after, matcher)
        return after

    def complete(self, state: tuple[int, ...]) -> bool:
        """As in Constraint."""
        return bool(state) and state[-1] in self.ends or self._at(state).is_accepting()

    def _place(self, state: tuple[int, ...]) -> str:
        text = b"".join(self._tokens[token] for token in state)
        return f"at byte {len(text)} of a text of llguidance's grammar, after {text.decode(errors='replace')[-40:]!r}"


class _Wrapped:
    """What llguidance asks of a tokenizer. It cuts texts into tokens only to force some, which is not asked of it here."""

    def __init__(self, tokens: list[bytes], ends: tuple[int, ...]):
        self.eos_token_id, self.bos_token_id = ends[0], None
        self.special_token_ids = [j for j, token in enumerate(tokens) if not token]
        self.tokens = [token or b"<|special %d|>" % j for j, token in enumerate(tokens)]
        self._bytes = {token[0]: j for j, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        return [self._bytes[byte] for byte in (text.encode() if isinstance(text, str) else text)]
