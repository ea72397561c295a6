"""Speculative decoding: a small model proposes several tokens, the large one looks at all of them in one pass and keeps as many as it
would have drawn itself.

Exact in distribution, whatever the small model proposes. Sources: Leviathan et al. 2023, "Fast inference from Transformers via
speculative decoding", algorithm 1; Chen et al. 2023, "Accelerating large language model decoding with speculative sampling", §3.
"""

from dataclasses import dataclass
from typing import List, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..model import Model
from ..ops.sample import filtered_logprobs, uniforms
from .cache import PagedCache, Rows
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
    to take tokens back is to run others in their place."""

    def __init__(self, model: Model, count: int, tokens: int):
        pages = -(-tokens // PAGE)
        self.model, self.cache = model, PagedCache(model, count * pages, PAGE)
        self.tables = torch.arange(count * pages, dtype=torch.int32, device=model.device).view(count, pages)
        weight = model.head_weight.detach().to(model.compute_dtype)  # as the engine has it
        self.head = weight if ops.backend.is_deterministic() else weight.float()

    def start(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        """Run all of the prompts but their last tokens; sequences [i·n, (i + 1)·n) go on from prompt i."""
        first = self.tables[::n]
        rows = np.flatnonzero([len(p) > 1 for p in prompts])
        if len(rows):
            tokens, cu_seqlens = ragged([prompts[i][:-1] for i in rows], self.model.device)
            positions = ops.positions_from_cu_seqlens(cu_seqlens)
            owner = torch.as_tensor(rows, device=tokens.device).repeat_interleave(cu_seqlens.diff().long())
            self.cache.forward(self.model, tokens, positions, self._slots(first[owner], positions), cu_seqlens)
        used = -(-max((len(p) - 1 for p in prompts), default=0) // PAGE)
        for i in range(1, n):
            self.cache.copy(first[:, :used].flatten().long(), self.tables[i::n, :used].flatten().long())

    def _slots(self, tables: Tensor, positions: Tensor) -> Tensor:
        return tables.gather(1, (positions // PAGE)[:, None]).squeeze(1).long() * PAGE + positions % PAGE

    def logits(self, tokens: Sequence[Sequence[int]], rows: np.ndarray, start: np.ndarray) -> Tensor:
        """Run tokens of sequences ``rows``, each sequence's from position ``start`` on: logits (N, V) fp32 after each, end to end."""
        counts = np.array([len(t) for t in tokens])
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        device = self.model.device
        positions = torch.as_tensor(np.repeat(start, counts) + within, device=device)
        tables = self.tables[torch.as_tensor(np.repeat(rows, counts), device=device)]
        seen = Rows(tables[:, :int(positions.max()) // PAGE + 1].contiguous(), (positions + 1).int())
        flat, _ = ragged(tokens, device)
        return logits_of(self.cache.forward(self.model, flat, positions, self._slots(tables, positions), rows=seen), self.head)


@torch.no_grad()
@ops.weights_held()
def speculate(model: Model, draft: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, n: int = 1, stop: Sequence[int] = (),
              sampling: SamplingConfig = SamplingConfig(), seed: int = 0, ahead: int = 4) -> Speculation:
    """n continuations of each prompt, distributed as ``generate``'s with the same settings (at temperature 0: the same tokens).

    draft: proposes up to ``ahead`` tokens before ``model`` is run, and none beyond its own context; any model of the same vocabulary. What a request draws depends on
    (seed, its number, the step) and the models alone. Completions have the log-probs of ``model``, filtered as it was drawn from.

    Errors: ValueError for different vocabularies, a prompt that is empty or leaves no room in either context, a repetition penalty
    (which hangs on tokens that are not settled yet), a biased id that is none, and counts below 1.
    """
    _check(model, draft, prompts, max_new_tokens, n, sampling, ahead)
    context, reach = model.config.context, draft.config.context
    texts = [list(map(int, p)) for p in prompts for _ in range(n)]
    done = [Completion() for _ in texts]
    room = np.array([min(max_new_tokens, context - len(t)) for t in texts])
    longest = max((len(t) + r for t, r in zip(texts, room)), default=1)
    large, small = Sequences(model, len(texts), longest), Sequences(draft, len(texts), min(longest, reach))
    for sequences in (large, small):
        sequences.start(prompts, n)
    lag = np.ones(len(texts), np.int64)  # tokens at the end of each text that the draft has not run
    rows, proposed, accepted, passes = np.arange(len(texts)), 0, 0, 0
    while len(rows):
        length, step = np.array([len(texts[r]) for r in rows]), np.array([len(done[r].ids) for r in rows])
        count = np.minimum(ahead, np.minimum(room[rows] - step - 1, reach - length))  # the last token is the large model's own
        guesses, beliefs = _propose(small, texts, rows, lag[rows], count, sampling, seed, step)
        run = [[texts[r][-1], *g] for r, g in zip(rows, guesses)]
        truth = _distributions(large.logits(run, rows, length - 1), sampling).split([len(t) for t in run])
        passes += len(rows)
        for r, guess, q, p in zip(rows, guesses, beliefs, truth):
            new, logprobs = _settle(guess, q, p, seed, int(r), len(done[r].ids))
            proposed, accepted = proposed + len(guess), accepted + len(new) - 1
            lag[r] = 2 if len(new) > len(guess) > 0 else 1  # after a whole success the draft has not run its own last guess either
            _extend(done[r], texts[r], new, logprobs, stop)
        rows = rows[[not done[r].finished and len(done[r].ids) < room[r] for r in rows]]
    for c in done:
        c.finish_reason = "stop" if c.finished else "length"
    return Speculation(done, proposed, accepted, passes / max(len(done), 1))


def _propose(small: Sequences, texts: List[List[int]], rows: np.ndarray, lag: np.ndarray, count: np.ndarray, sampling: SamplingConfig,
             seed: int, step: np.ndarray) -> tuple[List[List[int]], List[List[Tensor]]]:
    """Up to count[i] tokens for each of the rows, drawn by the small model, and the distributions (V,) they were drawn from."""
    guesses: List[List[int]] = [[] for _ in rows]
    beliefs: List[List[Tensor]] = [[] for _ in rows]
    for at in range(int(count.max(initial=0))):
        own = np.flatnonzero(count > at)
        tokens = [[guesses[i][-1]] if at else texts[rows[i]][-lag[i]:] for i in own]
        start = np.array([len(texts[rows[i]]) + at - len(t) for i, t in zip(own, tokens)])
        ends = torch.as_tensor(np.cumsum([len(t) for t in tokens]) - 1, device=small.head.device)
        q = _distributions(small.logits(tokens, rows[own], start)[ends], sampling)
        drawn = _draw(q, seed, rows[own], DRAFT, step[own] + at)
        for i, token, belief in zip(own, drawn.tolist(), q):
            guesses[i].append(token)
            beliefs[i].append(belief)
    return guesses, beliefs


def _distributions(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """(N, V): log-probs of what is drawn from, bias and filters applied."""
    for token, bias in sampling.logit_bias:
        logits[:, token] += bias
    return filtered_logprobs(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)[0]


def _draw(logprobs: Tensor, seed: int, requests: np.ndarray, kind: int, steps: np.ndarray) -> Tensor:
    """A token of each row, by the numbers of that kind."""
    device = logprobs.device
    streams = torch.as_tensor(requests * KINDS + kind, dtype=torch.int64, device=device)
    return ops.sample(logprobs, seed, streams, torch.as_tensor(steps, dtype=torch.int64, device=device))[0]


def _settle(guess: List[int], q: List[Tensor], p: Tensor, seed: int, request: int, step: int) -> tuple[List[int], List[float]]:
    """The guesses that stay, and one token of the large model's own; with their log-probs under p (len(guess) + 1, V).

    A guess x stays with probability min(1, p(x) / q(x)); instead of the first that does not, one is drawn of max(0, p − q); after the
    last that does, one of p.
    """
    at = torch.arange(step, step + len(guess))
    chance = uniforms(seed, torch.full_like(at, request * KINDS + ACCEPT), at).tolist()
    kept = 0
    while kept < len(guess) and chance[kept] < float((p[kept, guess[kept]].double() - q[kept][guess[kept]].double()).exp()):
        kept += 1
    own = p[kept]
    if kept < len(guess):
        left = (own.double().exp() - q[kept].double().exp()).clamp(min=0)
        # Where rounding alone has refused a guess, nothing is left, and p is as good.
        own = left.log().float() if float(left.sum()) > 0 else own
    last = int(_draw(own[None], seed, np.array([request]), FINAL, np.array([step + kept])))
    new = [*guess[:kept], last]
    return new, p[torch.arange(len(new)), torch.tensor(new)].tolist()


def _extend(completion: Completion, text: List[int], new: List[int], logprobs: List[float], stop: Sequence[int]) -> None:
    """Append what is new, up to the first stop token."""
    for token, logprob in zip(new, logprobs):
        completion.ids.append(token)
        completion.logprobs.append(logprob)
        text.append(token)
        if token in stop:
            completion.finished = True
            return


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
