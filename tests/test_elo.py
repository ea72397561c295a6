import math

import numpy as np
import pytest

from nanorlhf.evals.elo import ELO_PER_NAT, bradley_terry, davidson, ratings

evalica = pytest.importorskip("evalica")


def made_up_scores(n=200, seed=0):
    """Four models of rising skill whose integer scores tie often."""
    rng = np.random.default_rng(seed)
    return {name: np.round(rng.normal(skill, 1.5, n)) for name, skill in [("a", 0), ("b", 0.5), ("c", 1.2), ("d", 1.3)]}


def games(scores):
    """The same games in evalica's form: left, right and winner of each."""
    xs, ys, winners = [], [], []
    names = list(scores)
    for i, x in enumerate(names):
        for y in names[i + 1 :]:
            for left, right in zip(scores[x], scores[y], strict=True):
                xs.append(x), ys.append(y)
                winners.append(
                    evalica.Winner.X if left > right else evalica.Winner.Y if right > left else evalica.Winner.Draw
                )
    return xs, ys, winners


def test_two_models_have_the_rating_of_their_odds():
    """Three wins to one: odds 3, so the difference is 400 · log10(3) ≈ 190.85 points, half on each side of 1000."""
    table = ratings({"x": [1, 1, 1, 0], "y": [0, 0, 0, 1]}, resamples=0, prior_ties=0)
    gap = 400 * math.log10(3)
    assert table["x"]["rating"] == pytest.approx(1000 + gap / 2, abs=1e-6)
    assert table["y"]["rating"] == pytest.approx(1000 - gap / 2, abs=1e-6)


def test_ratings_are_evalicas_bradley_terry_maximum():
    scores = made_up_scores()
    oracle = evalica.bradley_terry(*games(scores), tolerance=1e-12, limit=10_000).scores
    log_strength = np.log([oracle[name] for name in scores])
    expected = 1000 + ELO_PER_NAT * (log_strength - log_strength.mean())
    table = ratings(scores, resamples=0, prior_ties=0)
    assert [table[name]["rating"] for name in scores] == pytest.approx(expected, abs=1e-3)


def test_order_and_spread_agree_with_evalicas_sequential_elo():
    """Sequential Elo with a small k wanders round the maximum: the same order, gaps within 40 points."""
    scores = made_up_scores(n=2000)
    xs, ys, winners = games(scores)
    order = np.random.default_rng(2).permutation(len(xs))
    oracle = evalica.elo([xs[i] for i in order], [ys[i] for i in order], [winners[i] for i in order], k=2).scores
    table = ratings(scores, resamples=0)
    ours = np.array([table[name]["rating"] for name in scores])
    theirs = np.array([oracle[name] for name in scores])
    assert list(np.argsort(ours)) == list(np.argsort(theirs))
    assert np.abs((ours - ours.mean()) - (theirs - theirs.mean())).max() < 40


def test_the_mean_rating_is_1000_and_one_prior_tie_moves_almost_nothing():
    scores = made_up_scores(n=500)
    plain, with_prior = ratings(scores, resamples=0, prior_ties=0), ratings(scores, resamples=0)
    assert np.mean([row["rating"] for row in with_prior.values()]) == pytest.approx(1000)
    assert max(abs(plain[m]["rating"] - with_prior[m]["rating"]) for m in scores) < 1.0


def test_a_model_that_never_loses_is_rated_with_the_prior_and_refused_without():
    """10 wins and one tie are 10½ to ½, odds of 21."""
    scores = {"best": [1] * 10, "worst": [0] * 10}
    table = ratings(scores, resamples=20)
    assert table["best"]["rating"] - table["worst"]["rating"] == pytest.approx(400 * math.log10(21), abs=1e-6)
    with pytest.raises(ValueError, match="lose to the rest at least once"):
        ratings(scores, resamples=0, prior_ties=0)


def test_a_far_start_still_converges_where_a_full_newton_step_would_not():
    """One loss in a million games: the difference is ln(10⁶)."""
    strength = bradley_terry(np.array([[0.0, 1e6], [1.0, 0.0]]))
    assert strength[0] - strength[1] == pytest.approx(math.log(1e6), rel=1e-8)


def test_intervals_hold_the_rating_and_are_the_same_for_the_same_seed():
    scores = made_up_scores(n=60)
    first, again, other = ratings(scores), ratings(scores), ratings(scores, seed=1)
    assert first == again and first != other
    for row in first.values():
        low, high = row["ci95"]
        assert low < row["rating"] < high


def test_intervals_cover_the_true_gap_about_95_times_in_100():
    """Truth: x wins 70 %. Half the gap is each model's rating; 150 experiments, 4 s.e. of 0.95 is 0.07."""
    rng = np.random.default_rng(3)
    truth = 1000 + 200 * math.log10(0.7 / 0.3)
    covered = 0
    for seed in range(150):
        x = (rng.random(150) < 0.7).astype(float)
        low, high = ratings({"x": x, "y": 1 - x}, resamples=200, seed=seed)["x"]["ci95"]
        covered += low <= truth <= high
    assert 0.88 <= covered / 150 <= 0.995


@pytest.mark.parametrize(
    "scores, message",
    [
        ({"a": [1]}, "at least 2 models, got 1"),
        ({"a": [1], "b": [1, 2]}, "same prompts"),
        ({"a": [], "b": []}, "same prompts"),
        ({"a": [1.0], "b": [float("nan")]}, "finite"),
    ],
)
def test_bad_input_gets_one_sentence(scores, message):
    with pytest.raises(ValueError, match=message):
        ratings(scores)


def test_the_analytic_interval_of_two_models_is_the_deltas():
    """Two models, no ties added: the strength is half the log-odds of the share p of wins, whose error is √(p(1−p)/(n−1)); by the
    delta rule that of the rating is 400/ln 10 · that / (2 p (1 − p))."""
    wins = np.array([1.0] * 70 + [0.0] * 30)
    found = ratings({"a": wins, "b": 1 - wins}, resamples=0, prior_ties=0)["a"]
    low, high = found["ci95_analytic"]
    error = math.sqrt(0.7 * 0.3 / 99) / (2 * 0.7 * 0.3)
    assert (high - low) / 2 == pytest.approx(1.959964 * ELO_PER_NAT * error, rel=1e-4)
    assert found["rating"] == pytest.approx(1000 + ELO_PER_NAT * math.log(7 / 3) / 2) == (low + high) / 2


def test_the_analytic_interval_agrees_with_the_bootstrap():
    for row in ratings(made_up_scores(400), resamples=1000).values():
        widths = [high - low for low, high in (row["ci95"], row["ci95_analytic"])]
        assert widths[0] == pytest.approx(widths[1], rel=0.15)


def test_davidsons_strengths_make_the_likelihood_stationary():
    """From its own formula, eq. 2.1, by central differences in every strength and in ν."""
    rng = np.random.default_rng(3)
    wins, ties = rng.integers(1, 9, (3, 3)).astype(float), rng.integers(1, 6, (3, 3)).astype(float)
    np.fill_diagonal(wins, 0)
    ties = np.triu(ties, 1) + np.triu(ties, 1).T
    strength, nu = davidson(wins, ties)

    def likelihood(s, log_nu):
        p, total = np.exp(s), 0.0
        for i in range(3):
            for j in range(i + 1, 3):
                tie = np.exp(log_nu) * math.sqrt(p[i] * p[j])
                whole = p[i] + p[j] + tie
                total += wins[i, j] * math.log(p[i] / whole) + wins[j, i] * math.log(p[j] / whole) + ties[i, j] * math.log(tie / whole)
        return total

    for k in range(4):
        step = np.eye(4)[k] * 1e-5
        slope = (likelihood(strength + step[:3], math.log(nu) + step[3]) - likelihood(strength - step[:3], math.log(nu) - step[3])) / 2e-5
        assert slope == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="davidson: expected at least one tie"):
        davidson(wins, np.zeros((3, 3)))


def test_ties_alone_have_no_finite_weight():
    with pytest.raises(ValueError, match="davidson: expected at least one tie and one win"):
        davidson(np.zeros((2, 2)), np.array([[0.0, 5.0], [5.0, 0.0]]))
