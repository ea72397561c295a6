"""Which prompts are run next, on which pages, and the arrays for the one forward pass that runs them."""

from dataclasses import dataclass, field
from typing import Callable, Deque, Dict, List, Optional, Tuple

import numpy as np
import torch

from .cache import Rows
from .pages import PagePool, PrefixTree
from .request import Handle


@dataclass
class Plan:
    """A prompt to be run once for ``handles``, each with the pages of its own ``tables`` entry. The first ``matched`` pages are
    known; all have them and the other full ones in common, and a last page that is not full each for itself."""

    context: np.ndarray
    matched: int
    handles: List[Handle] = field(default_factory=list)
    tables: List[np.ndarray] = field(default_factory=list)


def plan_next(waiting: Deque[Handle], slots: int, tokens: int, pool: PagePool, tree: PrefixTree,
              take: Callable[[int], Optional[np.ndarray]], keep: bool) -> List[Plan]:
    """Take requests off the queue, in order, for as long as there are slots, pages and up to about so many tokens to run.

    A prompt that begins as another does goes on from its pages, also where they are only going to be filled by the same pass.
    """
    plans: Dict[bytes, Plan] = {}
    while waiting and slots and tokens > 0:
        context = waiting[0].context()
        plan, full = plans.get(context.tobytes()), len(context) // pool.size
        if plan is not None:
            fresh = take(-(-len(context) // pool.size) - full)
            if fresh is None:
                break
            pool.share(plan.tables[0][:full])
            table = np.concatenate((plan.tables[0][:full], fresh))
        else:
            matched = np.asarray(tree.match(context[:-1]) if keep else [], np.int32)
            pool.share(matched)
            fresh = take(-(-len(context) // pool.size) - len(matched))
            if fresh is None:
                pool.release(matched)
                break
            table = np.concatenate((matched, fresh))
            if keep:
                tree.insert(context[:-1], table)  # what match looked for: all of it is known or new, and none is another's
            plan = plans[context.tobytes()] = Plan(context, len(matched))
            tokens -= len(context) - len(matched) * pool.size
        plan.handles.append(waiting.popleft())
        plan.tables.append(table)
        slots -= 1
    return list(plans.values())


class Prefill:
    """What PagedCache.forward takes for these plans, which it sorts: first those that need nothing from the cache. last (R,): where the
    last token of each request is; copies: pages (sources, targets) to be copied afterwards, for requests that share a prompt."""

    def __init__(self, plans: List[Plan], page_size: int, on_device: Callable[[np.ndarray], torch.Tensor]):
        plans.sort(key=lambda p: p.matched > 0)
        known = [p.matched * page_size for p in plans]
        positions = [np.arange(k, len(p.context)) for p, k in zip(plans, known)]
        counts = np.array([len(x) for x in positions])
        self.tokens = on_device(np.concatenate([p.context[k:] for p, k in zip(plans, known)]))
        self.positions = on_device(np.concatenate(positions))
        self.slots = on_device(np.concatenate([p.tables[0][x // page_size].astype(np.int64) * page_size + x % page_size
                                               for p, x in zip(plans, positions)]))
        self.last = on_device(np.repeat(counts.cumsum() - 1, [len(p.handles) for p in plans]))
        whole = sum(p.matched == 0 for p in plans)
        self.cu_seqlens = on_device(np.concatenate(([0], counts[:whole].cumsum())).astype(np.int32)) if whole else None
        self.rows = _continued(plans[whole:], counts[whole:], page_size, on_device) if whole < len(plans) else None
        forks = [(p.tables[0][-1], table[-1]) for p in plans if len(p.context) % page_size for table in p.tables[1:]]
        self.copies = tuple(on_device(np.array(x, np.int64)) for x in (zip(*forks) if forks else ((), ())))


def _continued(plans: List[Plan], counts: np.ndarray, page_size: int, on_device) -> Rows:
    """A row for every new token of prompts whose beginning is cached: it sees that, and its own prompt's new tokens up to itself."""
    groups: Dict[int, int] = {}  # prompts that go on from the same page have all before it in common
    owner = np.array([groups.setdefault(int(p.tables[0][p.matched - 1]), len(groups)) for p in plans], np.int32)
    first = [int((owner == g).argmax()) for g in range(len(groups))]
    prefix = _padded([plans[i].tables[0][:plans[i].matched] for i in first])
    lengths = np.array([plans[i].matched * page_size for i in first], np.int32)
    own = _padded([p.tables[0][p.matched:] for p in plans])
    seen = np.concatenate([np.arange(1, n + 1, dtype=np.int32) for n in counts])
    shared: Tuple = tuple(on_device(x) for x in (prefix, lengths, np.repeat(owner, counts)))
    return Rows(on_device(np.repeat(own, counts, 0)), on_device(seen), shared)


def _padded(tables: List[np.ndarray]) -> np.ndarray:
    out = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, table in zip(out, tables):
        row[:len(table)] = table
    return out
