"""Every setting of a run, as frozen dataclasses. A preset is a function; command-line flags are made from the fields."""

import json
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Literal, Tuple, get_args, get_origin, get_type_hints

import tyro


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


# What settings of these names may be; beside them every number is finite, and a whole one above 0.
_ABOVE_0 = {"temperature", "top_p", "clip", "value_clip", "beta"}
_FROM_0 = {"top_k", "min_p", "importance_cap", "kl_coef", "kl_target", "kl_budget", "micro_episodes", "ratio_stop", "gamma", "lam",
           "value_coef", "label_smoothing", "margin", "unfavourable", "labeller_temperature", "evals", "lr", "muon_lr", "weight_decay"}
_AT_MOST = {"top_p": 1, "min_p": 1, "gamma": 1, "lam": 1, "label_smoothing": 0.5, "unfavourable": 1}


def _check_ranges(name: str, config) -> None:
    hints = get_type_hints(type(config))
    for f in fields(config):
        value, at = getattr(config, f.name), f"{name}.{f.name}"
        if is_dataclass(value):
            _check_ranges(at, value)
        elif get_origin(hints[f.name]) is Literal:
            _require(value in get_args(hints[f.name]), f"{at} must be one of {', '.join(get_args(hints[f.name]))}, got {value!r}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            whole = isinstance(value, int) and f.name not in _FROM_0
            _require(math.isfinite(value), f"{at} must be finite, got {value}")
            _require(value > 0 or not whole and f.name not in _ABOVE_0, f"{at} must be above 0, got {value}")
            _require(value >= 0 or f.name not in _FROM_0, f"{at} must be 0 or more, got {value}")
            _require(value <= _AT_MOST.get(f.name, value), f"{at} must be at most {_AT_MOST.get(f.name)}, got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder: a Llama (a Qwen3 with ``qk_norm``), or GPT-2's variant."""

    vocab_size: int = 4096  # V, special tokens included
    hidden_size: int = 192  # C
    layers: int = 4
    heads: int = 3  # H, query heads
    kv_heads: int = 3  # Hkv; fewer than heads is grouped-query attention
    head_size: int = 64  # D
    intermediate_size: int = 512  # width of the MLP
    context: int = 256  # tokens that one sequence can hold
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    qk_norm: bool = True  # RMSNorm on each query and key head, as Qwen3 has
    tied: bool = True  # one matrix for the embedding and the output
    variant: Literal["llama", "gpt2"] = "llama"  # gpt2: learned positions, LayerNorm, GELU, biases

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int) and not isinstance(value, bool):
                _require(value > 0, f"ModelConfig: {f.name} must be positive, got {value}")
        _require(self.heads % self.kv_heads == 0,
                 f"ModelConfig: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        _require(self.head_size % 2 == 0 or self.variant == "gpt2",
                 f"ModelConfig: rotary positions need an even head_size, got {self.head_size}")
        _require(self.variant in ("llama", "gpt2"), f"ModelConfig: unknown variant {self.variant!r}")


def gpt2_small() -> ModelConfig:
    """The 124M shape of Radford et al. 2019."""
    return ModelConfig(vocab_size=50257, hidden_size=768, layers=12, heads=12, kv_heads=12, head_size=64,
                       intermediate_size=3072, context=1024, qk_norm=False, variant="gpt2")


@dataclass(frozen=True)
class DataConfig:
    sources: Tuple[str, ...] = ()  # names of sources to use; empty: every one that is there
    files: Annotated[Tuple[str, ...], tyro.conf.arg(aliases=["--files"])] = ()  # local text files, each a source of its own
    offline: Annotated[bool, tyro.conf.arg(aliases=["--offline"])] = False  # do not fetch archives; use what is installed or cached
    max_source_bytes: int = 12_000_000  # a larger source is cut, by whole documents
    held_out_bytes: int = 100_000  # most held-out text of a source that bits per byte are measured on


@dataclass(frozen=True)
class TokenizerConfig:
    vocab_size: int = 4096
    pattern: str = "gpt4"  # a named split rule, or a regular expression
    train_bytes: int = 8_000_000  # text taken for training, over the mixture


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 3e-3  # AdamW: embeddings, norms, heads, biases
    muon_lr: float = 0.02  # Muon: hidden matrices; 0 gives every parameter to AdamW
    betas: Tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    momentum: float = 0.95  # Muon's
    warmup: float = 0.03  # share of the steps with rising rate
    decay: float = 0.6  # share of the steps, at the end, over which the rate falls linearly
    final: float = 0.05  # last rate as a share of the peak
    clip: float = 1.0  # bound of the gradient's global norm


@dataclass(frozen=True)
class PretrainConfig:
    steps: int = 340
    rows: int = 16  # rows of `row_tokens` tokens in a step
    row_tokens: int = 256
    micro_rows: int = 16  # rows in one forward; gradients add up to a step
    evals: int = 4  # times that held-out bits per byte are measured
    sample_points: Tuple[float, ...] = (0.0, 0.03, 0.15, 0.4, 1.0)  # shares of the steps at which samples are drawn
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class SFTConfig:
    steps: int = 300
    batch_tokens: int = 4096
    examples: int = 20_000  # demonstrations in a pass, shared over the families
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, muon_lr=0.012, decay=0.9))


@dataclass(frozen=True)
class RewardConfig:
    epochs: int = 2  # passes over the human-labelled groups
    unfavourable: float = 0.0  # share of the human-labelled groups whose prompt asks for blame
    k: int = 8  # completions of a prompt that are ranked together
    groups_per_step: int = 8
    simulated_prompts: int = 128  # prompts whose K sampled completions the simulated labeller ranks
    loss: Literal["kwise", "pairwise"] = "kwise"  # a group's pairs count as one, or every pair alike
    margin: float = 0.0  # that a pair's scores are to be apart, for each rank between them
    members: int = 1  # models that judge together, each with a head and an order of its own
    member_score: Literal["mean", "min"] = "mean"  # of their scores
    normalise: Literal["after", "both", "none"] = "after"  # mean 0, deviation 1 on SFT samples: after training, or before it too
    labeller_temperature: float = 0.5  # of the simulated labeller's Bradley-Terry noise
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, muon_lr=0.006, decay=0.9))


@dataclass(frozen=True)
class RLConfig:
    """What all reinforcement learning from the reward model has in common."""

    steps: int = 28
    distinct_prompts: int = 3000  # that a step's prompts are drawn from, shared over the families
    max_new_tokens: int = 48
    temperature: float = 0.7  # of the sampler, and of every log-probability in training
    top_k: int = 0  # filters of the sampler; training's log-probabilities are those of the whole softmax
    top_p: float = 1.0
    min_p: float = 0.0
    importance_cap: float = 0.0  # weight actions by trainer over sampler, at most this; 0: not at all. Wanted with a filter
    missing_end: Literal["replace", "subtract", "keep"] = "replace"  # what becomes of the score without an end of turn
    missing_end_score: float = -1.0  # what replaces it, or is added to it
    kl_coef: float = 0.2  # beta at the start
    kl_target: float = 6.0  # nats per response that the controller keeps to; 0: beta stays as it is
    kl_horizon: int = 600  # episodes; the controller's
    kl_budget: float = 0.0  # nats per response beyond which the run stops; 0: none
    clip: float = 0.2  # of the probability ratio
    epochs: int = 1  # passes over each batch of rollouts
    minibatches: int = 4  # optimiser steps in a pass
    micro_episodes: int = 0  # episodes in one forward, gradients add up to a step; 0: all of a minibatch
    ratio_stop: float = 0.0  # a minibatch with a larger ratio ends its batch's passes; 0: none does
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4, muon_lr=0.0015, decay=0.3, final=0.3))


@dataclass(frozen=True)
class PPOConfig(RLConfig):
    prompts: int = 128  # rollouts in a step
    gamma: float = 1.0
    lam: float = 0.95
    kl_in: Literal["reward", "loss"] = "reward"
    kl_centred: bool = True  # in the reward: the penalty of a token is counted from the batch's mean, and so is neutral to length
    kl_loss: Literal["k1", "k2", "k3"] = "k2"  # in the loss: which estimator; only k2 has the gradient of the KL from the policy
    whiten_rewards: bool = False  # to deviation 1, their mean kept
    whiten_advantages: Literal["batch", "minibatch", "none"] = "batch"
    value: Literal["separate", "shared"] = "separate"  # a network of its own, or a head on the policy's
    value_init: Literal["reward", "zero"] = "reward"  # a separate one's weights: the reward model's, or SFT's with a head of zeros
    value_clip: float = 0.2
    value_coef: float = 0.1  # a shared head's weight in the loss
    value_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-4, muon_lr=0.003, decay=0.3, final=0.3))


@dataclass(frozen=True)
class GroupConfig(RLConfig):
    """RLOO, GRPO and REINFORCE: several responses to a prompt instead of a value model."""

    prompts: int = 32  # of a step
    samples: int = 4  # responses to each
    advantage: Annotated[Literal["rloo", "grpo", "reinforce"], tyro.conf.Suppress] = "rloo"  # in a run, the stage's own
    std_norm: bool = True  # grpo: divide by the group's deviation (off: Dr. GRPO)
    length_norm: bool = True  # grpo: a response's tokens count 1/length each (off: all tokens alike)
    baseline: bool = False  # reinforce: subtract the batch's mean reward


@dataclass(frozen=True)
class DPOConfig:
    steps: int = 60
    pairs_per_step: int = 32
    prompts: int = 1024  # whose samples the reward model compares
    samples: int = 4  # of each prompt: the best and the worst make a pair
    beta: float = 0.5  # the larger, the nearer to SFT: at 0.1 the run's pairs are fitted by heart and answers grow
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4, muon_lr=0.0015, decay=0.9))


@dataclass(frozen=True)
class EvalConfig:
    prompts: int = 512  # held-out prompts of the stage comparison
    best_of: int = 16
    shots: int = 4  # examples in the base model's prompt
    temperature: float = 0.7  # of every system


@dataclass(frozen=True)
class RunConfig:
    """All of a run. ``out`` is its folder; every stage starts from the one before."""

    out: str = "runs/first"
    seed: int = 0
    preset: str = "laptop"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute type; master weights stay float32
    device: str = "auto"
    deterministic: bool = False  # a token's log-prob is the same bits in rollouts and in training: ops.backend.deterministic
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    compared: Tuple[Literal["dpo", "rloo", "grpo", "reinforce"], ...] = ("dpo", "rloo", "grpo")  # trained beside PPO, from the same models
    dpo: DPOConfig = field(default_factory=DPOConfig)
    rloo: GroupConfig = field(default_factory=GroupConfig)
    grpo: GroupConfig = field(default_factory=lambda: GroupConfig(advantage="grpo"))
    reinforce: GroupConfig = field(default_factory=lambda: GroupConfig(advantage="reinforce"))
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        for name in ("data", "tokenizer", "pretrain", "sft", "reward", "ppo", "rloo", "grpo", "reinforce", "dpo", "eval"):
            _check_ranges(name, getattr(self, name))
        _require(self.seed >= 0, f"seed must be 0 or more, got {self.seed}")
        _require(self.eval.prompts >= 6, f"eval.prompts must be at least 6 for an interval in each family, "
                 f"got {self.eval.prompts}")
        _require(self.ppo.prompts >= self.ppo.minibatches,
                 f"ppo.prompts ({self.ppo.prompts}) cannot be cut into {self.ppo.minibatches} minibatches")
        for name in ("rloo", "grpo", "reinforce"):
            group = getattr(self, name)
            _require(group.samples >= 2 or name == "reinforce", f"{name}.samples must be at least 2 to compare, got {group.samples}")
            _require(group.prompts * group.samples >= group.minibatches,
                     f"{name}: {group.prompts} prompts of {group.samples} samples cannot be cut into {group.minibatches} minibatches")
            _require(group.max_new_tokens < self.model.context, f"{name}.max_new_tokens ({group.max_new_tokens}) leaves no room for a "
                     f"prompt in the model's context ({self.model.context})")
        for name in ("ppo", "rloo", "grpo", "reinforce"):
            rl = getattr(self, name)
            episodes = rl.prompts * getattr(rl, "samples", 1)
            _require(not rl.kl_target or episodes < 5 * rl.kl_horizon,  # a step moves beta by at most 0.2 · episodes / horizon of itself
                     f"{name}.kl_horizon ({rl.kl_horizon}) is too short for {episodes} responses in a step: beta could fall to 0")
        _require(self.dpo.loss == "sigmoid" or not self.dpo.label_smoothing, "dpo.label_smoothing is of the sigmoid loss; IPO has none")
        _require(self.dpo.samples >= 2, f"dpo.samples must be at least 2 to make a pair, got {self.dpo.samples}")
        # The tokenizer decides; the resolved configuration names one number.
        object.__setattr__(self, "model", replace(self.model, vocab_size=self.tokenizer.vocab_size))
        _require(self.pretrain.row_tokens <= self.model.context,
                 f"pretrain.row_tokens ({self.pretrain.row_tokens}) is longer than the model's context "
                 f"({self.model.context})")
        _require(self.ppo.max_new_tokens < self.model.context,
                 f"ppo.max_new_tokens ({self.ppo.max_new_tokens}) leaves no room for a prompt in the model's context "
                 f"({self.model.context})")
        _require(self.reward.k >= 2, f"reward.k must be at least 2 to rank anything, got {self.reward.k}")

    def to_dict(self) -> dict:
        """Every resolved value, as JSON holds it.

        >>> RunConfig().to_dict()["model"]["layers"]
        4
        """
        return json.loads(json.dumps(asdict(self)))


def laptop() -> RunConfig:
    """The main run: all stages in under 15 minutes on a 2-core CPU."""
    return RunConfig()


def tiny() -> RunConfig:
    """A smoke run of well under a minute: the same code on a model too small to be good at anything."""
    return RunConfig(
        preset="tiny",
        data=DataConfig(offline=True, max_source_bytes=600_000, held_out_bytes=4000),
        tokenizer=TokenizerConfig(vocab_size=768, train_bytes=400_000),
        model=ModelConfig(vocab_size=768, hidden_size=64, layers=2, heads=2, kv_heads=1, head_size=32,
                          intermediate_size=128, context=256),
        pretrain=PretrainConfig(steps=40, rows=16, row_tokens=64, micro_rows=16, evals=2, sample_points=(0.0, 1.0)),
        sft=SFTConfig(steps=30, batch_tokens=1024, examples=1000),
        reward=RewardConfig(epochs=1, k=4, groups_per_step=4, simulated_prompts=16),
        ppo=PPOConfig(steps=3, prompts=16, max_new_tokens=16, epochs=1),
        dpo=DPOConfig(steps=3, pairs_per_step=4, prompts=16, samples=4),
        rloo=GroupConfig(steps=3, prompts=4, max_new_tokens=16),
        grpo=GroupConfig(advantage="grpo", steps=3, prompts=4, max_new_tokens=16),
        reinforce=GroupConfig(advantage="reinforce", steps=3, prompts=4, max_new_tokens=16),
        eval=EvalConfig(prompts=16, best_of=2, shots=1),
    )


PRESETS = {"laptop": laptop, "tiny": tiny}


def preset(name: str, **changes) -> RunConfig:
    """The preset of that name with top-level fields replaced.

    >>> preset("tiny", seed=3).seed
    3
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(sorted(PRESETS))}")
    return replace(PRESETS[name](), **changes)
