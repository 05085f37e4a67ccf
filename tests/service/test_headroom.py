"""One answer in two hundred may take longer than the multiple of its estimate: not more."""

from __future__ import annotations

import numpy as np
import pytest

from likely.batching.headroom import MAX_MULTIPLE, MIN_ESTIMATE, MIN_MULTIPLE, MISS_RATE, Headroom

ESTIMATE = 10 * MIN_ESTIMATE


@pytest.mark.parametrize("spread", [0.12, 0.16, 0.2])
def test_one_in_a_hundred_exceeds_it_whatever_the_spread(spread: float) -> None:
    headroom, exceeded = Headroom(), []
    for times in np.random.default_rng(0).lognormal(0.0, spread, 40_000):
        exceeded.append(times > headroom.multiple)
        headroom.record_answer(ESTIMATE, times * ESTIMATE)
    assert MIN_MULTIPLE < headroom.multiple < MAX_MULTIPLE
    assert np.mean(exceeded[5000:]) == pytest.approx(MISS_RATE, abs=0.1 * MISS_RATE)


def calm(answers: int) -> Headroom:
    headroom = Headroom()
    for _ in range(answers):
        headroom.record_answer(ESTIMATE, ESTIMATE)
    return headroom


def test_it_shrinks_while_answers_come_in_time_and_grows_within_a_few_late_ones() -> None:
    assert (
        MAX_MULTIPLE
        == calm(0).multiple
        > calm(500).multiple
        > calm(1000).multiple
        > MIN_MULTIPLE
        == calm(10_000).multiple
    )
    headroom = calm(1000)
    before = headroom.multiple
    for _ in range(3):
        headroom.record_answer(ESTIMATE, 3 * ESTIMATE)
    assert headroom.multiple > before + 0.25
    for _ in range(100):
        headroom.record_answer(ESTIMATE, 3 * ESTIMATE)
    assert headroom.multiple == MAX_MULTIPLE


def test_a_missed_deadline_counts_as_late() -> None:
    headroom = calm(1000)
    before = headroom.multiple
    headroom.record_miss(ESTIMATE)
    assert headroom.multiple > before


def test_what_is_short_or_was_not_estimated_tells_nothing() -> None:
    headroom = calm(1000)
    before = headroom.multiple
    for estimate in (0.0, 0.9 * MIN_ESTIMATE):
        headroom.record_answer(estimate, 100.0)
        headroom.record_miss(estimate)
    assert headroom.multiple == before
