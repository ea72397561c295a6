"""How a token is drawn from the logits: the settings of ops.sample, checked once."""

import math
from dataclasses import dataclass
from typing import Tuple

from ..ops.sample import check_sampling


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 1.0  # 0 takes the most probable token
    top_k: int = 0  # keep the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # then keep the smallest set of tokens with at least this probability
    min_p: float = 0.0  # then keep those with at least this share of the most probable one's probability
    repetition_penalty: float = 1.0  # divides positive logits, and multiplies negative ones, of tokens that have been (Keskar et al. 2019 §4.1)
    logit_bias: Tuple[Tuple[int, float], ...] = ()  # (id, what is added to its logit)

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"sample: expected a finite repetition_penalty above 0, got {self.repetition_penalty}")
