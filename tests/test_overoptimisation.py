"""evals/overoptimisation.py: points made by the forms of Gao et al. 2023 are fitted by their own coefficients."""

import math

import numpy as np
import pytest

from nanorlhf.evals.overoptimisation import curve, fit

KL = np.array([0.0, 0.5, 1.0, 2.0, 5.0, 9.0, 16.0])


@pytest.mark.parametrize("form, made, peak", [
    ("best_of_n", lambda d: d * (0.8 - 0.1 * d), 4.0**2),  # 0.8 = 0.2 d
    ("rl", lambda d: d * (0.8 - 0.4 * np.log(np.maximum(d, 1e-9))), math.e**2),  # 0.8 = 0.4 (ln d + 1), d = e
])  # fmt: skip
def test_exact_points_give_back_their_coefficients_and_the_peak(form, made, peak):
    gain = made(np.sqrt(KL))
    found = fit(KL, gain, form)
    assert (found["alpha"], found["beta"]) == pytest.approx((0.8, 0.1 if form == "best_of_n" else 0.4))
    assert found["peak_kl"] == pytest.approx(peak) and found["rms"] < 1e-9 and found["r2"] == pytest.approx(1)
    np.testing.assert_allclose(curve(found, KL), gain, atol=1e-9)


def test_a_gain_that_only_rises_has_no_peak():
    d = np.sqrt(KL)
    assert fit(KL, d * (0.5 + 0.1 * d), "best_of_n")["peak_kl"] is None


def test_the_residuals_are_what_the_fit_leaves_and_are_orthogonal_to_it():
    noise = np.array([0, 0.1, -0.1, 0.05, 0.02, -0.07, 0.03])
    d = np.sqrt(KL)
    found = fit(KL, d * (0.8 - 0.1 * d) + noise, "best_of_n")
    residuals = np.array(found["residuals"])
    assert len(residuals) == 6 and abs(residuals @ d[1:]) < 1e-9 and abs(residuals @ d[1:] ** 2) < 1e-9
    assert found["rms"] == pytest.approx(math.sqrt((residuals**2).mean()))


def test_bad_input_is_one_sentence():
    with pytest.raises(ValueError, match="expected at least 3 points away from the start, got 2"):
        fit([0.0, 1.0, 2.0], [0.0, 1.0, 1.0], "rl")
    with pytest.raises(ValueError, match="expected a form of best_of_n, rl, got 'ppo'"):
        fit([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], "ppo")


@pytest.mark.parametrize("kl, gain", [([1.0, 2.0, 3.0], [1.0, 2.0, math.nan]), ([1.0, 2.0, math.nan, 3.0], [1.0] * 4), ([1.0, 2.0, 3.0], [1.0])])
def test_points_that_are_no_points_are_refused(kl, gain):
    with pytest.raises(ValueError, match="expected a finite gain for each finite KL"):
        fit(kl, gain, "rl")
