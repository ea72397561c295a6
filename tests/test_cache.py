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
