"""The checks of bench/gpu.py of all ops but attention: every size that a kernel may treat in its own way, by gpu_verify's rules; and of
the engine's graphs."""

import math
import warnings

import torch

from gpu_verify import BF16, F32, Skipped, boxed, check, close, earned, poisoned, same
from nanorlhf import ops
from nanorlhf.config import ModelConfig
from nanorlhf.engine import Engine, Request, SamplingConfig
from nanorlhf.engine.graph import CudaCapture
from nanorlhf.model import Model
from nanorlhf.ops import optim
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
            own = {"temperature": place.randint(4, B).double() / 2, "top_k": place.randint(60, B, seed=1)}
            mask = place.randint(2**31, B, (V + 31) // 32).int() | 1
            for settings in ({}, {"temperature": 0.0}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}, several, {"mask": mask, **own}):
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


@check("decode graphs")
def _decode_graphs(place):
    """The engine by captured steps, and by the same steps called again and again, before and after weights change in place."""
    if place.device != "cuda":
        raise Skipped("needs a GPU")
    config = ModelConfig(vocab_size=501, hidden_size=192, layers=3, heads=6, kv_heads=2, head_size=64, intermediate_size=256, context=256)
    plain = SamplingConfig(), SamplingConfig(temperature=0), SamplingConfig(0.8, top_k=40), SamplingConfig(top_p=0.9, min_p=0.01)
    requests = [Request([7 + i % 2] * 40 + [i], 60 + 5 * i, plain[i % 4], seed=i % 3, stream=i, stop=(3, 4)) for i in range(29)]
    for dtype in (F32, BF16):
        net, told = Model(config, dtype=dtype).to(place.device), []
        captured = CudaCapture(net.device)
        engines = [Engine(net, slots=13, graphs=capture) for capture in (lambda run: run, captured)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a capture that fails
            for _ in range(2):
                told.append([[(c.ids, c.logprobs) for c in engine.run(requests)] for engine in engines])
                with torch.no_grad():
                    for weight in net.parameters():
                        weight.mul_(0.9)
        assert all(ours == expected for expected, ours in told), f"captured steps draw otherwise in {dtype}"
        assert captured.last is not None, "nothing was captured"
        assert told[0] != told[1]
