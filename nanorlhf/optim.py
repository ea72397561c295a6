"""Muon for the hidden matrices, AdamW for the rest; one schedule, one clip.

Sources: Jordan et al. 2024 (Muon: momentum orthogonalised by a Newton-Schulz iteration); Loshchilov & Hutter 2019 (AdamW).
"""

import math
from typing import Dict, List

import torch
from torch import Tensor, nn

from . import ops
from .config import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the peak rate at ``step`` of ``steps``: linear warm-up, a plateau, linear decay to ``config.final``.

    >>> c = OptimConfig(warmup=0.1, decay=0.5, final=0.0)
    >>> [round(learning_rate(s, 10, c), 2) for s in (0, 4, 5, 9)]
    [1.0, 1.0, 1.0, 0.2]
    """
    warmup, decay = max(1, round(config.warmup * steps)), max(1, round(config.decay * steps))
    rising = min(1.0, (step + 1) / warmup)
    left = min(1.0, (steps - step) / decay)
    return rising * (config.final + (1 - config.final) * left)


def orthogonalise(G: Tensor, iterations: int = 5) -> Tensor:
    """(k, m, n) → k matrices, each with the same singular vectors and singular values near 1 (within about 0.3).

    The quintic iteration X ← aX + (bA + cA²)X with A = XXᵀ and Jordan's coefficients, in the type of ``G``; for tall
    matrices, which have the smaller XᵀX, X ← aX + X(bA + cA²).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.shape[-2] > G.shape[-1]
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        A = X.mT @ X if tall else X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X


class AdamW(torch.optim.AdamW):
    """torch's, with all of a group's parameters updated in one pass. ``step`` takes what the gradients are multiplied by."""

    @torch.no_grad()
    def step(self, closure=None, scale: float = 1.0) -> None:
        for group in self.param_groups:
            alike: Dict[float, List[Tensor]] = {}  # by the number of updates they have had
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p].update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                    self.state[p]["step"] += 1
                    alike.setdefault(float(self.state[p]["step"]), []).append(p)
            for step, params in alike.items():
                moments = ([self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq"))
                ops.optim.adamw_(params, [p.grad for p in params], *moments, step, group["lr"], group["betas"], group["eps"],
                                 group["weight_decay"], scale)


class Muon(torch.optim.Optimizer):
    """W ← (1 − lr·wd)·W − lr·sqrt(max(1, rows/columns))·orthogonalise(Nesterov momentum).

    Matrices of one shape are orthogonalised in one batched product. dtype: of those products, that of the parameters unless given.
    ``step`` takes what the gradients are multiplied by.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, dtype: torch.dtype | None = None):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None, scale: float = 1.0) -> None:
        for group in self.param_groups:
            shapes: Dict[torch.Size, List[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
            for shape, params in shapes.items():
                momenta = [self.state[p]["momentum"] for p in params]
                updates = ops.optim.momentum_([p.grad for p in params], momenta, group["momentum"], self.dtype or params[0].dtype,
                                              scale)
                ops.optim.apply_(params, orthogonalise(updates), 1 - group["lr"] * group["weight_decay"],
                                 group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5)


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """Muon's parameters: the matrices inside the blocks; not embeddings, output or scalar heads, norms or biases."""
    return p.ndim == 2 and ".layers." in name


class Optimizer:
    """What a stage holds: ``step`` clips, sets the rates for this step of the schedule, updates and clears gradients."""

    def __init__(self, model: nn.Module, config: OptimConfig, steps: int):
        self.config, self.steps = config, steps
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        hidden = [p for n, p in named if config.muon_lr > 0 and is_hidden_matrix(n, p)]
        taken = {id(p) for p in hidden}
        rest = [p for _, p in named if id(p) not in taken]
        groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
                  {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
        self.parts = [AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=1e-8)]
        if hidden:
            # A model that computes in bf16 has its updates made orthogonal in bf16, as Jordan et al. do.
            self.parts.append(Muon(hidden, config.muon_lr, config.momentum, config.weight_decay, getattr(model, "compute_dtype", None)))
        self.params = [p for _, p in named]

    def step(self, step: int) -> tuple[float, float]:
        """Update with the rate of ``step``. Returns (learning rate of AdamW, gradient norm before clipping)."""
        norm = ops.optim.gradient_norm([p.grad for p in self.params if p.grad is not None])
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite at step {step}")
        share = learning_rate(step, self.steps, self.config)
        for part, peak in zip(self.parts, (self.config.lr, self.config.muon_lr)):
            for group in part.param_groups:
                group["lr"] = peak * share
            part.step(scale=min(1.0, self.config.clip / (norm + 1e-6)))
        self.clear()
        return self.config.lr * share, norm

    def clear(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> Dict[str, Tensor]:
        """Everything that a resumed run needs, as named tensors."""
        tensors = {}
        for i, part in enumerate(self.parts):
            for index, state in part.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"{i}.{index}.{key}"] = torch.as_tensor(value)
        return tensors

    def load_state_tensors(self, tensors: Dict[str, Tensor]) -> None:
        for i, part in enumerate(self.parts):
            state: Dict[int, Dict[str, Tensor]] = {}
            for name, value in tensors.items():
                which, index, key = name.split(".")
                if int(which) == i:
                    state.setdefault(int(index), {})[key] = value
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
