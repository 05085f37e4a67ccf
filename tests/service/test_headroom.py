"""One answer in a hundred may take longer than the multiple of its estimate: not more."""

from __future__ import annotations

import numpy as np
import pytest

from likely.batching.headroom import FIRST, LEAST, MISSED, MOST, TELLS, Headroom

ESTIMATE = 10 * TELLS


@pytest.mark.parametrize("spread", [0.12, 0.16, 0.2])
def test_one_in_a_hundred_exceeds_it_whatever_the_spread(spread: float) -> None:
    headroom, exceeded = Headroom(), []
    for times in np.random.default_rng(0).lognormal(0.0, spread, 40_000):
        exceeded.append(times > headroom.times)
        headroom.answered(ESTIMATE, times * ESTIMATE)
    assert LEAST < headroom.times < MOST
    assert np.mean(exceeded[1000:]) == pytest.approx(MISSED, abs=0.1 * MISSED)


def test_it_grows_within_a_few_late_answers_and_comes_back() -> None:
    headroom = Headroom()
    for _ in range(4):
        headroom.answered(ESTIMATE, 3 * ESTIMATE)
    assert headroom.times > FIRST + 0.35
    for _ in range(100):
        headroom.answered(ESTIMATE, 3 * ESTIMATE)
    assert headroom.times == MOST
    for _ in range(10_000):
        headroom.answered(ESTIMATE, ESTIMATE)
    assert headroom.times == LEAST


def test_a_missed_deadline_counts_as_late() -> None:
    headroom = Headroom()
    headroom.missed(ESTIMATE)
    assert headroom.times > FIRST


def test_what_is_short_or_was_not_estimated_tells_nothing() -> None:
    headroom = Headroom()
    for estimate in (0.0, 0.9 * TELLS):
        headroom.answered(estimate, 100.0)
        headroom.missed(estimate)
    assert headroom.times == FIRST
