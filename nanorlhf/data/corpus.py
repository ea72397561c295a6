"""What one run reads, loaded once: its sources, their held-out parts, the films, the demonstrations."""

from functools import cached_property

import numpy as np

from ..config import RunConfig
from ..tokenizer import Tokenizer
from .films import load_films, split_films
from .instruct import instruct_pairs
from .mixture import Mixture, default_weights, pack, split_held_out
from .sources import DEFAULT_NAMES, document_bytes, load_sources


class Corpus:
    """The text of a run. Everything is a function of the configuration and of what is installed or cached."""

    def __init__(self, config: RunConfig):
        self.config = config
        names = list(config.data.sources) or list(DEFAULT_NAMES)
        sources, self.left_out = load_sources(names + list(config.data.files), config.data.offline, config.seed)
        if not sources:
            raise ValueError("no source of text is left: " + "; ".join(self.left_out))
        self.sources = {source.name: source for source in sources}
        if len(self.sources) < len(sources):
            twice = next(s.name for i, s in enumerate(sources) if s.name in {other.name for other in sources[:i]})
            raise ValueError(f"corpus: two sources are called {twice!r}; rename one of the files")
        self.parts = {name: (cut(train, config.data.max_source_bytes), held)
                      for name, (train, held) in split_held_out(sources).items()}

    def train_documents(self, name: str) -> list:
        return self.parts[name][0]

    @cached_property
    def held_out(self) -> dict:
        """{source: held-out documents}, of the sources that have any."""
        most = self.config.data.held_out_bytes
        return {name: head(held, most) for name, (_, held) in self.parts.items() if held}

    @cached_property
    def films(self):
        """The split of the film corpus, or None when the corpus is not among the sources."""
        if "films" not in self.sources:
            return None
        return split_films(load_films(self.config.data.offline), self.config.seed)

    @cached_property
    def demonstrations(self):
        """(train, held_out) lists of instruct.Example."""
        return instruct_pairs(list(self.sources.values()), self.films, self.config.seed)

    def tokenizer_texts(self) -> list:
        """Training documents of every source, in the mixture's proportions, up to ``tokenizer.train_bytes``."""
        texts = []
        for name, share in default_weights(list(self.parts)).items():
            texts += cut(self.train_documents(name), int(share * self.config.tokenizer.train_bytes))
        return [document_bytes(text) for text in texts]

    def mixture(self, tokenizer: Tokenizer, end_of_text: int) -> Mixture:
        streams = {}
        for name in self.parts:
            ids, offsets = tokenizer.encode_batch([document_bytes(d) for d in self.train_documents(name)])
            if len(ids):
                streams[name] = pack(ids, offsets, end_of_text)
        return Mixture(streams, default_weights(list(streams)), self.config.pretrain.row_tokens, self.config.seed,
                       end_of_text)

    def data_card(self, epochs: dict) -> list:
        """One entry a source. epochs: how often pretraining saw it."""
        return [{"source": s.name, "slot": s.slot, "version": s.version, "sha256": s.sha256, "licence": s.licence,
                 "bytes": s.bytes, "documents": len(s.documents), "epochs": epochs.get(s.name, 0.0)}
                for s in self.sources.values()]


def head(documents: list, most: int) -> list:
    """Documents from the front up to about ``most`` bytes; the last one is cut.

    >>> head(["abc", "defg", "h"], 5)
    ['abc', 'de']
    """
    chosen, size = [], 0
    for document in documents:
        if size < most:
            chosen.append(document[:most - size])
            size += len(document_bytes(chosen[-1]))
    return chosen


def cut(documents: list, most: int) -> list:
    """Whole documents from the front, until the next would bring their bytes above ``most``; at least one.

    >>> cut(["ab", "cd", "e"], 4)
    ['ab', 'cd']
    """
    sizes = np.cumsum([len(document_bytes(d)) for d in documents])
    return documents[:max(1, int(np.searchsorted(sizes, most, side="right")))]
