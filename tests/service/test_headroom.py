"""One answer in two hundred may take longer than the multiple of its estimate: not more."""

from __future__ import annotations

import numpy as np
import pytest

from likely.batching.headroom import LEAST, MIN_ESTIMATE, MISSED, MOST, Headroom

ESTIMATE = 10 * MIN_ESTIMATE


@pytest.mark.parametrize("spread", [0.12, 0.16, 0.2])
def test_one_in_a_hundred_exceeds_it_whatever_the_spread(spread: float) -> None:
    headroom, exceeded = Headroom(), []
    for times in np.random.default_rng(0).lognormal(0.0, spread, 40_000):
        exceeded.append(times > headroom.times)
        headroom.answered(ESTIMATE, times * ESTIMATE)
    assert LEAST < headroom.times < MOST
    assert np.mean(exceeded[5000:]) == pytest.approx(MISSED, abs=0.1 * MISSED)


def calm(answers: int) -> Headroom:
    headroom = Headroom()
    for _ in range(answers):
        headroom.answered(ESTIMATE, ESTIMATE)
    return headroom


def test_it_shrinks_while_answers_come_in_time_and_grows_within_a_few_late_ones() -> None:
    assert MOST == calm(0).times > calm(500).times > calm(1000).times > LEAST == calm(10_000).times
    headroom = calm(1000)
    before = headroom.times
    for _ in range(3):
        headroom.answered(ESTIMATE, 3 * ESTIMATE)
    assert headroom.times > before + 0.25
    for _ in range(100):
        headroom.answered(ESTIMATE, 3 * ESTIMATE)
    assert headroom.times == MOST


def test_a_missed_deadline_counts_as_late() -> None:
    headroom = calm(1000)
    before = headroom.times
    headroom.missed(ESTIMATE)
    assert headroom.times > before


def test_what_is_short_or_was_not_estimated_tells_nothing() -> None:
    headroom = calm(1000)
    before = headroom.times
    for estimate in (0.0, 0.9 * MIN_ESTIMATE):
        headroom.answered(estimate, 100.0)
        headroom.missed(estimate)
    assert headroom.times == before
