"""Held-out likelihood in bits per byte, a unit that models with different tokenizers share."""

from typing import Dict, List, Sequence

import torch

from .. import chat as chat_format
from ..data.instruct import Example
from ..data.sources import document_bytes
from ..engine.generate import ragged
from ..model import Model
from ..tokenizer import Tokenizer
from .bits import bits_per_byte

_BATCH_TOKENS = 8192


def windows(ids: Sequence[int], context: int, overlap: int) -> List[tuple[List[int], int]]:
    """Cut a long document into windows of at most ``context`` tokens, each but the first repeating ``overlap`` of the
    one before as context. Returns [(window, how many of its leading tokens are not scored)].

    Errors: ValueError for an overlap that leaves a token without context, or no room for a new one.

    >>> windows([0, 1, 2, 3, 4], 3, 1)
    [([0, 1, 2], 1), ([2, 3, 4], 1)]
    """
    if not 1 <= overlap < context:
        raise ValueError(f"windows: expected an overlap of 1 to {context - 1} for a context of {context}, got {overlap}")
    cut, start = [(list(ids[:context]), 1)], context
    while start < len(ids):
        end = min(start + context - overlap, len(ids))
        cut.append((list(ids[start - overlap:end]), overlap))
        start = end
    return cut


@torch.no_grad()
def summed_nats(model: Model, pieces: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """Σ −log p of the tokens whose mask is 1, over pieces (ids, mask)."""
    total, batch, held = 0.0, [], 0
    for piece in [*pieces, None]:
        if batch and (piece is None or held + len(piece[0]) > _BATCH_TOKENS):
            tokens, cu_seqlens = ragged([ids for ids, _ in batch], model.device)
            mask, _ = ragged([mask for _, mask in batch], model.device)
            logprobs, _ = model.logprobs(tokens, cu_seqlens, torch.nonzero(mask).squeeze(-1) - 1)
            total, batch, held = total - float(logprobs.double().sum()), [], 0
        if piece is not None:
            batch.append(piece)
            held += len(piece[0])
    return total


def document_bits(model: Model, tokenizer: Tokenizer, documents: Dict[str, list]) -> Dict[str, float]:
    """{source: bits per byte} of whole documents, each predicted from ``<|endoftext|>`` on. A document longer than the
    context is read in windows that overlap by a quarter."""
    start, context = tokenizer.special_tokens[chat_format.END_OF_TEXT], model.config.context
    result = {}
    for name, texts in documents.items():
        pieces, size = [], 0
        for text in texts:
            data = document_bytes(text)
            size += len(data)
            for ids, unscored in windows([start] + tokenizer.encode(data), context, context // 4):
                pieces.append((ids, [0] * unscored + [1] * (len(ids) - unscored)))
        result[name] = bits_per_byte(summed_nats(model, pieces), size)
    return result


def response_bits(model: Model, tokenizer: Tokenizer, examples: Sequence[Example]) -> float:
    """Bits per byte of the human responses given their prompts in the chat format, the end of turn not counted."""
    pieces, size = [], 0
    for example in examples:
        ids, mask = chat_format.render(tokenizer, [{"role": "user", "content": example.prompt},
                                                   {"role": "assistant", "content": example.response}])
        if len(ids) <= model.config.context:
            pieces.append((ids, mask[:-1] + [0]))
            size += len(example.response.encode())
    return bits_per_byte(summed_nats(model, pieces), size)
