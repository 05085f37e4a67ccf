import itertools

import numpy as np
import pytest
from scipy.stats import norm

from likely.answers import Pixels
from likely_export import baselines, data
from likely_export.baselines import DiscretisedMixture, IndependentPixels
from likely_export.data import Dataset, Sizes

LEVELS = 3


@pytest.fixture(scope="module")
def every() -> Pixels:
    """All pictures of 2x2 pixels and three levels."""
    pictures = list(itertools.product(range(LEVELS), repeat=4))
    return np.array(pictures, np.uint8).reshape(-1, 1, 2, 2)


@pytest.fixture(scope="module")
def seen() -> Pixels:
    pairs = np.random.default_rng(0).integers(0, LEVELS, (60, 1, 2, 1))
    return pairs.repeat(2, 3).astype(np.uint8)


def test_independent_pixels_sum_to_one_over_all_pictures(every: Pixels, seen: Pixels) -> None:
    log_px = IndependentPixels(seen, LEVELS).log_prob(every)
    assert np.exp(log_px).sum() == pytest.approx(1)


@pytest.mark.parametrize("components", [1, 4])
@pytest.mark.parametrize("variance", [1e-4, 0.25])
def test_a_discretised_mixture_sums_to_one_over_all_pictures(
    every: Pixels, seen: Pixels, components: int, variance: float
) -> None:
    log_px = DiscretisedMixture(seen, LEVELS, components, variance).log_prob(every)
    assert np.exp(log_px).sum() == pytest.approx(1)


def test_a_mixture_of_one_is_a_product_of_normal_masses(every: Pixels, seen: Pixels) -> None:
    flat = seen.reshape(60, 4)
    normal = norm(flat.mean(0), np.sqrt(flat.var(0) + 0.1))
    edges = np.array([-np.inf, 0.5, 1.5, np.inf])
    pixels = every.reshape(-1, 4)
    expected = (normal.cdf(edges[pixels + 1]) - normal.cdf(edges[pixels])).prod(1)
    found = DiscretisedMixture(seen, LEVELS, 1, 0.1).log_prob(every)
    assert np.allclose(np.exp(found), expected, atol=1e-9)


def test_masses_keep_their_logarithm_in_both_tails() -> None:
    edges = np.array([-60.0, -59.0, 59.0, 60.0])
    masses = baselines._log_masses(edges)
    assert np.isfinite(masses).all() and masses[2] == pytest.approx(0)
    assert np.allclose(masses, masses[::-1]) and masses[1] == pytest.approx(norm.logcdf(-59))


def test_on_digits_structure_pays() -> None:
    found = baselines.evaluate(data.load("digits", Sizes(160, 260, 120, 300)))
    pixels = found["independent_pixels_nll_nats"]
    assert found["gaussian_mixture_nll_nats"] < pixels < 64 * np.log(17)
    assert found["independent_pixels_given_label_nll_nats"] < pixels
    assert found["logistic_regression_accuracy"] > found["independent_pixels_accuracy"] > 0.85
    assert found["test_size"] == found["bits_per_dim"]["test_size"] == 300
    assert found["logistic_regression_train_size"] == found["gaussian_mixture_train_size"] == 957


@pytest.mark.parametrize("channels", [1, 3])
def test_coin_flips_cost_a_compressor_at_least_a_bit_each(channels: int) -> None:
    x = np.random.default_rng(2).integers(0, 2, (2, channels, 128, 128)).astype(np.uint8)
    found = baselines.bits_per_dim(x, 2)
    assert 1 <= found["zlib"] < 1.1 and 1 <= found["png"] < 1.1


def test_compressors_see_the_whole_test_part_and_one_label_needs_no_regression(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baselines, "COMPONENTS", (1,))
    x = np.random.default_rng(1).integers(0, LEVELS, (1103, 1, 2, 2)).astype(np.uint8)
    x[1000:] = 0  # these compress better
    one = data.Split(x, np.zeros(len(x), np.int64))
    found = baselines.evaluate(Dataset("one", LEVELS, ("0",), one, one, one, one, one, ""))
    assert found["bits_per_dim"] == {**baselines.bits_per_dim(x, LEVELS), "test_size": 1103}
    assert found["independent_pixels_accuracy"] == 1
    assert not any(name.startswith("logistic") for name in found)
