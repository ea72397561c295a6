"""Every CUDA kernel against its reference in fp64, with nothing kind in memory: workspaces and outputs hold NaN before a call, and
every input lies in the middle of NaN, on a multiple of 16 bytes and off it. bench/gpu.py runs the list on a GPU; the tests run it
on the emulator, ``small``."""

import math
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nanorlhf import ops
from nanorlhf.ops import backend, optim
from nanorlhf.ops.attention import attention_decode_reference, attention_reference
from nanorlhf.ops.embedding import embedding_reference
from nanorlhf.ops.gae import gae_reference
from nanorlhf.ops.loss import logits_logprobs_reference
from nanorlhf.ops.matmul import matmul_reference
from nanorlhf.ops.norm import add_rms_norm_reference, rms_norm_reference
from nanorlhf.ops.ppo_loss import ppo_policy_loss_reference, ppo_value_loss_reference
from nanorlhf.ops.rope import rope_qkv_reference, rope_reference
from nanorlhf.ops.sample import sample_reference
from nanorlhf.ops.softmax import softmax_reference
from nanorlhf.ops.swiglu import swiglu_reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from oracle import assert_earned, values_and_gradients  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
CHECKS = {}  # name: function of a Place
SANITIZED = ("softmax", "norm", "loss", "attention portable", "attention sm90", "decode", "gae", "embedding")  # under compute-sanitizer


@dataclass(frozen=True)
class Place:
    """Where kernels are checked: a device, and whether sizes have to be small there. ``runs``: how often the bits are compared."""

    device: str
    small: bool = False
    runs: int = 100
    module: object = None  # the kernels' module, for the choice between variants of attention
    avoid: frozenset = frozenset()  # variants that are known to be wrong

    def randn(self, *shape, seed=0):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def randint(self, high, *shape, seed=0):
        return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def bounds(self, lengths):
        return torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)

    def some(self, *sizes):
        """The sizes to try: where they have to be small, those that are."""
        return [s for s in sizes if not self.small or math.prod(s if isinstance(s, tuple) else (s,)) <= 40_000]


def check(name):
    def add(function):
        CHECKS[name] = function
        return function

    return add


@contextmanager
def poisoned():
    """Within it torch.empty and its kin give memory full of NaN (255 in bytes)."""
    before, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)
            torch.utils.deterministic.fill_uninitialized_memory = filled


def boxed(x, off):
    """A copy of x with 64 NaN or more before it and behind; ``off``: from a multiple of 16 bytes, in elements."""
    box = x.new_full((x.numel() + 128 + off,), math.nan)
    inside = box[64 + off : 64 + off + x.numel()]
    inside.copy_(x.reshape(-1))
    return inside.view(x.shape)


def earned(op, reference, inputs, dtype=F32, **limits):
    for off in (0, 1):
        with poisoned():
            assert_earned(lambda *xs: op(*(boxed(x, off) for x in xs)), reference, inputs, dtype, **limits)


def close(ours, exact, dtype=F32, roundings=8):
    """Within a few roundings of the largest value; for ops without gradients."""
    assert ours.shape == exact.shape, f"{tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if exact.numel():
        error, largest = (ours.double() - exact.double()).abs().max(), exact.double().abs().max()
        assert error <= roundings * torch.finfo(dtype).eps * max(largest, 1e-30), f"error {error:.3g} of {largest:.3g}"


def same(ours, expected, what):
    assert torch.equal(ours, expected), f"{what}: {int((ours != expected).sum())} of {ours.numel()} differ"


def variants(place):
    """The kernels that bf16 attention can be run by here."""
    names = place.module.attention_variants() if hasattr(place.module, "attention_variants") else ["portable"]
    hopper = place.device != "cuda" or torch.cuda.get_device_capability()[0] == 9
    return [name for name in names if name not in place.avoid and (hopper or name != "sm90")]


@contextmanager
def variant(place, name):
    choose = None if name == "auto" else getattr(place.module, "attention_variant", None)
    before = choose(name) if choose else None
    try:
        yield
    finally:
        if choose:
            choose(before)


@check("softmax")
def _softmax(place):
    for shape in place.some((1, 1), (3, 15), (5, 7), (300, 64), (33, 257), (2, 4096), (3, 50257), (2, 131072), (0, 8)):
        for dtype in (F32, BF16):
            earned(ops.softmax, softmax_reference, (place.randn(*shape),), dtype)
    x = place.randn(4, 40)
    x[1], x[2, 3:], x[3] = -math.inf, -math.inf, -1e4
    out = ops.softmax(x)
    assert out[1].isnan().all() and not out[[0, 2, 3]].isnan().any() and (out[2, 3:] == 0).all()


@check("loss")
def _loss(place):
    reference = logits_logprobs_reference
    for N, C, V in place.some((1, 1, 1), (5, 8, 15), (5, 16, 257), (0, 4, 5), (70, 64, 5003), (300, 128, 32768)):
        hidden, weight, targets = place.randn(N, C), place.randn(V, C, seed=1), place.randint(V, N)
        earned(lambda h, w: ops.token_logprobs(h, w, targets, 0.7), lambda h, w: reference(h @ w.T, targets, 0.7), (hidden, weight))
        for dtype in (F32, BF16):
            earned(lambda x: ops.logits_logprobs(x, targets, 1.5), lambda x: reference(x, targets, 1.5), (hidden @ weight.T,), dtype)
    hidden, weight, targets = place.randn(40, 64).bfloat16(), place.randn(300, 64, seed=1).bfloat16(), place.randint(300, 40)
    exact = reference(hidden.double() @ weight.double().T, targets)
    for ours, expected in zip(ops.token_logprobs(hidden, weight, targets), exact, strict=True):
        close(ours, expected, roundings=64)  # products of bf16 are exact in fp32: only sums round
    targets[::3] = -100
    counted = targets != -100
    with poisoned():
        ours = ops.cross_entropy(hidden.float(), weight.float(), targets, z_loss=0.1)
    logits = hidden[counted].double() @ weight.double().T
    close(ours, torch.nn.functional.cross_entropy(logits, targets[counted]) + 0.1 * logits.logsumexp(-1).square().mean(), roundings=64)


@check("norm")
def _norm(place):
    for shape in place.some((1, 1), (3, 15), (300, 64), (2, 3, 17), (129, 256), (0, 8), (1000, 768), (7, 5120), (5, 16389)):
        for dtype in (F32, BF16):
            x, residual, weight = place.randn(*shape), place.randn(*shape, seed=1), place.randn(shape[-1], seed=2)
            earned(ops.rms_norm, rms_norm_reference, (x, weight), dtype)
            earned(ops.add_rms_norm, add_rms_norm_reference, (x, residual, weight), dtype)


@check("rope")
def _rope(place):
    shapes = (1, 1, 1, 2), (5, 3, 1, 30), (0, 2, 2, 8), (40, 4, 2, 64), (300, 4, 2, 64), (40, 12, 12, 128), (3000, 12, 4, 64)
    for N, H, Hkv, D in place.some(*shapes):
        positions = place.randint(3000, N)
        for dtype in (F32, BF16):
            q, k, v = (place.randn(N, heads, D, seed=i) for i, heads in enumerate((H, Hkv, Hkv)))
            weights = place.randn(D, seed=3), place.randn(D, seed=4)
            earned(lambda x: ops.rope(x, positions), lambda x: rope_reference(x, positions), (q,), dtype)
            earned(lambda q, k, v, *w: ops.rope_qkv(q, k, v, positions, 1e4, *w),
                   lambda q, k, v, *w: rope_qkv_reference(q, k, v, positions, 1e4, *w), (q, k, v, *weights), dtype)  # fmt: skip


@check("swiglu")
def _swiglu(place):
    for shape in place.some((1, 1), (5, 15), (300, 64), (0, 8), (77, 333), (1000, 3072)):
        for dtype in (F32, BF16):
            earned(ops.swiglu, swiglu_reference, (place.randn(*shape), place.randn(*shape, seed=1)), dtype)
    packed = place.randn(9, 32)
    same(ops.swiglu(*packed.chunk(2, 1)), ops.swiglu(*(x.contiguous() for x in packed.chunk(2, 1))), "halves of one array")


@check("embedding")
def _embedding(place):
    for N, V, C in place.some((0, 3, 4), (1, 1, 1), (40, 7, 15), (300, 100, 17), (4000, 50, 768), (9000, 50304, 64)):
        ids, weight = place.randint(V, N), place.randn(V, C)
        for dtype in (F32, BF16):
            earned(lambda w: ops.embedding(ids, w), lambda w: embedding_reference(ids, w), (weight,), dtype)


@check("matmul")
def _matmul(place):
    for rows, columns, depth in place.some((1, 1, 1), (3, 5, 7), (33, 65, 129), (0, 4, 4), (100, 256, 64), (513, 1030, 768)):
        for dtype in (F32, BF16):
            x, weight = (place.randn(*shape, seed=i).to(dtype) for i, shape in enumerate(((rows, depth), (columns, depth))))
            bias = place.randn(columns, seed=2)
            with poisoned():
                ours = ops.matmul(boxed(x, 0), boxed(weight, 0), bias)
            close(ours, matmul_reference(x.double(), weight.double(), bias.double()), dtype, roundings=8 + depth**0.5)


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
            raise LookupError(f"no choice of {name} kernels here")
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
        raise LookupError("ops.attention_paged is not there")
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


@check("gae")
def _gae(place):
    for lengths in ([1], [3, 0, 4, 5], [0, 0, 17, 0], [1] * 50, [400], list(range(60)), [0], [] if place.small else [9000] * 3):
        M, bounds = sum(lengths), place.bounds(lengths)
        rewards, values = place.randn(M), 10 * place.randn(M, seed=1)
        with poisoned():
            ours = ops.gae(rewards, values, bounds, 0.99, 0.95)
        for a, b in zip(ours, gae_reference(rewards.double(), values.double(), bounds, 0.99, 0.95), strict=True):
            close(a, b, roundings=2)


@check("ppo loss")
def _ppo_loss(place):
    for M in place.some(1, 15, 17, 257, 5000, 100_003):
        old, advantages, ref = (place.randn(M, seed=i) for i in (1, 2, 3))

        def policy(op):
            return lambda x: tuple(op(x, old.to(x.dtype), advantages.to(x.dtype), 0.2, ref.to(x.dtype)))[:1]

        def value(op):
            return lambda x: tuple(op(x, old.to(x.dtype), advantages.to(x.dtype), 0.2))[:1]

        earned(policy(ops.ppo_policy_loss), policy(ppo_policy_loss_reference), (0.3 * place.randn(M),))
        earned(value(ops.ppo_value_loss), value(ppo_value_loss_reference), (place.randn(M),))


@check("sample")
def _sample(place):
    for B, V in place.some((1, 1), (7, 50), (40, 300), (64, 50257), (3, 131072)):
        for dtype in (F32, BF16):
            logits, requests, steps = (3 * place.randn(B, V)).to(dtype), place.randint(9999, B), place.randint(99, B, seed=1)
            several = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}
            for settings in ({}, {"temperature": 0.0}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}, several):
                with poisoned():
                    tokens, *ours = ops.sample(logits, 5, requests, steps, **settings)
                expected, *exact = sample_reference(logits.double(), 5, requests, steps, **settings)
                agree = tokens == expected  # a draw within a rounding of the border between two tokens may fall on either side
                assert agree.float().mean() >= (0.9 if B > 10 else 0.5 if B > 1 else 0), f"{int(agree.sum())} of {B} tokens agree"
                for a, b in zip(ours, exact, strict=True):
                    close(a[agree], b[agree], roundings=64)


@check("optimiser")
def _optimiser(place):
    shapes = [(1,), (17,), (64, 48)] if place.small else [(1,), (17,), (64, 48), (768, 3072), (50304, 16)]
    params, gradients = ([place.randn(*s, seed=i + j) for i, s in enumerate(shapes)] for j in (0, 50))
    close(torch.tensor(optim.gradient_norm(gradients)), torch.cat([g.double().flatten() for g in gradients]).norm().cpu(), roundings=16)
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    twins = [[x.double() for x in xs] for xs in (params, gradients, *moments)]
    for step in (1, 2, 3):
        for kind in ((params, gradients, *moments), twins):
            optim.adamw_(*kind, step, 1e-2, (0.9, 0.95), 1e-8, 0.1, 0.5)
    for ours, exact in zip(params, twins[0], strict=True):
        close(ours, exact, roundings=8)


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
        raise LookupError("needs a GPU")
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
        raise LookupError("needs a GPU with 40 GB free")
    x = torch.randn(70_000, 32_768, dtype=BF16, device="cuda")
    close(ops.softmax(x)[-3:], ops.softmax(x[-3:].clone()), BF16, roundings=2)
    targets = place.randint(32_768, len(x))
    close(ops.logits_logprobs(x, targets)[0][-3:], ops.logits_logprobs(x[-3:].clone(), targets[-3:])[0], roundings=32)
    del x
    q = torch.randn(1_100_000, 16, 128, dtype=BF16, device="cuda")
    bounds = torch.arange(0, len(q) + 1, 50, device="cuda", dtype=torch.int32)
    same(ops.attention(q, q, q, bounds)[-50:], ops.attention(*[q[-50:].clone()] * 3, place.bounds([50])), "attention")


def run_checks(place, names=None, deadline=math.inf, note=print):
    """[{name, verdict, detail, seconds}] of the checks of these names; verdict: ok, FAILED, or skipped with the reason."""
    rows = []
    for name, function in CHECKS.items():
        if names is not None and name not in names:
            continue
        began, verdict, detail = time.monotonic(), "ok", ""
        try:
            if began > deadline:
                raise LookupError("no time left")
            function(place)
            if place.device == "cuda":
                torch.cuda.synchronize()
        except LookupError as error:
            verdict, detail = "skipped", str(error)
        except Exception as error:  # a check that breaks in any way is a row of the table
            verdict, detail = "FAILED", f"{type(error).__name__}: {error}".strip()
        rows.append({"name": name, "verdict": verdict, "detail": detail[:500], "seconds": round(time.monotonic() - began, 2)})
        note(f"{verdict:8} {name:16} {rows[-1]['seconds']:7.1f} s  {detail[:300]}")
    return rows


def native_module(device):
    """The module whose kernels run on tensors of this device."""
    return backend.native(torch.empty(0, device=device))[0] if hasattr(backend, "native") else None
