"""The loop of reinforcement learning, the same for PPO, RLOO, GRPO and REINFORCE: roll out, pass over the rollout, adapt β."""

from typing import Callable, List, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import parallel
from ..checkpoint import StageState
from ..config import RLConfig
from ..model import Model
from ..optim import Optimizer
from .loss import AdaptiveKL
from .rollout import Rollout, drawn_prompts

# loss(part, whole) → (loss, measured): of the episodes ``part`` of a minibatch ``whole``, so that the losses of all its parts add up
# to the minibatch's, whatever the parts are.
Loss = Callable[[np.ndarray, np.ndarray], tuple[Tensor, dict]]


def improve(stage: str, policy: Model, prompts: Sequence[List[int]], config: RLConfig, seed: int, state: StageState, parts: dict,
            roll_out: Callable[[List[List[int]], int], Rollout], update: Callable[[Rollout, float, int], dict],
            log: Callable[[dict], None]) -> Model:
    """``config.steps`` steps of: rollout = roll_out(prompts of the step, its seed), then update(rollout, β, step).

    parts: what the stage's state holds, by name. The run stops early, for good, when the KL to the reference passes
    ``config.kl_budget``: the weights stay those that were measured.
    """
    held = state.restore(**parts)
    controller = AdaptiveKL(held.get("beta", config.kl_coef), config.kl_target, config.kl_horizon)
    if "stopped" in held:  # by an earlier sitting, that was ended before the stage was complete
        log(held["stopped"])
    for step in range(held["step"], 0 if "stopped" in held else config.steps):
        rollout = roll_out(drawn_prompts(prompts, config.prompts, seed, step), seed * 1_000_003 + step)
        measured = rollout.measured()
        if config.kl_budget and measured["kl"] > config.kl_budget:
            row = {"stage": stage, "event": "stop", "step": step, **measured, "kl_budget": config.kl_budget}
            log(row)
            state.save(step, beta=controller.beta, stopped=row)
            break
        updated = update(rollout, controller.beta, step)
        log({"stage": stage, "step": step + 1, **measured, "kl_coef": controller.beta,
             "reward": measured["score"] - controller.beta * measured["kl"], **updated})
        controller.update(measured["kl"], len(rollout.scores))
        state.tick(step + 1, beta=controller.beta)
    return policy


def passes(rollout: Rollout, config: RLConfig, seed: int, step: int, loss: Loss, optimizers: Sequence[Optimizer]) -> dict:
    """``config.epochs`` passes in ``config.minibatches`` optimiser steps each, in an order drawn from (seed, step, epoch). Returns
    the means of what was measured. A minibatch whose largest ratio passes ``config.ratio_stop`` ends them, unless it is the first.
    """
    actions = rollout.cu_actions.diff().cpu().numpy()
    rows, ended = [], False
    for at in range(config.epochs * config.minibatches):
        epoch, number = divmod(at, config.minibatches)
        order = np.random.default_rng([seed, step, epoch, 4]).permutation(len(actions))
        whole = np.array_split(order, config.minibatches)[number]
        mine = whole[parallel.share(len(whole))]
        measured = []
        for part in np.array_split(mine, -(-len(mine) // (config.micro_episodes or len(mine)))) if len(mine) else []:
            value, facts = loss(part, whole)
            value.backward()
            measured.append((float(actions[part].sum()), facts))
        facts = parallel.weighted_means(measured)
        if config.ratio_stop and rows and facts["ratio_max"] > config.ratio_stop:
            ended = True
            for optimizer in optimizers:
                optimizer.clear()
            break
        norms = []
        for optimizer in optimizers:
            parallel.sum_gradients(optimizer.params)
            norms.append(optimizer.step(step * config.epochs * config.minibatches + at)[1])
        rows.append({**facts, "grad_norm": norms[0]})
    means = {key: float(np.mean([r[key] for r in rows])) for key in rows[0]}
    return {**means, "first_ratio_max": rows[0]["ratio_max"], "passes_ended": ended}


def share_of(rollout: Rollout, part: np.ndarray, whole: np.ndarray) -> float:
    """The part's actions over those of the whole: what turns a mean over its actions into its term of the whole's."""
    actions = rollout.cu_actions.diff()
    return int(actions[torch.as_tensor(part)].sum()) / int(actions[torch.as_tensor(whole)].sum())
