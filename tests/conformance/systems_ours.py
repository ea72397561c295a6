"""This package's models, engine and stages before the suite, on a model small enough to be checked by enumeration."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import tiny
from nanorlhf import chat, parallel
from nanorlhf.config import ModelConfig, OptimConfig, PPOConfig, RewardConfig
from nanorlhf.data.instruct import instruct_pairs
from nanorlhf.data.mixture import split_held_out
from nanorlhf.data.sources import load_sources
from nanorlhf.engine import SamplingConfig, generate
from nanorlhf.engine.generate import ragged
from nanorlhf.model import Model
from nanorlhf.ops import backend
from nanorlhf.optim import Optimizer
from nanorlhf.train import ppo, sft
from nanorlhf.train.reward import Ranking, normalise, score_all, score_sequences, train_reward
from nanorlhf.train.rollout import Judge, Rollout, drawn_prompts, roll_out

GOOD, END = 7, 21
PROMPTS = tiny.random_sequences(12, 6, seed=5)
SLOW = replace(tiny.OPTIM, lr=0.003, muon_lr=0.003)
CONFIG = PPOConfig(steps=2, prompts=12, max_new_tokens=8, temperature=1.0, epochs=2, minibatches=2, kl_coef=0.05, kl_horizon=100,
                   missing_end_score=-1.0, optim=SLOW, value_optim=tiny.OPTIM)


def judged(sequences):
    return torch.tensor([s[-8:].count(GOOD) - 1.0 for s in sequences])


JUDGE = Judge(judged, END)


class Systems:
    vocab, longest, end = tiny.SHAPE.vocab_size, tiny.SHAPE.context, END

    def __init__(self):
        self.net, self.reward_model = tiny.model(0), tiny.model(1, scalar_head=True)

    # --- models ---
    @torch.no_grad()
    def score(self, sequences):
        return score_sequences(self.reward_model, sequences)

    @torch.no_grad()
    def logprobs(self, sequences, temperature=1.0):
        found = self.net.train().logprobs(*ragged(sequences), temperature=temperature)[0]  # as while training
        return [part.tolist() for part in found.split([len(s) - 1 for s in sequences])]

    def generate(self, prompts, count, n=1, temperature=1.0, top_k=0, seed=0, stop=()):
        drawn = generate(self.net, prompts, count, n, stop, SamplingConfig(temperature, top_k), seed)
        return [(c.ids, c.logprobs, c.finished) for c in drawn]

    def head_weights(self, width):
        """The scalar head of a new reward model: weight (width,), and its bias or None."""
        shape = dict(hidden_size=width, layers=1, intermediate_size=8)
        head = Model(ModelConfig(**{**tiny.SHAPE.__dict__, **shape}), scalar_head=True, seed=3).score
        return head.weight.detach().flatten(), head.bias

    @torch.no_grad()
    def normalised_scores(self, fitted, fresh):
        """Scores after the reward model was normalised on samples: (of those samples, of fresh ones)."""
        net = tiny.model(4, scalar_head=True)
        net.score.weight.mul_(7.3)
        offset = normalise(net, fitted)
        return score_all(net, fitted) - offset, score_all(net, fresh) - offset

    @torch.no_grad()
    def initial_values(self, sequences, start):
        """(value at every id, score of the sequence) for a value model that starts from "zero" or from the "reward" model."""
        offset = 0.375  # what normalisation took off the scores
        value = tiny.model(1, scalar_head=True)
        if start == "zero":
            torch.nn.init.zeros_(value.score.weight)
        critic = ppo.Critic(value, offset if start == "reward" else 0.0)
        tokens, cu_seqlens = ragged(sequences)
        values = critic(tokens, cu_seqlens, torch.arange(len(tokens)))
        return [v.tolist() for v in values.split([len(s) for s in sequences])], (self.score(sequences) - offset).tolist()

    # --- text ---
    def render(self, messages, generation_prompt=False):
        """(ids, which of them are learnt, the end-of-turn id, the id that opens the assistant's turn)."""
        tok = tiny.byte_tokenizer()
        ids, mask = chat.render(tok, messages, generation_prompt)
        return ids, mask, tok.special_tokens[chat.END], tok.special_tokens[chat.ASSISTANT]

    def splits(self):
        """{what: (train, held out)} of texts."""
        sources, _ = load_sources(["topics"], offline=True)
        train, held = instruct_pairs(sources, None, 0)
        return {**split_held_out(sources), "responses": ([e.response for e in train], [e.response for e in held])}

    def sft_step(self, examples):
        """The loss of an SFT batch of (ids, mask), and its gradient by the output weight, (V, C)."""
        net = tiny.model(0)
        logprobs, _ = sft.response_logprobs(net, examples)
        loss = -logprobs.mean()
        loss.backward()
        return float(loss.detach()), net.head_weight.grad

    def reward_order(self, groups):
        """Which groups one pass of reward training looked at, in order."""
        net, seen = tiny.model(0, scalar_head=True), []
        own = net.scores
        net.scores = lambda tokens, cu_seqlens, where: (seen.extend(tokens[cu_seqlens[:-1].long()][::2].tolist()),
                                                        own(tokens, cu_seqlens, where))[1]
        rankings = [Ranking("made", [[i, 1, END], [i, 2, END]], [0, 1]) for i in range(groups)]
        with tempfile.TemporaryDirectory() as folder:
            train_reward(net, [rankings], RewardConfig(groups_per_step=4, optim=tiny.OPTIM), 5, tiny.saving(Path(folder)),
                         lambda m: {}, lambda row: None)
        return seen

    # --- reinforcement learning ---
    def ranks(self, prompts, ranks):
        """For each rank (its prompts, what it drew) of one step, every prompt with its responses."""
        asked = drawn_prompts(prompts, len(prompts), 0, 0)
        shares = [parallel.share(len(asked), rank, ranks) for rank in range(ranks)]
        return [(asked[s], [c.ids for c in generate(self.net, asked[s], 6, seed=0, first_request=s.start)]) for s in shares]

    def rollout(self, **changes):
        """(prompts, the sampler's ids and log-probs by response, the Rollout that training takes)."""
        config, (policy, ref, value) = replace(CONFIG, **changes), self.models()
        sampling = SamplingConfig(config.temperature, config.top_k, config.top_p, config.min_p)
        drawn = generate(policy, PROMPTS, config.max_new_tokens, 1, [END], sampling, 3)
        return PROMPTS, drawn, roll_out(policy, ref, value.scores, JUDGE, PROMPTS, config, 3)

    def models(self, shared=False):
        policy = tiny.model(0, scalar_head=shared, loud=False)
        return policy, tiny.model(0, loud=False), policy if shared else tiny.model(2, scalar_head=True, loud=False)

    def ppo_rows(self, **changes):
        """The logged rows of a PPO run that starts at its reference, in kernels whose bits no batch changes."""
        rows, before = [], backend.deterministic(True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                ppo.ppo(*self.models(), JUDGE, PROMPTS, replace(CONFIG, **changes), 0, tiny.saving(Path(folder)), rows.append)
        finally:
            backend.deterministic(before)
        return rows

    def ppo_resumed(self):
        """(policy and value model of a run of three steps, those of one that was killed at the third and went on)."""
        config, ended = replace(CONFIG, steps=3), []
        with tempfile.TemporaryDirectory() as folder:
            for name, logs in (("whole", [lambda row: None]), ("cut", [tiny.killed_at(3), lambda row: None])):
                for log in logs:
                    nets = self.models()
                    try:
                        ppo.ppo(*nets, JUDGE, PROMPTS, config, 0, tiny.saving(Path(folder) / name), log)
                    except tiny.Killed:
                        continue
                ended.append(nets[::2])
        return ended

    def ppo_moves(self, policy_rate, value_rate):
        """Which of (policy, reference, value model) one step of PPO changes at these learning rates."""
        rate = lambda x: OptimConfig(lr=x, muon_lr=x, weight_decay=0.0)
        config = replace(CONFIG, steps=1, optim=rate(policy_rate), value_optim=rate(value_rate))
        nets, starts = self.models(), self.models()
        with tempfile.TemporaryDirectory() as folder:
            ppo.ppo(*nets, JUDGE, PROMPTS, config, 0, tiny.saving(Path(folder)), lambda row: None)
        return [not tiny.same_weights(a, b) for a, b in zip(nets, starts)]

    def ppo_weights(self, **changes):
        """The policy's weights (n,) in fp64 after the passes over one rollout of another policy."""
        config = replace(CONFIG, **changes)
        policy, ref, value = tiny.model(3, loud=False), tiny.model(0, loud=False), tiny.model(2, scalar_head=True, loud=False)
        rollout = roll_out(policy, ref, value.scores, JUDGE, PROMPTS, config, 1)
        rollout = Rollout(**{k: v.double() if v.is_floating_point() else v for k, v in rollout.__dict__.items()})
        policy, value = (net.double() for net in (policy, value))
        policy.compute_dtype = value.compute_dtype = torch.float64
        optimizers = [Optimizer(policy, config.optim, 4), Optimizer(value, config.value_optim, 4)]
        ppo.update(policy, ppo.Critic(value), optimizers, rollout, 0.1, config, 0, 0)
        return torch.cat([p.detach().flatten() for p in policy.parameters()])
