"""ops.decode_step and decode_run: tokens through all layers at once, checked against the layers one by one in fp64."""

import math
import os
import sys

import pytest
import torch

from nanorlhf import ops
from nanorlhf.config import ModelConfig
from nanorlhf.engine.cache import PagedCache, Rows, packed_decoder
from nanorlhf.engine.constrain import Vocabulary, constrain, regex
from nanorlhf.model import Model
from nanorlhf.ops import backend
from test_backend import ISAS, python
from tiny import model

SHAPES = [
    dict(vocab_size=23, hidden_size=16, heads=2, kv_heads=1, head_size=8, intermediate_size=24),
    dict(vocab_size=77, hidden_size=33, heads=3, kv_heads=3, head_size=6, intermediate_size=50, qk_norm=False),
    dict(vocab_size=131, hidden_size=64, heads=4, kv_heads=2, head_size=40, intermediate_size=96, tied=False),
    dict(vocab_size=64, hidden_size=96, heads=3, kv_heads=3, head_size=64, intermediate_size=160, qk_norm=False, tied=False),
]
SIZE = 4  # tokens a page


def nets(shape, dtype, seed=0):
    """The same model in ``dtype`` and in fp64, of numbers that bf16 has."""
    config = ModelConfig(**{"layers": 3, "context": 256, **shape})
    made = [Model(config, dtype=d, seed=seed).requires_grad_(False) for d in (dtype, torch.float64)]
    g = torch.Generator().manual_seed(seed)
    for (name, one), other in zip(made[0].named_parameters(), made[1].double().parameters()):
        if one.ndim == 1:
            one.copy_(1 + 0.3 * torch.randn(one.shape, generator=g))
        elif "embed" in name:
            one.mul_(25)
        one.copy_(one.bfloat16())
        other.copy_(one)
    return made


def step_of(net, rows, prefixes=(), seed=0):
    """(arguments of PagedCache.logits after the decoder, k, v): ``rows`` of length 1 to 20 in pages in no order. Pools are NaN where
    no token is; row b has prefix b % (G + 1) if there is one."""
    g = torch.Generator().manual_seed(seed + rows)
    c, G = net.config, len(prefixes)
    lengths = torch.randint(1, 21, (rows,), generator=g)
    counts = [*(-(-lengths // SIZE)).tolist(), *(-(-n // SIZE) for n in prefixes)]
    order = torch.randperm(sum(counts) + 2, generator=g).int()
    tables = torch.full((len(counts), max(counts) + 1), -9, dtype=torch.int32)
    for row, part in zip(tables, order.split([*counts, 2])):
        row[: len(part)] = part
    pool = torch.full((2, c.layers, len(order), SIZE, c.kv_heads, c.head_size), math.nan)
    for table, n in zip(tables, [*lengths.tolist(), *prefixes]):
        for t in range(n):
            pool[:, :, table[t // SIZE], t % SIZE] = torch.randn(2, c.layers, c.kv_heads, c.head_size, generator=g).bfloat16().float()
    owner = torch.arange(rows).int() % (G + 1) - 1
    before = torch.tensor([0, *prefixes])[owner.long() + 1]
    last = lengths - 1
    slots = tables[torch.arange(rows), last // SIZE].long() * SIZE + last % SIZE
    prefix = (tables[rows:].contiguous(), torch.tensor(prefixes).int(), owner) if G else None
    tokens = torch.randint(0, c.vocab_size, (rows,), generator=g)
    return (tokens, before + last, slots, Rows(tables[:rows].contiguous(), lengths.int(), prefix)), pool


def cache_of(net, pool):
    cache = PagedCache(net, pool.shape[2], SIZE)
    cache.k_pages.copy_(pool[0]), cache.v_pages.copy_(pool[1])
    return cache


def by_layers(net, arguments, pool):
    """(logits, cache), in plain torch."""
    cache, before = cache_of(net, pool), backend.force("reference")
    try:
        wide = torch.promote_types(net.compute_dtype, torch.float32)
        hidden = cache.forward(net, *arguments[:3], rows=arguments[3])
        return hidden.to(wide) @ net.head_weight.to(net.compute_dtype).to(wide).T, cache
    finally:
        backend.force(before)


def at_once(net, arguments, pool):
    cache = cache_of(net, pool)
    return cache.logits(packed_decoder(net), *arguments), cache


def check(shape, dtype, rows, prefixes=()):
    net, exact_net = nets(shape, dtype)
    arguments, pool = step_of(net, rows, prefixes)
    (exact, exact_cache), (naive, naive_cache), (ours, cache) = (f(n, arguments, pool) for f, n in (
        (by_layers, exact_net), (by_layers, net), (at_once, net)))  # fmt: skip
    pages = [torch.stack((c.k_pages, c.v_pages)).flatten(2, 3) for c in (exact_cache, naive_cache, cache)]
    written = [p[:, :, arguments[2]] for p in pages]
    for z, y, x in ((exact, naive, ours), written):
        error, allowed = (x.double() - z).abs().max(), (y.double() - z).abs().max()
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * z.abs().max(), (shape, dtype, rows, error, allowed)
    kept, given = (x.index_fill(2, arguments[2], 0).nan_to_num(7) for x in (pages[2], pool.flatten(2, 3).to(dtype)))
    assert torch.equal(kept, given)


def with_prompts(net, rows, lengths, seed=5):
    """step_of with whole sequences of these lengths before the rows: (arguments, cu_seqlens, pool), rows None if there are 0."""
    g = torch.Generator().manual_seed(seed)
    (tokens, positions, slots, own), pool = step_of(net, max(rows, 1))
    tokens, positions, slots = (x[:rows] for x in (tokens, positions, slots))
    fresh = sum(-(-n // SIZE) for n in lengths)
    first = pool.shape[2]
    pool = torch.cat((pool, torch.full((*pool.shape[:2], fresh, *pool.shape[3:]), math.nan)), 2)
    pages, new = (first + torch.randperm(fresh, generator=g)).tolist(), []
    for n in lengths:
        table, pages = pages[: -(-n // SIZE)], pages[-(-n // SIZE):]
        new += [table[t // SIZE] * SIZE + t % SIZE for t in range(n)]
    whole = torch.cat([torch.arange(n) for n in lengths])
    ids = torch.randint(0, net.config.vocab_size, (len(new),), generator=g)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    arguments = torch.cat((ids, tokens)), torch.cat((whole, positions)), torch.cat((torch.tensor(new), slots)), own if rows else None
    return arguments, cu_seqlens, pool


def check_prompts(shape, dtype, rows, lengths):
    """Whole sequences beside rows, a few tokens and many, and the logits of all or of some."""
    net, exact_net = nets(shape, dtype)
    (tokens, positions, slots, own), cu_seqlens, pool = with_prompts(net, rows, lengths)
    found = []
    for one in (exact_net, net):
        cache, before = cache_of(one, pool), backend.force("reference")
        try:
            wide = torch.promote_types(one.compute_dtype, torch.float32)
            hidden = cache.forward(one, tokens, positions, slots, cu_seqlens, own)
            found.append((hidden.to(wide) @ one.head_weight.to(one.compute_dtype).to(wide).T, cache.k_pages))
        finally:
            backend.force(before)
    last = torch.tensor([len(tokens) - 1, 0, len(tokens) // 2] * 300)  # of a prompt, for each of its samples
    for some in (None, last):
        cache = cache_of(net, pool)
        ours = cache.logits(packed_decoder(net), tokens, positions, slots, own, cu_seqlens, some)
        (exact, exact_k), (naive, naive_k) = found
        exact, naive = (x if some is None else x[some] for x in (exact, naive))
        keys = [k.flatten(1, 2)[:, slots].double() for k in (exact_k, naive_k, cache.k_pages)]
        for z, y, x in ((exact, naive, ours), keys):
            error, allowed = (x.double() - z).abs().max(), (y.double() - z).abs().max()
            assert error <= 2 * allowed + 8 * torch.finfo(dtype).eps * z.abs().max(), (shape, dtype, rows, len(lengths), error, allowed)


def check_run(shape, dtype, prefixes=()):
    """A run draws what steps and draws in turns do, to the bit; it ends with a token that ends a row."""
    net = nets(shape, dtype)[0]
    (tokens, positions, slots, own), pool = step_of(net, 7, prefixes)
    B, most, V, spare = 7, 6, net.config.vocab_size, pool.shape[2]
    pages = torch.cat((own.pages, torch.zeros(B, 2).int()), 1)
    for b, n in enumerate(own.lengths.tolist()):  # two pages more of each row
        pages[b, -(-n // SIZE): -(-n // SIZE) + 2] = torch.tensor([spare + 2 * b, spare + 2 * b + 1])
    pool = torch.cat((pool, torch.full((*pool.shape[:2], 2 * B, *pool.shape[3:]), math.nan)), 2)
    streams, steps, settings = torch.arange(B) + 100, torch.arange(B) % 3, {"seed": 2**64 - 5, "temperature": 0.8, "top_k": 9}
    if prefixes:
        settings["temperature"] = torch.linspace(0, 2, B, dtype=torch.float64)
    decoder, by_steps, expected = packed_decoder(net), cache_of(net, pool), []
    at = tokens
    for i in range(most):
        lengths = (own.lengths + i).int()
        last = lengths.long() - 1
        here = pages[torch.arange(B), last // SIZE].long() * SIZE + last % SIZE
        logits = by_steps.logits(decoder, at, positions + i, here, Rows(pages, lengths, own.prefix))
        at, *marks = ops.sample(logits, requests=streams, steps=steps + i, **settings)
        expected.append((at, torch.stack(marks)))
    drawn, marks = (torch.stack([e[i] for e in expected], i) for i in (0, 1))
    stops, stop_of = torch.zeros(2, V, dtype=torch.bool), torch.arange(B) % 2
    cache = cache_of(net, pool)
    run = lambda stops: cache.run(decoder, tokens, positions, Rows(pages, own.lengths, own.prefix), streams, steps, most, stops, stop_of, **settings)
    ours = run(stops)
    assert torch.equal(ours[0], drawn) and torch.equal(ours[1], marks)
    assert torch.equal(cache.k_pages.nan_to_num(7), by_steps.k_pages.nan_to_num(7))
    row = 3
    stops[1, drawn[2, row]] = True
    ends = min(i for i in range(most) if stops[stop_of, drawn[i]].any())
    assert ends <= 2 and torch.equal(run(stops)[0], drawn[: ends + 1])


EVERY = """
import sys, torch
from nanorlhf import _C
from test_decode_step import SHAPES, alone_and_together, check, check_prompts, check_run

assert _C.isa() == sys.argv[1]
with torch.no_grad():
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for rows, prefixes in ((1, ()), (5, (8,)), (18, (4, 140)), (70, ())):
                check(shape, dtype, rows, prefixes)
            alone_and_together(shape, dtype, 70)
            for rows, lengths in ((0, [1]), (2, [3, 1, 7]), (5, [40, 1, 33, 130, 17, 90])):
                check_prompts(shape, dtype, rows, lengths)
            check_run(shape, dtype)
            check_run(shape, dtype, (8,))
"""


def alone_and_together(shape, dtype, most):
    """A row's logits are the same bits in every batch, on one thread and on two."""
    net = nets(shape, dtype)[0]
    (tokens, positions, slots, rows), pool = step_of(net, most)
    threads, whole = torch.get_num_threads(), at_once(net, (tokens, positions, slots, rows), pool)[0]
    for count in (1, 2, 3, 7, 16, 33, most):
        torch.set_num_threads(1 + count % 2)
        some = slice(most - count, most)
        part = Rows(rows.pages[some].contiguous(), rows.lengths[some].contiguous())
        ours = at_once(net, (tokens[some].contiguous(), positions[some].contiguous(), slots[some].contiguous(), part), pool)[0]
        assert torch.equal(ours, whole[some]), (shape, dtype, count)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_is_as_exact_as_the_layers_and_a_row_is_the_same_in_every_batch(isa):
    done = python(EVERY, isa, NANORLHF_ISA=isa, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode == 0, done.stderr


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_weights_are_those_of_the_next_step_once_packed(dtype):
    net = nets(SHAPES[0], dtype)[0]
    arguments, pool = step_of(net, 6)
    decoder = packed_decoder(net)
    for w in net.parameters():
        w.mul_(0.9)
    decoder.pack()
    assert torch.equal(cache_of(net, pool).logits(decoder, *arguments), at_once(net, arguments, pool)[0])


@torch.no_grad()
def test_a_run_ends_before_logits_that_are_no_distribution():
    """Token 5 has no numbers for an embedding: the run ends with it, and the next one raises."""
    net = nets(dict(SHAPES[0], tied=False), torch.float32)[0]
    (tokens, positions, slots, own), pool = step_of(net, 1)
    own = own._replace(pages=torch.cat((own.pages[:, :-1], torch.tensor([[0, 1, 2, 3, 4]]).int()), 1))
    decoder, cache = packed_decoder(net), cache_of(net, pool.nan_to_num(0))
    one, stops = torch.ones(1, dtype=torch.int64), torch.zeros(1, 23, dtype=torch.bool)
    run = lambda at, stream: cache.run(decoder, at, positions, own, stream * one, 0 * one, 12, stops, 0 * one, temperature=3.0)
    stream, drawn = next((s, d) for s in range(99) if 5 in (d := run(tokens, s)[0])[1:9])
    net.model.embed_tokens.weight[5] = math.nan
    assert torch.equal(run(tokens, stream)[0], drawn[: (drawn[:, 0] == 5).nonzero()[0, 0] + 1])
    with pytest.raises(ValueError, match="row 0 that is NaN"):
        run(5 * one, stream)


def test_what_goes_layer_by_layer():
    assert packed_decoder(model()) is not None
    assert packed_decoder(model(variant="gpt2", qk_norm=False)) is None
    assert packed_decoder(Model(model().config, dtype=torch.float64).double()) is None
    for setting, on, off in ((backend.deterministic, True, False), (backend.force, "reference", "auto")):
        setting(on)
        try:
            assert packed_decoder(model()) is None
        finally:
            setting(off)


@torch.no_grad()
def test_inputs_that_do_not_fit_are_named():
    net = model()
    (tokens, positions, slots, rows), pool = step_of(net, 3, (4,))
    cache, decoder = cache_of(net, pool), packed_decoder(net)
    for arguments, message in (
        ((tokens + 23, positions, slots, rows), r"expected tokens in \[0, 23\)"),
        ((tokens, positions + 32, slots, rows), r"expected positions in \[0, 32\)"),
        ((tokens, positions, slots - 999, rows), r"expected slots in \[0, "),
        ((tokens, positions, slots, rows._replace(pages=rows.pages + 99)), r"expected pages in \[0, P - 1 = "),
        ((tokens, positions, slots, rows._replace(lengths=rows.lengths + 99)), "expected lengths in"),
        ((tokens.int(), positions, slots, rows), "expected tokens, positions, slots and last in int64"),
        ((tokens, positions[:2], slots, rows), "expected tokens, positions, slots and last in int64"),
    ):
        with pytest.raises(ValueError, match="decode_step: " + message):
            cache.logits(decoder, *arguments)
    with pytest.raises(ValueError, match="expected cu_seqlens to rise from 0 to N = 3"):
        cache.logits(decoder, tokens, positions, slots, cu_seqlens=torch.tensor([0, 2]).int())
    with pytest.raises(ValueError, match=r"expected last in \[0, 3\), got 3"):
        cache.logits(decoder, tokens, positions, slots, rows, last=torch.tensor([3]))
    with pytest.raises(ValueError, match="for as many tokens"):
        cache.logits(decoder, tokens, positions, slots)
    with pytest.raises(ValueError, match="for as many tokens"):
        cache.logits(decoder, tokens, positions, slots, rows, cu_seqlens=torch.zeros(0).int())
    with pytest.raises(ValueError, match=r"on the CPU, .* got .* on meta"):
        cache.logits(decoder, tokens.to("meta"), positions, slots, rows)
    with pytest.raises(ValueError, match="expected k_pages and v_pages .* on the CPU"):
        ops.decode_step(decoder, tokens, positions, slots, *(x.to("meta") for x in (cache.k_pages, cache.v_pages)), rows.pages, rows.lengths)
    draws = torch.arange(3), torch.arange(3), 2, torch.zeros(1, 23, dtype=torch.bool)
    for arguments, message in (
        ((*draws, torch.ones(3, dtype=torch.int64)), "stop_of"),
        ((*draws[:2], 0, draws[3], torch.zeros(3, dtype=torch.int64)), "expected most of 1 or more"),
        ((*draws[:2], 99, draws[3], torch.zeros(3, dtype=torch.int64)), "expected lengths in"),
        ((*draws[:3], draws[3].int(), torch.zeros(3, dtype=torch.int64)), "in bool"),
    ):
        with pytest.raises(ValueError, match="decode_run: .*" + message):
            cache.run(decoder, tokens, positions, rows, *arguments)
    with pytest.raises(ValueError, match="a constraint or None for each of 3 rows, got 1"):
        cache.run(decoder, tokens, positions, rows, *draws, torch.zeros(3, dtype=torch.int64), constraints=[None])
    far = constrain(regex("a*"), Vocabulary([b"a"] * 99), [])
    with pytest.raises(ValueError, match="decode_run: expected constraints over the decoder's vocabulary"):
        cache.run(decoder, tokens, positions, rows, *draws, torch.zeros(3, dtype=torch.int64), constraints=[None, None, far.cursor(far.start())])
    near = constrain(regex("a*"), Vocabulary([b"a"] * 23), [])
    with pytest.raises(ValueError, match="decode_run: expected nodes that the constraints have given out, got 99999"):
        cache.run(decoder, tokens, positions, rows, *draws, torch.zeros(3, dtype=torch.int64), constraints=[None, None, (near.cursor(near.start())[0], 99999)])
    with pytest.raises(ValueError, match="top_p above 0"):
        cache.run(decoder, tokens, positions, rows, *draws, torch.zeros(3, dtype=torch.int64), top_p=0)
    apart = cache.k_pages.transpose(2, 4).contiguous().transpose(2, 4)  # the same numbers, a key's elements not side by side
    with pytest.raises(ValueError, match="a key's elements side by side"):
        ops.decode_step(decoder, tokens, positions, slots, apart, cache.v_pages, rows.pages, rows.lengths)
    with pytest.raises(ValueError, match="expected k_pages and v_pages"):
        ops.decode_step(decoder, tokens, positions, slots, cache.k_pages.double(), cache.v_pages, rows.pages, rows.lengths)
    net.model.layers[1].post_attention_layernorm.weight = torch.nn.Parameter(torch.ones(15))
    with pytest.raises(ValueError, match=r"expected post_norm of shape \(16,\), got \(15,\)"):
        packed_decoder(net)


@torch.no_grad()
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_what_is_filled_natively_is_fp32_whatever_the_default_is(default):
    net = model()
    arguments, pool = step_of(net, 40)
    expected = at_once(net, arguments, pool)[0]
    torch.set_default_dtype(default)
    try:
        found = at_once(net, arguments, pool)[0]
        marks = cache_of(net, pool).run(packed_decoder(net), *arguments[:2], arguments[3], *(torch.arange(40),) * 2, 1, torch.zeros(1, 23).bool(), torch.zeros(40).long())[1]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert marks.dtype == torch.float32 and torch.equal(marks[2], torch.ones(1, 40))
