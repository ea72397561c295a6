"""Data parallelism under torchrun: every rank holds the whole model, takes its share of each batch, and gradients are summed.
The first rank writes the files.

Without torchrun there is one rank, and nothing here does anything.
"""

import os
from typing import Iterable, List, Sequence, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def start(device: torch.device) -> None:
    """Join the other ranks, where torchrun has said that there are some."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the rank that writes files and speaks to the user."""
    return rank() == 0


def wait() -> None:
    """Until every rank is here."""
    if size() > 1:
        dist.barrier()


def agreed(mine: T) -> T:
    """What the first rank holds."""
    if size() == 1:
        return mine
    held = [mine]
    dist.broadcast_object_list(held)
    return held[0]


def share(count: int, at: int | None = None, of: int | None = None) -> slice:
    """The part of ``count`` things in order that is this rank's: parts differ by one at most.

    >>> share(5, 0, 2), share(5, 1, 2)
    (slice(0, 3, None), slice(3, 5, None))
    """
    at, of = rank() if at is None else at, size() if of is None else of
    each, more = divmod(count, of)
    begin = at * each + min(at, more)
    return slice(begin, begin + each + (at < more))


def gather(mine: T) -> List[T]:
    """What every rank holds, in the order of ranks. Tensors have to be on the CPU."""
    if size() == 1:
        return [mine]
    every: List = [None] * size()
    dist.all_gather_object(every, mine)
    return every


def sum_gradients(params: Iterable[torch.nn.Parameter]) -> None:
    """Every gradient becomes the sum over the ranks; one that a rank did not form counts as zero."""
    if size() == 1:
        return
    params = list(params)
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    for p, part in zip(params, flat.split([p.numel() for p in params])):
        p.grad.copy_(part.view_as(p))


def weighted_means(rows: Sequence[tuple[float, dict]]) -> dict:
    """Of every rank's rows (weight, {name: number}): the weighted means; the largest of what is named "..._max"."""
    every = [row for part in gather(list(rows)) for row in part]
    total = sum(weight for weight, _ in every)
    return {name: max(r[name] for _, r in every) if name.endswith("_max") else sum(w * r[name] for w, r in every) / total
            for name in every[0][1]}
