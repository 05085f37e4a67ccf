"""Properties of the noise: keyed by seed and picture, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from likely import noise

seeds = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=30)
@given(seeds, st.integers(0, 2**63 - 20), st.integers(0, 10))
def test_noise_is_the_same_in_whatever_batch(seed: int, first: int, cut: int) -> None:
    whole = noise.gumbel(seed, range(first, first + 10), (3, 2))
    parts = (
        noise.gumbel(seed, range(first, first + cut), (3, 2)),
        noise.gumbel(seed, range(first + cut, first + 10), (3, 2)),
    )
    assert np.array_equal(whole, np.concatenate(parts))


def test_seeds_and_uses_do_not_share_streams() -> None:
    seeds = (0, 1, -1, 2**63 - 1, -(2**63))
    draws = {
        float(noise.stream(seed, index, use, attempt).random())
        for seed in seeds
        for index in (0, 1, 2**63 - 1)
        for use in noise.Use
        for attempt in (0, 1)
    }
    assert len(draws) == len(seeds) * 3 * len(noise.Use) * 2


def test_noise_has_its_distribution() -> None:
    normal = noise.normal(1, range(100), (400,))
    gumbel = noise.gumbel(1, range(100), (400,))
    assert normal.dtype == gumbel.dtype == np.float32
    assert normal.mean() == pytest.approx(0, abs=0.02)
    assert normal.std() == pytest.approx(1, abs=0.02)
    assert gumbel.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert gumbel.std() == pytest.approx(np.pi / np.sqrt(6), abs=0.02)
    assert np.isfinite(gumbel).all()


def test_uniform_numbers_lie_in_the_half_open_unit_interval() -> None:
    numbers = noise.uniform(7, range(5, 1005))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.array_equal(numbers[10:], noise.uniform(7, range(15, 1005)))
