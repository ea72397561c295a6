"""The comparison that the talk shows from InstructGPT: base, prompted base, SFT, best-of-n and PPO on the same
held-out prompts, under a judge that no stage trained on."""

from dataclasses import dataclass, field
from typing import Callable, Dict, List, Sequence

import torch

from .. import chat as chat_format
from ..assistant import Assistant
from ..data.instruct import Example, few_shot
from ..engine import Completion, SamplingConfig, generate
from ..engine.generate import ragged
from .best_of_n import best_of_n


@dataclass
class Answers:
    """One system's responses to the prompts, in order. tokens: response lengths; entropy: mean nats per token."""

    texts: List[str] = field(default_factory=list)
    tokens: List[int] = field(default_factory=list)
    entropy: float = float("nan")


@torch.no_grad()
def mean_entropy(assistant: Assistant, prompts: Sequence[List[int]], drawn: Sequence[Completion],
                 temperature: float) -> float:
    """Mean entropy, in nats, of the model's distribution over the tokens it sampled."""
    model, total, count = assistant.model, 0.0, 0
    for i in range(0, len(prompts), 128):
        part = list(zip(prompts[i:i + 128], drawn[i:i + 128]))
        tokens, cu_seqlens = ragged([p + c.ids for p, c in part], model.device)
        mask, _ = ragged([[0] * len(p) + [1] * len(c.ids) for p, c in part], model.device)
        _, entropy = model.logprobs(tokens, cu_seqlens, torch.nonzero(mask).squeeze(-1) - 1, temperature)
        total, count = total + float(entropy.sum()), count + len(entropy)
    return total / max(count, 1)


def complete_lines(base: Assistant, documents: Sequence[str], max_new_tokens: int, temperature: float,
                   seed: int) -> Answers:
    """A base model's continuation of each document, up to the end of the line."""
    prompts = [[base.end_of_text] + base.tokenizer.encode(d) for d in documents]
    room = base.model.config.context - max_new_tokens
    prompts = [p[:1] + p[max(1, len(p) - room + 1):] for p in prompts]  # of a long prompt the end, where the task is
    newlines = base.tokens_with("\n")
    drawn = generate(base.model, prompts, max_new_tokens, stop=[base.end_of_text, *newlines],
                     sampling=SamplingConfig(temperature), seed=seed)
    texts = [base.text(c).split("\n")[0].strip() for c in drawn]
    return Answers(texts, [len(c.ids) for c in drawn], mean_entropy(base, prompts, drawn, temperature))


def render_prompts(assistant: Assistant, examples: Sequence[Example]) -> List[List[int]]:
    return [chat_format.render(assistant.tokenizer, [{"role": "user", "content": e.prompt}], generation_prompt=True)[0]
            for e in examples]


def chat_answers(assistant: Assistant, examples: Sequence[Example], max_new_tokens: int, temperature: float,
                 seed: int) -> Answers:
    prompts = render_prompts(assistant, examples)
    drawn = generate(assistant.model, prompts, max_new_tokens, stop=[assistant.end],
                     sampling=SamplingConfig(temperature), seed=seed)
    return Answers([assistant.text(c).strip() for c in drawn], [len(c.ids) for c in drawn],
                   mean_entropy(assistant, prompts, drawn, temperature))


def best_answers(assistant: Assistant, examples: Sequence[Example], n: int, score: Callable[[List[List[int]]], torch.Tensor],
                 max_new_tokens: int, temperature: float, seed: int) -> Answers:
    best = best_of_n(assistant.model, render_prompts(assistant, examples), n, score, assistant.end, max_new_tokens, temperature, seed)
    return Answers([assistant.text(c).strip() for c in best], [len(c.ids) for c in best])


def fitting_document(base: Assistant, example: Example, pool: Sequence[Example], shots: int, seed: int,
                     room: int) -> str:
    """The few-shot document with at most ``shots`` whole examples that is no longer than ``room`` tokens."""
    for k in range(shots, 0, -1):
        document = few_shot(example, pool, k, seed)
        if len(base.tokenizer.encode(document)) <= room:
            return document
    return few_shot(example, pool, 0, seed)


def compare(systems: Dict[str, Assistant], examples: Sequence[Example], train: Sequence[Example],
            score: Callable[[List[List[int]]], torch.Tensor], best_of: int, shots: int, max_new_tokens: int,
            temperature: float, seed: int) -> Dict[str, Answers]:
    """Every system's answers to ``examples``: "base", "sft" and whatever was trained from it. The prompted base sees ``shots``
    solved examples of the same family, or as many as its context has room for beside the answer."""
    families = {e.family: [] for e in examples}
    for e in train:
        families.get(e.family, []).append(e)
    base = systems["base"]
    room = base.model.config.context - max_new_tokens - 1
    documents = [fitting_document(base, e, families[e.family], shots, seed * 1_000_003 + i, room)
                 for i, e in enumerate(examples)]
    drawn = {
        "base": complete_lines(base, [e.prompt + "\n" for e in examples], max_new_tokens, temperature, seed),
        "base_prompted": complete_lines(base, documents, max_new_tokens, temperature, seed + 1),
        "sft": chat_answers(systems["sft"], examples, max_new_tokens, temperature, seed + 2),
        "best_of_n": best_answers(systems["sft"], examples, best_of, score, max_new_tokens, temperature, seed + 3),
    }
    tuned = [name for name in systems if name not in drawn]
    return {**drawn, **{name: chat_answers(systems[name], examples, max_new_tokens, temperature, seed + 4) for name in tuned}}
