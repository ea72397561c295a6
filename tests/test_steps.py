"""engine/steps.py: which weights a step is computed with, and that cached logits are the uncached ones."""

import numpy as np
import pytest
import torch

from nanorlhf.engine import Engine, Request, generate
from nanorlhf.engine.generate import ragged
from nanorlhf.engine.prefill import Plan
from nanorlhf.engine.request import Handle
from nanorlhf.engine.steps import Steps
from nanorlhf.ops import backend
from tiny import model, random_sequences


@torch.no_grad()
def test_what_has_changed_since_the_last_look():
    net = model()
    steps = Steps(net, 3, 4, False)
    assert steps.refresh() == "moved" and steps.refresh() is None and steps.native
    cache, version = steps.cache, steps.version
    net.model.norm.weight.mul_(2)
    assert steps.version > version and steps.refresh() == "changed" and steps.refresh() is None
    before = backend.deterministic(True)
    try:
        assert steps.refresh() == "changed" and not steps.native
    finally:
        backend.deterministic(before)
    assert steps.refresh() == "changed" and steps.native and steps.cache is cache
    net.model.norm.weight = torch.nn.Parameter(torch.ones_like(net.model.norm.weight))
    assert steps.refresh() == "moved" and steps.cache is not cache
    net.compute_dtype = torch.bfloat16
    assert steps.refresh() == "moved" and steps.cache.k_pages.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("how", ["native", "layers", "deterministic"])
@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_cached_logits_are_the_uncached_ones(how, variant):
    """Of prompts run together, then of each token that is drawn, by what it reports of them; two samples of each share their pages."""
    net, prompts = model(1, variant=variant, qk_norm=variant == "llama"), random_sequences(5, 12, seed=4, shortest=1)
    force, deterministic = backend.force("reference" if how == "layers" else "auto"), backend.deterministic(how == "deterministic")
    try:
        found = generate(net, prompts, 15, 2, seed=3)
        steps = Steps(net, 40, 4, False)
        steps.refresh()
        tables = np.arange(40, dtype=np.int32).reshape(5, 8)
        plans = [Plan(np.array(p), 0, [Handle(Request(p, 3), 3, None)], [t[: -(-len(p) // 4)]]) for p, t in zip(prompts, tables)]
        logits, _ = steps.prefill(plans)
    finally:
        backend.force(force), backend.deterministic(deterministic)
    for prompt, row in zip(prompts, logits):
        torch.testing.assert_close(row, net(*ragged([prompt]))[-1] @ net.head_weight.T, atol=1e-4, rtol=1e-4)
    for i, c in enumerate(found):
        prompt = prompts[i // 2]
        exact = net.logprobs(*ragged([prompt + c.ids]))[0][len(prompt) - 1:]
        torch.testing.assert_close(torch.tensor(c.logprobs), exact, atol=1e-4, rtol=0)
    assert len({tuple(c.ids) for c in found}) > 5


def test_weights_that_are_put_in_place_of_others_are_seen():
    """Also where no counter tells: load_state_dict with assign, another tensor as a parameter, and another backend."""
    net, prompts = model(1), random_sequences(3, 9, seed=3)
    engine, requests = Engine(net, page_size=4), [Request(p, 8) for p in prompts]

    def check():
        assert [c.ids for c in engine.run(requests)] == [c.ids for c in Engine(net).run(requests)]

    check()
    before = [c.ids for c in engine.run(requests)]
    net.load_state_dict({k: v.clone() for k, v in model(2).state_dict().items()}, assign=True)
    check()
    assert [c.ids for c in engine.run(requests)] != before
    net.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.ones_like(net.model.layers[1].mlp.up_proj.weight))
    check()
    net.model.layers[0].mlp.up_proj.weight.data = 9 * torch.ones_like(net.model.layers[0].mlp.up_proj.weight)
    check()
    was = backend.force("reference")
    try:
        check()
        assert not engine.steps.native
    finally:
        backend.force(was)
