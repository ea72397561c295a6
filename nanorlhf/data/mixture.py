"""What a model trains on in which order: the held-out split, packing, and the weighted mixture of sources."""

import numpy as np
import torch

from .sources import document_bytes
from .text import stable_hash

HELD_OUT_SHARE = 0.02  # of a source's bytes
HELD_OUT_FLOOR = 20_000  # bytes: two per cent of a small source would measure nothing …
HELD_OUT_MOST = 0.2  # … but never more than this share of it
HELD_OUT_BYTES = 100_000  # cap
# After the LLaMA table of the talk (web text, code, encyclopaedia, books, Q&A …), with more prose and less web, as
# nothing here is web text. Renormalised over the sources that are there.
DEFAULT_WEIGHTS = {"wiki": 0.30, "plays": 0.125, "bible": 0.125, "films": 0.20, "stdlib": 0.15, "docstrings": 0.04,
                   "dialogue": 0.04, "topics": 0.02, "wiki_fr": 0.05, "wiki_es": 0.05}
FILE_WEIGHT = 0.5  # a file that the user names is what the user wants to hear


def default_weights(names):
    """The weight of each named source, summing to 1.

    >>> default_weights(["wiki", "stdlib"])["wiki"]
    0.6666666666666667
    """
    raw = {name: DEFAULT_WEIGHTS.get(name, FILE_WEIGHT) for name in names}
    return {name: weight / sum(raw.values()) for name, weight in raw.items()}


def split_held_out(sources, share=HELD_OUT_SHARE, cap=HELD_OUT_BYTES):
    """Training and held-out documents of each source: {name: (train, held_out)}, both in the source's order.

    Documents are held out in the order of a stable hash of their key, whatever the seed: share of the bytes, at least
    one document, at most cap bytes. A document whose key another source holds out is in neither part. A source of a
    single document holds nothing out.
    """
    held_keys, keys_of = set(), {}
    for source in sources:
        keys = list(source.keys) or source.documents
        chosen = _held_out(source.documents, keys, share, cap)
        held_keys.update((bool(source.keys), keys[i]) for i in chosen)
        keys_of[source.name] = (keys, chosen)
    parts = {}
    for source in sources:
        keys, chosen = keys_of[source.name]
        held = [source.documents[i] for i in sorted(chosen)]
        train = [document for document, key in zip(source.documents, keys) if (bool(source.keys), key) not in held_keys]
        parts[source.name] = (train, held)
    return parts


def _held_out(documents, keys, share, cap):
    """The set of indices held out."""
    if len(documents) < 2:
        return set()
    sizes = [len(document_bytes(document)) for document in documents]
    wanted = min(cap, max(share * sum(sizes), min(HELD_OUT_FLOOR, HELD_OUT_MOST * sum(sizes))))
    order = sorted(range(len(documents)), key=lambda i: (stable_hash(keys[i], "held out"), i))
    chosen, size = [], 0
    for i in order:
        if not chosen or size + sizes[i] <= wanted:
            chosen.append(i)
            size += sizes[i]
    # Copies of a text share its key and stand on the same side.
    held = {keys[i] for i in chosen}
    return {i for i in range(len(documents)) if keys[i] in held}


def pack(ids, offsets, eot_id):
    """Documents end to end, each opened and closed by <|endoftext|>: it is what the first token is predicted from, and
    the model learns to predict it at the end.

    ids (N,) int32 and offsets (B+1,) int64 as Tokenizer.encode_batch gives them; returns (N + 2B,) int32.

    >>> pack(np.array([1, 2, 3], np.int32), np.array([0, 2, 3]), 9).tolist()
    [9, 1, 2, 9, 9, 3, 9]
    """
    offsets = np.asarray(offsets)
    ends = np.stack([offsets[:-1], offsets[1:]], axis=1).ravel()
    return np.insert(np.asarray(ids, dtype=np.int32), ends, np.int32(eot_id))


class Mixture:
    """Rows of row_tokens tokens drawn from several packed streams in given proportions.

    batch is a pure function of (seed, step, rows), so that a run resumes from the step number alone. Which source a
    row comes from follows a Kronecker (golden ratio) sequence, so every prefix has the given proportions to within
    a few rows. A source's rows come in a new random order, and with new row boundaries, at each of its epochs.
    """

    def __init__(self, streams, weights, row_tokens, seed, eot_id):
        """streams: {name: int32 ids}; weights: {name: share}, renormalised over streams; eot_id ends documents."""
        self.names = sorted(name for name in streams if weights.get(name, 0) > 0)
        if not self.names or any(len(streams[name]) == 0 for name in self.names):
            raise ValueError(f"Mixture: expected at least one stream, none empty, with a positive weight, got "
                             f"{ {name: len(ids) for name, ids in streams.items()} } and weights {weights}")
        if row_tokens < 2:
            raise ValueError(f"Mixture: expected row_tokens of at least 2, got {row_tokens}")
        self.row_tokens, self.seed, self.eot_id = row_tokens, seed, eot_id
        self.sizes = {name: len(streams[name]) for name in self.names}
        # A stream shorter than a row is repeated until it fills one.
        self.streams = {name: np.resize(ids, row_tokens) if len(ids) < row_tokens else np.asarray(ids)
                        for name, ids in ((name, streams[name]) for name in self.names)}
        # One row less than fits, where that leaves any, so that the boundaries can shift.
        self.epoch_rows = {name: max(1, (len(ids) + 1) // row_tokens - 1) for name, ids in self.streams.items()}
        total = sum(weights[name] for name in self.names)
        self.edges = np.cumsum([weights[name] / total for name in self.names])
        self._choice = np.empty(0, np.int64)  # source of row n, grown on demand
        self._ordinal = np.empty(0, np.int64)  # how many earlier rows had the same source
        self._orders = {}  # the permutation in use of each source: {name: (epoch, shift, order)}

    def _grow(self, rows):
        if rows <= len(self._choice):
            return
        rows = max(rows, 2 * len(self._choice), 1024)
        start = np.uint64(stable_hash(str(self.seed), "mixture"))
        point = (np.arange(rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start) / 2.0**64
        self._choice = np.minimum(np.searchsorted(self.edges, point, side="right"), len(self.names) - 1)
        self._ordinal = np.empty(rows, np.int64)
        for i in range(len(self.names)):
            mine = self._choice == i
            self._ordinal[mine] = np.arange(mine.sum())

    def _row(self, name, ordinal):
        epoch, place = divmod(int(ordinal), self.epoch_rows[name])
        if self._orders.get(name, (None,))[0] != epoch:
            rng = np.random.default_rng([self.seed, stable_hash(name), epoch])
            slack = len(self.streams[name]) - self.epoch_rows[name] * self.row_tokens
            self._orders[name] = (epoch, int(rng.integers(slack + 1)), rng.permutation(self.epoch_rows[name]))
        _, shift, order = self._orders[name]
        start = shift + int(order[place]) * self.row_tokens
        return self.streams[name][start:start + self.row_tokens]

    def batch(self, step, rows):
        """(tokens (rows·row_tokens,) int64, cu_seqlens (B+1,) int32) of one step.

        A sequence starts at every row and at every <|endoftext|> that opens a document: one that follows another.
        """
        if step < 0 or rows < 1:
            raise ValueError(f"Mixture.batch: expected step ≥ 0 and rows ≥ 1, got {step} and {rows}")
        first = step * rows
        self._grow(first + rows)
        tokens = np.concatenate([self._row(self.names[self._choice[n]], self._ordinal[n])
                                 for n in range(first, first + rows)])
        end = tokens == self.eot_id
        breaks = np.union1d(np.flatnonzero(end[1:] & end[:-1]) + 1, np.arange(0, len(tokens) + 1, self.row_tokens))
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(breaks.astype(np.int32))

    def epochs(self, step, rows):
        """How often each source has been seen after that many steps: {name: tokens drawn / tokens there}."""
        self._grow(step * rows)
        counts = np.bincount(self._choice[:step * rows], minlength=len(self.names))
        return {name: float(count * self.row_tokens / self.sizes[name]) for name, count in zip(self.names, counts)}
