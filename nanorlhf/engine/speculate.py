"""Speculative decoding: a small model proposes several tokens, the large one looks at all of them in one pass and keeps as many as it
would have drawn itself.

Exact in distribution, whatever the small model proposes. Sources: Leviathan et al. 2023, "Fast inference from Transformers via
speculative decoding", algorithm 1; Chen et al. 2023, "Accelerating large language model decoding with speculative sampling", §3.
"""

from dataclasses import dataclass
from typing import List, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..model import Model
from ..ops.sample import filtered_logprobs, uniforms
from .cache import PagedCache, Rows, packed_decoder
from .draw import logits_of
from .generate import ragged
from .request import Completion
from .sample import SamplingConfig

PAGE = 16
DRAFT, ACCEPT, FINAL = range(3)  # of each request and step: the numbers that propose, that accept, and that draw what is not proposed
KINDS = 3


@dataclass
class Speculation:
    """``completions`` in the order of ``generate``'s; how many tokens were proposed and accepted; passes of the large model a request."""

    completions: List[Completion]
    proposed: int
    accepted: int
    passes: float

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that were kept; 0 where none was proposed."""
        return self.accepted / max(self.proposed, 1)


class Sequences:
    """One model's keys and values of all sequences, each on pages of its own. A position is written whenever its token is run, so that
    to take tokens back is to run others in their place. Arrays are NumPy's, so that of a pass that takes a fraction of a millisecond
    little is spent around it."""

    def __init__(self, model: Model, count: int, tokens: int, decoder: Optional[ops.PackedDecoder] = None):
        """decoder: the model's, where it is at hand."""
        pages = -(-tokens // PAGE)
        self.model, self.device, self.cache = model, model.device, PagedCache(model, count * pages, PAGE)
        self.tables = np.arange(count * pages, dtype=np.int32).reshape(count, pages)
        self.decoder = packed_decoder(model) if decoder is None else decoder
        self.stops = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)  # none, as ``run`` has to be told
        if self.decoder is None:
            weight = model.head_weight.detach().to(model.compute_dtype)  # as the engine has it
            self.head = weight if ops.backend.is_deterministic() else weight.float()

    def on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def start(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        """Run all of the prompts but their last tokens; sequences [i·n, (i + 1)·n) go on from prompt i."""
        counts = np.array([len(p) - 1 for p in prompts], np.int64)
        some = np.flatnonzero(counts)
        if len(some):
            tokens, cu_seqlens = ragged([prompts[i][:-1] for i in some], self.device)
            rows, positions, _ = spans(some * n, np.zeros_like(some), counts[some])
            self._run(tokens, rows, positions, None, cu_seqlens, tokens.new_empty(0))
        used = -(-counts.max(initial=0) // PAGE)
        for i in range(1, n):
            self.cache.copy(*(self.on_device(self.tables[at::n, :used].ravel().astype(np.int64)) for at in (0, i)))

    def logits(self, tokens: Tensor, rows: np.ndarray, positions: np.ndarray, last: Optional[np.ndarray] = None) -> Tensor:
        """Run tokens (N,) of sequences ``rows`` (N,) at ``positions`` (N,): logits (N, V) fp32 of what follows each, or (R, V) for the tokens
        ``last`` (R,)."""
        return self._run(tokens, rows, positions, self._seen(rows, positions, int(positions.max())), None,
                         None if last is None else self.on_device(last))

    def run(self, tokens: Tensor, rows: np.ndarray, positions: np.ndarray, streams: Tensor, steps: Tensor, most: int, seed: int,
            s: SamplingConfig) -> tuple[Tensor, Tensor]:
        """Run a token (B,) of each row, then what was drawn after it, ``most`` times in all: the tokens drawn and their log-probs under what
        they were drawn from, (K, B) each. K is smaller where logits are no distribution. For a model with a decoder."""
        seen = self._seen(rows, positions, int(positions.max()) + most - 1)
        drawn, marks, _ = self.cache.run(self.decoder, tokens, torch.from_numpy(positions), seen, streams, steps, most, self.stops, torch.zeros_like(streams),
                                      seed=seed, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)  # fmt: skip
        return drawn, marks[0]

    def _seen(self, rows: np.ndarray, positions: np.ndarray, last: int) -> Rows:
        tables = self.tables[:, : last // PAGE + 1].take(rows, 0)
        return Rows(self.on_device(tables), self.on_device((positions + 1).astype(np.int32)))

    def _run(self, tokens: Tensor, rows: np.ndarray, positions: np.ndarray, seen: Optional[Rows], cu_seqlens: Optional[Tensor],
             last: Optional[Tensor]) -> Tensor:
        slots = self.on_device(rows * (self.tables.shape[1] * PAGE) + positions)  # a sequence's pages lie one after the other
        if self.decoder is not None:
            return self.cache.logits(self.decoder, tokens, self.on_device(positions), slots, seen, cu_seqlens, last)
        hidden = self.cache.forward(self.model, tokens, self.on_device(positions), slots, cu_seqlens, seen)
        return logits_of(hidden if last is None else hidden[last], self.head)


def spans(rows: np.ndarray, start: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """counts[i] positions from start[i] on, of each of the rows: the row and the position of each, and where the next row's begin.

    >>> spans(np.array([4, 2]), np.array([7, 0]), np.array([2, 1]))
    (array([4, 4, 2]), array([7, 8, 0]), array([2, 3]))
    """
    ends = counts.cumsum()
    return rows.repeat(counts), np.arange(ends[-1]) + (start - ends + counts).repeat(counts), ends


class Texts:
    """What was written so far, a row for each request. ``ids`` behind ``length`` are guesses or nothing."""

    def __init__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, n: int, context: int):
        self.start = np.array([len(p) for p in prompts], np.int64).repeat(n)
        self.length, self.end = self.start.copy(), np.minimum(self.start + max_new_tokens, context)
        shape = len(self.start), int(self.end.max(initial=1))
        self.ids = np.zeros(shape, np.int64)
        self.logprobs, self.guessed = np.zeros(shape, np.float32), np.zeros(shape, np.float32)  # of the large model, and of the small one
        for row, prompt in zip(self.ids, (p for p in prompts for _ in range(n))):
            row[: len(prompt)] = prompt
        self.finished = np.zeros(shape[0], bool)

    def guess(self, rows: np.ndarray, at: int, tokens: Tensor, logprobs: Tensor) -> None:
        """Write tokens (K, R) behind the ends of the rows, from ``at`` behind them on."""
        where = rows, self.length[rows] + np.arange(at, at + len(tokens))[:, None]
        self.ids[where], self.guessed[where] = tokens.cpu().numpy(), logprobs.cpu().numpy()

    def extend(self, rows: np.ndarray, count: np.ndarray, stop: np.ndarray) -> None:
        """count[i] of the ids behind the end of each row stay, up to the first that is in ``stop``."""
        if len(stop):
            owner, positions, ends = spans(rows, self.length[rows], count)
            within = np.arange(len(owner)) - (ends - count).repeat(count)
            stopped = np.isin(self.ids[owner, positions], stop)
            first = np.minimum.reduceat(np.where(stopped, within + 1, len(owner) + 1), ends - count)
            self.finished[rows] = first <= count
            count = np.minimum(first, count)
        self.length[rows] += count

    def completions(self) -> List[Completion]:
        found = []
        for ids, logprobs, start, length, finished in zip(self.ids, self.logprobs, self.start, self.length, self.finished):
            found.append(Completion(ids[start:length].tolist(), logprobs[start:length].tolist(), bool(finished)))
            found[-1].finish_reason = "stop" if finished else "length"
        return found


@torch.no_grad()
@ops.weights_held()
def speculate(model: Model, draft: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, n: int = 1, stop: Sequence[int] = (),
              sampling: SamplingConfig = SamplingConfig(), seed: int = 0, ahead: int = 4) -> Speculation:
    """n continuations of each prompt, distributed as ``generate``'s with the same settings (at temperature 0: the same tokens).

    draft: proposes up to ``ahead`` tokens before ``model`` is run, and none beyond its own context; any model of the same vocabulary. What
    a request draws depends on (seed, its number, the step) and the models alone, and on ``ahead``. Completions have the log-probs of ``model``, filtered as it was drawn from.

    Errors: ValueError for different vocabularies, a prompt that is empty or leaves no room in either context, a repetition penalty
    (which hangs on tokens that are not settled yet), a biased id that is none, and counts below 1.
    """
    _check(model, draft, prompts, max_new_tokens, n, sampling, ahead)
    texts, reach = Texts(prompts, max_new_tokens, n, model.config.context), draft.config.context
    requests, longest = texts.ids.shape
    large = Sequences(model, requests, longest)
    small = Sequences(draft, requests, min(longest, reach), large.decoder if draft is model else None)
    for sequences in (large, small):
        sequences.start(prompts, n)
    chances = _chances(seed, requests, max(texts.end - texts.start, default=0)) if sampling.temperature > 0 else None
    rows, stops, proposed, accepted, passes = np.arange(requests), np.array(stop, np.int64), 0, 0, 0
    while len(rows):
        length = texts.length[rows]
        count = np.minimum(ahead, np.minimum(texts.end[rows] - length - 1, reach - length)).clip(0)  # the last token is the large model's own
        if len(rows) > 1:  # those with most guesses first, so that whoever still guesses is at the front
            order = np.argsort(-count, kind="stable")
            rows, count = rows[order], count[order]
        count = _propose(small, texts, rows, count, sampling, seed)
        kept = _settle(large, small, texts, rows, count, chances, sampling, seed)
        proposed, accepted, passes = proposed + int(count.sum()), accepted + int(kept.sum()), passes + len(rows)
        texts.extend(rows, kept + 1, stops)
        rows = rows[~texts.finished[rows] & (texts.length[rows] < texts.end[rows])]
    return Speculation(texts.completions(), proposed, accepted, passes / max(requests, 1))


def _chances(seed: int, requests: int, steps: int) -> np.ndarray:
    """(requests, steps): the number that p / q has to be above for a guess to stay; its log."""
    of, at = torch.arange(requests) * KINDS + ACCEPT, torch.arange(steps)
    return uniforms(seed, of.repeat_interleave(steps), at.repeat(requests)).log().view(requests, steps).numpy()


def _propose(small: Sequences, texts: Texts, rows: np.ndarray, count: np.ndarray, sampling: SamplingConfig, seed: int) -> np.ndarray:
    """Write count[i] tokens, drawn by the small model, behind the end of each of the rows, of which those with more come first. Returns the
    counts, which are smaller where the small model failed."""
    drawn, length, most = [], texts.length[rows], int(count.max(initial=0))
    step = length - texts.start[rows]
    at_once = small.decoder is not None and not sampling.logit_bias and most > 1 and most == count[-1]
    for at in range(1 if at_once else most):
        own = rows if at_once else rows[:np.count_nonzero(count > at)]
        many, before = len(own), length[: len(own)] + (at - 1)
        if at:
            logits = small.logits(drawn[-1][0][:many].contiguous(), own, before)
        else:  # after a whole success the small model has not run its own last guess either; else that changes nothing
            owner, positions, ends = spans(own, np.maximum(before - 1, 0), np.minimum(before + 1, 2))
            logits = small.logits(small.on_device(texts.ids[owner, positions]), owner, positions, ends - 1)
        drawn.append(_draw(_biased(logits, sampling), seed, own, DRAFT, step[:many] + at, sampling)[:2])
    if at_once:
        streams, steps = torch.from_numpy(rows * KINDS + DRAFT), torch.from_numpy(step + 1)
        more = small.run(drawn[0][0], rows, length, streams, steps, most - 1, seed, sampling)
        texts.guess(rows, 0, *(torch.cat((x[None], y)) for x, y in zip(drawn[0], more)))
        return np.full_like(count, 1 + len(more[0]))
    for at, (tokens, logprobs) in enumerate(drawn):
        texts.guess(rows[: len(tokens)], at, tokens[None], logprobs[None])
    return count


def _settle(large: Sequences, small: Sequences, texts: Texts, rows: np.ndarray, count: np.ndarray, chances: Optional[np.ndarray],
            sampling: SamplingConfig, seed: int) -> np.ndarray:
    """How many of each row's guesses stay (R,); behind them a token of the large model's own is written, and the log-probs of all.

    A guess x stays with probability min(1, p(x) / q(x)); instead of the first that does not, one is drawn of max(0, p − q); after the
    last that does, one of p.
    """
    owner, positions, ends = spans(rows, texts.length[rows] - 1, count + 1)
    logits = _biased(large.logits(large.on_device(texts.ids[owner, positions]), owner, positions), sampling)
    guesses, first = texts.ids[owner, positions + 1], ends - count - 1  # behind each row's guesses there is something else
    each = np.arange(len(owner))
    within = each - first.repeat(count + 1)
    if chances is None:
        best = _draw(logits, seed, owner, FINAL, within, sampling)[0].cpu().numpy()
        fails, logprobs = best != guesses, np.zeros(len(owner), np.float32)
    else:
        p = _distributions(logits, sampling)
        logprobs, step = _taken(p, each, guesses), positions + 1 - texts.start[owner]
        fails = ~(chances[owner, step] < logprobs - texts.guessed[owner, positions + 1].astype(np.float64))
    fails[ends - 1] = True
    kept = np.minimum.reduceat(np.where(fails, within, len(owner)), first)
    own = first + kept
    if chances is None:
        new = best[own]
    else:
        left, refused = p.index_select(0, large.on_device(own)), np.flatnonzero(kept < count)
        if len(refused):
            _take_away(small, texts, rows[refused], positions[own[refused]], left, refused, sampling)
        new = _draw(left, seed, rows, FINAL, step[own])[0].cpu().numpy()
        logprobs[own] = _taken(p, own, new)
    texts.ids[rows, positions[own] + 1] = new
    texts.logprobs[owner, positions + 1] = logprobs
    return kept


def _take_away(small: Sequences, texts: Texts, rows: np.ndarray, positions: np.ndarray, p: Tensor, refused: np.ndarray, sampling: SamplingConfig):
    """Put log max(0, p − q) into p (R, V), at the rows ``refused``. The small model runs the tokens at ``positions`` again for q: at most
    once a pass, while to keep what it drew from would be to leave the native loop after every guess."""
    at = small.on_device(refused)
    logits = small.logits(small.on_device(texts.ids[rows, positions]), rows, positions)
    q, own = _distributions(_biased(logits, sampling), sampling), p[at]
    left = (own.double().exp() - q.double().exp()).clamp(min=0)
    # Where rounding alone has refused a guess, nothing is left, and p is as good.
    p[at] = torch.where(left.sum(-1, keepdim=True) > 0, left.log().float(), own)


def _taken(p: Tensor, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return p.take(torch.from_numpy(rows * p.shape[1] + columns).to(p.device)).cpu().numpy()


def _biased(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    for token, bias in sampling.logit_bias:
        logits[:, token] += bias
    return logits


def _distributions(logits: Tensor, s: SamplingConfig) -> Tensor:
    """(N, V): log-probs of what is drawn from, filters applied."""
    if s.temperature > 0 and (s.top_k, s.top_p, s.min_p) == (0, 1, 0):  # the same in fewer steps
        logits = logits if s.temperature == 1 else (logits - logits.amax(-1, keepdim=True)) / s.temperature
        return logits.log_softmax(-1)
    return filtered_logprobs(logits, s.temperature, s.top_k, s.top_p, s.min_p)[0]


def _draw(logits: Tensor, seed: int, requests: np.ndarray, kind: int, steps: np.ndarray, s: SamplingConfig = SamplingConfig()) -> tuple:
    """What ``ops.sample`` has of each row, by the numbers of that kind."""
    streams, steps = (torch.from_numpy(x).to(logits.device) for x in (requests * KINDS + kind, steps))
    return ops.sample(logits, seed, streams, steps, s.temperature, s.top_k, s.top_p, s.min_p)


def _check(model: Model, draft: Model, prompts, max_new_tokens: int, n: int, sampling: SamplingConfig, ahead: int) -> None:
    if model.config.vocab_size != draft.config.vocab_size:
        raise ValueError(f"speculate: the models have vocabularies of different sizes, {model.config.vocab_size} and {draft.config.vocab_size}")
    if min(max_new_tokens, n, ahead) < 1:
        raise ValueError(f"speculate: max_new_tokens, n and ahead must be at least 1, got {max_new_tokens}, {n} and {ahead}")
    if sampling.repetition_penalty != 1:
        raise ValueError("speculate: a repetition penalty hangs on tokens that are not settled yet")
    biased = max((i for i, _ in sampling.logit_bias), default=0)
    if biased >= model.config.vocab_size:
        raise ValueError(f"speculate: logit_bias names id {biased}; the models have {model.config.vocab_size}")
    context = min(model.config.context, draft.config.context)
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"speculate: prompt {i} has {len(prompt)} tokens; it needs 1 to {context - 1} for a context of {context}")
