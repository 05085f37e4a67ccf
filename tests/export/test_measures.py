"""Figures against values that are known without them."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from likely_export import measures
from likely_export.data import evenly_spaced


def test_error_of_the_mean() -> None:
    found = measures.mean(np.array([1.0, 2.0, 3.0, 4.0]))
    assert found["mean"] == 2.5
    assert found["standard_error"] == pytest.approx(np.sqrt(5 / 3) / 2)


def test_separation_of_what_is_apart_and_what_is_not() -> None:
    inliers = np.arange(1000.0)
    errors = dict.fromkeys(("auroc_standard_error", "fpr95_standard_error"), 0.0)
    apart = measures.separation(inliers, inliers + 1000)
    assert apart == {"auroc": 1, "fpr95": 0, "aupr": 1, "aupr_standard_error": 0, **errors}
    same = measures.separation(inliers, inliers)
    assert same["auroc"] == pytest.approx(0.5) and same["fpr95"] == pytest.approx(0.95)
    under = measures.separation(inliers, inliers - 1000)
    assert (under["auroc"], under["fpr95"]) == (0.0, 1.0) and errors.items() <= under.items()
    assert under["aupr"] == pytest.approx(np.mean(np.arange(1, 1001) / np.arange(1001, 2001)))


def test_areas_are_those_of_others_and_ties_count_half() -> None:
    rng = np.random.default_rng(5)
    inliers, outliers = rng.poisson(4, 300).astype(float), rng.poisson(6, 200).astype(float)
    found, truth = measures.separation(inliers, outliers), np.repeat([0, 1], [300, 200])
    scores = np.concatenate([inliers, outliers])
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, scores))
    assert found["aupr"] == pytest.approx(average_precision_score(truth, scores))


@pytest.mark.parametrize(("n", "m"), [(400, 150), (150, 600)])
def test_standard_errors_of_a_separation_are_those_of_new_pictures(
    n: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "SAMPLES", 20)  # each is rough, and their mean is not
    rng = np.random.default_rng(6)
    found = [measures.separation(rng.normal(size=n), rng.normal(1.5, 1.2, m)) for _ in range(300)]
    for name in ("auroc", "fpr95", "aupr"):
        estimated = np.mean([one[f"{name}_standard_error"] for one in found])
        assert estimated == pytest.approx(np.std([one[name] for one in found]), rel=0.15), name


@pytest.mark.parametrize(("n", "m"), [(400, 400), (400, 150)])
def test_standard_errors_of_outliers_made_of_inliers_are_those_of_new_pictures(
    n: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "SAMPLES", 20)
    rng, original_rows = np.random.default_rng(10), evenly_spaced(n, m)
    found, apart = [], []
    for _ in range(200):
        inliers = rng.normal(size=n)
        outliers = 0.9 * inliers[original_rows] + rng.normal(1, 0.44, m)
        found.append(measures.separation(inliers, outliers, original_rows))
        apart.append(
            measures.placement_mean(*measures.placements(inliers, outliers))["standard_error"]
        )
    for name in ("auroc", "fpr95", "aupr"):
        estimated = np.mean([one[f"{name}_standard_error"] for one in found])
        assert estimated == pytest.approx(np.std([one[name] for one in found]), rel=0.2), name
    # Taken for independent, they would seem to be known less well than they are.
    assert np.mean(apart) > 1.2 * np.std([one["auroc"] for one in found])


def test_a_single_outlier_has_a_separation() -> None:
    found = measures.separation(np.arange(100.0), np.array([49.5]))
    assert found["auroc"] == 0.5 and np.all(np.isfinite(list(found.values())))
    made = measures.separation(np.arange(100.0), np.array([49.5]), np.array([7]))
    assert made["auroc_standard_error"] == found["auroc_standard_error"]


def test_open_set_rate_counts_what_is_right_and_less_doubtful_than_outliers() -> None:
    doubt, right = np.array([0.0, 1, 2, 3]), np.array([True, False, True, True])
    found = measures.open_set_rate(doubt, right, np.array([0.5, 2.0]))
    assert found["mean"] == pytest.approx((2 + 0.5 + 0) / (4 * 2))
    rng = np.random.default_rng(7)
    inliers, outliers = rng.normal(size=300), rng.normal(1, 1, 200)
    every = measures.open_set_rate(inliers, np.ones(300, bool), outliers)
    apart = measures.separation(inliers, outliers)
    assert list(every.values()) == [apart["auroc"], apart["auroc_standard_error"]]
    assert measures.open_set_rate(inliers, np.zeros(300, bool), outliers)["mean"] == 0
    # The area itself, by the trapezoids of every threshold.
    right = rng.random(300) < 0.8
    thresholds = np.sort(np.concatenate([[-9], inliers, outliers]))
    rate = (right[:, None] & (inliers[:, None] <= thresholds)).mean(0)
    accepted = (outliers[:, None] <= thresholds).mean(0)
    area = measures.open_set_rate(inliers, right, outliers)["mean"]
    assert area == pytest.approx(np.trapezoid(rate, accepted))


def test_to_accept_an_outlier_is_an_error() -> None:
    found = measures.open_set(np.array([0.0, 1.0]), np.ones(2, bool), np.array([2.0]))
    assert found["aurc"] == pytest.approx((0 + 0 + 1 / 3) / 3) and found["oscr"] == 1


def test_a_variance_estimated_below_0_is_0() -> None:
    over, under = np.array([1.0, 0.0, 0.5, 0.5]), np.array([0.0, 0.75, 0.375])
    assert measures.placement_mean(over, under, np.arange(3))["standard_error"] == 0


def test_the_error_of_an_open_set_rate_is_that_of_new_pictures() -> None:
    rng = np.random.default_rng(8)
    found = [
        measures.open_set_rate(rng.normal(size=300), rng.random(300) < 0.4, rng.normal(1, 1, 30))
        for _ in range(1000)
    ]
    estimated = np.mean([one["standard_error"] for one in found])
    assert estimated == pytest.approx(np.std([one["mean"] for one in found]), rel=0.1)


def test_bootstrap_error_of_a_mean_is_the_known_one_and_the_same_again() -> None:
    values = np.random.default_rng(9).normal(size=500)
    errors = [measures.bootstrap_error(lambda rows: float(values[rows].mean()), 500) for _ in "ab"]
    assert errors[0] == errors[1]
    assert errors[0] == pytest.approx(measures.mean(values)["standard_error"], rel=0.15)
    halves = measures.bootstrap_error(
        lambda a, b: float(values[:250][a].mean() - values[250:][b].mean()), 250, 250
    )
    assert halves == pytest.approx(2 * errors[0], rel=0.2)


def test_the_error_of_none_at_all_is_none() -> None:
    assert measures.standard_error(np.zeros(0, bool)) is None
    assert measures.standard_error(np.arange(100) < 20) == pytest.approx(0.04, rel=0.01)


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


def test_a_whole_number_of_rejections_is_not_rounded_below_itself() -> None:
    assert 0.29 * 100 < 29  # as floats have it
    assert measures.rejection_band(0.29, 99, 1000) == measures.rejection_band(0.295, 99, 1000)


def test_calibration_error_of_honest_and_of_boastful_posteriors() -> None:
    rng = np.random.default_rng(1)
    sure = rng.uniform(0.5, 1, 50_000)
    posterior = np.stack([sure, 1 - sure], 1)
    honest = (rng.random(50_000) > sure).astype(np.int64)
    assert measures.calibration_error(posterior, honest) < 0.01
    boastful = np.tile([0.99, 0.01], (1000, 1))
    y = np.repeat([0, 1], 500)
    assert measures.calibration_error(boastful, y) == pytest.approx(0.49)
    assert measures.calibration_error(np.array([[1.0, 0.0]]), np.array([1])) == 1


def test_the_nats_of_a_label_are_finite() -> None:
    found = measures.label_nats(np.array([[0.25, 0.75], [1.0, 0.0]]), np.array([0, 1]))
    assert found == pytest.approx([np.log(4), 300 * np.log(10)])


def test_labels_are_told_by_their_posterior_alone() -> None:
    posterior = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    y, kept = np.array([0, 1, 1, 1]), np.array([True, True, False, False])
    found = measures.labelling(posterior, y, kept)
    assert found["accuracy"]["mean"] == 0.75 and found["accuracy_of_accepted"]["mean"] == 0.5
    assert found["label_nll_nats"]["mean"] == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.7]).mean())
    assert found["ece"] == measures.calibration_error(posterior, y) and found["ece_standard_error"]
    wrong = np.array([False, True, False, False])
    assert found["aurc"] == measures.selective_risk(-posterior.max(1), wrong) == 1 / 16
    assert measures.labelling(posterior, y, ~kept & False)["accuracy_of_accepted"] is None
    assert "accuracy_of_accepted" not in measures.labelling(posterior, y)


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
