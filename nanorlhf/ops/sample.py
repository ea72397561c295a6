"""From logits to a token and its log-probabilities. Native on CPUs and GPUs (csrc/sample.h).

The filters are those of Hugging Face's warpers, in their order: temperature, top-k, top-p, min-p. Each keeps every token
from a least logit on, so tokens that are equally probable stay or go together: top-k keeps all that equal the k-th, and
top-p the smallest set of whole levels of probability that holds at least that much (there Hugging Face keeps some of the last
level, which ones being up to its sort).
"""

import math

import torch

from nanorlhf.ops import backend

MOST_TEMPERATURE = 1e30  # so that it is finite in fp32
_MASK, _GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15
DEFAULTS = {"seed": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
ROW_DTYPES = {name: torch.int64 if isinstance(x, int) else torch.float64 for name, x in DEFAULTS.items()}


def sample(logits, seed, requests, steps, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, mask=None):
    """One token a row of logits, with its log-probability under what it was drawn from and under the whole softmax.

    logits: (B, V) floating point, -inf where a token cannot be; requests, steps: (B,) int64. A row's random number is a
    pure function of (seed, request, step), and on the CPU its token is one of these and its logits, settings and mask alone:
    whatever the batch, the threads and the instruction set. temperature: 0 takes the first of the largest logits. top_k:
    keep the k most probable, 0 all; top_p: of these, the most probable that together have at least this share; min_p: of
    these, those with at least this share of the most probable one's probability. Each of these and the seed is a number, or
    a tensor (B,) of the logits' device, int64 for seed and top_k, float64 for the others. mask: (B, ceil(V / 32)) int32,
    applied before everything else: token j may come where bit j % 32 of word j // 32 is set.

    Returns (tokens (B,) int64, logprobs (B,), unfiltered (B,), kept (B,)), the latter in fp32 and the log-probs in nats (fp64
    for fp64 logits), without gradient. logprobs: under softmax(logits / temperature) as masked and filtered; 0 at temperature
    0. unfiltered: under softmax(logits / temperature), the policy's own (what ops.token_logprobs gives); at temperature 0,
    where there is none, under softmax(logits). kept: the share of that softmax that the mask allows.

    Raises ValueError for shapes that do not fit, settings out of range, rows that are no distribution (with NaN, +inf, or
    nothing above -inf), and masks that allow no token above -inf. The CUDA kernel, which nobody waits for, gives such a row,
    one with settings out of range in a tensor too, token -1 with NaN for the rest. Its weights have the CPU's bits, so both
    draw the same token unless rounding of sums decides.

    >>> rows = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, -math.inf]])
    >>> tokens, logprobs, unfiltered, kept = sample(rows, 0, torch.tensor([5, 6]), torch.tensor([0, 0]), top_k=1)
    >>> int(tokens[0]), logprobs.exp().tolist(), bool((unfiltered < logprobs).any()), kept.tolist()
    (1, [1.0, 0.5], True, [1.0, 1.0])
    >>> second = torch.tensor([[0b010], [0b010]], dtype=torch.int32)
    >>> tokens, _, _, kept = sample(rows, 0, torch.tensor([5, 6]), torch.tensor([0, 0]), mask=second)
    >>> tokens.tolist(), round(float(kept[1]), 3)
    ([1, 1], 0.5)
    """
    own, settings = [], (seed, temperature, top_k, top_p, min_p)
    if torch.Tensor in map(type, settings):
        (seed, temperature, top_k, top_p, min_p), own = apart("sample", len(logits), logits.device, settings)
    check_sampling(temperature, top_k, top_p, min_p)
    if logits.dim() != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        got = f"{tuple(logits.shape)} in {logits.dtype}"
        raise ValueError(f"sample: expected logits of shape (B, V) in floating point, got {got}")
    rows = logits.shape[:1]
    for name, x in (("requests", requests), ("steps", steps)):
        if x.shape != rows or x.dtype != torch.int64:
            raise ValueError(f"sample: expected {name} of shape ({len(logits)},) in int64, got {tuple(x.shape)} in {x.dtype}")
    if mask is not None:
        _expect("sample", "mask", mask, (len(logits), (logits.shape[1] + 31) // 32), torch.int32, logits.device)
    # Called directly, it does not pass torch's dispatcher, which for one row takes longer than the row.
    native = _sample_op if torch.compiler.is_compiling() else _sample
    return (native if backend.use_native("sample", logits) else _reference_of_all)(logits.detach(), signed(seed), requests, steps, temperature, top_k, top_p, min_p, own, mask)


def check_sampling(temperature, top_k, top_p, min_p, where=""):
    """ValueError, in one sentence that ends in ``where``, for a setting out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"sample: expected a finite temperature of 0 or more, got {temperature}{where}")
    if temperature > MOST_TEMPERATURE:
        raise ValueError(f"sample: expected a temperature of at most {MOST_TEMPERATURE:g}, got {temperature}{where}")
    if top_k < 0:
        raise ValueError(f"sample: expected top_k of 0 or more, got {top_k}{where}")
    if isinstance(top_k, float) or top_k >= 1 << 63:
        raise ValueError(f"sample: expected top_k to be a whole number below 2^63, got {top_k}{where}")
    if not 0 < top_p <= 1:
        raise ValueError(f"sample: expected top_p above 0 and at most 1, got {top_p}{where}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"sample: expected min_p from 0 to 1, got {min_p}{where}")


def _expect(op, name, x, shape, dtype, device):
    if x.shape != shape or x.dtype != dtype or x.device != device:
        wanted, got = f"{shape} in {dtype} on {device}", f"{tuple(x.shape)} in {x.dtype} on {x.device}"
        raise ValueError(f"{op}: expected {name} of shape {wanted.replace('torch.', '')}, got {got.replace('torch.', '')}")


def apart(op, rows, device, settings):
    """The settings with the default where rows have their own, and these, None where there are none."""
    numbers, own = list(settings), [None] * len(settings)
    for i, (name, x) in enumerate(zip(DEFAULTS, settings, strict=True)):
        if isinstance(x, torch.Tensor):
            _expect(op, name, x, (rows,), ROW_DTYPES[name], device)
            numbers[i], own[i] = DEFAULTS[name], x
    return numbers, own


def _reference_of_all(logits, seed, requests, steps, temperature, top_k, top_p, min_p, own, mask):
    numbers = seed, temperature, top_k, top_p, min_p
    seed, *settings = (number if x is None else x for number, x in zip(numbers, own, strict=True)) if own else numbers
    return sample_reference(logits, seed, requests, steps, *settings, mask)


def sample_reference(logits, seed, requests, steps, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, mask=None):
    """The same in plain torch."""
    logprobs, unfiltered, kept = filtered_logprobs(logits, temperature, top_k, top_p, min_p, mask)
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
    point = uniforms(seed, requests, steps)[:, None] * cumulative[:, -1:]
    # When rounding puts the point at the very end, the last token that has any probability is meant.
    last = logits.shape[1] - 1 - (logprobs > -math.inf).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    tokens = torch.minimum(torch.searchsorted(cumulative, point, right=True), last)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1), unfiltered.gather(1, tokens).squeeze(1), kept


def filtered_logprobs(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, mask=None):
    """The distributions that ``sample`` draws from, in plain torch: (logprobs (B, V), -inf where mask and filters cut,
    unfiltered (B, V), kept (B,)), in fp32 (fp64 for fp64 logits). Arguments and errors are those of ``sample``.

    >>> filtered_logprobs(torch.tensor([[0.0, 0.0, -1.0]]), top_k=1)[0].exp().tolist()
    [[0.5, 0.5, 0.0]]
    """
    B, V = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    rows = B if any(isinstance(x, torch.Tensor) for x in settings.values()) else 1
    for r, row in enumerate(zip(*(x.tolist() if isinstance(x, torch.Tensor) else [x] * rows for x in settings.values()))):
        check_sampling(*row, f" in row {r}")
    # (B, 1) each, so that a number and a tensor of it give the same bits
    temperature, top_k, top_p, min_p = (
        torch.as_tensor(x, dtype=ROW_DTYPES[name], device=logits.device).expand(B)[:, None] for name, x in settings.items())  # fmt: skip
    scores = logits.to(wide)
    scores = scores - scores.amax(-1, keepdim=True)
    if bool(scores.isnan().any()):
        row = int(scores.isnan().any(-1).nonzero()[0])
        raise ValueError(f"sample: expected logits below inf and not all -inf, got row {row} that is NaN, +inf or all -inf")
    scores = scores / temperature.masked_fill(temperature == 0, 1).to(wide)
    unfiltered, kept = scores.log_softmax(-1), torch.ones_like(scores[:, 0])
    if mask is not None:
        allowed = (mask[:, :, None] >> torch.arange(32, device=mask.device) & 1).bool().flatten(1)[:, :V]
        scores = scores.masked_fill(~allowed, -math.inf)
        kept = unfiltered.masked_fill(~allowed, -math.inf).logsumexp(-1).exp().clamp(max=1)
        empty = (scores.amax(-1) == -math.inf).nonzero()
        if len(empty):
            raise ValueError(f"sample: expected a mask that allows a token above -inf, got none in row {int(empty[0])}")
    scores = _filtered(scores, top_k, top_p, min_p)
    if bool((temperature == 0).any()):  # there the first of the largest is all that is left
        first = torch.arange(V, device=scores.device) == scores.argmax(-1, keepdim=True)
        scores = scores.masked_fill((temperature == 0) & ~first, -math.inf)
    return scores.log_softmax(-1), unfiltered, kept


def _filtered(scores, top_k, top_p, min_p):
    """Scores (B, V) with -inf where top-k, top-p or min-p, (B, 1) each, cut them."""
    V = scores.shape[1]
    most = max((k for k in top_k[:, 0].tolist() if k < V), default=0)
    if most > 0:
        least = scores.topk(most)[0].gather(1, top_k.clamp(1, most) - 1)
        scores = scores.masked_fill((scores < least) & (top_k > 0) & (top_k < V), -math.inf)
    if bool((top_p < 1).any()):  # a level stays while the mass before it is below top_p; the first always does
        ordered = scores.sort(-1, descending=True)[0]
        p = ordered.softmax(-1)
        kept = (p.cumsum(-1) - p < top_p.to(p.dtype)).sum(-1, keepdim=True).masked_fill(top_p == 1, V)
        scores = scores.masked_fill(scores < ordered.gather(1, kept.clamp(min=1) - 1), -math.inf)
    if bool((min_p > 0).any()):
        scores = scores.masked_fill(scores < scores.amax(-1, keepdim=True) + min_p.log().to(scores.dtype), -math.inf)
    return scores


def uniforms(seed, requests, steps):
    """Counter-based random numbers in [0, 1), float64 (B,): a pure function of (seed, request, step), so a request
    draws the same numbers whatever batch it is in. seed: a number or int64 (B,). Source: SplitMix64, Steele et al. 2014, §5.

    >>> one, three = torch.tensor([7]), torch.tensor([2, 7, 9])
    >>> bool(uniforms(0, one, one)[0] == uniforms(0, three, torch.tensor([5, 7, 1]))[1])
    True
    """
    state = _mix(requests + signed((seed + 1) * signed(_GOLDEN)))
    state = _mix(state + (steps + 1) * signed(_GOLDEN))
    return ((state >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def signed(x):
    """A number modulo 2^64 as an int64; a tensor is one already."""
    if isinstance(x, torch.Tensor):
        return x
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _mix(x):
    """SplitMix64's finaliser on int64: products wrap, shifts are logical."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))
        if factor is not None:
            x = x * signed(factor)
    return x


def _sample(logits, seed, requests, steps, temperature, top_k, top_p, min_p, own, mask):
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    requests, steps = requests.contiguous(), steps.contiguous()
    own = [x if x is None else x.contiguous() for x in own]
    addresses = [0 if x is None else x.data_ptr() for x in own] if own else (0, 0, 0, 0, 0)
    mask = mask if mask is None or mask.stride(1) == 1 else mask.contiguous()
    tokens, logprobs = torch.empty_like(requests), torch.empty_like(requests, dtype=torch.float32)
    unfiltered, kept = torch.empty_like(logprobs), torch.empty_like(logprobs)
    rows, columns = logits.shape
    module, lane = backend.native(logits, lambda m: m.sample_workspace(rows, columns))
    module.sample(
        rows, columns, logits.stride(0), backend.DTYPES[logits.dtype], logits.data_ptr(), seed, requests.data_ptr(),
        steps.data_ptr(), temperature, top_k, top_p, min_p, addresses,
        *((0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))), tokens.data_ptr(), logprobs.data_ptr(),
        unfiltered.data_ptr(), kept.data_ptr(), lane,
    )  # fmt: skip
    return tokens, logprobs, unfiltered, kept


_sample_op = backend.define(
    "sample(Tensor logits, int seed, Tensor requests, Tensor steps, float temperature, int top_k, float top_p, float min_p, "
    "Tensor?[] own, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor)",
    _sample,
    lambda logits, seed, requests, *_: (
        torch.empty_like(requests),
        *(logits.new_empty(logits.shape[:1], dtype=torch.float32) for _ in range(3)),
    ),
)
