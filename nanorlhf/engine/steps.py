"""What a model computes for the engine: prompts, then token after token, with keys and values in a cache of pages.

There are three ways to the next tokens of a batch. Where the native step can run (ops.decode_step), it draws up to a window of them in one
call. On a GPU the steps of a window are replays of a graph (graph.py). Else, and for what neither can do, the model's layers run
op by op and a token is drawn by draw.py.
"""

from contextlib import AbstractContextManager
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..model import Model
from . import batch as columns
from .batch import Batch
from .cache import PagedCache, Rows, packed_decoder
from .draw import draw, logits_of
from .graph import Capture, CudaCapture, DecodeGraph, DecodeGraphs
from .prefill import Plan, Prefill


class Look(NamedTuple):
    """What K steps have drawn for R rows."""

    tokens: np.ndarray  # (K, R)
    marks: np.ndarray  # (M, K, R), as draw.draw has them
    top: Optional[tuple] = None  # of the first step
    nodes: Sequence[int] = ()  # where the rows' constraints have come to, if these went along


class Steps:
    """The passes of one model. ``cache`` is there once ``refresh`` was called, which has to be before any of them."""

    cache: PagedCache

    def __init__(self, model: Model, pages: int, page_size: int, graphs: Union[bool, Capture]):
        self.model, self._pool = model, (pages, page_size)
        capture = CudaCapture(model.device) if graphs is True and model.device.type == "cuda" else graphs
        self._graphs = None if isinstance(capture, bool) else DecodeGraphs(capture)
        self._places = [(m._parameters, name) for m in model.modules() for name, w in m._parameters.items() if w is not None]
        self._casts: dict = {}
        self._known: Optional[tuple] = None
        self._decoder = self._head = None

    def weights(self) -> List[Tensor]:
        """As they are now: a module may have been given another tensor."""
        return [held[name] for held, name in self._places]

    @property
    def version(self) -> int:
        return sum([w._version for w in self.weights()])

    @property
    def native(self) -> bool:
        """Whether tokens are drawn by the native step."""
        return self._decoder is not None

    def refresh(self) -> Optional[str]:
        """Take note of other weights: None if they are the same, else "changed", or "moved" where the cache is a new one."""
        addresses = tuple([(w.data_ptr(), w.dtype) for w in self.weights()])
        known, before = (self.version, self.model.compute_dtype, addresses, (ops.backend.is_deterministic(), ops.backend.forced())), self._known
        if known == before:
            return None
        moved = before is None or known[1:3] != before[1:3]
        if moved:
            self.cache = PagedCache(self.model, *self._pool)
        if before is None or known[1:] != before[1:]:
            self._decoder, self._head = packed_decoder(self.model), None
            self._casts.clear()
            if self._graphs is not None:
                self._graphs.clear()
        elif self._decoder is not None:
            self._decoder.pack()
        self._known = known
        if self._decoder is None:
            self._cast()
        return "moved" if moved else "changed"

    @torch.no_grad()
    def _cast(self) -> None:
        """Copies of weights in other types follow them, where they are: a graph has their addresses."""
        ops.recast(self._casts)
        weight, kept = self.model.head_weight.detach(), self._head
        head = weight.to(self.model.compute_dtype)
        head = head if ops.backend.is_deterministic() else head.float()
        if kept is None:
            self._head = head
        elif head.data_ptr() != weight.data_ptr():
            kept.copy_(head)

    def weights_held(self) -> AbstractContextManager:
        """Within it no weight may change."""
        return ops.weights_held(self._casts)

    def prefill(self, plans: List[Plan]) -> Tuple[Tensor, Optional[Tensor]]:
        """Run the plans' prompts: logits (R, V) of the last token for each of their requests, and its hidden state where that is at hand."""
        p = Prefill(plans, self._pool[1], lambda x: torch.from_numpy(x).to(self.model.device))
        found = self._forward(p.tokens, p.positions, p.slots, p.rows, p.cu_seqlens, p.last)
        if len(p.copies[0]):
            self.cache.copy(*p.copies)
        return found

    def draw(self, logits: Tensor, hidden: Optional[Tensor], batch: Batch, low: int) -> Tuple[Tensor, Tensor, Optional[tuple]]:
        """As draw.draw, whose tokens are the next ones to be read."""
        tokens, marks, top = draw(self.model, logits, hidden, batch, low)
        batch.token[low:batch.size] = tokens
        return tokens, marks, top

    def decode(self, batch: Batch, count: int, window: int, look: Callable[[Look], None]) -> None:
        """Up to so many tokens of every row of a composed batch, then ``look``, also at what was drawn before an error."""
        if self.native and not batch.flags & columns.STEPWISE:
            return look(self._run(batch, count))
        if self._graphs is not None and not (batch.flags & (columns.STEPWISE | columns.CONSTRAINED) or ops.backend.is_deterministic()):
            graph = self._graphs.find(self.model, self._forward, batch, count, window)
            if graph is not None:
                return self._replay(graph, batch, count, look)
        drawn: list = []
        try:
            for _ in range(count):
                drawn.append(self._next(batch))
        finally:
            if drawn:
                tokens, marks, tops = zip(*drawn)
                look(Look(torch.stack(tokens).cpu().numpy(), torch.stack(marks, 1).cpu().numpy(), tops[0]))

    def _forward(self, tokens: Tensor, positions: Tensor, slots: Tensor, rows: Optional[Rows], cu_seqlens: Optional[Tensor] = None,
                 last: Optional[Tensor] = None) -> Tuple[Tensor, Optional[Tensor]]:
        """PagedCache.forward for all tokens, or for ``last`` (R,): logits (R, V), and the hidden states (R, C) where they are at hand."""
        if self._decoder is not None:
            return self.cache.logits(self._decoder, tokens, positions, slots, rows, cu_seqlens, last), None
        hidden = self.cache.forward(self.model, tokens, positions, slots, cu_seqlens, rows)
        hidden = hidden if last is None else hidden[last]
        return logits_of(hidden, self._head), hidden

    def _run(self, batch: Batch, count: int) -> Look:
        """Natively."""
        (sampler, streams), (positions, rows), ints = batch.sampler_from(0), batch.next(), batch.ints[:, :batch.size]
        drawn, marks, nodes = self.cache.run(
            self._decoder, batch.token[:batch.size], positions, rows, streams, batch.on_device(ints[columns.STEP] + 1), count,
            batch.on_device(batch.stop_bits), batch.on_device(ints[columns.STOPS].copy()), seed=sampler.seed,
            constraints=batch.cursors(), **sampler.settings)  # fmt: skip
        batch.token[:batch.size] = drawn[-1]
        batch.advance(len(drawn))
        return Look(drawn.numpy(), marks.numpy(), nodes=nodes)

    def _replay(self, graph: DecodeGraph, batch: Batch, count: int, look: Callable[[Look], None]) -> None:
        """By a graph."""
        done = 0
        graph.load(batch)
        try:
            for done in range(1, count + 1):
                graph.replay()
        except BaseException:  # the last step never was
            done -= 1
            raise
        finally:
            if done:
                batch.advance(done)
                batch.token[:batch.size] = graph.token[:batch.size]
                look(Look(*graph.drawn(batch.size, done)))

    def _next(self, batch: Batch) -> Tuple[Tensor, Tensor, Optional[tuple]]:
        """By the model's layers: every row's next token, as ``draw`` has it."""
        (positions, rows), slots = batch.next(), batch.next_slots()
        batch.advance(1)
        try:
            return self.draw(*self._forward(batch.token[:batch.size], positions, slots, rows), batch, 0)
        except BaseException:  # the step never was
            batch.advance(-1)
            raise
