"""Figures against values that are known without them."""

import numpy as np
import pytest

from likely_export import measures


def test_error_of_the_mean() -> None:
    found = measures.mean(np.array([1.0, 2.0, 3.0, 4.0]))
    assert found["mean"] == 2.5
    assert found["standard_error"] == pytest.approx(np.sqrt(5 / 3) / 2)


def test_separation_of_what_is_apart_and_what_is_not() -> None:
    inliers = np.arange(1000.0)
    assert measures.separation(inliers, inliers + 1000) == {"auroc": 1.0, "fpr95": 0.0}
    same = measures.separation(inliers, inliers)
    assert same["auroc"] == pytest.approx(0.5) and same["fpr95"] == pytest.approx(0.95)
    assert measures.separation(inliers, inliers - 1000) == {"auroc": 0.0, "fpr95": 1.0}


def test_rank_correlation_of_what_is_all_the_same_is_none() -> None:
    rising = np.arange(5.0)
    assert measures.rank_correlation(rising, rising**3) == pytest.approx(1)
    assert measures.rank_correlation(rising, -rising) == pytest.approx(-1)
    assert measures.rank_correlation(rising, np.full(5, 2.0)) == 0
    assert measures.rank_correlation(np.zeros(1), np.ones(1)) == 0


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_rates_of_valid_p_values_lie_in_their_band(alpha: float) -> None:
    rng = np.random.default_rng(0)
    n, m, rounds, outside = 500, 400, 600, 0
    band = measures.rejection_band(alpha, n, m)
    assert band is not None
    low, high = band
    for _ in range(rounds):
        ranked = np.sort(rng.normal(size=n))
        p = (1 + n - np.searchsorted(ranked, rng.normal(size=m))) / (n + 1)
        outside += not low <= np.mean(p <= alpha) <= high
    assert outside / rounds < 0.025
    assert high - low < 0.12


def test_no_rejection_can_be_promised_below_the_finest_alpha() -> None:
    assert measures.rejection_band(0.001, 100, 1000) is None


def test_calibration_error_of_honest_and_of_boastful_posteriors() -> None:
    rng = np.random.default_rng(1)
    sure = rng.uniform(0.5, 1, 50_000)
    posterior = np.stack([sure, 1 - sure], 1)
    honest = (rng.random(50_000) > sure).astype(np.int64)
    assert measures.calibration_error(posterior, honest) < 0.01
    boastful = np.tile([0.99, 0.01], (1000, 1))
    y = np.repeat([0, 1], 500)
    assert measures.calibration_error(boastful, y) == pytest.approx(0.49)


def test_selective_risk_is_the_mean_error_among_the_kept() -> None:
    wrong = np.array([False, False, True, True])
    assert measures.selective_risk(np.array([0.0, 1, 2, 3]), wrong) == pytest.approx(
        (0 + 0 + 1 / 3 + 2 / 4) / 4
    )
    assert measures.selective_risk(np.array([3.0, 2, 1, 0]), wrong) == pytest.approx(
        (1 + 1 + 2 / 3 + 2 / 4) / 4
    )


def test_selective_risk_does_not_depend_on_the_order_of_ties() -> None:
    rng = np.random.default_rng(2)
    wrong = rng.random(200) < 0.3
    constant = [measures.selective_risk(np.ones(200), w) for w in (wrong, np.sort(wrong))]
    assert constant == pytest.approx([wrong.mean()] * 2)
    doubt, order = rng.integers(0, 5, 200).astype(float), rng.permutation(200)
    found = measures.selective_risk(doubt, wrong)
    assert measures.selective_risk(doubt[order], wrong[order]) == pytest.approx(found)
    # What breaking the ties at random gives, on average.
    broken = [measures.selective_risk(doubt + rng.random(200) / 2, wrong) for _ in range(500)]
    assert np.mean(broken) == pytest.approx(found, abs=3e-3)
