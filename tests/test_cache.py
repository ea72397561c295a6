"""engine/cache.py: hidden states from a cache are those of the whole sequence."""

import pytest
import torch

from nanorlhf.engine.cache import KVCache
from nanorlhf.engine.generate import ragged
from tiny import model, random_sequences


@pytest.mark.parametrize("variant", [{}, {"kv_heads": 2, "qk_norm": False}, {"variant": "gpt2", "qk_norm": False}])
@torch.no_grad()
def test_prefill_and_steps_give_the_hidden_states_of_the_uncached_forward(variant):
    net, sequences = model(1, **variant), random_sequences(5, 14, shortest=6)
    whole = [net(*ragged([s])) for s in sequences]
    split = [2, 1, 5, 3, 4]  # tokens that are prefilled
    cache = KVCache(16)
    hidden = cache.prefill(net, *ragged([s[:n] for s, n in zip(sequences, split)]))
    torch.testing.assert_close(hidden, torch.cat([w[:n] for w, n in zip(whole, split)]), atol=2e-5, rtol=1e-4)
    assert cache.lengths.tolist() == split
    for step in range(min(len(s) - n for s, n in zip(sequences, split))):
        hidden = cache.step(net, torch.tensor([s[n + step] for s, n in zip(sequences, split)]))
        expected = torch.stack([w[n + step] for w, n in zip(whole, split)])
        torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-4)
    assert cache.lengths.tolist() == [n + step + 1 for n in split]


@torch.no_grad()
def test_sequences_can_be_dropped_reordered_and_copied():
    """[a, b, c] becomes [c, a, c]; each goes on with a token of its own as it does alone."""
    net, sequences = model(2), [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    cache = KVCache(8)
    cache.prefill(net, *ragged(sequences))
    cache.select(torch.tensor([2, 0, 2]))
    hidden = cache.step(net, torch.tensor([10, 11, 12]))
    for row, sequence in enumerate(([6, 7, 8, 9, 10], [1, 2, 3, 11], [6, 7, 8, 9, 12])):
        torch.testing.assert_close(hidden[row], net(*ragged([sequence]))[-1], atol=2e-5, rtol=1e-4)
    assert cache.lengths.tolist() == [5, 4, 5]


@torch.no_grad()
def test_samples_of_one_prompt_share_its_keys_and_go_on_alone():
    """64 samples of a prompt of 512 tokens, then 3 of them: hidden states are those of each sequence without a cache, and the
    cache holds the prompt once: (512 + 64 * 4) tokens, not 64 * (512 + 4)."""
    net = model(3, context=600)
    g = torch.Generator().manual_seed(0)
    prompt, new = torch.randint(0, 23, (512,), generator=g).tolist(), torch.randint(0, 23, (64, 4), generator=g)
    cache = KVCache(4)
    cache.prefill(net, *ragged([prompt]))
    cache.select(torch.zeros(64, dtype=torch.long))
    kept = torch.arange(64)
    for step in range(4):
        if step == 2:
            kept = torch.tensor([50, 7, 63])
            cache.select(kept)
        hidden = cache.step(net, new[kept, step])
        for row in (0, 1, len(kept) - 1):
            whole = net(*ragged([prompt + new[kept[row], :step + 1].tolist()]))[-1]
            torch.testing.assert_close(hidden[row], whole, atol=2e-5, rtol=1e-4)
        if step == 1:
            held = sum(x.nbytes for x in vars(cache).values() if isinstance(x, torch.Tensor))
            assert held < 1.1 * (512 + 64 * 4) * 2 * 2 * 8 * 4  # layers, k and v, head size, bytes
