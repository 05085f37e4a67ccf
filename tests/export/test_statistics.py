import math
from typing import Literal

import autoregressive
import numpy as np
import pytest
import torch
from scipy.stats import binom

from likely.answers import Doubles, Guarantee
from likely.outliers import Contrast, Detector
from likely_export import calibrate
from likely_export.calibrate import PartConfig, Seen
from likely_export.statistics import (
    EDGES,
    STATISTICS,
    Reconstruction,
    Tables,
    excess,
    regional_surprise,
    statistics,
    surprise_shares,
    tables,
    total_entropy,
    total_surprise,
)

OWN = tuple(name for name, statistic in STATISTICS.items() if statistic.needs is None)


def made(name: str, n: int = 5) -> Tables:
    model, config = autoregressive.model(name), autoregressive.CONFIGS[name]
    x = autoregressive.pictures(config, n)
    found = tables(model.log_probs(x), model.head.to_digits(x), config.shape[0])
    assert torch.allclose(found.surprise, model.surprise(x), atol=1e-5)
    assert torch.all(found.coarse <= found.surprise + 1e-5)
    return found


@pytest.mark.parametrize("name", autoregressive.CONFIGS)
def test_tables_are_of_the_pictures_shape_and_sum_to_the_totals(name: str) -> None:
    config, t = autoregressive.CONFIGS[name], made(name)
    assert t.surprise.shape == t.entropy.shape == t.variance.shape == (5, *config.shape)
    assert torch.all(t.entropy >= 0) and torch.all(t.variance >= 0)
    assert torch.all(t.entropy <= config.shape[0] * math.log(config.levels) + 1e-4)
    assert torch.allclose(total_surprise(t)[:, 0], t.surprise.sum((1, 2, 3)))
    assert torch.allclose(total_entropy(t)[:, 0], t.entropy.sum((1, 2, 3)))
    assert torch.allclose(regional_surprise(t).sum(1), t.surprise.sum((1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_a_model_that_knows_nothing_has_finite_statistics(levels: int) -> None:
    log_probs = torch.full((2, 28, 28, 1, levels), -math.log(levels))
    t = tables(log_probs, torch.zeros(2, 28, 28, 1, dtype=torch.long), 1)
    found = statistics(t, OWN)
    assert torch.all(torch.isfinite(found))
    assert torch.all(excess(t).abs() < 1)


def test_expected_surprise_is_what_draws_give() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.log_softmax(torch.randn((1, 1, 1, 1, 9), generator=generator), -1)
    probs = log_probs.exp()[0, 0, 0, 0]
    t = tables(log_probs, torch.zeros(1, 1, 1, 1, dtype=torch.long), 1)
    surprises = -log_probs[0, 0, 0, 0]
    mean = float((probs * surprises).sum())
    assert float(t.entropy) == pytest.approx(mean, abs=1e-6)
    assert float(t.variance) == pytest.approx(
        float((probs * (surprises - mean) ** 2).sum()), abs=1e-6
    )


def test_shares_count_each_pixel_once() -> None:
    surprise = torch.tensor([0.005, 0.03, 0.75, 100.0]).view(1, 1, 2, 2)
    shares = surprise_shares(Tables(surprise, surprise, surprise, surprise))[0]
    assert len(shares) == len(EDGES) - 1
    assert float(shares[0]) == pytest.approx((0.5 + 3) / 4)
    assert float(shares[-1]) == pytest.approx(0.25)
    assert torch.all(shares[1:] <= shares[:-1] + 1e-6)


def test_statistics_are_their_closed_forms() -> None:
    surprise = torch.arange(16.0).view(1, 1, 4, 4)
    local, picture = torch.full_like(surprise, 9.0), torch.zeros_like(surprise)
    picture[..., 0, 0] = 1.0
    redrawn = Reconstruction(
        torch.tensor([[-7.0, -3.0, -5.0]]),
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([[0.0, math.log(3.0)]]),
        torch.full_like(surprise, 0.25),
        picture,
    )
    t = Tables(surprise, surprise, surprise - 1, surprise + 1, local, redrawn)
    squared = 0.75**2 + 15 * 0.25**2
    expected = {
        "excess": [16 / math.sqrt(136)],
        "gain": [144 - 120],
        "local_ratio": [120 / 145],
        "bound": [-3],
        "margin": [2],
        "disagreement": [3 - 120],
        "divergence": [(25 + 4 - 2 - math.log(3.0)) / 2],
        "latent_norms": [5, 2],
        "latent": [3, 4],
        "error": [squared, squared / 1.25],
        "regional_surprise": list(range(16)),
        "regional_bias": [0.75, *[-0.25] * 15],
    }
    for name, values in expected.items():
        assert STATISTICS[name].compute(t)[0].tolist() == pytest.approx(values), name


def test_regions_are_of_neighbours() -> None:
    surprise = torch.arange(8.0)[:, None].expand(8, 8)[None, None]  # each row its number
    t = Tables(surprise, surprise, surprise, surprise)
    rows = torch.tensor([0.0 + 1, 2 + 3, 4 + 5, 6 + 7]) * 2
    assert torch.equal(regional_surprise(t).view(4, 4), rows[:, None].expand(4, 4))


def test_the_coarse_part_is_of_the_first_digit() -> None:
    log_probs = torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]])).view(1, 1, 1, 2, 2)
    t = tables(log_probs, torch.zeros(1, 1, 1, 2, dtype=torch.long), 1)
    assert float(t.coarse) == pytest.approx(math.log(4))
    assert float(t.surprise) == pytest.approx(math.log(8))


@pytest.mark.parametrize(
    "parts",
    [
        (PartConfig(),),
        (PartConfig("mixture", dimensions=4, components=2), PartConfig("neighbours")),
        (PartConfig(), PartConfig("contrast", weight=2.0)),
    ],
)
def test_calibrated_p_values_are_valid_for_dependent_statistics(
    parts: tuple[PartConfig, ...],
) -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6))
    draw = [np.exp(rng.normal(size=(n, 6)) @ mixing) for n in (400, 999, 4000)]
    fit, ranked = (Seen(values, np.arange(len(values)) % 3) for values in draw[:2])
    odd = Seen(rng.normal(size=(300, 6)) @ mixing.T, np.zeros(300, np.int64))
    columns = {"all": np.arange(6)}
    learnt = calibrate.combination(fit, parts, columns, odd, labels=4, original_rows=np.arange(300))
    detector = Detector(calibrate.detector(learnt, ranked))
    label = np.arange(len(draw[2])) % 3
    p = detector.p_value(detector.score(draw[2], label))
    for alpha in (0.01, 0.05, 0.1):
        spread = math.sqrt(alpha * (1 - alpha) * (1 / 999 + 1 / 4000))
        assert np.mean(p <= alpha) == pytest.approx(alpha, abs=4 * spread)
    unseen = detector.score(draw[2][:9], np.full(9, 3))  # a label that no fit picture is taken for
    assert np.all(np.isfinite(unseen))
    far = detector.score(draw[2][:50] * 1e6, label[:50])
    assert np.all(detector.p_value(far) == detector.finest_alpha)
    sure = detector.p_value(detector.score(draw[2], label), Guarantee.PAC)
    assert np.all((sure >= p) & (sure <= 1))


def test_a_picture_is_held_out_together_with_its_corrupted_twin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learnt_from: list[tuple[set[float], set[float]]] = []
    contrast = calibrate._contrast

    def recording(config: PartConfig, columns: Doubles, v: Doubles, odd: Doubles) -> Contrast:
        learnt_from.append(({*v[:, 0]}, {*odd[:, 0]}))
        return contrast(config, columns, v, odd)

    monkeypatch.setattr(calibrate, "_contrast", recording)
    values, label = np.random.default_rng(0).normal(size=(50, 2)), np.zeros(50, np.int64)
    rows = np.delete(np.arange(50), range(5, 10))  # what is made of the others was left out
    odd = Seen(values[rows], label[rows])  # told from what it is made of by nothing
    parts, columns = [PartConfig("contrast")], {"all": np.arange(2)}
    calibrate.combination(Seen(values, label), parts, columns, odd, original_rows=rows)
    # A part says how unusual a picture is that it was not fitted on; in the end all serve.
    assert [len(fitted) for fitted, _ in learnt_from] == [37, 37, 38, 38, 50]
    assert all(twins <= fitted for fitted, twins in learnt_from)


def test_what_a_split_promises_with_confidence_is_exact() -> None:
    rng, n = np.random.default_rng(0), 40
    seen = Seen(rng.normal(size=(n, 2)), np.zeros(n, np.int64))
    learnt = calibrate.combination(seen, [PartConfig()], {"all": np.arange(2)})
    y = np.arange(n) % 3  # of four labels
    arrays = calibrate.detector(learnt, seen, rng.dirichlet(np.ones(4), n), y)
    assert Detector(arrays).flaw(4) is None
    # Of n pictures at most k lie in a tail of that size once in twenty times (Clopper and
    # Pearson, 1934).
    sizes = arrays["confident"]
    assert binom.cdf(np.arange(n), n, sizes[:-1]) == pytest.approx(0.05)
    assert sizes[-1] == 1


def test_weights_count_beside_one_another_alone() -> None:
    values = np.random.default_rng(0).normal(size=(40, 2))
    seen, found = Seen(values, np.zeros(40, np.int64)), []
    for weight in (1.0, 6.0):
        parts = [PartConfig(weight=weight), PartConfig("neighbours", weight=2 * weight)]
        learnt = calibrate.combination(seen, parts, {"all": np.arange(2)})
        found.append(learnt(seen.statistics, seen.label))
    assert found[0] == pytest.approx(found[1])


def test_a_part_looks_at_its_own_statistics() -> None:
    values = np.random.default_rng(0).normal(size=(40, 3))
    seen, part = Seen(values, np.zeros(40, np.int64)), PartConfig(statistics=("b",))
    learnt = calibrate.combination(seen, [part], calibrate.places({"a": 1, "b": 2}))
    assert learnt.parts[0].stored()["columns"].tolist() == [1, 2]


def test_distances_are_measured_within_labels() -> None:
    rng, label = np.random.default_rng(0), np.arange(400) % 2
    v = rng.normal(size=(400, 2)) + 100 * label[:, None]
    found = calibrate._mahalanobis(np.arange(2.0), v, label, 2)
    assert np.mean(found(v, label)) == pytest.approx(2, rel=0.1)


def test_a_mixture_keeps_what_varies_most() -> None:
    v = np.random.default_rng(0).normal(size=(400, 3)) * [1, 10, 3]
    config = PartConfig("mixture", dimensions=1, components=1)
    kept = calibrate._mixture(config, np.arange(3.0), v).whitening
    assert np.abs(kept[:, 0]).argmax() == 1


def test_a_contrast_is_large_of_what_is_corrupted() -> None:
    rng = np.random.default_rng(0)
    real, odd = rng.normal(size=(200, 2)), rng.normal(size=(100, 2)) * 3 + 1
    found = calibrate._contrast(PartConfig("contrast"), np.arange(2.0), real, odd)
    none = np.zeros(200, np.int64)
    assert np.mean(found(odd, none[:100])) > np.mean(found(real, none)) + 1


def test_ranks_do_not_tell_apart_what_agrees_but_for_rounding() -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random((1000, 1)) < 0.9, 0.5, rng.normal(size=(1000, 1)))
    values += 1e-12 * rng.normal(size=(1000, 1))
    lower, upper = calibrate._ranks(values)(np.array([[0.5 - 1e-12], [0.5 + 1e-12]]))[:, 0]
    assert upper - lower < 1e-6


def test_a_few_pictures_of_a_label_do_not_say_how_far_its_next_ones_deviate() -> None:
    rng = np.random.default_rng(0)
    sizes = (400, 2, calibrate.MIN_LABEL_PICTURES, 1, 0)
    label = np.repeat(np.arange(len(sizes)), sizes)
    average = rng.normal(label, 1.0)
    average[label == 1] = 3.0, 3.001
    usual = calibrate._mean_and_deviation_by_label(average, label, len(sizes))
    for k in (0, 2):  # of as many as speak for themselves nothing but their own
        own = average[label == k]
        assert usual[k].tolist() == [own.mean(), own.std()]
    assert usual[1, 0] == average[label == 1].mean() and usual[3, 0] == average[label == 3][0]
    assert 1 < usual[1, 1] < 1.3 < usual[3, 1] < 1.6  # the mean of one is less sure than of two
    assert usual[4].tolist() == [average.mean(), average.std()]


def test_a_statistic_of_one_number_may_be_all_that_a_mixture_looks_at() -> None:
    values = np.random.default_rng(0).normal(size=(40, 1))
    seen = Seen(values, np.zeros(40, np.int64))
    learnt = calibrate.combination(
        seen, [PartConfig("mixture", components=1)], calibrate.places({"excess": 1})
    )
    scores = learnt(seen.statistics, seen.label)
    assert scores.argmax() in (values.argmax(), values.argmin())


@pytest.mark.parametrize("kind", ["mahalanobis", "mixture", "neighbours", "contrast"])
@pytest.mark.parametrize("case", ["alike", "alone", "two"])
def test_what_does_not_vary_is_combined_too(
    kind: Literal["mahalanobis", "mixture", "neighbours", "contrast"], case: str
) -> None:
    # All pictures alike; each alone with its label, none of which differs from its centre; or of
    # two kinds, as many of each.
    values = {
        "alike": np.full((8, 3), 0.1),
        "alone": np.random.default_rng(0).normal(size=(8, 3)),
        "two": np.tile([[0.1, 0.7, 3.0], [0.3, 0.1, 3.0]], (4, 1)),
    }[case]
    seen = Seen(values, np.arange(8) if case == "alone" else np.zeros(8, np.int64))
    part = PartConfig(kind, components=1, neighbours=1)
    learnt = calibrate.combination(
        seen, [part], calibrate.places({"all": 3}), seen, labels=8, original_rows=np.arange(8)
    )
    assert np.isfinite(learnt(seen.statistics, seen.label)).all()


def test_the_temperature_is_found_again() -> None:
    rng = np.random.default_rng(1)
    log_pxy = rng.normal(size=(20000, 5)) * 3
    honest = np.exp(log_pxy) / np.exp(log_pxy).sum(1, keepdims=True)
    y = (honest.cumsum(1) > rng.random((20000, 1))).argmax(1)
    found = calibrate.fit_temperature(log_pxy * 4, y, np.full(5, 0.2))
    assert found == pytest.approx(4, rel=0.05)


def test_the_better_expert_and_its_temperature_are_found_again() -> None:
    rng = np.random.default_rng(1)
    log_pxy = rng.normal(size=(4000, 5)) * 3
    honest = np.exp(log_pxy) / np.exp(log_pxy).sum(1, keepdims=True)
    y = (honest.cumsum(1) > rng.random((4000, 1))).argmax(1)
    evidence = np.stack([log_pxy * 4, rng.normal(size=(4000, 5))], 1)
    weights, temperature = calibrate.fit_expert_weights(evidence, y, np.full(5, 0.2))
    assert sum(weights) == pytest.approx(1) and weights[0] > 0.8
    assert temperature / weights[0] == pytest.approx(4, rel=0.1)
