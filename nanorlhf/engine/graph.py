"""A step of decoding as a CUDA graph: one launch in place of some hundred, and a window of steps without a word from the host.

A graph repeats kernels with the addresses and the numbers that they were called with. So all that changes from step to step lies in
tensors that stay where they are, and a step moves them on itself: its tokens are the next one's input, positions and lengths go
up by one, and the slot of the next key is looked up in the page table. Numbers that the host gives to kernels are bounds which hold as
long as the graph does: rows, the width of the page tables (from which the kernel of ops.attention_paged has its grid and workspace;
how it divides the keys of a row depends on the row's length alone, which it reads on the device), and prefixes. Each is
rounded up, so that few graphs serve all batches. Rows that are too many are pads, all alike: they attend to one token in a
page of their own, stay where they are, and nobody looks at what they draw.

What captures a step is passed in (Capture), so everything but the capture itself runs on a CPU too. ``CudaCapture`` follows torch's
recipe (torch.cuda.graphs: warm-up on a side stream, one pool for all graphs), but it has not run on a GPU yet: bench/gpu.py checks it
where there is one. A step with padded rows may round otherwise than one without, by torch's choice of a product's kernel.
"""

import warnings
from typing import Callable, Dict, Optional, Protocol, Tuple

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..model import Model
from ..ops.sample import DEFAULTS, ROW_DTYPES, signed
from .batch import LENGTH, POSITION, STEP, Batch
from .cache import Rows

PATIENCE = 32  # steps that a shape of batch is decoded eagerly before it is worth a capture, which takes as long as some hundred
MOST_GRAPHS = 64  # that are kept, the latest
WARM_UPS = 3  # runs before a capture, as torch advises: libraries and kernels set themselves up
FEW_PAGES = 16  # tables are at least this wide
LIVE = 3  # the row of DecodeGraph.state after POSITION, LENGTH and STEP: what a step adds to each

# forward(tokens, positions, slots, rows) -> (logits (B, V), what else the model found), as Steps._forward
Forward = Callable[[Tensor, Tensor, Tensor, Rows], Tuple[Tensor, Optional[Tensor]]]


class Capture(Protocol):
    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does again to the same memory what ``run`` does, without waiting for the device. Whether, and how often, ``run`` itself
        is called for that is left open."""


class CudaCapture:
    """Graphs of one device, in one pool of memory: none of them needs what another has left there."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last: Optional[torch.cuda.CUDAGraph] = None  # kept, as a pool that no graph has any more cannot be taken again

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self.device):
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):  # in which kernels are tried too, which cannot be while capturing
                    run()
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.last and self.last.pool(), capture_error_mode="thread_local"):
                    run()
            finally:  # torch itself does not go back from its stream if the capture fails
                torch.cuda.set_stream(here)
        self.last = graph
        return graph.replay


def capturable(model: Model) -> bool:
    """Whether every op of a step has its kernel on the model's GPU. What stands in for one looks at values, for which it would wait."""
    like = torch.empty(0, dtype=model.compute_dtype, device=model.device)
    own = ("rms_norm", "rope_qkv", "swiglu") if model.config.variant == "llama" else ()
    return all(ops.backend.use_native(op, like) for op in ("embedding", "attention_paged", "sample", *own))


def rounded_rows(count: int, slots: int) -> int:
    """
    >>> [rounded_rows(n, 20) for n in (1, 2, 3, 8, 9, 17)]
    [1, 2, 4, 8, 16, 20]
    """
    return min(1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8, slots)


def rounded_up(count: int, least: int, most: int) -> int:
    """To a fourfold of a fourfold … of ``least``, or to ``most``.

    >>> [rounded_up(n, 16, 100) for n in (3, 16, 17, 65, 100)]
    [16, 16, 64, 100, 100]
    """
    while least < count:
        least *= 4
    return min(least, most)


Shape = Tuple[int, int, Optional[Tuple[int, int]], int]  # rows, width of their tables, (prefixes, width of theirs), steps that are kept


def shape_of(batch: Batch, window: int) -> Shape:
    rows, most, prefix = rounded_rows(batch.size, batch.slots), batch.table.shape[1], None
    if batch.prefix is not None:
        prefixes, width = batch.prefix[0].shape
        prefix = rounded_up(prefixes, 1, max(rows // 2, 1)), rounded_up(width, FEW_PAGES, most)  # two rows or more share each
    return rows, rounded_up(batch.own_pages.shape[1], FEW_PAGES, most), prefix, window


class DecodeGraph:
    """One step of up to so many rows. ``load`` what a batch has, ``replay`` once a step, then look at what was ``drawn``."""

    def __init__(self, capture: Capture, forward: Forward, shape: Shape, scratch: int, page_size: int, device: torch.device):
        """scratch: the page of rows that are none."""
        rows, width, prefix, window = self.shape = shape
        self.scratch, self.page_size = scratch, page_size

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token, self.streams, self.state = zeros(rows), zeros(rows), zeros(4, rows)
        self.table = torch.full((rows, width), scratch, dtype=torch.int32, device=device)
        self.prefix = None
        if prefix is not None:
            self.prefix = zeros(*prefix, dtype=torch.int32), zeros(prefix[0], dtype=torch.int32), zeros(rows, dtype=torch.int32) - 1
        self.settings = {name: torch.full((rows,), x, dtype=ROW_DTYPES[name], device=device) for name, x in DEFAULTS.items()}
        self.at, self.tokens, self.marks = zeros(1), zeros(window, rows), zeros(3, window, rows, dtype=torch.float32)
        self.state[LENGTH] = 1
        self.replay = capture(lambda: self._step(forward))  # of pads alone, which move nothing

    def _step(self, forward: Forward) -> None:
        self.state[:LIVE].add_(self.state[LIVE])
        position, length, step = self.state[POSITION], self.state[LENGTH], self.state[STEP]
        last = length - 1
        page = self.table.gather(1, (last // self.page_size)[:, None])[:, 0].long()
        slots = page * self.page_size + last % self.page_size
        logits, _ = forward(self.token, position, slots, Rows(self.table, length.int(), self.prefix))
        tokens, *marks = ops.sample(logits, requests=self.streams, steps=step, **self.settings)
        self.token.copy_(tokens)
        self.tokens.index_copy_(0, self.at, tokens[None])
        self.marks.index_copy_(1, self.at, torch.stack(marks)[:, None])
        self.at.add_(1).remainder_(len(self.tokens))  # warm-ups go round too

    def load(self, batch: Batch) -> None:
        """What the batch has now, and pads for the other rows."""
        B = batch.size
        state = np.zeros(self.state.shape, np.int64)
        state[LENGTH], state[:LIVE, :B], state[LIVE, :B] = 1, batch.ints[:LIVE, :B], 1
        self.state.copy_(torch.from_numpy(state))
        sampler, streams = batch.sampler_from(0)
        for name, buffer in self.settings.items():
            buffer.fill_(DEFAULTS[name])
            buffer[:B] = signed(sampler.seed) if name == "seed" else sampler.settings.get(name, DEFAULTS[name])
        for buffer, own in ((self.token, batch.token[:B]), (self.streams, streams)):
            buffer[B:] = 0
            buffer[:B] = own
        self.table.fill_(self.scratch)
        self.table[:B, :batch.own_pages.shape[1]] = batch.own_pages
        if self.prefix is not None:
            (pages, lengths, owner), (count, width) = self.prefix, batch.prefix[0].shape
            pages[:count, :width], lengths[:count], owner[:B] = batch.prefix
            lengths[count:], owner[B:] = 0, -1
        self.at.zero_()

    def drawn(self, rows: int, count: int) -> Tuple[np.ndarray, np.ndarray]:
        """What the first so many steps since ``load`` have drawn: tokens (K, B), and marks (3, K, B) as draw.draw has them."""
        return self.tokens[:count, :rows].cpu().numpy(), self.marks[:, :count, :rows].cpu().numpy()


class DecodeGraphs:
    """Those of one engine: made for a shape of batch when it has come often enough, kept until weights or cache lie elsewhere."""

    def __init__(self, capture: Capture, patience: int = PATIENCE):
        self._capture: Optional[Capture] = capture
        self.patience = patience
        self.clear()

    def clear(self) -> None:
        """Forget all: what they read or write is no longer there."""
        self._graphs: Dict[Shape, DecodeGraph] = {}
        self._asked: Dict[Shape, int] = {}

    def find(self, model: Model, forward: Forward, batch: Batch, count: int, window: int) -> Optional[DecodeGraph]:
        """The graph for ``count`` steps of a composed batch; None where they are better drawn eagerly."""
        if self._capture is None:
            return None
        shape = shape_of(batch, max(window, count))
        graph = self._graphs.pop(shape, None)
        if graph is None:
            asked = self._asked[shape] = self._asked.get(shape, 0) + count
            if asked <= self.patience or (isinstance(self._capture, CudaCapture) and not capturable(model)):
                return None
            try:
                graph = DecodeGraph(self._capture, forward, shape, batch.page_count, batch.page_size, batch.device)
            except Exception as error:  # whatever a driver has against it, decoding can do without
                self._capture = None
                self.clear()
                warnings.warn(f"engine: decoding goes on without CUDA graphs, as a step could not be captured: {error}", stacklevel=2)
                return None
        self._graphs[shape] = graph
        if len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph
