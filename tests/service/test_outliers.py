"""Properties of the calibrated p-value."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from likely.answers import Guarantee
from likely.bundle import Bundle
from likely.errors import InvalidInput
from likely.outliers import (
    Combination,
    Contrast,
    Detector,
    Mahalanobis,
    Mixture,
    Neighbours,
    Ranks,
    benjamini_hochberg,
)

if TYPE_CHECKING:
    from tests.conftest import Toy


@pytest.fixture
def detector(toy: Toy) -> Detector:
    return Detector(Bundle.open(toy.path).calibration())


def test_p_values_lie_between_the_finest_alpha_and_one(detector: Detector) -> None:
    statistics = np.random.default_rng(0).normal(size=(1000, 2)) * 100
    p = detector.p_value(detector.score(statistics))
    assert p.min() >= detector.finest_alpha
    assert p.max() <= 1


def test_the_rate_of_false_rejections_is_at_most_alpha(detector: Detector, toy: Toy) -> None:
    n, alpha = 4000, 0.1
    p = detector.p_value(detector.score(toy.statistics(toy.draw(np.random.default_rng(1), n))))
    # The calibration set itself varies: a beta distribution round alpha (Vovk, 2012).
    spread = np.sqrt(alpha * (1 - alpha) * (1 / n + 1 / len(detector.scores)))
    assert abs((p <= alpha).mean() - alpha) < 3.3 * spread


def test_what_is_farther_off_is_not_more_plausible(detector: Detector, toy: Toy) -> None:
    usual = toy.statistics(toy.draw(np.random.default_rng(2), 50)).mean(0)
    steps = np.linspace(10, 1000, 20)[:, None]
    scores = detector.score(usual + steps)
    assert np.all(np.diff(scores) > 0)
    assert np.allclose(detector.p_value(scores), detector.finest_alpha)


def test_a_picture_is_judged_alone(detector: Detector, toy: Toy) -> None:
    statistics = toy.statistics(toy.draw(np.random.default_rng(3), 20))
    together = detector.score(statistics)
    assert np.array_equal(together, [detector.score(row[None])[0] for row in statistics])


@pytest.mark.parametrize("bundle", ["bundles/digits", "bundles/fashion_mnist"])
def test_a_score_has_the_same_bits_in_whatever_company(bundle: str) -> None:
    opened = Bundle.open(Path(bundle))
    detector, golden = Detector(opened.calibration()), opened.golden()
    rng = np.random.default_rng(4)
    usual = golden["density/statistics"]
    statistics = usual[rng.integers(len(usual), size=67)]
    statistics = statistics + rng.normal(size=statistics.shape).astype(np.float32)
    label = rng.integers(len(opened.manifest.labels), size=67)
    together = detector.score(statistics, label)
    for size in (1, 3, 8, 66):
        parts = np.split(np.arange(67), range(size, 67, size))
        apart = np.concatenate([detector.score(statistics[i], label[i]) for i in parts])
        assert np.array_equal(apart, together)


@pytest.mark.parametrize("bank", [3, 40, 85, 4000])
def test_neighbours_are_the_nearest_of_the_whole_bank(bank: int) -> None:
    rng, count = np.random.default_rng(5), 3
    centre, whitening, known = (
        rng.normal(size=4),
        rng.normal(size=(4, 4)),
        rng.normal(size=(bank, 4)),
    )
    known[bank // 2 :] = known[: bank - bank // 2]  # and ties
    part = Neighbours(np.arange(4.0)[::-1], centre, whitening, known, np.array(count))
    normal = rng.normal(size=(21, 4))
    v = (normal[:, ::-1] - centre) @ whitening
    apart = np.sort(np.linalg.norm(v[:, None] - known, axis=2), 1)[:, :count].mean(1)
    assert part(normal, np.zeros(21, np.int64)) == pytest.approx(apart, rel=1e-9)


def test_a_picture_of_the_bank_is_as_near_as_can_be() -> None:
    bank = np.random.default_rng(7).normal(size=(40, 4)) * 1e3
    part = Neighbours(np.arange(4.0), np.zeros(4), np.eye(4), bank, np.array(1))
    assert part(bank, np.zeros(40, np.int64)) == pytest.approx(0, abs=1e-3)


def test_a_contrast_holds_far_scores() -> None:
    slopes, bends = np.array([1.0, -2.0, 3.0]), np.array([0.5, 0.25, -1.0])
    part = Contrast(np.array([2.0, 0.0, 1.0]), slopes, bends)
    normal = np.array([[1.0, 1e6, -7.0], [-1.5, 6.0, 2.0]])
    held = np.array([[-6.0, 1.0, 6.0], [2.0, -1.5, 6.0]])
    expected = held @ slopes + np.abs(held) @ bends
    assert part(normal, np.zeros(2, np.int64)) == pytest.approx(expected)


def test_a_contrast_has_the_same_bits_in_whatever_company() -> None:
    rng, label = np.random.default_rng(8), np.zeros(67, np.int64)
    part = Contrast(rng.permutation(80)[:40].astype(float), *rng.normal(size=(2, 40)))
    normal = rng.normal(size=(67, 80))
    alone = [part(normal[i : i + 1], label[:1])[0] for i in range(67)]
    assert np.array_equal(part(normal, label), alone)


def test_parts_come_back_in_their_order_and_labels_have_what_is_usual_for_them() -> None:
    count = 12
    ranks = Ranks(np.array([[-1.0] * 2, [1.0] * 2]), np.array([-1.0, 1.0]), np.ones(2))
    part_ranks = Ranks(np.repeat([[-1.0], [1.0]], count, 1), np.array([-1.0, 1.0]), np.ones(count))
    parts = tuple(
        Mahalanobis(np.array([0.0]), np.zeros((1, 1)), np.full((1, 1), np.sqrt(k)))
        for k in range(count)
    )
    weights = np.arange(count) / np.arange(count).sum()
    usual = np.array([[0.0, 1.0], [5.0, 2.0]])
    made = Combination(ranks, parts, part_ranks, weights, usual)
    average = (weights * np.arange(count)).sum()  # of k times the square of 1
    for combination in (made, Combination.read(made.stored())):
        scores = combination(np.ones((2, 2)), np.array([0, 1]))
        assert scores == pytest.approx([average, (average - 5) / 2])


def test_a_mixture_gives_minus_its_log_density() -> None:
    rng, terms, r = np.random.default_rng(6), 5, 3
    roots = rng.normal(size=(terms, r, r)) + 2 * np.eye(r)
    means, weights = rng.normal(size=(terms, r)), rng.dirichlet(np.ones(terms))
    offsets = np.log(weights) + np.linalg.slogdet(roots)[1] - r / 2 * np.log(2 * np.pi)
    part = Mixture(np.arange(3.0), np.zeros(r), np.eye(r), means, roots, offsets)
    normal = rng.normal(size=(11, r))
    each = [
        np.log(weight) + multivariate_normal(mean, np.linalg.inv(root @ root.T)).logpdf(normal)
        for weight, mean, root in zip(weights, means, roots, strict=True)
    ]
    assert part(normal, np.zeros(11, np.int64)) == pytest.approx(-logsumexp(each, axis=0))


def test_ties_count_against_a_picture_by_either_guarantee(toy: Toy) -> None:
    arrays = Bundle.open(toy.path).calibration()
    known = {"scores": np.array([0.0, 0, 1, 2]), "confident": np.array([0.3, 0.4, 0.5, 0.6, 1])}
    detector = Detector({**arrays, **known})
    scores = np.array([-1.0, 0.0, 1.0, 5.0])
    assert detector.p_value(scores).tolist() == [1.0, 1.0, 0.6, 0.2]
    assert detector.p_value(scores, Guarantee.PAC).tolist() == [1.0, 1.0, 0.5, 0.3]
    assert detector.check_alpha(0.3, Guarantee.PAC) == 0.3
    with pytest.raises(InvalidInput, match=r"0\.25 is not in \[0\.3, 1\).* cannot promise finer"):
        detector.check_alpha(0.25, Guarantee.PAC)


def test_a_label_ranks_pictures_among_its_own_and_ties_count_against_them(toy: Toy) -> None:
    arrays = Bundle.open(toy.path).calibration()
    known = {"label_scores": np.array([0.0, 0, 3, 1, 2, 5]), "label_counts": np.array([3, 0, 3])}
    detector = Detector({**arrays, **known})
    # A score below 0 does not speak against a picture, and one of 2 does so by 2 nats.
    p = detector.label_p_values(np.array([-3.0, 2.0]), np.ones((2, 3)))
    assert p.tolist() == [[1.0, 1.0, 1.0], [0.5, 1.0, 0.75]]


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, 0.0049, float("nan"), float("inf")])
def test_an_alpha_that_cannot_be_promised_is_refused(detector: Detector, alpha: float) -> None:
    with pytest.raises(InvalidInput, match=r"\[0.005, 1\)") as caught:
        detector.check_alpha(alpha)
    assert ("cannot promise finer" in str(caught.value)) == (alpha < 0.005)


def test_the_finest_alpha_can_be_promised(detector: Detector) -> None:
    assert detector.check_alpha(detector.finest_alpha) == pytest.approx(1 / 200)


def test_false_discoveries_of_a_batch_are_bounded_and_outliers_found(toy: Toy) -> None:
    """50 jobs of 1,000 pictures, of which 5 % are planted; each with a calibration of its own."""
    arrays, rate, planted = Bundle.open(toy.path).calibration(), 0.05, 50
    odd = toy.statistics(np.repeat(toy.log_q.argmin(-1).astype(np.uint8)[None], planted, 0))
    proportions, powers = [], []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        usual = toy.statistics(toy.draw(rng, 2999 + 950))
        scores = Detector(arrays).score(usual)
        detector = Detector({**arrays, "scores": np.sort(scores[:2999])})
        p = detector.p_value(np.concatenate([scores[2999:], detector.score(odd)]))
        rejected = benjamini_hochberg(p, rate)
        proportions.append(rejected[:950].sum() / max(1, rejected.sum()))
        powers.append(rejected[950:].mean())
    spread = np.std(proportions) / np.sqrt(50)
    assert np.mean(proportions) <= rate + 3 * spread
    assert np.mean(proportions) > 0  # or it would show nothing
    assert np.mean(powers) > 0.95


@pytest.mark.parametrize(
    ("p_values", "rate", "rejected"),
    [
        ([0.03] * 3 + [0.9] * 27, 0.3, [True] * 3 + [False] * 27),
        ([0.1, 0.5, 0.9], 0.3, [True, False, False]),
        ([0.1 + 1e-9, 0.5, 0.9], 0.3, [False] * 3),
    ],
)
def test_what_equals_its_bound_is_rejected(
    p_values: list[float], rate: float, rejected: list[bool]
) -> None:
    assert benjamini_hochberg(p_values, rate).tolist() == rejected


def test_a_rate_that_is_none_is_refused() -> None:
    for rate in (0.0, 1.0, float("nan")):
        with pytest.raises(InvalidInput, match="rate"):
            benjamini_hochberg(np.array([0.1]), rate)
    assert benjamini_hochberg(np.empty(0), 0.1).shape == (0,)
