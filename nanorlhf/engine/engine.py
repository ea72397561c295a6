"""Continuous batching over a paged cache: requests wait, are decoded together, and leave one by one.

What a request draws depends on (seed, stream, step) and the model alone, so neither its company, nor waiting, nor being put off and
recomputed changes it: to the bit while ops.backend.deterministic is on. Else sums over a prefix that rows share, and over tokens that are
recomputed, have another order, and a draw may be decided by the last bit. Sources: Orca, Yu et al., OSDI 2022 (iteration-level scheduling); vLLM, arXiv 2309.06180 §4.5 (preemption by
recomputation).
"""

import math
from collections import deque
from typing import Deque, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from ..model import Model
from ..tokenizer import Tokenizer
from . import batch as columns
from .batch import Batch
from .graph import Capture
from .pages import PagePool, PrefixTree
from .prefill import Plan, plan_next
from .request import Completion, Handle, Request
from .steps import Look, Steps
from .stops import TextStream

WINDOW = 16  # steps between looks at what was drawn, where no request has to be looked at sooner
POOL_BYTES = 1 << 31  # of a cache whose size is not asked for
PREFILL_TOKENS = 4096  # prompts are run together up to about this many tokens


class Engine:
    """Decodes the requests that are submitted, up to ``slots`` at a time, with keys and values in ``pool_tokens`` of cache.

    The weights are the model's own: after an optimiser's step or ``load_state_dict`` the next step uses the new ones, and everything
    that was cached under the old ones is forgotten (requests under way are recomputed). Only in-place changes through ``.data``
    go unseen, and modules that were added later. ``window``: steps between looks at what was drawn, where no request has to be looked at
    sooner; on a GPU these are replays of one graph (graph.py).
    """

    def __init__(self, model: Model, tokenizer: Optional[Tokenizer] = None, slots: int = 64, pool_tokens: Optional[int] = None,
                 page_size: int = 16, keep: bool = True, graphs: Union[bool, Capture] = True):
        """pool_tokens: 8 contexts, as far as POOL_BYTES go, unless given. keep: whether prompts and continuations stay for later requests
        to go on from. graphs: whether steps on a GPU are captured as CUDA graphs, of plain sampling alone; or what captures them."""
        self.model, self.tokenizer, self.keep = model, tokenizer, keep
        c = model.config
        if pool_tokens is None:
            pool_tokens = min(8 * c.context, POOL_BYTES // (2 * c.layers * c.kv_heads * c.head_size * model.compute_dtype.itemsize))
        pages = -(-pool_tokens // page_size)
        if slots < 1 or pages < 1 or page_size < 1:
            raise ValueError(f"engine: slots, pool_tokens and page_size must be at least 1, got {slots}, {pool_tokens} and {page_size}")
        self.pool = PagePool(pages, page_size)
        self.steps = Steps(model, pages + 1, page_size, graphs)  # one page more than anybody can hold: that of a graph's pads
        self.tree = PrefixTree(self.pool)
        self.waiting: Deque[Handle] = deque()
        self.batch = self._new_batch(slots)
        self.window = WINDOW
        self._crowded = False  # the pool was too small for all: nobody joins until somebody leaves
        self._stepping, self._cancelled = False, []  # what callbacks cancel leaves after all rows were looked at
        self._called = False  # whether a callback, which may change the weights, was called since they were looked at

    def _new_batch(self, slots: int) -> Batch:
        c = self.model.config
        return Batch(slots, c.context, c.vocab_size, self.pool.count, self.pool.size, self.model.device)

    @property
    def version(self) -> int:
        """How often the weights have been changed, as far as torch counts: the sum of their version counters."""
        return self.steps.version

    def submit(self, request: Request) -> Handle:
        """Errors: ValueError for a prompt that is empty or leaves no room in the context, ids that the model does not have, a request
        that the pool cannot hold, and text or a constraint that does not go with the tokenizer or model."""
        prompt = np.array(request.prompt)
        context, length, vocab_size = self.model.config.context, len(request.prompt), self.model.config.vocab_size
        if not 0 < length < context:
            raise ValueError(f"engine: the prompt has {length} tokens; it needs 1 to {context - 1} for a context of {context}")
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu" or not 0 <= prompt.min() <= prompt.max() < vocab_size:
            raise ValueError(f"engine: a prompt is a list of ids from 0 to {vocab_size - 1}, got {prompt.tolist()[:8]}")
        room = min(request.max_new_tokens, context - length)
        pages = -(-(length + room - 1) // self.pool.size)
        if pages > self.pool.count:
            raise ValueError(f"engine: a prompt of {length} tokens and {room} new ones need {pages} pages of {self.pool.size} tokens; the "
                             f"pool has {self.pool.count}")
        text = request.stop_text or request.on_text is not None
        if text and self.tokenizer is None:
            raise ValueError("engine: stop_text and on_text need an engine with a tokenizer")
        if request.constraint is not None and request.constraint.vocab_size != vocab_size:
            raise ValueError(f"engine: a constraint over {request.constraint.vocab_size} tokens does not fit a model of {vocab_size}")
        biased = max((i for i, _ in request.sampling.logit_bias), default=0)
        if biased >= vocab_size:
            raise ValueError(f"engine: logit_bias names id {biased}; the model has {vocab_size}")
        if sum(bias == -math.inf for _, bias in request.sampling.logit_bias) == vocab_size:
            raise ValueError("engine: logit_bias bans every token")
        handle = Handle(request, room, TextStream(self.tokenizer, request.stop_text) if text else None)
        self.waiting.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request with what it has; nothing happens to one that has ended. What a callback cancels has ended before the next token."""
        if handle in self.waiting:
            self.waiting.remove(handle)
            self._complete(handle, handle.drawn, handle.marks, "cancelled")
        elif self._stepping:
            self._cancelled.append(handle)
        elif handle in self.batch.handles:
            row = self.batch.handles.index(handle)
            self._leave([row], [int(self.batch.ints[columns.STEP, row]) + 1], ["cancelled"])

    def run(self, requests: Sequence[Request]) -> List[Completion]:
        """Submit these and decode until they have ended. Errors: also what a callback or a constraint raised."""
        self._expect_no_step()
        handles: List[Handle] = []
        try:
            for request in requests:
                handles.append(self.submit(request))
            ahead = deque(handles)
            self._called = True  # look at the weights, which nobody changes in between but a callback
            while ahead:
                if ahead[0].completion is not None:
                    ahead.popleft()
                    continue
                if self._called:
                    self._refresh()
                self._step()
            return [h.result() for h in handles]
        finally:
            for handle in handles:
                if handle.completion is None:
                    self.cancel(handle)

    @torch.no_grad()
    def step(self) -> bool:
        """Let requests join, and decode a token of each, or up to ``window`` where nobody has to look at them. Returns whether any is left.
        Errors: ValueError from within a callback, which may submit and cancel."""
        self._expect_no_step()
        self._refresh()
        self._step()
        return bool(self.waiting or self.batch.size)

    def _expect_no_step(self) -> None:
        if self._stepping:
            raise ValueError("engine: a callback may submit and cancel requests, not decode")

    @torch.no_grad()
    def _step(self) -> None:
        self._stepping = True
        try:
            with self.steps.weights_held():
                self._admit()
                self._decode()
        finally:
            self._stepping = False

    def _refresh(self) -> None:
        """Forget what was computed under other weights."""
        self._called = False
        change = self.steps.refresh()
        if change is None:
            return
        for row in range(self.batch.size)[::-1]:
            self._put_off(row)
        self.tree.clear()
        self._crowded = False
        if change == "moved":
            self.batch = self._new_batch(self.batch.slots)

    def _take(self, count: int) -> Optional[np.ndarray]:
        if count > self.pool.free:
            self.tree.evict(count - self.pool.free)
        return self.pool.take(count)

    def _admit(self) -> None:
        while self.waiting and self.batch.size < self.batch.slots and not (self._crowded and self.batch.size):
            plans = plan_next(self.waiting, self.batch.slots - self.batch.size, PREFILL_TOKENS, self.pool, self.tree, self._take, self.keep)
            if not plans:
                self._crowded = True
                return
            low = self.batch.size
            try:
                logits, hidden = self.steps.prefill(plans)
                for plan in plans:
                    for handle, pages in zip(plan.handles, plan.tables):
                        self.batch.join(handle, pages, len(plan.context))
                self.batch.compose()
                tokens, marks, top = self.steps.draw(logits, hidden, self.batch, low)
            except BaseException:
                self._undo(plans, low)
                raise
            self._harvest(Look(tokens.cpu().numpy()[None], marks.cpu().numpy()[:, None], top), low)
            if self._called:
                self._refresh()

    def _undo(self, plans: List[Plan], low: int) -> None:
        """A pass that failed: its requests wait again, and nobody finds the pages that it may not have filled."""
        self.batch.keep(np.arange(low))
        self.tree.clear()
        for handle, pages in [pair for plan in plans for pair in zip(plan.handles, plan.tables)][::-1]:
            self.pool.release(pages)
            self.waiting.appendleft(handle)

    def _decode(self) -> None:
        batch = self.batch
        count = self._grow(batch.ahead(self.window, self.steps.native)) if batch.size else 0
        if count:
            batch.compose()
            self.steps.decode(batch, count, self.window, self._harvest)

    def _grow(self, count: int) -> int:
        """Pages for so many tokens more of every row or, where the pool has not as many, for one; while it has not even these, the
        youngest row is put off. Returns for how many there are; 0 where no row is left."""
        while self.batch.size:
            for wanted in dict.fromkeys((count, 1)):
                rows = self.batch.lacking(wanted)
                pages = self._take(len(rows)) if len(rows) else rows
                if pages is not None:
                    if len(rows):
                        self.batch.add_pages(rows, pages)
                    return wanted
            self._put_off(self.batch.size - 1)
            self._crowded = True
        return 0

    def _put_off(self, row: int) -> None:
        """The last row goes back to the head of the queue with what it has drawn, and will be recomputed."""
        handle, count = self.batch.handles[row], int(self.batch.ints[columns.STEP, row]) + 1
        drawn, marks = self.batch.drawn(row, count)
        self._give_up_pages(row, count)
        handle.drawn, handle.marks = drawn, marks
        self.batch.keep(np.arange(row))
        self.waiting.appendleft(handle)

    def _give_up_pages(self, row: int, count: int) -> None:
        """Leave a row's full pages to the tree; the last of its ``count`` tokens has no key yet."""
        batch, handle = self.batch, self.batch.handles[row]
        pages = batch.pages(row)
        if self.keep:
            ids = np.concatenate((handle.prompt, batch.ids[batch.ints[columns.RECORD, row], :count - 1]))
            own = self.tree.insert(ids, pages)
            pages = np.concatenate((np.asarray(own, np.int32), pages[len(own):]))
        self.pool.release(pages)

    def _harvest(self, look: Look, low: int = 0) -> None:
        """Look at what was drawn for the rows from ``low`` on."""
        tokens, marks, top, nodes = look
        batch = self.batch
        ints = batch.ints[:, low:batch.size]
        steps = ints[columns.STEP] + np.arange(1 - len(tokens), 1)[:, None]  # (K, R)
        batch.ids[ints[columns.RECORD], steps] = tokens
        batch.marks[:len(marks), ints[columns.RECORD], steps] = marks
        if tokens.min() < 0:  # of which the books are right, so that nobody finds a page by what an earlier request has drawn
            raise ValueError("engine: the model's logits are no distribution")
        stopped = batch.stop_bits[ints[columns.STOPS], tokens]
        ended = stopped | (steps + 1 >= ints[columns.ROOM])
        for row in batch.attended:
            if row >= low and self._attend(row, row - low, tokens[:, row - low].tolist(), bool(ended[:, row - low].any()), top, nodes):
                stopped[-1, row - low] = ended[-1, row - low] = True
        if ended.any():
            rows = ended.any(0).nonzero()[0]
            first = ended[:, rows].argmax(0)
            self._leave((low + rows).tolist(), (steps[first, rows] + 1).tolist(),
                        ["error" if batch.handles[low + r].error else "stop" if s else "length" for r, s in zip(rows, stopped[first, rows])])
        while self._cancelled:
            handle = self._cancelled.pop()
            if handle in batch.handles:
                row = batch.handles.index(handle)
                self._leave([row], [int(batch.ints[columns.STEP, row]) + 1], ["cancelled"])

    def _attend(self, row: int, place: int, tokens: List[int], ended: bool, top, nodes: Sequence[int]) -> bool:
        """What has to happen for this row's request before its next token, which has just drawn these (one of them, unless all that is to
        be looked at is its constraint); place: of the row in ``top``. Returns whether that ends it. An error ends it alone."""
        handle = self.batch.handles[row]
        request, stop = handle.request, False
        self._called |= request.on_token is not None or request.on_text is not None
        try:
            if request.top_logprobs:
                ids, values = (x[place, :request.top_logprobs].tolist() for x in top)
                handle.top.append(list(zip(ids, values)))
            if request.on_token is not None:
                request.on_token(tokens[0])
            if handle.text is not None:
                piece, stop = handle.text.push(tokens[0])
                handle.say(piece)
            if request.constraint is not None and not (ended or stop):
                handle.moved(nodes[row], tokens) if nodes else handle.advance(tokens[0])
        except BaseException as error:
            handle.error, stop = error, True
        return stop

    def _leave(self, rows: List[int], counts: List[int], reasons: List[str]) -> None:
        """End these rows, with so many tokens each."""
        ended = []
        for row, count, reason in zip(rows, counts, reasons):
            ended.append((self.batch.handles[row], *self.batch.drawn(row, count), reason))
            self._give_up_pages(row, count)
        self.batch.keep(np.setdiff1d(np.arange(self.batch.size), rows))
        self._crowded = False
        for each in ended:  # their callbacks find the books in order
            self._complete(*each)

    def _complete(self, handle: Handle, ids: np.ndarray, marks: Optional[np.ndarray], reason: str) -> None:
        try:
            handle.complete(ids, marks, reason, self.tokenizer)
        except BaseException as error:
            handle.error = error
