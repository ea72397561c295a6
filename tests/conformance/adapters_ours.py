"""This package before the suite: dense tensors become ragged ones, and come back."""

from types import SimpleNamespace

import torch

from nanorlhf import ops
from nanorlhf.config import OptimConfig, PPOConfig, RLConfig
from nanorlhf.evals import best_of_n, reward_quality
from nanorlhf.optim import AdamW, learning_rate
from nanorlhf.train import loss, objective, ppo
from nanorlhf.train.rollout import end_rule
from .systems_ours import Systems


def bounds(mask):
    """(B+1,): where the rows' tokens that count begin and end, end to end."""
    return torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))


def dense(x, mask):
    """(M,) → (B, T), 0 where nothing counts."""
    return torch.zeros(mask.shape, dtype=x.dtype).masked_scatter(mask, x)


class Ours(Systems):
    name = "nanorlhf"

    # --- tokens ---
    def token_logprobs(self, logits, ids, temperature):
        return ops.logits_logprobs(logits.flatten(0, 1), ids.flatten(), temperature)[0].view(ids.shape)

    def entropy(self, logits, mask):
        rows = logits[mask]
        return ops.logits_logprobs(rows, torch.zeros(len(rows), dtype=torch.int64), 1.0)[1].mean()

    def sft_loss(self, logits, ids, learn):
        cu_seqlens = torch.arange(len(ids) + 1, dtype=torch.int32) * ids.shape[1]
        where = ops.next_token_positions(cu_seqlens)
        where = where[learn.flatten()[where + 1]]
        return -ops.logits_logprobs(logits.flatten(0, 1)[where], ids.flatten()[where + 1])[0].mean()

    # --- means and divergences ---
    def masked_mean(self, x, mask):
        return objective.average(x[mask], bounds(mask))

    def whiten(self, x, mask, shift_mean):
        return dense(loss.whiten(x[mask], shift_mean), mask)

    def kl(self, logprobs, ref_logprobs, kind):
        return loss.kl_loss(logprobs, ref_logprobs, kind)

    def exact_kl(self, logits, ref_logits):
        return objective.logits_kl(logits, ref_logits)

    def importance_weights(self, logprobs, sampled, cap):
        return objective.importance_weights(logprobs, sampled, cap)

    # --- PPO ---
    def token_rewards(self, scores, logprobs, ref_logprobs, mask, beta):
        rollout = SimpleNamespace(logprobs=logprobs[mask], ref_logprobs=ref_logprobs[mask], scores=scores, cu_actions=bounds(mask))
        return dense(ppo.token_rewards(rollout, beta, PPOConfig(kl_centred=False)), mask)

    def gae(self, rewards, values, mask, gamma, lam):
        return tuple(dense(x, mask) for x in loss.gae(rewards[mask], values[mask], bounds(mask), gamma, lam))

    def advantages(self, rewards, values, mask, gamma, lam):
        return dense(loss.whiten(loss.gae(rewards[mask], values[mask], bounds(mask), gamma, lam)[0]), mask)

    def policy_loss(self, logprobs, old, advantages, mask, clip):
        return loss.ppo_policy_loss(logprobs[mask], old[mask], advantages[mask], clip).loss

    def value_loss(self, values, old, returns, mask, clip):
        return loss.ppo_value_loss(values[mask], old[mask], returns[mask], clip).loss

    def policy_metrics(self, logprobs, old, advantages, mask, clip):
        found = loss.ppo_policy_loss(logprobs[mask], old[mask], advantages[mask], clip)
        return {"approx_kl": found.kl2, "clip_fraction": found.clip_fraction}

    def accumulated_loss(self, terms, mask, sizes):
        parts = zip(terms.split(sizes), mask.split(sizes))
        return sum(objective.average(x[m], bounds(m), count=int(mask.sum())) for x, m in parts)

    def kl_controller(self, beta, target, horizon):
        controller = loss.AdaptiveKL(beta, target, horizon)
        return lambda kl, episodes: (controller.update(kl, episodes), controller.beta)[1]

    def missing_end(self, scores, finished, value):
        return end_rule(scores, finished, RLConfig(missing_end_score=value))

    def defaults(self):
        return {"gamma": PPOConfig.gamma, "lam": PPOConfig.lam, "clip": PPOConfig.clip, "value_clip": PPOConfig.value_clip}

    # --- rewards and preferences ---
    def kwise_loss(self, scores, ranks):
        return loss.kwise_loss(scores, ranks, torch.tensor([0, len(scores)]))[0]

    def pairwise_loss(self, better, worse, margins):
        return loss.pairwise_loss(better, worse, margins).mean()

    def dpo_loss(self, chosen, rejected, ref_chosen, ref_rejected, beta, smoothing):
        return loss.dpo_loss((chosen - ref_chosen) - (rejected - ref_rejected), beta, smoothing)

    def ipo_loss(self, chosen, rejected, ref_chosen, ref_rejected, beta):
        return loss.ipo_loss((chosen - ref_chosen) - (rejected - ref_rejected), beta)

    def pair_accuracy(self, gaps):
        return reward_quality.accuracy(gaps)

    def calibration(self, gaps):
        return reward_quality.calibration(gaps)

    # --- groups ---
    def rloo_advantages(self, rewards):
        return loss.rloo_advantages(rewards.flatten(), rewards.shape[1]).view(rewards.shape)

    def grpo_advantages(self, rewards, std_norm):
        return loss.grpo_advantages(rewards.flatten(), rewards.shape[1], std_norm).view(rewards.shape)

    def grpo_loss(self, logprobs, old, ref_logprobs, advantages, mask, clip, beta, length_norm, longest):
        gain = advantages.repeat_interleave(mask.sum(1))
        terms = loss.policy_terms(logprobs[mask], old[mask], gain, clip)[0] + beta * loss.kl_loss(logprobs[mask], ref_logprobs[mask], "k3")
        return objective.average(terms, bounds(mask), "sequence" if length_norm else "sum", length=longest)

    def reinforce_loss(self, logprobs, rewards, mask, baseline):
        return objective.reinforce_loss(logprobs[mask], rewards, bounds(mask), baseline)

    def best_of_n_kl(self, n):
        return best_of_n.kl_bound(n)

    # --- updates ---
    def adam(self, gradients, lr, betas, eps):
        p, values = torch.nn.Parameter(torch.zeros(1)), []
        optimizer = AdamW([p], lr=lr, betas=betas, eps=eps, weight_decay=0.0)
        for g in gradients:
            p.grad = torch.tensor([g])
            optimizer.step()
            values.append(float(p.detach()))
        return values

    def learning_rate(self, step, steps):
        return learning_rate(step, steps, OptimConfig(warmup=0.0, decay=1.0, final=0.0))


OURS = Ours()
