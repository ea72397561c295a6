"""The attention rows of bench/gpu.py: 16k tokens, 2048 columns of heads, bf16, against every backend of torch."""

import inspect
import time

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpu_verify
from gpu_time import OURS, Case, Row
from nanorlhf import ops

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
TOKENS, COLUMNS = 16384, 2048
QUICK = {(128, 2048), (128, 8192), (64, 1024), (64, 8192)}  # of (head size, length)
WIDE = {(128, 4096), (64, 4096)}  # where the slower peers are shown too
# Of documents that make a row of 16k tokens: from a sentence to a long page.
MIXED = [37, 2210, 412, 96, 1533, 655, 148, 3071, 23, 880, 1204, 331, 64, 1790, 509, 2502, 719]
MIXED = [*MIXED, TOKENS - sum(MIXED)]
AVOID = frozenset()  # variants that are not to be run, as a check of theirs failed


def compiled(f, device):
    """torch's compiler's version of f where it is timed. Its backward pass can run again and again, for which it must give nothing
    away."""
    torch._functorch.config.donated_buffer = False
    return torch.compile(f, dynamic=False) if device == "cuda" else f


def pinned(backend, q, k, v, causal, **more):
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **more).transpose(1, 2)


def varlen(q, k, v, cu_seqlens, longest, causal):
    from torch.nn.attention.varlen import varlen_attn

    named = "is_causal" in inspect.signature(varlen_attn).parameters  # in the first releases that have it
    way = {"is_causal": causal} if named else {"window_size": (-1, 0 if causal else -1)}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **way)


def flexible(q, cu_seqlens, causal, numbers):
    """A function of (1, H, N, D) tensors: FlexAttention with a mask that is made once, here; the time that took goes to numbers."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    N = q.shape[0]
    owner = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1, device=q.device), cu_seqlens.diff().long(), output_size=N)

    def seen(b, h, i, j):
        return (owner[i] == owner[j]) & (i >= j) if causal else owner[i] == owner[j]

    began = time.perf_counter()
    mask = create_block_mask(seen, None, None, N, N, device=q.device)
    if q.is_cuda:
        torch.cuda.synchronize()
    numbers["flex mask ms"] = round(1e3 * (time.perf_counter() - began), 2)
    run = compiled(flex_attention, q.device.type)
    return lambda q, k, v: run(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask)[0].transpose(0, 1)


def by_variant(device, run):
    """{name: run} for each of our kernels, where there is a choice."""
    module = gpu_verify.native_module(device)
    place = gpu_verify.Place(device, module=module, avoid=AVOID)
    names = gpu_verify.variants(place) if module is not None else []

    def chosen(name):
        def call():
            with gpu_verify.variant(place, name):
                return run()

        return call

    return {f"{OURS} {name}": chosen(name) for name in names} if len(names) > 1 else {}


def in_direction(backward, ways, inputs, gradient):
    """The ways as they are, without gradients, or their backward passes alone, forward having run once."""
    if not backward:
        def inference(way):
            def run():
                with torch.no_grad():
                    return way(*inputs)

            return run

        return {name: inference(way) for name, way in ways.items()}

    def gradients(way):
        held = []

        def run():
            if not held:
                held.append(way(*inputs))
            return torch.autograd.grad(held[0], inputs, gradient.view(held[0].shape), retain_graph=True)

        return run

    return {name: gradients(way) for name, way in ways.items()}


def dense(D, S, causal, backward):
    """A batch of rows of one length."""

    def build(device, tiny):
        T, B, H = (S, TOKENS // S, COLUMNS // D) if not tiny else (40, 2, 2)
        inputs = [torch.randn(B * T, H, D, device=device, dtype=torch.bfloat16).requires_grad_(backward) for _ in range(3)]
        gradient, cu_seqlens = torch.randn_like(inputs[0]), torch.arange(0, B * T + 1, T, device=device, dtype=torch.int32)
        numbers = {}

        def torchs(backend):
            return lambda *x: pinned(backend, *(y.view(B, T, H, D).transpose(1, 2) for y in x), causal)

        ways = {OURS: lambda q, k, v: ops.attention(q, k, v, cu_seqlens, causal)} | {name: torchs(b) for name, b in BACKENDS.items()}
        if (D, S) in WIDE and B * T * T < 1 << 28:
            ways["varlen"] = lambda q, k, v: varlen(q, k, v, cu_seqlens, T, causal)
            if causal:
                ways["flex"] = flexible(inputs[0], cu_seqlens, causal, numbers)
        contenders = in_direction(backward, ways, inputs, gradient)
        if (D, S) in QUICK | WIDE:  # outside of the rest, as backward kernels are chosen when they are called
            contenders |= by_variant(device, contenders[OURS])
        pairs = B * (T * (T + 1) // 2 if causal else T * T)
        return Case(contenders, (2.5 if backward else 1) * 4 * pairs * H * D / 1e12, "TFLOP/s", numbers=numbers)

    return build


def packed(D, backward):
    """Documents of mixed lengths in one row."""

    def build(device, tiny):
        lengths, H = (MIXED, COLUMNS // D) if not tiny else ([5, 70, 1, 33], 2)
        N = sum(lengths)
        inputs = [torch.randn(N, H, D, device=device, dtype=torch.bfloat16).requires_grad_(backward) for _ in range(3)]
        cu_seqlens, numbers = torch.tensor([0, *lengths], device=device).cumsum(0).int(), {}
        ways = {
            OURS: lambda q, k, v: ops.attention(q, k, v, cu_seqlens),
            "flex": flexible(inputs[0], cu_seqlens, True, numbers),
            "varlen": lambda q, k, v: varlen(q, k, v, cu_seqlens, max(lengths), True),
        }
        work = sum(T * (T + 1) // 2 for T in lengths) * 4 * H * D / 1e12
        contenders = in_direction(backward, ways, inputs, torch.randn_like(inputs[0]))
        return Case({**contenders, **by_variant(device, contenders[OURS])}, (2.5 if backward else 1) * work, "TFLOP/s", numbers=numbers)

    return build


def copying(nbytes, device):
    """A contender that reads and writes that many bytes in all."""
    source = torch.ones(nbytes // 8, device=device)
    target = torch.empty_like(source)

    def run():
        target.copy_(source)

    return run


def decode(B, T, H=32, Hkv=8, D=128, paged=False, page=64):
    """One query a sequence, against a cache of T keys each."""

    def build(device, tiny):
        b, t = (B, T) if not tiny else (3, 128)
        q = torch.randn(b, H, D, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(b, t, Hkv, D, device=device, dtype=torch.bfloat16) for _ in range(2))
        lengths = torch.full((b,), t, device=device, dtype=torch.int32)
        ways = {OURS: lambda: ops.attention_decode(q, k, v, lengths)}
        if paged:
            pages = torch.randperm(b * t // page, device=device).int().view(b, -1)
            pools = [torch.empty(b * t // page, page, Hkv, D, device=device, dtype=torch.bfloat16) for _ in range(2)]
            for pool, cache in zip(pools, (k, v), strict=True):
                pool[pages.flatten().long()] = cache.view(-1, page, Hkv, D)
            ways = {OURS: lambda: ops.attention_paged(q, *pools, pages, lengths), "not paged": ways[OURS]}
        dense = q[:, :, None], *(x.transpose(1, 2) for x in (k, v))
        for name in ("cuDNN", "flash"):  # "efficient" knows no groups of queries
            ways[name] = lambda backend=BACKENDS[name]: pinned(backend, *dense, False, enable_gqa=True)
        ways["copy"] = copying(2 * k.nbytes, device)
        return Case(ways, 2 * k.nbytes / 1e9, "GB/s", numbers={"KV MB": 2 * k.nbytes / 1e6})

    return build


def shared_prompt(samples=64, prompt=2048, own=128, H=32, Hkv=8, D=128):
    """Samples of one prompt: its keys once, against a copy for each."""

    def build(device, tiny):
        n, p, t = (samples, prompt, own) if not tiny else (5, 40, 8)
        q = torch.randn(n, H, D, device=device, dtype=torch.bfloat16)
        prefix = [torch.randn(p, Hkv, D, device=device, dtype=torch.bfloat16) for _ in range(2)]
        caches = [torch.randn(n, t, Hkv, D, device=device, dtype=torch.bfloat16) for _ in range(2)]
        whole = [torch.cat((x[None].expand(n, -1, -1, -1), c), 1) for x, c in zip(prefix, caches, strict=True)]
        lengths = torch.full((n,), t, device=device, dtype=torch.int32)
        shared = (*prefix, torch.tensor([0, p], device=device, dtype=torch.int32), torch.zeros_like(lengths))
        ways = {
            OURS: lambda: ops.attention_decode(q, *caches, lengths, None, shared),
            "unshared": lambda: ops.attention_decode(q, *whole, lengths + p),
        }
        return Case(ways, 2 * (prefix[0].nbytes + caches[0].nbytes) / 1e9, "GB/s")

    return build


def forward_bars(D, S):
    return (0.95, 1.15) if D == 64 else (0.8, 1.0) if S >= 2048 else (0.9, 1.1)


def rows():
    found, lengths = [], [512, 1024, 2048, 4096, 8192, 16384]
    forward, backward = (tuple(f"attention {name}{what}" for name in ("portable", "sm90")) for what in (" forward", ""))
    for D in (128, 64):
        for S in lengths:
            for causal in (True, False):
                shape = f"D{D} S{S} {'causal' if causal else 'full'}"
                fast = (D, S) in QUICK and causal
                found.append(Row(f"forward {shape}", dense(D, S, causal, False), ("cuDNN",), *forward_bars(D, S), forward, fast))
                found.append(Row(f"backward {shape}", dense(D, S, causal, True), ("cuDNN",), 0.7, 1.0, backward, fast))
    for D in (128, 64):
        found.append(Row(f"packed forward D{D}", packed(D, False), ("flex",), 2.0, None, forward, D == 128))
        found.append(Row(f"packed backward D{D}", packed(D, True), ("flex",), 2.0, None, backward))
    for B, T in ((8, 2048), (64, 2048), (4, 32768)):
        found.append(Row(f"decode B{B} T{T}", decode(B, T), ("copy",), 0.85, None, ("decode",), B == 64))
    found.append(Row("decode paged B64 T2048", decode(64, 2048, paged=True), ("copy",), 0.85, None, ("paged",)))
    found.append(Row("64 samples of a 2k prompt", shared_prompt(), ("unshared",), 5.0, None, ("decode",), True))
    return found
