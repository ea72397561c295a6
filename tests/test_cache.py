"""engine/cache.py: hidden states from pages are those of the whole sequence."""

import pytest
import torch

from nanorlhf import ops
from nanorlhf.engine.cache import PagedCache, Rows
from nanorlhf.engine.generate import ragged
from tiny import model, random_sequences

SIZE = 4  # tokens a page


def tables(counts, first=0):
    """(B, Pmax) int32: pages of their own for so many tokens each, in an order that is no order."""
    needed = [-(-n // SIZE) for n in counts]
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1)).split(needed)
    return torch.stack([torch.nn.functional.pad(o, (0, max(needed) - len(o))) for o in order]).int() + first


def slots(table, positions):
    return table.gather(1, positions[:, None] // SIZE).squeeze(1).long() * SIZE + positions % SIZE


@pytest.mark.parametrize("variant", [{}, {"kv_heads": 2, "qk_norm": False}, {"variant": "gpt2", "qk_norm": False}])
@torch.no_grad()
def test_prefill_and_steps_give_the_hidden_states_of_the_uncached_forward(variant):
    net, sequences = model(1, **variant), random_sequences(5, 14, shortest=6)
    whole, split = [net(*ragged([s])) for s in sequences], [2, 1, 5, 3, 4]  # tokens that are prefilled
    table, cache = tables([len(s) for s in sequences]), PagedCache(net, 25, SIZE)
    cache.k_pages[:], cache.v_pages[:] = torch.nan, torch.nan
    tokens, cu_seqlens = ragged([s[:n] for s, n in zip(sequences, split)])
    positions = ops.positions_from_cu_seqlens(cu_seqlens)
    owners = torch.arange(5).repeat_interleave(torch.tensor(split))
    hidden = cache.forward(net, tokens, positions, slots(table[owners], positions), cu_seqlens)
    torch.testing.assert_close(hidden, torch.cat([w[:n] for w, n in zip(whole, split)]), atol=2e-5, rtol=1e-4)
    for step in range(min(len(s) - n for s, n in zip(sequences, split))):
        at = torch.tensor(split) + step
        rows = Rows(table, (at + 1).int())
        hidden = cache.forward(net, torch.tensor([s[i] for s, i in zip(sequences, at)]), at, slots(table, at), rows=rows)
        torch.testing.assert_close(hidden, torch.stack([w[i] for w, i in zip(whole, at)]), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_token_may_see_pages_that_the_same_pass_fills():
    """One pass runs a whole sequence of 8 tokens, and another that goes on from its first page: the second's last three tokens
    are those of the sequence that has both."""
    net, first, more = model(2), [5, 1, 7, 2, 9, 4, 4, 8], [3, 6, 3]
    cache = PagedCache(net, 4, SIZE)
    tokens, cu_seqlens = ragged([first])
    rows = Rows(torch.tensor([[3]] * 3).int(), torch.tensor([1, 2, 3]).int(),
                (torch.tensor([[2]]).int(), torch.tensor([4]).int(), torch.zeros(3).int()))
    positions = torch.tensor([*range(8), 4, 5, 6])
    where = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 12, 13, 14])  # pages 2 and 0, then 3
    hidden = cache.forward(net, torch.cat((tokens, torch.tensor(more))), positions, where, cu_seqlens, rows)
    torch.testing.assert_close(hidden[:8], net(*ragged([first])), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(hidden[8:], net(*ragged([first[:4] + more]))[4:], atol=2e-5, rtol=1e-4)


def test_a_copied_page_has_the_same_keys_and_values_in_every_layer():
    cache = PagedCache(model(), 5, SIZE)
    for i, pages in enumerate((cache.k_pages, cache.v_pages)):
        pages.copy_(torch.arange(pages.numel()).view_as(pages) + i)
    before = cache.k_pages.clone(), cache.v_pages.clone()
    cache.copy(torch.tensor([1, 1]), torch.tensor([4, 0]))
    for pages, old in zip((cache.k_pages, cache.v_pages), before):
        assert torch.equal(pages, old[:, [1, 1, 2, 3, 1]])
