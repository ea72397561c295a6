"""Problems small enough to be solved: what our losses converge to, and the exact gradients that their expectations have to be.

Everything is enumerated in fp64: no sample is drawn, so that a tolerance here is of arithmetic and not of luck.
"""

import itertools
import math

import pytest
import torch

from .contract import assert_close, differences
from nanorlhf.evals.best_of_n import kl_bound
from nanorlhf.train.loss import gae, kl_loss, policy_terms, ppo_policy_loss, rloo_advantages
from nanorlhf.train.objective import average, reinforce_loss

@pytest.fixture(autouse=True)
def this_package(is_ours):
    if not is_ours:
        pytest.skip("solves problems with this package's losses, whatever adapter is under judgement")


# --- a bandit with a price on divergence -----------------------------------------------------------------------------

REWARDS = torch.tensor([1.0, 0.2, -0.5, 0.7, 0.0, -1.0, 0.4, 0.9], dtype=torch.float64)
REFERENCE = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.3, 0.8, -0.4, 0.1], dtype=torch.float64).log_softmax(0)
BETA = 0.4
ACTIONS = torch.arange(len(REWARDS) + 1)  # bounds of episodes of one action each
GIBBS = (REFERENCE + REWARDS / BETA).softmax(0)


def reinforce(theta, logp):
    """Mean over all arms of REINFORCE's loss for that arm, each weighed by its chance."""
    paid = REWARDS - BETA * (logp - REFERENCE).detach()
    return reinforce_loss(logp, paid * logp.detach().exp() * len(logp), ACTIONS)


def rloo(theta, logp):
    """All pairs of arms as groups of two, each weighed by its chance."""
    paid, chance = REWARDS - BETA * (logp - REFERENCE).detach(), logp.detach().exp()
    i, j = torch.cartesian_prod(torch.arange(len(logp)), torch.arange(len(logp))).unbind(1)
    gain = rloo_advantages(torch.stack([paid[i], paid[j]], 1).flatten(), 2)
    terms = policy_terms(logp[torch.stack([i, j], 1).flatten()], logp.detach()[torch.stack([i, j], 1).flatten()], gain, 0.2)[0]
    return (terms.view(-1, 2).sum(1) / 2 * chance[i] * chance[j]).sum()


def ppo(theta, logp):
    """The clipped loss at ratio 1 with the value function that is right, the mean; KL in the reward."""
    paid, chance = REWARDS - BETA * (logp - REFERENCE).detach(), logp.detach().exp()
    advantages, _ = gae(paid, (chance * paid).sum().expand_as(paid), ACTIONS, 1.0, 0.95)
    return ppo_policy_loss(logp, logp.detach(), advantages * chance * len(logp), 0.2).loss


def ppo_with_loss(theta, logp):
    """The same with the KL in the loss, by k2."""
    chance = logp.detach().exp()
    advantages, _ = gae(REWARDS, (chance * REWARDS).sum().expand_as(REWARDS), ACTIONS, 1.0, 0.95)
    return ppo_policy_loss(logp, logp.detach(), advantages * chance * len(logp), 0.2).loss + BETA * (chance * kl_loss(logp, REFERENCE, "k2")).sum()


@pytest.mark.parametrize("loss", [reinforce, rloo, ppo, ppo_with_loss])
def test_a_bandit_with_a_price_on_divergence_ends_at_the_gibbs_distribution(loss):
    """max E[r] − β KL(π‖π_ref) has the one solution π ∝ π_ref e^(r/β) (Ziegler et al. 2019 eq. 2; Rafailov et al. 2023 eq. 4). Eight
    arms, β = 0.4; gradient steps of 4 on the logits from the reference, until every chance is within 1e-6 of it, in at most 2000."""
    theta = REFERENCE.clone()
    for step in range(2000):
        theta = theta.detach().requires_grad_()
        loss(theta, theta.log_softmax(0)).backward()
        theta = theta.detach() - 4 * theta.grad
        if float((theta.softmax(0) - GIBBS).abs().max()) < 1e-6:
            break
    assert float((theta.softmax(0) - GIBBS).abs().max()) < 1e-6
    assert float((REFERENCE.exp() - GIBBS).abs().max()) > 0.1  # there was somewhere to go


def test_k3_in_the_loss_ends_elsewhere():
    """Its pull is the forward divergence's: where it rests, Σ π(r − E r) = β(π − π_ref) for every arm, which Gibbs' does not meet."""
    theta = REFERENCE.clone()
    for _ in range(4000):
        theta = theta.detach().requires_grad_()
        logp, chance = theta.log_softmax(0), theta.softmax(0).detach()
        (-(chance * (REWARDS - (chance * REWARDS).sum()) * logp).sum() + BETA * (chance * kl_loss(logp, REFERENCE, "k3")).sum()).backward()
        theta = theta.detach() - theta.grad
    chance = theta.softmax(0)
    assert_close(chance * (REWARDS - (chance * REWARDS).sum()), BETA * (chance - REFERENCE.exp()), 1e-6)
    assert float((chance - GIBBS).abs().max()) > 0.02


# --- three steps, all paths enumerated -------------------------------------------------------------------------------

STATES, CHOICES, LENGTH = 4, 3, 3
STEP = torch.tensor([[(s * 2 + a + 1) % STATES for a in range(CHOICES)] for s in range(STATES)])  # where choice a leads from s
WORTH = torch.linspace(-1.1, 1.3, STATES * CHOICES, dtype=torch.float64).sin().view(STATES, CHOICES)  # reward of choice a in s
LOGITS = torch.linspace(0.2, 3.1, STATES * CHOICES, dtype=torch.float64).cos()  # the policy's, (STATES · CHOICES,)
PATHS = list(itertools.product(range(CHOICES), repeat=LENGTH))
BOUNDS = torch.arange(0, LENGTH * len(PATHS) + 1, LENGTH)


def walked(path):
    """The states in which a path's choices are made, from state 0."""
    states = [0]
    for a in path[:-1]:
        states.append(int(STEP[states[-1], a]))
    return states


VISITED = torch.tensor([walked(path) for path in PATHS])  # (27, 3)
CHOSEN = torch.tensor(PATHS)
PAID = WORTH[VISITED, CHOSEN]  # (27, 3)


def expected_reward(logits):
    """E[Σ r] by the sum over the 27 paths, in plain floats."""
    chances = logits.view(STATES, CHOICES).softmax(1).tolist()
    total = 0.0
    for path in PATHS:
        chance = math.prod(chances[s][a] for s, a in zip(walked(path), path))
        total += chance * sum(float(WORTH[s, a]) for s, a in zip(walked(path), path))
    return total


def values_of(logits):
    """V(s, t), the exact expected reward from state s at time t on, by recursion backwards: (LENGTH + 1, STATES)."""
    p, V = logits.view(STATES, CHOICES).softmax(1), torch.zeros(LENGTH + 1, STATES, dtype=torch.float64)
    for t in reversed(range(LENGTH)):
        V[t] = (p * (WORTH + V[t + 1][STEP])).sum(1)
    return V


def path_logprobs(logits):
    """(27, 3): log π of each choice of each path."""
    return logits.view(STATES, CHOICES).log_softmax(1)[VISITED, CHOSEN]


def by_reinforce(logp, chance, baseline=0.0):
    return reinforce_loss(logp.flatten(), (PAID.sum(1) - baseline) * chance * len(PATHS), BOUNDS)


def by_rloo(logp, chance):
    """Every pair of paths as a group of two."""
    i, j = torch.cartesian_prod(torch.arange(len(PATHS)), torch.arange(len(PATHS))).unbind(1)
    pair = torch.stack([i, j], 1).flatten()
    gain = rloo_advantages(PAID.sum(1)[pair], 2).repeat_interleave(LENGTH)
    terms = policy_terms(logp[pair].flatten(), logp[pair].detach().flatten(), gain, 0.2)[0]
    weight = (chance[i] * chance[j]).repeat_interleave(2 * LENGTH) * len(i)
    return average(terms * weight, torch.arange(0, len(terms) + 1, LENGTH), "sum")


def by_gae(lam, exact_values):
    """The clipped loss at ratio 1; values are the right ones, or, where λ = 1, any: here some numbers of the state."""

    def loss(logp, chance):
        V = values_of(LOGITS) if exact_values else torch.linspace(-2, 5, (LENGTH + 1) * STATES, dtype=torch.float64).view(-1, STATES)
        values = V[torch.arange(LENGTH), VISITED]
        advantages, _ = gae(PAID.flatten(), values.flatten(), BOUNDS, 1.0, lam)
        weight = chance.repeat_interleave(LENGTH) * len(PATHS)
        found = ppo_policy_loss(logp.flatten(), logp.detach().flatten(), advantages * weight, 0.2).loss
        return found * LENGTH  # its mean is over choices, the objective's over paths

    return loss


ESTIMATORS = {
    "REINFORCE": by_reinforce,
    "REINFORCE with a baseline": lambda logp, chance: by_reinforce(logp, chance, 0.7),
    "RLOO": by_rloo,
    "PPO, λ = 1, any values": by_gae(1.0, False),
    "PPO, λ = 0.95, exact values": by_gae(0.95, True),
    "PPO, λ = 0, exact values": by_gae(0.0, True),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_expected_gradient_of_every_estimator_is_the_gradient_of_the_expectation(name):
    """Σ over all paths of chance · gradient of the loss, against central differences of E[Σ r], itself the sum over all paths. The
    reward is worth the same whichever later choices it depends on, so GAE with exact values has no bias at any λ."""
    logits = LOGITS.clone().requires_grad_()
    logp = path_logprobs(logits)
    ESTIMATORS[name](logp, logp.detach().sum(1).exp()).backward()
    exact = differences(expected_reward, LOGITS)
    assert_close(-logits.grad, exact, 1e-8)
    assert float(exact.abs().max()) > 0.05


def test_with_wrong_values_and_lambda_below_one_the_gradient_is_another():
    """What the exact values are there for."""
    logits = LOGITS.clone().requires_grad_()
    logp = path_logprobs(logits)
    by_gae(0.5, False)(logp, logp.detach().sum(1).exp()).backward()
    assert float((-logits.grad - differences(expected_reward, LOGITS)).abs().max()) > 0.02


def test_the_penalty_per_token_has_the_gradient_of_the_divergence_of_whole_paths():
    """Rewards −β(log π − log π_ref) at every choice, V = 0, λ = 1: the expected gradient is that of −β KL over the 27 paths."""
    reference = torch.linspace(1.0, -0.8, STATES * CHOICES, dtype=torch.float64)

    def divergence(x):
        p, q = x.view(STATES, CHOICES).softmax(1).tolist(), reference.view(STATES, CHOICES).softmax(1).tolist()
        total = 0.0
        for path in PATHS:
            here, there = (math.prod(c[s][a] for s, a in zip(walked(path), path)) for c in (p, q))
            total += here * math.log(here / there)
        return total

    logits = LOGITS.clone().requires_grad_()
    logp, chance = path_logprobs(logits), path_logprobs(LOGITS).sum(1).exp()
    paid = -BETA * (logp.detach() - path_logprobs(reference))
    advantages, _ = gae(paid.flatten(), torch.zeros(paid.numel(), dtype=torch.float64), BOUNDS, 1.0, 1.0)
    loss = ppo_policy_loss(logp.flatten(), logp.detach().flatten(), advantages * chance.repeat_interleave(LENGTH) * len(PATHS), 0.2).loss
    (loss * LENGTH).backward()
    assert_close(logits.grad, BETA * differences(divergence, LOGITS), 1e-8)


# --- best of n -------------------------------------------------------------------------------------------------------

def best_of_n_divergence(chances, n):
    """KL(best-of-n ‖ one sample) over samples in order of score, none of which tie: the best is the i-th with chance F_i^n − F_{i−1}^n."""
    total, below = 0.0, 0.0
    for p in chances:
        upto = below + p
        best = upto**n - below**n
        total += best * math.log(best / p) if best > 0 else 0.0
        below = upto
    return total


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_best_of_n_of_equally_likely_samples_comes_to_the_formula(n):
    """Of m equally likely samples. The formula is the integral of f log f with f = n u^(n−1), and the m samples the same with f averaged
    over cells of 1/m: what is lost is ∫ f′²/f / (24 m²) where that is finite, n > 2: n(n − 1)²/((n − 2)·24 m²)."""
    for m in (500, 2000):
        gap = kl_bound(n) - best_of_n_divergence([1 / m] * m, n)
        assert -1e-12 < gap < 1e-4
        if n > 2:
            assert gap == pytest.approx(n * (n - 1) ** 2 / ((n - 2) * 24 * m**2), rel=0.05)


@pytest.mark.parametrize("n", [2, 3, 8, 64])
def test_the_best_of_n_of_few_samples_stays_below_the_formula(n):
    """Beirami et al. 2024, theorem 1: an upper bound; strictly below it where a sample has a chance of its own, and by itself at the
    most log(1/p) of the best one, for n without end."""
    generator = torch.Generator().manual_seed(n)
    for size in (2, 3, 10):
        chances = torch.rand(size, generator=generator, dtype=torch.float64).add(0.05)
        chances = (chances / chances.sum()).tolist()
        assert best_of_n_divergence(chances, n) < kl_bound(n)
        assert best_of_n_divergence(chances, n) <= math.log(1 / chances[-1]) + 1e-12


def test_the_enumeration_of_the_best_is_that_of_all_draws():
    """Three samples of chances ½, 0.3, 0.2 and n = 3: the distribution of the best by all 27 triples."""
    chances, best = [0.5, 0.3, 0.2], [0.0, 0.0, 0.0]
    for triple in itertools.product(range(3), repeat=3):
        best[max(triple)] += math.prod(chances[i] for i in triple)
    assert_close(best_of_n_divergence(chances, 3), sum(b * math.log(b / p) for b, p in zip(best, chances)))
