"""What a library shows of itself to be judged: an adapter, an object with any of the methods below. A test whose method is missing
is skipped, and says which it was.

Tensors are dense: B responses of at most T tokens, right-padded, with a boolean mask (B, T) that is True where a token counts. A
library on ragged tensors converts. Everything is in nats and differentiable where its result is a loss. "scalar" is 0-d.

Functions, that any library has in some form:
    token_logprobs(logits (B,T,V), ids (B,T), temperature) → (B,T): log-probability of each id under the row of logits beside it
    entropy(logits (B,T,V), mask) → scalar, the mean over tokens that count
    sft_loss(logits (B,T,V), ids (B,T), learn (B,T)) → scalar: logits[t] predict ids[t+1]; learn marks the ids that count
    masked_mean(x, mask) → scalar          whiten(x, mask, shift_mean) → (B,T)
    kl(logprobs, ref_logprobs, kind) → (B,T), kind "k1", "k2", "k3": estimates of KL(policy ‖ reference), differentiable in logprobs
    token_rewards(scores (B,), logprobs, ref_logprobs, mask, beta) → (B,T)
    gae(rewards, values, mask, gamma, lam) → (advantages, returns), both (B,T), not whitened
    advantages(rewards, values, mask, gamma, lam) → (B,T), as the policy loss takes them
    policy_loss(logprobs, old, advantages, mask, clip) → scalar          value_loss(values, old, returns, mask, clip) → scalar
    policy_metrics(logprobs, old, advantages, mask, clip) → dict with any of approx_kl (½ mean d²), clip_fraction, ratio_mean
    accumulated_loss(terms (B,T), mask, sizes) → scalar: what the library's loop adds up to over micro-batches of these many responses
    kl_controller(beta, target, horizon) → update(kl, episodes) → the new beta
    missing_end(scores (B,), finished (B,), value) → (B,)          truncate(responses (B,T), stop, pad) → (B,T)
    kwise_loss(scores (K,), ranks (K,)) → scalar          pairwise_loss(better (P,), worse (P,), margins (P,)) → scalar
    dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing) → (P,)          ipo_loss(…, beta) → (P,)
    rloo_advantages(rewards (G,K)) → (G,K)          grpo_advantages(rewards (G,K), std_norm) → (G,K)
    grpo_loss(logprobs, old, ref_logprobs, advantages (B,), mask, clip, beta, length_norm, longest) → scalar
    reinforce_loss(logprobs, rewards (B,), mask, baseline) → scalar          importance_weights(logprobs, sampled, cap) → like them
    exact_kl(logits (N,V), ref_logits (N,V)) → (N,)          best_of_n_kl(n) → float
    adam(gradients, lr, betas, eps) → the values of a parameter that starts at 0, after each of these gradients
    learning_rate(step, steps) → share of the peak, for a linear decay to 0 without warm-up
    pair_accuracy(gaps) → float          calibration(gaps) → {"error": float}

Systems, on a small fixed model of the adapter's own (ids below ``vocab``, sequences of at most ``longest``):
    score(sequences) → (B,) of a reward model          logprobs(sequences, temperature) → [[log p of each id after the first]]
    generate(prompts, count, n, temperature, top_k, seed, stop) → [(ids, logprobs, finished)], those of prompt i at [i·n, (i+1)·n)
and what is said of each where it is used; only ours has them so far. An adapter's ``name`` is what reports call it.
"""

import pytest
import torch

Missing = pytest.skip.Exception  # raised by a method for a variant of its arguments that the library has not


def need(adapter, *names):
    """The adapter's methods of these names; skips the test where one is missing."""
    found = [getattr(adapter, name, None) for name in names]
    missing = [name for name, method in zip(names, found) if method is None]
    if missing:
        pytest.skip(f"{getattr(adapter, 'name', adapter)} has no {', '.join(missing)}")
    return found[0] if len(found) == 1 else found


def tensor(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def ones(B, T):
    return torch.ones(B, T, dtype=torch.bool)


def mask_of(lengths, T):
    """(B, T): the first ``lengths[b]`` tokens count.

    >>> mask_of([1, 2], 2).tolist()
    [[True, False], [True, True]]
    """
    return torch.arange(T)[None] < torch.tensor(lengths)[:, None]


def assert_close(found, expected, tolerance=1e-9):
    """AssertionError unless every number is within the tolerance, relative above 1. Tensors, lists and numbers alike."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    assert found.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(found.shape)}"
    gap = (found - expected).abs() / expected.abs().clamp_min(1)
    assert bool((gap <= tolerance).all()), f"expected {expected.tolist()}, got {found.tolist()}"


def gradient(f, x):
    """f(x) and its gradient; f may return a scalar or (scalar, …)."""
    x = x.clone().requires_grad_()
    out = f(x)
    out = out[0] if isinstance(out, tuple) else out
    out.backward()
    return out.detach(), x.grad


def differences(f, x, step=1e-6):
    """The gradient of f at x by central differences, f a plain function of a flat fp64 tensor."""
    eye = torch.eye(x.numel(), dtype=x.dtype) * step
    return torch.tensor([(float(f(x + e)) - float(f(x - e))) / (2 * step) for e in eye], dtype=torch.float64)
