"""The requests that are being decoded, as rows of arrays, so that a step costs a few array operations whatever their number."""

from typing import Dict, FrozenSet, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from .cache import Rows
from .request import Handle
from .sample import Sampler

# Rows of ``ints``. The first three are of the row's last token in the cache and of the last one drawn; a step adds 1 to each.
POSITION, LENGTH, STEP, ROOM, RECORD, USED, STOPS, FLAGS, STREAM = range(9)
CONSTRAINED, ENTROPY, TOP, ATTENDED, FILTERED, FOREIGN = (1 << i for i in range(6))  # bits of FLAGS; FOREIGN: a constraint that does not walk
STEPWISE = ENTROPY | TOP | FILTERED | FOREIGN  # rows of these are not run natively
SPARE = 4  # columns of page tables that are kept free, so that they are rarely made anew


class Batch:
    """Row r of every array is ``handles[r]``; the youngest is the last. ids and marks keep what was drawn, at the row's RECORD, which
    it keeps for as long as it is here; token (slots,) is the last one of each row, on the model's device."""

    def __init__(self, slots: int, context: int, vocab_size: int, pages: int, page_size: int, device: torch.device):
        self.slots, self.vocab_size, self.page_count, self.page_size, self.device = slots, vocab_size, pages, page_size, device
        self.handles: List[Handle] = []
        self.ints = np.zeros((9, slots), np.int64)
        self.table = np.zeros((slots, -(-context // page_size)), np.int32)
        self.ids, self.marks = np.empty((slots, context), np.int64), np.empty((4, slots, context), np.float32)
        self.token = torch.zeros(slots, dtype=torch.int64, device=device)
        self._free = list(range(slots))[::-1]
        self._stops: Dict[FrozenSet[int], int] = {}
        self.stop_bits = np.zeros((0, vocab_size), bool)
        self.attended: List[int] = []  # rows of ATTENDED and CONSTRAINED
        self.changed, self._sampler = True, None

    @property
    def size(self) -> int:
        return len(self.handles)

    def on_device(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.device)

    def join(self, handle: Handle, pages: np.ndarray, length: int) -> None:
        """A row whose ``length`` tokens are in these pages; its next token is about to be drawn."""
        r, request, record, drawn = self.size, handle.request, self._free.pop(), len(handle.drawn)
        flags = (CONSTRAINED * (request.constraint is not None) | ENTROPY * request.entropy | TOP * (request.top_logprobs > 0)
                 | ATTENDED * handle.attended | FILTERED * (request.sampling.repetition_penalty != 1 or bool(request.sampling.logit_bias))
                 | FOREIGN * (request.constraint is not None and not handle.walks))
        self.ints[:, r] = (length - 1, 0, drawn, handle.room, record, len(pages), self._stop_index(frozenset(request.stop)), flags,
                           (request.stream + (1 << 63)) % (1 << 64) - (1 << 63))
        self.table[r, :len(pages)] = pages
        if drawn:
            self.ids[record, :drawn], self.marks[:, record, :drawn] = handle.drawn, handle.marks
        self.handles.append(handle)
        self.changed, self._sampler = True, None

    def _stop_index(self, stop: FrozenSet[int]) -> int:
        if not self.handles and len(self._stops) > 64:
            self._stops, self.stop_bits = {}, self.stop_bits[:0]
        if stop not in self._stops:
            bits = np.zeros((1, self.vocab_size), bool)
            bits[0, [i for i in stop if 0 <= i < self.vocab_size]] = True
            self._stops[stop], self.stop_bits = len(self._stops), np.concatenate((self.stop_bits, bits))
        return self._stops[stop]

    def drawn(self, row: int, count: int) -> Tuple[np.ndarray, np.ndarray]:
        """The row's first ``count`` tokens, and (4, count) what is known of them."""
        record = self.ints[RECORD, row]
        return self.ids[record, :count].copy(), self.marks[:, record, :count].copy()

    def pages(self, row: int) -> np.ndarray:
        return self.table[row, :self.ints[USED, row]]

    def keep(self, rows: np.ndarray) -> None:
        """Only these rows, in order, go on."""
        gone = np.ones(self.size, bool)
        gone[rows] = False
        self._free += self.ints[RECORD, :self.size][gone].tolist()
        self.handles = [self.handles[r] for r in rows]
        self.ints[:, :len(rows)] = self.ints[:, rows]
        self.table[:len(rows)] = self.table[rows]
        self.token[:len(rows)] = self.token[self.on_device(rows)]
        self.changed, self._sampler = True, None

    def ahead(self, limit: int, native: bool) -> int:
        """How many tokens, up to ``limit``, every row may draw before anybody has to look at one; native: whether they can be run natively,
        as far as that is not theirs to say."""
        ints = self.ints[:, :self.size]
        flags = np.bitwise_or.reduce(ints[FLAGS])
        if limit < 2 or flags & ATTENDED or flags & CONSTRAINED and not (native and not flags & STEPWISE):
            return 1
        return max(1, min(limit, int((ints[ROOM] - ints[STEP]).min()) - 1))

    def lacking(self, count: int) -> np.ndarray:
        """The rows, in order and as often as that, which need a page more for so many more tokens."""
        ints = self.ints[:, :self.size]
        return np.repeat(np.arange(self.size), np.maximum((ints[POSITION] + count) // self.page_size + 1 - ints[USED], 0))

    def add_pages(self, rows: np.ndarray, pages: np.ndarray) -> None:
        """One more page for each of these rows, in order; a row may be there several times."""
        used = self.ints[USED, rows] + np.arange(len(rows)) - np.searchsorted(rows, rows)
        self.table[rows, used] = pages
        np.add.at(self.ints[USED], rows, 1)
        if not self.changed:
            column = used - self.depth[rows]
            if column.max() < self.own.shape[1]:
                self.own[rows, column] = pages
                self.own_pages = self.on_device(self.own)
            else:
                self.changed = True

    def compose(self) -> None:
        """What holds as long as the rows are the same: shared prefixes, and page tables."""
        if not self.changed:
            return
        B, table = self.size, self.table[:self.size]
        ints = self.ints[:, :B]
        self.depth, owner, leaders = shared_prefixes(table[:, :ints[USED].max()], (ints[POSITION] + 1) // self.page_size, self.page_count)
        ints[LENGTH] = ints[POSITION] + 1 - self.depth * self.page_size
        width = min((ints[USED] - self.depth).max() + SPARE, table.shape[1])
        column = np.minimum(self.depth[:, None] + np.arange(width), table.shape[1] - 1)
        self.own = np.take_along_axis(table, column, 1)
        self.own_pages, self.prefix = self.on_device(self.own), None
        if len(leaders):
            depth = self.depth[leaders].astype(np.int32)
            self.prefix = tuple(self.on_device(x) for x in (table[leaders, :depth.max()].copy(), depth * self.page_size, owner))
        self.flags = int(np.bitwise_or.reduce(ints[FLAGS]))
        self.attended = np.flatnonzero(ints[FLAGS] & (ATTENDED | CONSTRAINED)).tolist()
        self.changed = False

    def next(self) -> Tuple[Tensor, Rows]:
        """Of every row's next token in the cache: positions (B,), and where its keys are."""
        ints = self.ints[:, :self.size]
        return self.on_device(ints[POSITION] + 1), Rows(self.own_pages, self.on_device((ints[LENGTH] + 1).astype(np.int32)), self.prefix)

    def next_slots(self) -> Tensor:
        """(B,) int64: where its key and value go."""
        page, offset = np.divmod(self.ints[POSITION, :self.size] + 1, self.page_size)
        return self.on_device(self.table[np.arange(self.size), page].astype(np.int64) * self.page_size + offset)

    def advance(self, count: int) -> None:
        """Every row has drawn so many tokens, and all but the last are in the cache."""
        self.ints[:STEP + 1, :self.size] += count

    def sampler_from(self, low: int) -> Tuple[Sampler, Tensor]:
        """What draws for the rows from ``low`` on, whose STEP is of the token about to be drawn, and their streams (R,)."""
        if low == 0 and self._sampler is not None:
            return self._sampler
        requests, steps, seen = [h.request for h in self.handles[low:]], self.ints[STEP, low:self.size].tolist(), None
        configs, seeds = [r.sampling for r in requests], [r.seed for r in requests]
        if any(c.repetition_penalty != 1 for c in configs):
            seen = [np.concatenate((h.prompt, self.drawn(low + i, steps[i])[0])) for i, h in enumerate(self.handles[low:])]
        elif not configs[0].logit_bias and all(c is configs[0] for c in configs):
            configs = configs[:1]  # its settings are numbers, for however many rows
        sampler = Sampler(configs, seeds[0] if len(set(seeds)) == 1 else seeds, self.vocab_size, seen, self.device)
        made = sampler, self.on_device(self.ints[STREAM, low:self.size].copy())
        if low == 0:
            self._sampler = made
        return made

    def cursors(self) -> Optional[list]:
        """Of the rows' constraints, for ops.decode_run; None where there is none."""
        if not self.flags & CONSTRAINED:
            return None
        return [h.cursor() for h in self.handles]

    def mask(self, low: int) -> Optional[Tensor]:
        """(R, ceil(V / 32)) int32 of the constraints of the rows from ``low`` on; None where there is none."""
        rows = np.flatnonzero(self.ints[FLAGS, low:self.size] & CONSTRAINED)
        if not len(rows):
            return None
        mask = np.full((self.size - low, -(-self.vocab_size // 32)), -1, np.int32)
        for r in rows:
            mask[r] = self.handles[low + r].mask
        return self.on_device(mask)


def shared_prefixes(table: np.ndarray, full: np.ndarray, pages: int) -> Tuple[np.ndarray, np.ndarray, Sequence[int]]:
    """Which rows are to be attended with which leading pages, each row with those that save the most reads: its first d pages
    shared by n rows save d · (1 − 1/n). table: (B, W), of which row b has ``full[b]`` full pages, which others may have too.

    Returns depth (B,), how many pages it shares; owner (B,) int32, its group or −1; and a row of each group.

    >>> depth, owner, leaders = shared_prefixes(np.array([[4, 5, 1], [4, 5, 2], [4, 3, 0]]), np.array([2, 2, 2]), 6)
    >>> depth.tolist(), owner.tolist(), leaders.tolist()
    ([2, 2, 0], [0, 0, -1], [0])
    """
    B, W = table.shape
    alone = np.zeros(B, np.int64), np.full(B, -1, np.int32), np.zeros(0, np.int64)
    if B < 2 or not full.any():
        return alone
    whole = np.arange(W) < full[:, None]
    count = np.where(whole, np.bincount(table[whole], minlength=pages)[table], 1)
    if count.max() < 2:
        return alone
    saved = np.arange(1, W + 1) * (1 - 1 / np.maximum(count, 1))
    best = saved.argmax(1)
    key = np.where(saved[np.arange(B), best] > 0, table[np.arange(B), best], -1)
    page, leader, group, members = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    shared = (members > 1) & (page >= 0)
    owner = np.where(shared[group], (np.cumsum(shared) - 1)[group], -1).astype(np.int32)
    return np.where(owner >= 0, best + 1, 0), owner, leader[shared]
