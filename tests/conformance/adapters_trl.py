"""TRL before the suite: its functions, its trainers' loss methods on a stand-in for the trainer, and lines in between.

    python -m pytest tests/conformance --adapter=conformance.adapters_trl:TRL        what has GRPO, RLOO, DPO and the reward model's loss
    python -m pytest tests/conformance --adapter=conformance.adapters_trl:TRL_PPO    PPO, which TRL has up to 1.12
"""

import importlib.metadata
import inspect
from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl.experimental.utils import get_reward
from trl.trainer import dpo_trainer, grpo_trainer, reward_trainer, rloo_trainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from .contract import Missing
from .excerpt import excerpt, ran

VERSION = importlib.metadata.version("trl")
DPO = excerpt(inspect.getsource(dpo_trainer.DPOTrainer._compute_loss), "chosen_logratios = ", "# Log the metrics")
RLOO = excerpt(inspect.getsource(rloo_trainer.RLOOTrainer._generate_and_score_completions), "grouped_rewards = rewards.view(", "# Unscorable")
GRPO = excerpt(inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions), "mean_grouped_rewards = torch.nanmean(rewards", "is_std_zero")
GRPO_KL = excerpt(inspect.getsource(grpo_trainer.GRPOTrainer._compute_loss), "per_token_kl = (", "# Importance sampling correction")


def stand_in(**names):
    """What the loss methods read of a trainer beside the arguments given: one process, training, nothing optional switched on."""
    alone = SimpleNamespace(num_processes=1, device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, **_: x,
                            sync_gradients=True)
    return SimpleNamespace(**{
        "accelerator": alone, "model": SimpleNamespace(training=True), "aux_loss_enabled": False, "_metrics": defaultdict(lambda: defaultdict(list)),
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token", "use_vllm": False,
        "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False, "_total_train_tokens": 0, "_tp_size": 1, "beta": 0.0,
        "max_completion_length": 1, "use_weighting": False, **names})


def grpo(logprobs, old, advantages, mask, clip, kind="bnpo", entropies=None, ref=None, parts=1, count=None, **names):
    """(loss, metrics) of GRPOTrainer on log-probs that the model is said to have given."""
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=parts)
    trainer = stand_in(
        loss_type=kind, epsilon_low=clip, epsilon_high=clip, args=args, current_gradient_accumulation_steps=parts,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs) if entropies is None else entropies, None), **names)
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = dict(prompt_ids=ids[:, :1], prompt_mask=mask[:, :1].long(), completion_ids=ids, completion_mask=mask.long(), advantages=advantages,
                  old_per_token_logps=old, ref_per_token_logps=ref, num_items_in_batch=mask.sum() if count is None else count)
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


class Trl:
    name = f"TRL {VERSION}"

    def token_logprobs(self, logits, ids, temperature):
        return selective_log_softmax(logits / temperature, ids)

    def entropy(self, logits, mask):
        rows = torch.zeros(mask.shape, dtype=logits.dtype)
        return torch.tensor(grpo(rows, rows, rows, mask, 0.2, entropies=entropy_from_logits(logits))[1]["entropy"])

    def kl(self, logprobs, ref_logprobs, kind):
        if kind != "k3":
            raise Missing(f"TRL's GRPO has no {kind}")
        return ran(GRPO_KL, torch=torch, per_token_logps=logprobs, ref_per_token_logps=ref_logprobs)["per_token_kl"]

    def policy_loss(self, logprobs, old, advantages, mask, clip):
        return grpo(logprobs, old, advantages, mask, clip)[0]

    def policy_metrics(self, logprobs, old, advantages, mask, clip):
        return {"clip_fraction": grpo(logprobs, old, advantages, mask, clip)[1]["clip_ratio/region_mean"]}

    def accumulated_loss(self, terms, mask, sizes):
        """GRPOTrainer's default, "dapo": at ratio 1 a term is minus its advantage."""
        zero = torch.zeros_like(terms)
        parts = zip(*(x.split(sizes) for x in (zero, terms, mask)))
        return sum(grpo(z, z, -x, m, 0.2, "dapo", parts=len(sizes), count=mask.sum())[0] for z, x, m in parts)

    def grpo_advantages(self, rewards, std_norm):
        trainer = SimpleNamespace(scale_rewards="group" if std_norm else "none")
        found = ran(GRPO, torch=torch, nanstd=grpo_trainer.nanstd, rewards=rewards.flatten(), num_generations=rewards.shape[1], self=trainer)
        return found["advantages"].view(rewards.shape)

    def grpo_loss(self, logprobs, old, ref_logprobs, advantages, mask, clip, beta, length_norm, longest):
        kind = "grpo" if length_norm else "dr_grpo"
        return grpo(logprobs, old, advantages, mask, clip, kind, ref=ref_logprobs, beta=beta, max_completion_length=longest)[0]

    def rloo_advantages(self, rewards):
        found = ran(RLOO, torch=torch, nanstd=rloo_trainer.nanstd, rewards=rewards.flatten(), num_generations=rewards.shape[1],
                    self=SimpleNamespace(normalize_advantages=False))
        return found["advantages"].view(rewards.shape)

    def _pairs(self, kind, chosen, rejected, ref_chosen, ref_rejected, beta, smoothing=0.0):
        trainer = stand_in(f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], beta=beta, label_smoothing=smoothing)
        losses = [ran(DPO, torch=torch, F=nn.functional, math=None, self=trainer, device="cpu", mode="train", chosen_logps=a, rejected_logps=b,
                      ref_chosen_logps=c, ref_rejected_logps=d, completion_mask=torch.ones(2, 1))["loss"]
                  for a, b, c, d in zip(*(x.split(1) for x in (chosen, rejected, ref_chosen, ref_rejected)))]
        return torch.stack(losses)

    def dpo_loss(self, chosen, rejected, ref_chosen, ref_rejected, beta, smoothing):
        if smoothing:
            raise Missing("TRL's sigmoid loss takes no label smoothing")
        return self._pairs("sigmoid", chosen, rejected, ref_chosen, ref_rejected, beta)

    def ipo_loss(self, chosen, rejected, ref_chosen, ref_rejected, beta):
        """Of one token each: TRL averages over the tokens of a response, where eq. 17 has the log-probability of the whole."""
        return self._pairs("ipo", chosen, rejected, ref_chosen, ref_rejected, beta)

    def pairwise_loss(self, better, worse, margins):
        trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=None))
        inputs = {"margin": margins, "attention_mask": torch.ones(1)}
        model = lambda **_: SimpleNamespace(logits=torch.cat([better, worse])[:, None])
        return reward_trainer.RewardTrainer.compute_loss(trainer, model, inputs)

    # A reward model of transformers, with random weights, read as TRL reads it: padded on the right with an id of its own.
    vocab, longest, pad = 23, 32, 23

    def score(self, sequences):
        if not hasattr(self, "net"):
            torch.manual_seed(0)
            shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
            self.net = LlamaForSequenceClassification(LlamaConfig(vocab_size=24, num_labels=1, pad_token_id=23, initializer_range=0.3, **shape)).eval()
        longest = max(map(len, sequences))
        rows = torch.tensor([s + [self.pad] * (longest - len(s)) for s in sequences])
        with torch.no_grad():
            return get_reward(self.net, rows, self.pad, 0)[1]


TRL = Trl()

try:
    from trl.experimental.ppo import ppo_trainer
except ImportError:  # removed
    ppo_trainer = None


class TrlPPO:
    """The lines of PPOTrainer.train, in its order. A response's ``sequence_lengths`` is the index of its last token."""

    name = f"TRL {VERSION}, PPO"

    def __init__(self):
        source = inspect.getsource(ppo_trainer.PPOTrainer.train)
        self.end = excerpt(source, "# Response Processing 3.", "# be very careful")
        self.masks = excerpt(source, "response_idxs = torch.arange(", "# 4. compute rewards")
        self.rewards = excerpt(source, "# 4. compute rewards", "# 5. whiten rewards")
        self.scan = excerpt(source, "# 6. compute advantages and returns", "empty_cache()")
        self.losses = excerpt(source, "vpredclipped = torch.clamp(", "accelerator.backward(loss)")
        self.figures = excerpt(source, "pg_clipfrac = masked_mean(", "gradient_accumulation_idx += 1")

    def _masked(self, mask, values=None, logprobs=None, ref_logprobs=None):
        empty = torch.zeros(mask.shape, dtype=torch.float64)
        given = {"values": values, "logprobs": logprobs, "ref_logprobs": ref_logprobs}
        return ran(self.masks, torch=torch, INVALID_LOGPROB=ppo_trainer.INVALID_LOGPROB, responses=torch.zeros(mask.shape), sequence_lengths=mask.sum(1) - 1,
                   **{name: empty if x is None else x for name, x in given.items()})

    def _scanned(self, rewards, values, mask, gamma, lam):
        names = self._masked(mask, values)
        return ran(self.scan, **{**names, "rewards": rewards, "args": SimpleNamespace(gamma=gamma, lam=lam), "masked_whiten": ppo_trainer.masked_whiten})

    def masked_mean(self, x, mask):
        return ppo_trainer.masked_mean(x, mask)

    def whiten(self, x, mask, shift_mean):
        return ppo_trainer.masked_whiten(x, mask, shift_mean)

    def kl(self, logprobs, ref_logprobs, kind):
        if kind == "k2":
            raise Missing("TRL's PPO has no k2")
        code = excerpt(self.rewards, "logr = ", "rewards = non_score_reward.clone()")
        return ran(code, args=SimpleNamespace(kl_estimator=kind, kl_coef=0.0), logprobs=logprobs, ref_logprobs=ref_logprobs)["kl"]

    def token_rewards(self, scores, logprobs, ref_logprobs, mask, beta):
        names = self._masked(mask, None, logprobs, ref_logprobs)
        return ran(self.rewards, **{**names, "scores": scores, "args": SimpleNamespace(kl_estimator="k1", kl_coef=beta)})["rewards"]

    def gae(self, rewards, values, mask, gamma, lam):
        names = self._scanned(rewards, values, mask, gamma, lam)
        return names["returns"] - names["values"], names["returns"]

    def advantages(self, rewards, values, mask, gamma, lam):
        return self._scanned(rewards, values, mask, gamma, lam)["advantages"]

    def _updated(self, mask, clip, logprobs=None, old=None, advantages=None, values=None, old_values=None, returns=None):
        empty = torch.zeros(mask.shape, dtype=torch.float64)
        new, old, mb_advantage, vpred, mb_values, mb_return = (empty if x is None else x for x in (logprobs, old, advantages, values, old_values, returns))
        invalid = ppo_trainer.INVALID_LOGPROB  # as the lines before mask them
        return ran(self.losses, torch=torch, masked_mean=ppo_trainer.masked_mean, vpred=vpred.masked_fill(~mask, 0), mb_values=mb_values,
                   mb_return=mb_return, new_logprobs=new.masked_fill(~mask, invalid), mb_logprobs=old.masked_fill(~mask, invalid),
                   mb_advantage=mb_advantage, padding_mask=~mask, padding_mask_p1=~mask, micro_batch_inds=slice(None),
                   args=SimpleNamespace(cliprange=clip, cliprange_value=clip, vf_coef=1.0))

    def policy_loss(self, logprobs, old, advantages, mask, clip):
        return self._updated(mask, clip, logprobs, old, advantages)["pg_loss"]

    def value_loss(self, values, old, returns, mask, clip):
        return self._updated(mask, clip, values=values, old_values=old, returns=returns)["vf_loss"]

    def _figures(self, names, logits):
        kept = {f"{name}_stats": {} for name in ("approxkl", "pg_clipfrac", "pg_loss", "vf_loss", "vf_clipfrac", "entropy", "ratio")}
        ran(self.figures, **{**names, **kept, "logits": logits, "ppo_epoch_idx": 0, "minibatch_idx": 0, "gradient_accumulation_idx": 0})
        return {name.removesuffix("_stats"): x[0, 0, 0] for name, x in kept.items()}

    def policy_metrics(self, logprobs, old, advantages, mask, clip):
        found = self._figures(self._updated(mask, clip, logprobs, old, advantages), torch.zeros(*mask.shape, 2))
        return {"approx_kl": found["approxkl"], "clip_fraction": found["pg_clipfrac"], "ratio_mean": found["ratio"]}

    def entropy(self, logits, mask):
        return self._figures(self._updated(mask, 0.2), logits)["entropy"]

    def accumulated_loss(self, terms, mask, sizes):
        """Accelerate divides each micro-batch's loss by their number; at ratio 1 a term is minus its advantage."""
        zero = torch.zeros_like(terms)
        parts = zip(*(x.split(sizes) for x in (zero, terms, mask)))
        return sum(self.policy_loss(z, z, -x, m, 0.2) / len(sizes) for z, x, m in parts)

    def missing_end(self, scores, finished, value):
        return ran(self.end, torch=torch, scores=scores.clone(), postprocessed_responses=finished.long()[:, None],
                   self=SimpleNamespace(args=SimpleNamespace(missing_eos_penalty=-value), processing_class=SimpleNamespace(eos_token_id=1)))["scores"]

    def truncate(self, responses, stop, pad):
        return ppo_trainer.truncate_response(stop, pad, responses)

    def defaults(self):
        from trl.experimental.ppo import PPOConfig

        return {name: PPOConfig.__dataclass_fields__[name].default for name in ("gamma", "lam")}

    score, vocab, longest, pad = Trl.score, Trl.vocab, Trl.longest, Trl.pad


if ppo_trainer is not None:
    TRL_PPO = TrlPPO()
