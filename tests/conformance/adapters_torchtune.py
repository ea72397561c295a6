"""torchtune before the suite: torchtune.rlhf, its losses, and the lines of the PPO recipe that stand between them.

    python -m pytest tests/conformance --adapter=conformance.adapters_torchtune:TORCHTUNE
"""

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import torch
import torchtune
from torchtune import rlhf
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.rlhf.loss import DPOLoss, PPOLoss

from .contract import Missing
from .excerpt import excerpt, ran

RECIPE = (Path(torchtune.__file__).parents[1] / "recipes" / "ppo_full_finetune_single_device.py").read_text()
MASKING = excerpt(RECIPE, "# step 5.2 if configured", "return Trajectory(")
FIGURES = excerpt(RECIPE, "approx_policy_kls = (", "return PPOStats(")


def trajectory(mask, scores=None, values=None, logprobs=None, ref_logprobs=None, penalty=None):
    """The recipe's names after it has masked a trajectory, the arguments standing for what the models gave."""
    empty = torch.zeros(mask.shape, dtype=torch.float64)
    return SimpleNamespace(**ran(
        MASKING, torch=torch, rlhf=rlhf, response_padding_masks=~mask, seq_lens=mask.sum(1) - 1,
        scores=empty[:, 0].clone() if scores is None else scores.clone(), values=(empty if values is None else values).clone(),
        logprobs=(empty if logprobs is None else logprobs).clone(), ref_logprobs=(empty if ref_logprobs is None else ref_logprobs).clone(),
        self=SimpleNamespace(_penalise_no_eos=penalty is not None, _min_response_length=None, _reward_penalty=penalty,
                             _max_generated_tokens=mask.shape[1])))


class TorchTune:
    name = f"torchtune {importlib.metadata.version('torchtune')}"

    def token_logprobs(self, logits, ids, temperature):
        return rlhf.logits_to_logprobs(logits, ids, temperature)

    def sft_loss(self, logits, ids, learn):
        labels = torch.hstack([ids.masked_fill(~learn, -100)[:, 1:], torch.full_like(ids[:, :1], -100)])
        return CEWithChunkedOutputLoss(num_output_chunks=1)([logits], labels)

    def masked_mean(self, x, mask):
        return rlhf.masked_mean(x, mask)

    def whiten(self, x, mask, shift_mean):
        return rlhf.whiten(x, mask, shift_mean)

    def kl(self, logprobs, ref_logprobs, kind):
        if kind != "k1":
            raise Missing(f"torchtune has no {kind}")
        return rlhf.get_rewards_ppo(torch.zeros(len(logprobs), dtype=logprobs.dtype), logprobs, ref_logprobs, 0.0)[1]

    def token_rewards(self, scores, logprobs, ref_logprobs, mask, beta):
        t = trajectory(mask, scores, None, logprobs, ref_logprobs)
        return rlhf.get_rewards_ppo(t.scores, t.logprobs, t.ref_logprobs, beta, t.value_seq_idxs)[0]

    def gae(self, rewards, values, mask, gamma, lam):
        t = trajectory(mask, values=values)
        _, returns = rlhf.estimate_advantages(t.values, rewards, gamma, lam, masks=mask)
        return returns - t.values, returns

    def advantages(self, rewards, values, mask, gamma, lam):
        return rlhf.estimate_advantages(trajectory(mask, values=values).values, rewards, gamma, lam, masks=mask)[0]

    def policy_loss(self, logprobs, old, advantages, mask, clip):
        zero = torch.zeros_like(logprobs)
        return PPOLoss(clip, 0.2, 0.0)(old, logprobs, advantages, zero, zero, zero, mask, mask)[0]

    def value_loss(self, values, old, returns, mask, clip):
        zero = torch.zeros_like(values)
        return PPOLoss(0.2, clip, 1.0)(zero, zero, zero, old, values, returns, mask, mask)[0]

    def policy_metrics(self, logprobs, old, advantages, mask, clip):
        logprobs, old = (x.masked_fill(~mask, 1.0) for x in (logprobs, old))  # as the recipe masks them
        zero = torch.zeros_like(logprobs)
        *_, ratios, clipped = PPOLoss(clip, 0.2, 0.0)(old, logprobs, advantages, zero, zero, zero, mask, mask)
        found = ran(FIGURES, pi_logprobs=logprobs, trajectory=SimpleNamespace(logprobs=old))
        return {"approx_kl": found["approx_policy_kls"], "clip_fraction": clipped, "ratio_mean": ratios}

    def accumulated_loss(self, terms, mask, sizes):
        """The recipe's loss of a micro-batch over the number of micro-batches; at ratio 1 a term is minus its advantage."""
        zero = torch.zeros_like(terms)
        parts = zip(*(x.split(sizes) for x in (zero, terms, mask)))
        return sum(self.policy_loss(z, z, -x, m, 0.2) / len(sizes) for z, x, m in parts)

    def missing_end(self, scores, finished, value):
        return trajectory(torch.stack([torch.ones_like(finished), ~finished], 1), scores, penalty=value).scores

    def truncate(self, responses, stop, pad):
        return rlhf.truncate_sequence_at_first_stop_token(responses.clone(), torch.tensor([stop]), pad)[1]

    def dpo_loss(self, chosen, rejected, ref_chosen, ref_rejected, beta, smoothing):
        return DPOLoss(beta, smoothing)(chosen, rejected, ref_chosen, ref_rejected)[0]

    def adam(self, gradients, lr, betas, eps):
        """torch's own, which the recipes' configurations name."""
        p, values = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)), []
        optimizer = torch.optim.AdamW([p], lr=lr, betas=betas, eps=eps, weight_decay=0.0)
        for g in gradients:
            p.grad = torch.tensor([g], dtype=torch.float64)
            optimizer.step()
            values.append(float(p.detach()))
        return values


TORCHTUNE = TorchTune()
