"""Every native op once, forward and backward, fp32 and bf16, in odd sizes, large enough for two threads: for the tests that
run all of them in a process of their own."""

import os

import torch

from nanorlhf import ops


def tasks():
    """How many threads the system counts in this process."""
    return len(os.listdir("/proc/self/task"))


def everything():
    """A list of results, the same bits on every call."""
    g = torch.Generator().manual_seed(0)
    N, V, C, H, D = 517, 2003, 160, 4, 40
    weight, head = (torch.randn(V, C, generator=g).requires_grad_() for _ in range(2))
    ids, cu_seqlens = torch.randint(0, V, (N,), generator=g), torch.tensor([0, 100, 100, 101, N]).int()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        x = ops.rms_norm(ops.embedding(ids, weight, dtype), torch.ones(C))
        q = ops.rope(x.view(N, H, D), torch.arange(N))
        a = ops.attention(q, q[:, ::2], q[:, 1::2], cu_seqlens).reshape(N, C)
        s = ops.softmax(ops.swiglu(a, x))
        logprobs, entropy = ops.token_logprobs(a + s, head, ids)
        other = ops.logits_logprobs((a + s) @ head.to(dtype).T, ids)[0]
        policy = ops.ppo_policy_loss(logprobs, entropy, other, 0.2, ref=other)
        value = ops.ppo_value_loss(entropy, logprobs, other, 0.2)
        (logprobs.sum() + entropy.sum() + other.sum() + policy.loss + value.loss).backward()
        cache = q[None].expand(9, N, H, D)[:, :, :2]
        decoded = ops.attention_decode(q[:9], cache, cache, (ids[:9] % N).int())
        prefix = q[:, ::2], q[:, 1::2], cu_seqlens, (ids[:9] % 4 // 3).int() * 3  # most begin with the first, the others with the last
        shared = ops.attention_decode(q[:9], cache[:, :20], cache[:, :20], (ids[:9] % 20).int(), prefix=prefix)
        results += [logprobs, entropy, other, decoded, shared, *policy, *value, weight.grad.clone(), head.grad.clone()]
        results += [*ops.gae(logprobs, entropy, cu_seqlens, 0.99, 0.95), ops.reward_to_go(logprobs, cu_seqlens)]
    results.append(torch.randn(999, 999, generator=g).softmax(-1))  # and loops of torch's own
    return [r.detach().float() for r in results]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
