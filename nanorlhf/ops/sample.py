"""From logits to a token and its log-probabilities. Native on CPUs and GPUs (csrc/sample.h).

The filters are those of Hugging Face's warpers, in their order: temperature, top-k, top-p, min-p. Each keeps every token
from a least logit on, so tokens that are equally probable stay or go together: top-k keeps all that equal the k-th, and
top-p the smallest set of whole levels of probability that holds at least that much (there Hugging Face keeps some of the last
level, which ones being up to its sort).
"""

import math

import torch

from nanorlhf.ops import backend

_MASK, _GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15


def sample(logits, seed, requests, steps, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One token a row of logits, with its log-probability under what it was drawn from and under the whole softmax.

    logits: (B, V) floating point, -inf where a token cannot be; requests, steps: (B,) int64. A row's random number is a
    pure function of (seed, request, step), and on the CPU its token is one of these and its logits alone: whatever the
    batch, the threads and the instruction set. temperature: 0 takes the first of the largest logits. top_k: keep the k
    most probable, 0 all; top_p: of these, the most probable that together have at least this share; min_p: of these,
    those with at least this share of the most probable one's probability.

    Returns (tokens (B,) int64, logprobs (B,), unfiltered (B,)), the latter in fp32 and nats (fp64 for fp64 logits), without
    gradient. logprobs: under softmax(logits / temperature) as filtered; 0 at temperature 0. unfiltered: under
    softmax(logits / temperature), the policy's own (what ops.token_logprobs gives); at temperature 0, where there is
    none, under softmax(logits).

    Raises ValueError for shapes that do not fit, settings out of range, and rows that are no distribution: with NaN,
    +inf, or nothing above -inf. The CUDA kernel, which nobody waits for, gives such a row token -1 with log-probs NaN. Its
    weights have the CPU's bits, so both draw the same token unless rounding of sums decides.

    >>> rows = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, -math.inf]])
    >>> tokens, logprobs, unfiltered = sample(rows, 0, torch.tensor([5, 6]), torch.tensor([0, 0]), top_k=1)
    >>> int(tokens[0]), logprobs.exp().tolist(), bool((unfiltered < logprobs).any())
    (1, [1.0, 0.5], True)
    """
    check_sampling(temperature, top_k, top_p, min_p)
    if logits.dim() != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        got = f"{tuple(logits.shape)} in {logits.dtype}"
        raise ValueError(f"sample: expected logits of shape (B, V) in floating point, got {got}")
    for name, x in (("requests", requests), ("steps", steps)):
        if x.shape != logits.shape[:1] or x.dtype != torch.int64:
            raise ValueError(f"sample: expected {name} of shape ({len(logits)},) in int64, got {tuple(x.shape)} in {x.dtype}")
    run = _sample_op if backend.use_native("sample", logits) else sample_reference
    return run(logits.detach(), _signed(seed), requests, steps, temperature, top_k, top_p, min_p)


def check_sampling(temperature, top_k, top_p, min_p):
    """ValueError, in one sentence, for a setting out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"sample: expected a finite temperature of 0 or more, got {temperature}")
    if top_k < 0:
        raise ValueError(f"sample: expected top_k of 0 or more, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"sample: expected top_p above 0 and at most 1, got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"sample: expected min_p from 0 to 1, got {min_p}")


def sample_reference(logits, seed, requests, steps, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The same in plain torch."""
    V = logits.shape[1]
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = scores - scores.amax(-1, keepdim=True)
    if bool(scores.isnan().any()):
        row = int(scores.isnan().any(-1).nonzero()[0])
        raise ValueError(f"sample: expected logits below inf and not all -inf, got row {row} that is NaN, +inf or all -inf")
    scores = scores / (temperature or 1)
    unfiltered = scores.log_softmax(-1)
    if temperature == 0:
        tokens = scores.argmax(-1)
        return tokens, torch.zeros_like(scores[:, 0]), unfiltered.gather(1, tokens[:, None]).squeeze(1)
    if 0 < top_k < V:
        scores = scores.masked_fill(scores < scores.topk(top_k)[0][:, -1:], -math.inf)
    if top_p < 1:  # a level stays while the mass before it is below top_p; the first always does
        ordered = scores.sort(-1, descending=True)[0]
        p = ordered.softmax(-1)
        kept = (p.cumsum(-1) - p < top_p).sum(-1, keepdim=True)
        scores = scores.masked_fill(scores < ordered.gather(1, kept.clamp(min=1) - 1), -math.inf)
    if min_p > 0:
        scores = scores.masked_fill(scores < math.log(min_p), -math.inf)
    logprobs = scores.log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    point = uniforms(seed, requests, steps)[:, None] * cumulative[:, -1:]
    # When rounding puts the point at the very end, the last token that has any probability is meant.
    last = V - 1 - (logprobs > -math.inf).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    tokens = torch.minimum(torch.searchsorted(cumulative, point, right=True), last)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1), unfiltered.gather(1, tokens).squeeze(1)


def uniforms(seed, requests, steps):
    """Counter-based random numbers in [0, 1), float64 (B,): a pure function of (seed, request, step), so a request
    draws the same numbers whatever batch it is in. Source: SplitMix64, Steele et al. 2014, §5.

    >>> one, three = torch.tensor([7]), torch.tensor([2, 7, 9])
    >>> bool(uniforms(0, one, one)[0] == uniforms(0, three, torch.tensor([5, 7, 1]))[1])
    True
    """
    state = _mix(requests + _signed((seed + 1) * _GOLDEN))
    state = _mix(state + (steps + 1) * _signed(_GOLDEN))
    return ((state >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def _signed(x):
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _mix(x):
    """SplitMix64's finaliser on int64: products wrap, shifts are logical."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))
        if factor is not None:
            x = x * _signed(factor)
    return x


def _sample(logits, seed, requests, steps, temperature, top_k, top_p, min_p):
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    requests, steps = requests.contiguous(), steps.contiguous()
    tokens = torch.empty_like(requests)
    logprobs, unfiltered = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    module, lane = backend.native(logits, lambda m: m.sample_workspace(*logits.shape))
    module.sample(
        *logits.shape, logits.stride(0), backend.DTYPES[logits.dtype], logits.data_ptr(), seed, requests.data_ptr(),
        steps.data_ptr(), temperature, top_k, top_p, min_p, tokens.data_ptr(), logprobs.data_ptr(), unfiltered.data_ptr(),
        lane,
    )  # fmt: skip
    return tokens, logprobs, unfiltered


_sample_op = backend.define(
    "sample(Tensor logits, int seed, Tensor requests, Tensor steps, float temperature, int top_k, float top_p, float min_p) "
    "-> (Tensor, Tensor, Tensor)",
    _sample,
    lambda logits, seed, requests, *_: (
        torch.empty_like(requests),
        *(logits.new_empty(logits.shape[:1], dtype=torch.float32) for _ in range(2)),
    ),
)
