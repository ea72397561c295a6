"""The checks of bench/gpu.py of attention in all its forms, and of what only shows in several ops together: the same bits on every
run, graphs, more than 2^31 elements."""

import math

import torch

from gpu_verify import BF16, CHECKS, F32, Skipped, boxed, check, close, earned, poisoned, same, variant, variants
from nanorlhf import ops
from nanorlhf.ops.attention import attention_decode_reference, attention_reference
from oracle import values_and_gradients

SMALL_LENGTHS = [(17,), (31, 0, 65)]
LENGTHS = [(1,), (17,), (0, 5, 0), (31, 1, 33, 0), (64, 129), (300,), (0, 0, 530, 2, 0), (1023, 64, 1), (2049,)]
HEAD_SIZES = (1, 16, 20, 32, 48, 64, 80, 96, 100, 128, 160, 192, 255, 256)
SMALL_HEAD_SIZES = (20, 64, 128, 160)


def _attention_cases(place, dtype, sizes, lengths):
    for index, D in enumerate(sizes):
        for at, row in enumerate(lengths if D in (64, 128) else [lengths[(index + 2) % len(lengths)]]):
            H, Hkv = ((2, 1), (4, 4), (6, 2))[(index + at) % 3]
            cu_seqlens = place.bounds(row)
            inputs = [place.randn(sum(row), heads, D, seed=i) for i, heads in enumerate((H, Hkv, Hkv))]
            for causal in (True, False):
                earned(lambda *x: ops.attention(*x, cu_seqlens, causal), lambda *x: attention_reference(*x, cu_seqlens, causal),
                       inputs, dtype)  # fmt: skip


def _neighbours(place, dtype):
    """NaN in one sequence leaves every bit of the others' results and gradients."""
    for D in (64, 128):
        bounds = place.bounds((70, 65, 0, 40))
        inputs = [place.randn(175, heads, D, seed=i) for i, heads in enumerate((2, 1, 1))]
        kind = [x.clone() for x in inputs]
        for x in inputs:
            x[70:135] = math.nan
        spoilt, right = (values_and_gradients(lambda *x: ops.attention(*x, bounds), xs, dtype) for xs in (inputs, kind))
        for ours, clean in zip(spoilt, right, strict=True):
            same(torch.cat((ours[:70], ours[135:])), torch.cat((clean[:70], clean[135:])), f"beside NaN, head size {D}")


def _attention(place, dtype):
    _attention_cases(place, dtype, *((SMALL_HEAD_SIZES, SMALL_LENGTHS) if place.small else (HEAD_SIZES, LENGTHS)))
    _neighbours(place, dtype)
    N = 37
    for scale in (-0.7, 0.0, 3.0):
        inputs, cu_seqlens = [place.randn(N, heads, 64, seed=i) for i, heads in enumerate((2, 1, 1))], place.bounds((N,))
        earned(lambda *x: ops.attention(*x, cu_seqlens, True, scale), lambda *x: attention_reference(*x, cu_seqlens, True, scale),
               inputs, dtype)  # fmt: skip


def _forward_alone(place, dtype):
    """Without the backward kernels, so that what is wrong in one direction is not laid to the other."""
    for row in ((1,), (64, 70)) if place.small else ((1,), (64, 129), (300, 0, 17), (2000,)):
        for D in (64, 128, 96):
            cu_seqlens = place.bounds(row)
            inputs = [place.randn(sum(row), heads, D, seed=i).to(dtype) for i, heads in enumerate((4, 2, 2))]
            for causal in (True, False):
                with poisoned():
                    ours = ops.attention(*(boxed(x, 0) for x in inputs), cu_seqlens, causal)
                close(ours, attention_reference(*(x.double() for x in inputs), cu_seqlens, causal), dtype, roundings=6)


def _of_variant(name, function):
    def run(place):
        if name not in variants(place):
            raise Skipped(f"no choice of {name} kernels here")
        with variant(place, name):
            function(place, BF16)

    return run


for _name in ("portable", "sm90"):
    CHECKS[f"attention {_name} forward"] = _of_variant(_name, _forward_alone)
    CHECKS[f"attention {_name}"] = _of_variant(_name, _attention)


@check("attention fp32")
def _attention_fp32(place):
    _attention(place, F32)


def _decode_case(place, lengths, prefixes, owner, H, Hkv, D, dtype):
    T = max(lengths, default=0) + 3
    q, k, v = (place.randn(len(lengths), *shape, D, seed=i).to(dtype) for i, shape in enumerate(((H,), (T, Hkv), (T, Hkv))))
    for b, n in enumerate(lengths):
        k[b, n:] = v[b, n:] = math.nan
    shared = [place.randn(sum(prefixes), Hkv, D, seed=i).to(dtype) for i in (3, 4)]
    owner, lengths = (torch.tensor(x).int().to(place.device) for x in (owner, lengths))
    return q, k, v, lengths, (*shared, place.bounds(prefixes), owner)


@check("decode")
def _decode(place):
    long, cases = (100 if place.small else 3000), ((64, 4, 2), (128, 8, 1), (20, 2, 1), (64, 12, 12), (100, 5, 1), (256, 2, 2))
    for D, H, Hkv in cases[: 3 if place.small else None]:
        for dtype in (F32, BF16):
            q, k, v, lengths, prefix = _decode_case(place, [3, 0, 17, long] * 3, [40, 0, 2 * long], [0, 1, 2] * 4, H, Hkv, D, dtype)
            for shared in (None, prefix):
                arguments = (None, None if shared is None else shared)
                with poisoned():
                    ours = ops.attention_decode(q, k, v, lengths, *arguments)
                wide = None if shared is None else (*(x.double() for x in shared[:2]), *shared[2:])
                exact = attention_decode_reference(q.double(), k.double(), v.double(), lengths, None, wide)
                naive = attention_decode_reference(q, k, v, lengths, *arguments)
                allowed = 2 * (naive.double() - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
                error = (ours.double() - exact).abs().max()
                assert error <= allowed, f"D {D}, {dtype}: error {error:.3g}, allowed {allowed:.3g}"
            prefix[0][:40] = math.nan
            spoilt = ops.attention_decode(q, k, v, lengths, None, prefix)
            same(spoilt[2::3], ours[2::3], "beside a prefix of NaN")


@check("paged")
def _paged(place):
    if not hasattr(ops, "attention_paged"):
        raise Skipped("ops.attention_paged is not there")
    size, B, Hkv, D = 16, 5, 2, 64
    lengths = torch.tensor([0, 1, 16, 33, 50]).int().to(place.device)
    q, k, v = (place.randn(*shape, seed=i).bfloat16() for i, shape in enumerate(((B, 4, D), (B, 64, Hkv, D), (B, 64, Hkv, D))))
    order = torch.randperm(B * 4, generator=torch.Generator().manual_seed(0)).to(place.device)
    pools = []
    for cache in (k, v):
        pool = torch.full((B * 4 + 3, size, Hkv, D), math.nan, dtype=BF16, device=place.device)
        pool[order] = cache.reshape(B * 4, size, Hkv, D)
        pools.append(pool)
    with poisoned():
        ours = ops.attention_paged(q, *pools, order.view(B, 4).int(), lengths)
    same(ours, ops.attention_decode(q, k, v, lengths), "pages against one cache")


def everything(place):
    """(name, call) of what sums in more than one thread, each call giving tensors."""
    N, C, V, H, D = (70, 64, 300, 4, 64) if place.small else (1111, 768, 5003, 12, 64)
    bounds, ids = place.bounds((N // 3, 0, N - N // 3)), place.randint(50, N)
    for dtype in (BF16, F32):
        x, w, g = (place.randn(*s, seed=i).to(dtype).requires_grad_() for i, s in enumerate(((N, C), (V, C), (N, C))))
        scale = place.randn(C, seed=3).requires_grad_()
        q, k, v, dout = (place.randn(N, heads, D, seed=i).to(dtype).requires_grad_() for i, heads in enumerate((H, H // 2, H // 2, H)))
        yield f"norm {dtype}", lambda x=x, g=g, scale=scale: torch.autograd.grad(ops.rms_norm(x, scale), (x, scale), g)
        yield f"embedding {dtype}", lambda w=w, g=g: torch.autograd.grad(ops.embedding(ids, w), w, g)
        yield f"loss {dtype}", lambda x=x, w=w: torch.autograd.grad(ops.token_logprobs(x, w, ids)[0].sum(), (x, w))
        for name in variants(place) if dtype == BF16 else ["auto"]:
            def attend(name=name, q=q, k=k, v=v, dout=dout):
                with variant(place, name):
                    out = ops.attention(q, k, v, bounds)
                    return out, *torch.autograd.grad(out, (q, k, v), dout)

            yield f"attention {name} {dtype}", attend
    decode = _decode_case(place, [N, 1, N // 2] * 5, [N, 7], [0, 0, 1] * 5, 8, 2, 64, BF16)
    yield "decode", lambda: [ops.attention_decode(*decode[:4], None, decode[4])]
    rewards = place.randn(N)
    yield "ppo loss", lambda: [ops.ppo_policy_loss(rewards, rewards + 0.1, rewards, 0.2).loss]


@check("determinism")
def _determinism(place):
    for name, call in everything(place):
        first = [x.detach().clone() for x in call()]
        for run in range(1, place.runs):
            if hasattr(place.module, "seed"):
                place.module.seed(run)  # the emulator's order of threads
            for ours, expected in zip(call(), first, strict=True):
                same(ours, expected, f"{name}, run {run}")


@check("graphs")
def _graphs(place):
    """Captured, then replayed on other values in the same memory; the host may not be waited for."""
    if place.device != "cuda":
        raise Skipped("needs a GPU")
    q, k, v = (place.randn(300, heads, 64, seed=i).bfloat16() for i, heads in enumerate((4, 2, 2)))
    bounds, lengths, row = place.bounds((100, 200)), place.bounds([3] * 7), place.randn(30, 500)
    caches = [x[None].expand(8, -1, -1, -1) for x in (k, v)]
    for call in (lambda: ops.attention(q, k, v, bounds), lambda: ops.softmax(row), lambda: ops.attention_decode(q[:8], *caches, lengths)):
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        for x in (q, k, v, row):
            x.mul_(-0.5)
        graph.replay()
        torch.cuda.synchronize()
        same(out, call(), "a replayed graph")


@check("large offsets")
def _large(place):
    """More than 2^31 elements: the last rows are as they are alone, where few long rows may be summed in another order."""
    if place.device != "cuda" or torch.cuda.mem_get_info()[0] < 40 << 30:
        raise Skipped("needs a GPU with 40 GB free")
    x = torch.randn(70_000, 32_768, dtype=BF16, device="cuda")
    close(ops.softmax(x)[-3:], ops.softmax(x[-3:].clone()), BF16, roundings=2)
    targets = place.randint(32_768, len(x))
    close(ops.logits_logprobs(x, targets)[0][-3:], ops.logits_logprobs(x[-3:].clone(), targets[-3:])[0], roundings=32)
    del x
    q = torch.randn(1_100_000, 16, 128, dtype=BF16, device="cuda")
    bounds = torch.arange(0, len(q) + 1, 50, device="cuda", dtype=torch.int32)
    same(ops.attention(q, q, q, bounds)[-50:], ops.attention(*[q[-50:].clone()] * 3, place.bounds([50])), "attention")
