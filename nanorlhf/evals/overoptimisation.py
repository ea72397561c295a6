"""How the gold reward goes with the distance from the SFT model while the proxy is optimised: the two forms of Gao et al. 2023,
"Scaling laws for reward model overoptimization", eq. 1: with d = √KL, best-of-n follows R(d) = d (α − β d), reinforcement
learning R(d) = d (α − β ln d). R counts from the SFT model's own mean."""

import math
from collections.abc import Sequence

import numpy as np

FORMS = {"best_of_n": lambda d: d * d, "rl": lambda d: d * np.log(np.maximum(d, 1e-12))}


def fit(kl: Sequence[float], gain: Sequence[float], form: str) -> dict:
    """Least squares of the form to points (KL in nats, gain of the gold reward): {"alpha", "beta", "rms", "residuals", "r2", "peak_kl"}.

    Both forms are linear in α and β. peak_kl: where the curve turns down, None where it does not. Points at KL 0 say nothing, since
    every curve starts there. Raises ValueError for fewer than three points above 0, and for numbers that are not finite.

    >>> found = fit([1.0, 4.0, 9.0], [0.9, 1.6, 2.1], "best_of_n")  # d (1 - 0.1 d)
    >>> round(found["alpha"], 6), round(found["beta"], 6), round(found["peak_kl"], 3)
    (1.0, 0.1, 25.0)
    """
    if form not in FORMS:
        raise ValueError(f"fit: expected a form of {', '.join(FORMS)}, got {form!r}")
    kl, gain = np.asarray(kl, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    if kl.shape != gain.shape or not np.isfinite([kl, gain]).all():
        raise ValueError(f"fit: expected a finite gain for each finite KL, got {len(kl)} KL and {len(gain)} gains")
    used = kl > 0
    if used.sum() < 3:
        raise ValueError(f"fit: expected at least 3 points away from the start, got {int(used.sum())}")
    d, y = np.sqrt(kl[used]), gain[used]
    terms = np.stack([d, -FORMS[form](d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(terms, y, rcond=None)
    residuals = y - terms @ [alpha, beta]
    spread = ((y - y.mean()) ** 2).sum()
    return {"form": form, "alpha": float(alpha), "beta": float(beta), "residuals": residuals.tolist(),
            "rms": float(np.sqrt((residuals**2).mean())), "r2": float(1 - (residuals**2).sum() / spread) if spread else None,
            "peak_kl": _peak(alpha, beta, form)}


def curve(found: dict, kl: Sequence[float]) -> list[float]:
    """The fitted gains at these KL.

    >>> curve({"form": "best_of_n", "alpha": 1.0, "beta": 0.1}, [4.0])
    [1.6]
    """
    d = np.sqrt(np.asarray(kl, dtype=np.float64))
    return (d * found["alpha"] - FORMS[found["form"]](d) * found["beta"]).tolist()


def _peak(alpha: float, beta: float, form: str) -> float | None:
    """The KL at which the slope in d is 0: α − 2 β d, or α − β (ln d + 1)."""
    if beta <= 0:
        return None
    if form == "best_of_n":
        return float((alpha / (2 * beta)) ** 2) if alpha > 0 else None
    return float(math.exp(min(2 * (alpha / beta - 1), 700.0)))
