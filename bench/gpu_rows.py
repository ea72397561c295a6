"""The other rows of bench/gpu.py: what the card itself can do, softmax, the loss head, the passes over rows, a training step."""

import torch
import torch.nn.functional as F

import gpu_rows_attention
from gpu_rows_attention import compiled, copying
from gpu_time import OURS, Case, Row
from nanorlhf import ops
from nanorlhf.ops.norm import rms_norm_reference
from nanorlhf.ops.rope import rope_qkv_reference
from nanorlhf.ops.swiglu import swiglu_reference

BF16 = torch.bfloat16


def product(size=8192):
    """What all TFLOP/s are a share of: torch's (cuBLAS's) product of two large bf16 matrices."""

    def build(device, tiny):
        n = size if not tiny else 64
        a, b = (torch.randn(n, n, device=device, dtype=BF16) for _ in range(2))
        return Case({"cuBLAS": lambda: a @ b}, 2 * n**3 / 1e12, "TFLOP/s")

    return build


def copy(nbytes=4 << 30):
    """What all GB/s are a share of: bytes read and written by a copy on the device."""

    def build(device, tiny):
        n = nbytes if not tiny else 1 << 16
        return Case({"copy": copying(n, device)}, n / 1e9, "GB/s", compared=False)

    return build


CEILINGS = [Row("cuBLAS 8192^3", product(), quick=True), Row("copy 4 GiB", copy(), quick=True)]


def softmax(shape, dtype):
    def build(device, tiny):
        x = torch.randn(shape if not tiny else (3, 50), device=device, dtype=dtype)
        torchs = compiled(lambda x: x.softmax(-1), device)
        ways = {OURS: lambda: ops.softmax(x), "torch": lambda: x.softmax(-1), "compiled": lambda: torchs(x),
                "copy": copying(2 * x.nbytes, device)}  # fmt: skip
        return Case(ways, 2 * x.nbytes / 1e9, "GB/s")

    return build


def loss_inputs(device, tiny, N=8192, C=4096, V=131072):
    N, C, V = (N, C, V) if not tiny else (20, 32, 90)
    hidden = torch.randn(N, C, device=device, dtype=BF16).requires_grad_()
    weight = torch.empty(V, C, device=device, dtype=BF16).normal_(0, C**-0.5).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), device=device)


def torch_cross_entropy(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets)


def torch_with_entropy(hidden, weight, targets):
    logp = F.linear(hidden, weight).float().log_softmax(-1)
    return -logp.gather(1, targets[:, None]).mean() - 0.01 * -(logp.exp() * logp).sum(-1).mean()


def our_cross_entropy(hidden, weight, targets):
    return -ops.token_logprobs(hidden, weight, targets)[0].mean()


def our_with_entropy(hidden, weight, targets):
    logprobs, entropy = ops.token_logprobs(hidden, weight, targets)
    return -logprobs.mean() - 0.01 * entropy.mean()


def peak(run, device):
    """GB of the device's memory over what is taken already, results included."""
    if device != "cuda":
        return 1.0
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = run()
    torch.cuda.synchronize()
    del held
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def loss_head(entropy, memory=False):
    ours, torchs = (our_with_entropy, torch_with_entropy) if entropy else (our_cross_entropy, torch_cross_entropy)

    def build(device, tiny):
        inputs = loss_inputs(device, tiny)
        fused = compiled(torchs, device)
        work = 6 * inputs[0].numel() * inputs[1].shape[0] / 1e12  # the logits that are computed again are not counted
        losses = {OURS: ours, "torch": torchs, "compiled": fused}
        ways = {name: lambda f=f: torch.autograd.grad(f(*inputs), inputs[:2]) for name, f in losses.items()}
        numbers = {}
        if memory:
            numbers = {f"peak GB {name}": round(peak(ways[name], device), 3) for name in (OURS, "torch")}
            ways = {OURS: ways[OURS]}
        return Case(ways, work, "TFLOP/s", tolerance=0.05, numbers=numbers)

    return build


def memory_ratio(case):
    return case.numbers["peak GB torch"] / max(case.numbers[f"peak GB {OURS}"], 1e-9)


def given_logits(device, tiny):
    logits = torch.randn((8192, 131072) if not tiny else (5, 70), device=device, dtype=BF16)
    targets = torch.randint(0, logits.shape[1], (len(logits),), device=device)
    ways = {OURS: lambda: ops.logits_logprobs(logits, targets)[0], "torch": lambda: -F.cross_entropy(logits, targets, reduction="none"),
            "copy": copying(logits.nbytes, device)}  # fmt: skip
    return Case(ways, logits.nbytes / 1e9, "GB/s")


def both_directions(ours, torchs, tensors, nbytes):
    """Forward and backward of an op over rows, against the same in compiled torch and a copy of what has to be moved."""

    def build(device, tiny):
        inputs = [x.requires_grad_() for x in tensors(device, tiny)]
        outputs = ours(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = [torch.randn_like(o) for o in outputs]
        fused = compiled(torchs, device)
        ways = {name: lambda f=f: torch.autograd.grad(f(*inputs), inputs, gradients) for name, f in ((OURS, ours), ("compiled", fused))}
        moved = nbytes(*inputs)
        return Case({**ways, "copy": copying(moved, device)}, moved / 1e9, "GB/s", tolerance=0.05)

    return build


def _normed(device, tiny):
    N, C = (16384, 4096) if not tiny else (6, 48)
    return torch.randn(N, C, device=device, dtype=BF16), torch.randn(C, device=device, dtype=BF16)


def _gated(device, tiny):
    return [torch.randn((16384, 8192) if not tiny else (5, 48), device=device, dtype=BF16) for _ in range(2)]


def _turned(device, tiny):
    N = 16384 if not tiny else 9
    return [torch.randn(N, heads, 128, device=device, dtype=BF16) for heads in (16, 4, 4)]


def _rope(f):
    return lambda q, k, v: f(q, k, v, torch.arange(len(q), device=q.device))


def sampled(device, tiny):
    logits = torch.randn((256, 131072) if not tiny else (4, 60), device=device)
    requests, steps = torch.arange(len(logits), device=device), torch.zeros(len(logits), dtype=torch.int64, device=device)
    ways = {OURS: lambda: ops.sample(logits, 0, requests, steps, top_k=50, top_p=0.95),
            "torch softmax + multinomial, no filter": lambda: logits.softmax(-1).multinomial(1),
            "copy": copying(logits.nbytes, device)}  # fmt: skip
    return Case(ways, logits.nbytes / 1e9, "GB/s", compared=False)


def step(batch=16, T=1024):
    """A whole training step of GPT-2's 124M shape in our form of a decoder (bench_step.py says what is in one), AdamW."""

    def build(device, tiny):
        import bench_step
        from nanorlhf.config import ModelConfig
        from nanorlhf.model import Model
        from nanorlhf.optim import Optimizer

        rows, length = (batch, T) if not tiny else (2, 16)
        size = {"vocab_size": 50304, "hidden_size": 768, "layers": 12, "heads": 12, "kv_heads": 12, "intermediate_size": 2048}
        if tiny:
            size = {"vocab_size": 64, "hidden_size": 64, "layers": 1, "heads": 1, "kv_heads": 1, "intermediate_size": 96}
        config = ModelConfig(**size, head_size=64, context=length)
        bench_step.CONFIG, bench_step.ROWS, bench_step.T = config, rows, length
        tokens, recipe = bench_step.batch().to(device), bench_step.RECIPES["adamw"]
        ours, plain = Model(config, dtype=BF16), bench_step.Plain(config)
        plain.load_state_dict(ours.state_dict())
        ours, plain = ours.to(device), plain.to(device)
        cu_seqlens = torch.arange(0, tokens.numel() + 1, length, dtype=torch.int32, device=device)
        our_optimizer, their_optimizer = Optimizer(ours, recipe, 10**9), bench_step.PlainOptimizer(plain, recipe)
        forward = compiled(plain, device)

        def our_step():
            loss = -ours.logprobs(tokens.flatten(), cu_seqlens)[0].mean()
            loss.backward()
            our_optimizer.step(0)
            return loss.detach()

        def their_step():
            with torch.autocast(device, BF16):
                loss = forward(tokens)
            loss.backward()
            their_optimizer.step()
            return loss.detach()

        return Case({OURS: our_step, "compiled": their_step}, bench_step.gigaflops() / 1e3, "TFLOP/s", tolerance=0.02)

    return build


def decoding(rows=8, tokens=64):
    """The engine's steps as CUDA graphs, and one by one, prompts included."""

    def build(device, tiny):
        from nanorlhf.config import ModelConfig
        from nanorlhf.engine import Engine, Request
        from nanorlhf.model import Model

        size, new = (768, tokens) if not tiny else (64, 4)
        config = ModelConfig(vocab_size=16 * size, hidden_size=size, layers=12 if not tiny else 1, heads=size // 64, kv_heads=size // 64,
                             head_size=64, intermediate_size=8 * size // 3, context=512)  # fmt: skip
        net = Model(config, dtype=BF16).to(device)
        requests = [Request([i + 1] * 16, new, stream=i) for i in range(rows)]
        ways = {name: Engine(net, slots=rows, graphs=graphs, keep=False) for name, graphs in ((OURS, True), ("eager", False))}
        runs = {name: lambda engine=engine: engine.run(requests) and None for name, engine in ways.items()}
        for _ in range(4):  # a shape is captured when it has come often enough
            runs[OURS]()
        return Case(runs, rows * new / 1e3, "ktokens/s", compared=False)

    return build


def rows():
    """Every row of the table but the ceilings, the most wanted first."""
    attention = gpu_rows_attention.rows()
    found = [Row(f"softmax {shape[0]} x {shape[1]} bf16", softmax(shape, BF16), ("copy",), 0.9, None, ("softmax",), shape[1] == 8192)
             for shape in ((16384, 8192), (65536, 2048), (4096, 32768), (1024, 131072))]  # fmt: skip
    found.append(Row("softmax 8192 x 8192 fp32", softmax((8192, 8192), torch.float32), ("copy",), 0.9, None, ("softmax",)))
    found += [
        Row("loss head with entropy", loss_head(True), ("torch", "compiled"), 2.5, None, ("loss",), True),
        Row("loss head, cross entropy alone", loss_head(False), ("torch", "compiled"), 2.5, None, ("loss",)),
        Row("loss head memory", loss_head(False, memory=True), ("torch's peak",), 4.0, None, ("loss",), True, memory_ratio),
        Row("training step 124M", step(), ("compiled",), 1.2, None, ("attention portable", "attention sm90", "norm", "loss"), patience=170),
        Row("logprobs of given logits", given_logits, ("copy",), needs=("loss",)),
        Row("RMSNorm both ways", both_directions(ops.rms_norm, rms_norm_reference, _normed, lambda x, w: 5 * x.nbytes), ("copy",),
            needs=("norm",)),
        Row("SwiGLU both ways", both_directions(ops.swiglu, swiglu_reference, _gated, lambda g, u: 8 * g.nbytes), ("copy",),
            needs=("swiglu",)),
        Row("RoPE both ways", both_directions(_rope(ops.rope_qkv), _rope(rope_qkv_reference), _turned,
                                              lambda q, k, v: 4 * (q.nbytes + k.nbytes + v.nbytes)), ("copy",), needs=("rope",)),
        Row("engine steps B8 124M", decoding(), ("eager",), needs=("decode graphs",)),
        Row("engine steps B64 124M", decoding(64), ("eager",), needs=("decode graphs",)),
        Row("sample 256 x 131072", sampled, ("copy",), needs=("sample",)),
    ]  # fmt: skip
    return sorted(attention + found, key=_order)


def _order(row):
    """What has a bar, the most telling rows first: the end of the list is what is left out when time is short."""
    first = ("forward D128", "backward D128", "forward D64", "packed", "decode", "64 samples", "softmax", "loss head", "training",
             "backward D64")  # fmt: skip
    place = next((i for i, start in enumerate(first) if row.name.startswith(start)), len(first))
    return (not row.quick, row.must is None, place)
