import math

import numpy as np
import pytest

from nanorlhf.evals.winrate import Z95, difference, length_controlled, mean_ci95, wilson_interval, win_rate


def test_mean_and_interval_of_a_sample_worked_by_hand():
    """1, 2, 3, 4: mean 2.5, squared deviations 2.25 + 0.25 + 0.25 + 2.25 = 5, s² = 5/3, s/√4 = √(5/12)."""
    result = mean_ci95([1, 2, 3, 4])
    half = Z95 * math.sqrt(5 / 12)
    assert result["mean"] == 2.5 and result["n"] == 4
    assert result["ci95"] == pytest.approx([2.5 - half, 2.5 + half], abs=1e-12)


def test_a_tie_counts_one_half():
    """Two wins, one tie, one loss: (2 + 1/2) / 4."""
    result = win_rate([2, 2, 1, 0], [1, 1, 1, 1])
    assert (result["mean"], result["wins"], result["ties"], result["n"]) == (0.625, 2, 1, 4)


def test_wilson_interval_solves_its_defining_equation():
    """Its ends are the rates p at which the seen rate lies exactly z standard errors, √(p(1−p)/n), away."""
    for rate, n in [(0.5, 10), (0.7, 500), (0.98, 33), (0.0, 7)]:
        for p in wilson_interval(rate, n):
            assert abs(rate - p) == pytest.approx(Z95 * math.sqrt(p * (1 - p) / n), abs=1e-7)


def test_an_interval_at_a_clean_sweep_still_has_width_and_stays_in_range():
    low, high = win_rate([1] * 20, [0] * 20)["ci95"]
    assert high == 1.0 and low == pytest.approx(20 / (20 + Z95**2))


def test_swapping_the_sides_mirrors_rate_and_interval():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, 101), rng.integers(0, 3, 101)
    ab, ba = win_rate(a, b), win_rate(b, a)
    assert ab["mean"] == pytest.approx(1 - ba["mean"])
    assert ab["ci95"] == pytest.approx([1 - x for x in reversed(ba["ci95"])])


@pytest.mark.parametrize("tie", [0.0, 0.4])
def test_intervals_cover_the_truth_about_95_times_in_100(tie):
    """2,000 experiments of 200 prompts; with ties the interval may only be too wide. 4 s.e. of 0.95 is 0.02."""
    rng = np.random.default_rng(1)
    outcome = rng.choice([1, 0, -1], p=[0.7 * (1 - tie), tie, 0.3 * (1 - tie)], size=(2000, 200))
    truth = 0.7 * (1 - tie) + tie / 2
    intervals = [win_rate(row, np.zeros(200))["ci95"] for row in outcome]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.93 <= covered <= (0.97 if tie == 0 else 1.0)
    means = [mean_ci95(row)["ci95"] for row in outcome]
    assert 0.93 <= np.mean([low <= 2 * truth - 1 <= high for low, high in means]) <= 0.97


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: win_rate([1.0], [1.0, 2.0]), "got 1 scores and 2 rivals"),
        (lambda: win_rate([], []), "at least 1 prompt"),
        (lambda: win_rate([float("nan")], [0.0]), "finite"),
        (lambda: mean_ci95([1.0]), "at least 2 values, got 1"),
        (lambda: mean_ci95([1.0, float("inf")]), "finite"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_paired_difference_by_hand():
    """Differences 1, 2, 3, 6: mean 3, s² = (4 + 1 + 0 + 9) / 3."""
    found = difference([1, 2, 3, 6], [0, 0, 0, 0])
    half = Z95 * math.sqrt(14 / 3 / 4)
    assert found["mean"] == 3 and found["ci95"] == pytest.approx([3 - half, 3 + half])
    shared = np.random.default_rng(0).normal(size=50) * 100  # what varies for both alike falls out
    assert np.diff(difference(shared + 1, shared)["ci95"])[0] < 1e-9


def test_wins_that_length_explains_are_even_at_equal_length():
    """Wins are drawn with log-odds 2 tanh(gap / deviation) and nothing else: the plain win-rate is far from even where most gaps are
    positive, that at equal length is not; with a true advantage of 1 in log-odds it is near σ(1)."""
    rng = np.random.default_rng(1)
    gap = rng.normal(6, 8, 4000)
    for advantage in (0.0, 1.0):
        chance = 1 / (1 + np.exp(-(advantage + 2 * np.tanh(gap / gap.std()))))
        won = (rng.random(4000) < chance).astype(float)
        plain, found = win_rate(won, 1 - won), length_controlled(won, 1 - won, 50 + gap, np.full(4000, 50.0))
        assert plain["mean"] > 0.65 and found["slope"] == pytest.approx(2, abs=0.2)
        low, high = found["ci95"]
        assert low - 0.02 < 1 / (1 + math.exp(-advantage)) < high + 0.02 and high - low < 0.08


def test_the_regression_without_a_difference_of_length_is_the_win_rate():
    won = np.array([1.0] * 7 + [0.0] * 3)
    found = length_controlled(won, 1 - won, [5] * 10, [5] * 10)
    assert found["mean"] == pytest.approx(0.7, abs=1e-5) and found["slope"] == 0
    with pytest.raises(ValueError, match="expected a length for each of 10 answers, got 2"):
        length_controlled(won, 1 - won, [1, 2], [1, 2])


@pytest.mark.parametrize("won", [0.0, 0.5, 1.0])
def test_outcomes_that_are_all_alike_have_the_win_rates_own_interval_at_equal_length(won):
    """A logistic regression has no maximum there: its interval would have no width after two prompts."""
    scores, rivals, lengths = [won] * 8, [1 - won] * 8, range(8)
    plain, found = win_rate(scores, rivals), length_controlled(scores, rivals, lengths, [0] * 8)
    assert (found["mean"], found["ci95"], found["slope"]) == (won, plain["ci95"], 0.0)


def test_a_clean_sweep_is_inside_its_own_interval():
    for n in range(1, 700):
        assert wilson_interval(0.0, n)[0] == 0.0 and wilson_interval(1.0, n)[1] == 1.0
