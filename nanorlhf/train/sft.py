"""Stage 2, the assistant: the same next-token loss on demonstrations, counted on the response's tokens only.

Source: Ouyang et al. 2022 §3.5 (SFT).
"""

from typing import Callable, List, Sequence

import numpy as np
import torch

from .. import parallel
from ..checkpoint import StageState
from ..config import SFTConfig
from ..engine.generate import ragged
from ..model import Model
from ..optim import Optimizer

Rendered = tuple[List[int], List[int]]  # ids, and a mask that is 1 where the loss counts


def token_batches(lengths: Sequence[int], budget: int, seed: int, epoch: int) -> List[np.ndarray]:
    """A shuffled pass over the examples in batches of at most ``budget`` tokens (a longer example is alone).

    >>> [len(batch) for batch in token_batches([3, 3, 3], 6, seed=0, epoch=0)]
    [2, 1]
    """
    order = np.random.default_rng([seed, epoch, 2]).permutation(len(lengths))
    batches, current, held = [], [], 0
    for i in order:
        if current and held + lengths[i] > budget:
            batches.append(np.array(current))
            current, held = [], 0
        current.append(i)
        held += lengths[i]
    if current:
        batches.append(np.array(current))
    return batches


def response_logprobs(model: Model, examples: Sequence[Rendered]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (M,) of all response tokens of a batch, and their ids (M,)."""
    tokens, cu_seqlens = ragged([ids for ids, _ in examples], model.device)
    mask, _ = ragged([mask for _, mask in examples], model.device)
    where = torch.nonzero(mask).squeeze(-1) - 1  # the position before a token predicts it
    return model.logprobs(tokens, cu_seqlens, where)[0], tokens[where + 1]


def backward(model: Model, examples: Sequence[Rendered]) -> float:
    """The gradients of the mean loss over the batch's response tokens, of which every rank forms its examples' part. Returns the loss."""
    count, mine = sum(sum(mask) for _, mask in examples), examples[parallel.share(len(examples))]
    total = 0.0
    if mine:
        loss = -response_logprobs(model, mine)[0].sum() / count
        loss.backward()
        total = float(loss.detach())
    return sum(parallel.gather(total))


def sft(model: Model, examples: Sequence[Rendered], config: SFTConfig, seed: int, state: StageState,
        evaluate: Callable[[Model], float], log: Callable[[dict], None]) -> Model:
    """Fine-tune on rendered demonstrations. evaluate(model) → held-out bits per byte of the responses.

    Errors: ValueError when there is no example.
    """
    if not examples:
        raise ValueError("sft: expected at least one example, got none")
    optimizer = Optimizer(model, config.optim, config.steps)
    first = state.restore(model=model, optimizer=optimizer)["step"]
    lengths = [len(ids) for ids, _ in examples]
    epoch, batches, passed = 0, token_batches(lengths, config.batch_tokens, seed, 0), 0
    for step in range(config.steps):
        if step - passed == len(batches):
            epoch, passed = epoch + 1, step
            batches = token_batches(lengths, config.batch_tokens, seed, epoch)
        if step < first:
            continue
        if step in (0, config.steps // 2):
            log({"stage": "sft", "event": "eval", "step": step, "response_bpb": evaluate(model)})
        loss = backward(model, [examples[i] for i in batches[step - passed]])
        parallel.sum_gradients(optimizer.params)
        lr, norm = optimizer.step(step)
        log({"stage": "sft", "step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm,
             "epoch": epoch})
        state.tick(step + 1)
    log({"stage": "sft", "event": "eval", "step": config.steps, "response_bpb": evaluate(model)})
    return model
