"""What changes a row's logits before a token is drawn from them. The sampler's own filters are in ops.sample; these depend on
what a request has said so far, or are its own table, and touch few of a row's logits: their cost is that of the tokens
that they touch."""

import math
from typing import Optional, Protocol, Sequence

import numpy as np
import torch
from torch import Tensor


MOST_PENALTY, MOST_BIAS = 1e6, 1e30  # so that together they leave a logit finite in fp32


class LogitFilter(Protocol):
    """Changes, in place, the logits of those rows of a batch that ask for it."""

    rows: Tensor  # int64, those rows, in rising order

    def apply(self, logits: Tensor) -> None:
        """logits: (B, V) floating point, changed in place."""

    def undo(self, logits: Tensor) -> None:
        """Puts back what the last ``apply`` has changed: the same bits."""

    def see(self, tokens: Tensor) -> None:
        """tokens: (B,) int64, what the rows have drawn."""


class LogitBias:
    """Adds numbers to logits: what a row adds to which is its own.

    biases: (B,) of (id, number) pairs, ids distinct within a row. Raises ValueError for an id outside the vocabulary.

    >>> logits = torch.zeros(2, 3)
    >>> LogitBias([[(2, 1.5)], []], vocab_size=3).apply(logits)
    >>> logits.tolist()
    [[0.0, 0.0, 1.5], [0.0, 0.0, 0.0]]
    """

    def __init__(self, biases: Sequence[Sequence[tuple[int, float]]], vocab_size: int, device: torch.device | str = "cpu"):
        flat = [(row, token, bias) for row, pairs in enumerate(biases) for token, bias in pairs]
        for _, token, _ in flat:
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias: expected ids in [0, V = {vocab_size}), got {token}")
        rows, tokens, numbers = (list(column) for column in zip(*flat)) if flat else ([], [], [])
        self.rows = torch.tensor(sorted(set(rows)), dtype=torch.int64, device=device)
        self._at = tuple(torch.tensor(x, dtype=torch.int64, device=device) for x in (rows, tokens))
        self._bias = torch.tensor(numbers, dtype=torch.float64, device=device)

    def apply(self, logits: Tensor) -> None:
        self._before = logits[self._at]
        logits[self._at] = self._before + self._bias.to(logits.dtype)

    def undo(self, logits: Tensor) -> None:
        logits[self._at] = self._before

    def see(self, tokens: Tensor) -> None:
        """What is drawn changes no bias."""


class RepetitionPenalty:
    """Divides by a row's penalty those of its positive logits whose ids it has seen, and multiplies the negative ones.

    penalties: (B,), 1 for rows that have none. seen: (B,) of the ids of prompt and output so far, in any order and number;
    read only where there is a penalty. Raises ValueError for an id outside the vocabulary.
    Source: Keskar et al. 2019 (CTRL), §4.1, where negative logits are divided too; as Hugging Face has it.

    >>> logits, penalty = torch.tensor([[2.0, -2.0, 1.0]]), RepetitionPenalty([2.0], [[0, 1, 1]], vocab_size=3)
    >>> penalty.apply(logits); logits.tolist()
    [[1.0, -4.0, 1.0]]
    """

    def __init__(self, penalties: Sequence[float], seen: Sequence[Sequence[int]], vocab_size: int,
                 device: torch.device | str = "cpu"):
        rows = [row for row, penalty in enumerate(penalties) if penalty != 1]
        ids = [np.unique(np.asarray(seen[row], dtype=np.int64)) for row in rows]
        for each in ids:
            if len(each) and not 0 <= each[0] <= each[-1] < vocab_size:
                wrong = each[0] if each[0] < 0 else each[-1]
                raise ValueError(f"repetition_penalty: expected ids in [0, V = {vocab_size}), got {wrong}")
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self._penalty = torch.tensor([penalties[row] for row in rows], dtype=torch.float64, device=device)
        owners = np.repeat(np.arange(len(rows)), np.array([len(each) for each in ids], dtype=np.int64))
        self._count = len(owners)
        # Which of ``rows`` has seen which id, in the first ``_count`` columns; there is room for more.
        self._seen = torch.empty(2, 2 * self._count + 16 * len(rows), dtype=torch.int64, device=device)
        self._seen[:, :self._count] = torch.from_numpy(np.stack([owners, np.concatenate([*ids, owners[:0]])])).to(device)

    def apply(self, logits: Tensor) -> None:
        # An id that is there twice is written twice, and the same: all are read first.
        owners, ids = self._seen[:, :self._count]
        penalty, self._at = self._penalty.to(logits.dtype)[owners], (self.rows[owners], ids)
        self._before = logits[self._at]
        logits[self._at] = torch.where(self._before < 0, self._before * penalty, self._before / penalty)

    def undo(self, logits: Tensor) -> None:
        logits[self._at] = self._before

    def see(self, tokens: Tensor) -> None:
        first, self._count = self._count, self._count + len(self.rows)
        if self._count > self._seen.shape[1]:
            self._seen = torch.cat([self._seen, torch.empty_like(self._seen)], 1)
        self._seen[0, first:self._count] = torch.arange(len(self.rows), device=tokens.device)
        self._seen[1, first:self._count] = tokens[self.rows]


def check_filters(repetition_penalty: float, logit_bias: Sequence[tuple[int, float]]) -> None:
    """ValueError, in one sentence, for a setting out of range."""
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty: expected a finite number above 0, got {repetition_penalty}")
    if not 1 / MOST_PENALTY <= repetition_penalty <= MOST_PENALTY:
        raise ValueError(f"repetition_penalty: expected a number from {1 / MOST_PENALTY:g} to {MOST_PENALTY:g}, got {repetition_penalty}")
    ids = set()
    for token, bias in logit_bias:
        if token < 0 or token in ids:
            raise ValueError(f"logit_bias: expected ids of 0 or more, each once, got {token}" + " again" * (token in ids))
        if not bias < math.inf:
            raise ValueError(f"logit_bias: expected numbers below inf, got {bias} for id {token}")
        if abs(bias) > MOST_BIAS and bias != -math.inf:
            raise ValueError(f"logit_bias: expected -inf or a number from {-MOST_BIAS:g} to {MOST_BIAS:g}, got {bias} for id {token}")
        ids.add(token)


def filters_of(penalties: Sequence[float], biases: Sequence[Sequence[tuple[int, float]]], seen: Optional[Sequence[Sequence[int]]],
               vocab_size: int, device: torch.device | str = "cpu") -> list[LogitFilter]:
    """The filters that some row asks for, in the order in which they are to be applied, Hugging Face's: bias, then penalty."""
    filters: list[LogitFilter] = []
    if any(biases):
        filters.append(LogitBias(biases, vocab_size, device))
    if any(penalty != 1 for penalty in penalties):
        if seen is None:
            raise ValueError("repetition_penalty: expected the ids that each row has seen")
        filters.append(RepetitionPenalty(penalties, seen, vocab_size, device))
    return filters
