"""engine/sample.py: frequencies against the filtered softmax, log-probabilities, and counter-based random numbers."""

import math

import numpy as np
import pytest
import torch

from nanorlhf.engine.sample import SamplingConfig, sample, uniforms

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, 0.25])
# The upper 0.1 % point of χ² for 1 to 7 degrees of freedom (Abramowitz & Stegun, table 26.8).
CHI2 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}
CONFIGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.5),
    SamplingConfig(temperature=2.0),
    SamplingConfig(top_k=3),
    SamplingConfig(top_p=0.8),
    SamplingConfig(temperature=0.7, top_k=5, top_p=0.9),
]


def draws(logits, config, count=20_000, seed=0):
    u = uniforms(seed, torch.arange(count), torch.zeros(count, dtype=torch.int64))
    return sample(logits.expand(count, -1), u, config)


def filtered(logits, config):
    """The distribution by its definition, in plain Python: the k most probable, of which the shortest head that
    reaches top_p, each share divided by the sum of those kept."""
    weights = [math.exp(x / config.temperature) for x in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[:config.top_k or None]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if mass >= config.top_p:
            break
    norm = sum(weights[i] for i in kept)
    return [weights[i] / norm if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("config", CONFIGS)
def test_tokens_come_as_often_as_the_filtered_softmax_says(config):
    """Pearson's χ² of 20,000 draws against the expected counts, below the point that chance passes once in 1,000."""
    tokens, _ = draws(LOGITS, config)
    counts, expected = np.bincount(tokens.numpy(), minlength=8), 20_000 * np.array(filtered(LOGITS, config))
    live = expected > 0
    assert counts[~live].sum() == 0
    chi2 = ((counts[live] - expected[live]) ** 2 / expected[live]).sum()
    assert chi2 < CHI2[live.sum() - 1]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_logprob_is_that_of_the_filtered_distribution(config):
    tokens, logprobs = draws(LOGITS, config, 500)
    expected = np.log(np.array(filtered(LOGITS, config))[tokens.numpy()])
    assert logprobs.dtype == torch.float32
    np.testing.assert_allclose(logprobs.numpy(), expected, atol=1e-5)


def test_inversion_by_hand():
    """Probabilities ½, ¼, ¼: u in [0, ½) is token 0, [½, ¾) token 1, [¾, 1) token 2. With top_k = 2 they are ⅔ and ⅓."""
    logits = torch.log(torch.tensor([0.5, 0.25, 0.25])).expand(5, -1)
    u = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.99], dtype=torch.float64)
    assert sample(logits, u, SamplingConfig())[0].tolist() == [0, 0, 1, 1, 2]
    tokens, logprobs = sample(logits, u, SamplingConfig(top_k=2))
    assert tokens.tolist() == [0, 0, 0, 1, 1]
    assert logprobs.exp().tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3])


def test_the_ends_of_the_unit_interval_never_draw_a_token_without_probability():
    logits = torch.tensor([[-100.0, 3.0, 3.0, -100.0]])
    for u, token in ((0.0, 1), (1 - 2**-53, 2)):
        drawn, logprob = sample(logits, torch.tensor([u], dtype=torch.float64), SamplingConfig(top_k=2))
        assert drawn.tolist() == [token] and float(logprob.exp()) == pytest.approx(0.5)


def test_temperature_zero_takes_the_most_probable_token_for_certain():
    tokens, logprobs = sample(LOGITS.expand(3, -1), torch.tensor([0.0, 0.5, 0.999]), SamplingConfig(temperature=0))
    assert tokens.tolist() == [0, 0, 0] and logprobs.tolist() == [0, 0, 0]


def test_the_first_token_stays_however_small_top_p_is_and_equal_ones_are_cut_in_order():
    assert draws(LOGITS, SamplingConfig(top_p=1e-9), 50)[0].unique().tolist() == [0]
    assert draws(torch.zeros(6), SamplingConfig(top_k=2), 200)[0].unique().tolist() == [0, 1]


def test_a_large_vocabulary_and_far_logits_are_sampled_too():
    logits = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draws(logits, SamplingConfig(), 64)
    expected = torch.log_softmax(logits.double(), -1)[tokens]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
    assert draws(torch.tensor([-1e30, 1e30, -torch.inf]), SamplingConfig(), 9)[0].unique().tolist() == [1]


@pytest.mark.parametrize("settings, sentence", [
    (dict(temperature=-1.0), "sampling: temperature must be 0 or more, got -1.0"),
    (dict(temperature=float("nan")), "sampling: temperature must be 0 or more, got nan"),
    (dict(top_k=-2), "sampling: top_k must be 0 or more, got -2"),
    (dict(top_p=0.0), "sampling: top_p must be above 0 and at most 1, got 0.0"),
    (dict(top_p=1.5), "sampling: top_p must be above 0 and at most 1, got 1.5"),
])  # fmt: skip
def test_settings_out_of_range_are_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingConfig(**settings)


# --- random numbers ------------------------------------------------------------------------------------------------

def splitmix(x):
    """SplitMix64's finaliser on Python integers."""
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7])
def test_uniforms_equal_the_same_rule_on_python_integers(seed):
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    requests, steps = [0, 1, 5, 10**6], [0, 3, 511, 7]
    expected = []
    for r, s in zip(requests, steps):
        state = splitmix((r + (seed + 1) * golden) & mask)
        expected.append((splitmix((state + (s + 1) * golden) & mask) >> 11) / 2**53)
    assert uniforms(seed, torch.tensor(requests), torch.tensor(steps)).tolist() == expected


def test_uniforms_are_uniform_and_unrelated_along_requests_steps_and_seeds():
    """40,000 numbers: 16 bins within the 0.1 % point of χ² with 15 degrees of freedom, 37.70; correlation of
    neighbours within 4 standard errors, 4/√n, along each of the three arguments."""
    n = 200
    requests, steps = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    grid = uniforms(3, requests, steps).view(n, n)
    assert 0 <= float(grid.min()) and float(grid.max()) < 1
    counts = torch.histc(grid.float(), 16, 0, 1)
    assert float(((counts - n * n / 16) ** 2 / (n * n / 16)).sum()) < 37.70
    other = uniforms(4, requests, steps).view(n, n)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid, other)):
        correlation = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(a.numel())
