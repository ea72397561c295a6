"""Stage 1, the base model: predict the next token of documents laid end to end.

Source: the talk's first stage; packing with ``<|endoftext|>`` between documents as in Brown et al. 2020 §B, attention
kept within a document.
"""

from typing import Callable, Iterator

from torch import Tensor

from .. import parallel
from ..checkpoint import StageState
from ..config import PretrainConfig
from ..data.mixture import Mixture
from ..model import Model
from ..optim import Optimizer


def row_slices(tokens: Tensor, cu_seqlens: Tensor, row_tokens: int, rows: int, of: slice | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a batch of whole rows, or those rows ``of`` it, into micro-batches of at most ``rows`` rows, each with its own cu_seqlens."""
    of = of or slice(0, -(-len(tokens) // row_tokens))
    for start in range(of.start * row_tokens, of.stop * row_tokens, rows * row_tokens):
        end = min(start + rows * row_tokens, of.stop * row_tokens, len(tokens))
        inside = cu_seqlens[(cu_seqlens >= start) & (cu_seqlens <= end)]
        yield tokens[start:end], inside - start


def train_step(model: Model, optimizer: Optimizer, tokens: Tensor, cu_seqlens: Tensor, config: PretrainConfig,
               step: int) -> dict:
    """One update on a batch of rows. The loss is the mean over all predicted tokens of the step, however the step is
    cut into micro-batches and shared by ranks: each adds its sum divided by the global count."""
    count = len(tokens) - (len(cu_seqlens) - 1)  # every token but the first of each sequence is predicted
    total = 0.0
    mine = parallel.share(len(tokens) // config.row_tokens)
    for part, part_cu in row_slices(tokens, cu_seqlens, config.row_tokens, config.micro_rows, mine):
        logprobs, _ = model.logprobs(part.to(model.device), part_cu.to(model.device))
        loss = -logprobs.sum() / count
        loss.backward()
        total += float(loss.detach())
    parallel.sum_gradients(model.parameters())
    lr, norm = optimizer.step(step)
    return {"loss": sum(parallel.gather(total)), "lr": lr, "grad_norm": norm}


def pretrain(model: Model, mixture: Mixture, config: PretrainConfig, state: StageState,
             evaluate: Callable[[Model], dict], draw: Callable[[Model], list], log: Callable[[dict], None]) -> Model:
    """Train ``model`` on ``mixture`` for ``config.steps`` steps, going on from ``state`` if it holds any.

    evaluate(model) → held-out bits per byte by source; draw(model) → [(prompt, text)] samples. Both are called at set
    points of the training and their results logged.
    """
    optimizer = Optimizer(model, config.optim, config.steps)
    first = state.restore(model=model, optimizer=optimizer)["step"]
    eval_steps = {round(config.steps * i / config.evals) for i in range(config.evals)} if config.evals else set()
    sample_steps = {round(config.steps * share) for share in config.sample_points}
    size = config.rows * config.row_tokens

    def look(step: int) -> None:
        where = {"stage": "pretrain", "step": step, "tokens": step * size}
        if step in eval_steps:
            log({**where, "event": "eval", "bpb": evaluate(model)})
        if step in sample_steps:
            for prompt, text in draw(model):
                log({**where, "event": "sample", "prompt": prompt, "text": text})

    for step in range(first, config.steps):
        look(step)
        tokens, cu_seqlens = mixture.batch(step, config.rows)
        row = train_step(model, optimizer, tokens, cu_seqlens, config, step)
        log({"stage": "pretrain", "step": step + 1, "tokens": (step + 1) * size,
             "tokens_per_s": (step + 1) * size / state.seconds, **row})
        state.tick(step + 1)
    look(config.steps)
    return model
