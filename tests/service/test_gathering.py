from __future__ import annotations

import pytest

from likely.batching.gathering import MAX_WAIT, OVERLAP_MEMORY, Gathering

FIXED = 3e-4


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def after(
    gap: float, times: int, min_rows: int = 16, *, alone: bool = False
) -> tuple[Gathering, Clock]:
    """What so many arrivals at these distances have taught."""
    clock = Clock()
    gathering = Gathering(min_rows, FIXED, clock)
    for _ in range(times):
        clock.now += gap
        gathering.record_arrival(alone=alone)
    return gathering, clock


@pytest.mark.parametrize("gap", [FIXED / 2, 3 * FIXED, 5 * FIXED])
def test_a_lone_caller_never_waits(gap: float) -> None:
    for times in range(1, 100):
        gathering, clock = after(gap, times, alone=True)
        assert gathering.delay(1, clock.now) == 0


def test_who_is_alone_waits_as_long_as_others_are_remembered() -> None:
    gathering, clock = after(FIXED, 100)
    waited = 0
    for _ in range(1000):
        clock.now += FIXED
        gathering.record_arrival(alone=True)
        waited += gathering.delay(1, clock.now) > 0
    assert waited == pytest.approx(OVERLAP_MEMORY / FIXED, abs=2)


def test_rows_wait_where_others_follow_closely_and_until_they_do_not() -> None:
    gathering, clock = after(FIXED, 100)
    since = clock.now

    assert gathering.delay(1, since) == pytest.approx(4 * FIXED)
    clock.now += FIXED
    assert gathering.delay(1, since) == pytest.approx(3 * FIXED)
    gathering.record_arrival(alone=False)
    assert gathering.delay(2, since) == pytest.approx(4 * FIXED)
    clock.now += 4 * FIXED
    assert gathering.delay(2, since) == 0


def test_nobody_waits_any_more_once_rows_come_seldom() -> None:
    gathering, clock = after(FIXED, 100)
    waited = 0
    for _ in range(20):
        clock.now += MAX_WAIT
        gathering.record_arrival(alone=False)
        waited += gathering.delay(1, clock.now) > 0
    assert waited < 5


def test_enough_rows_wait_for_nobody() -> None:
    gathering, clock = after(FIXED, 100, min_rows=4)

    assert gathering.delay(3, clock.now) > 0
    assert gathering.delay(4, clock.now) == 0


def test_a_request_waits_no_longer_than_the_longest() -> None:
    gathering, clock = after(FIXED, 100)
    since = clock.now
    while clock.now < since + MAX_WAIT - FIXED / 2:
        assert gathering.delay(2, since) > 0
        clock.now += FIXED
        gathering.record_arrival(alone=False)
    assert gathering.delay(2, since) <= FIXED / 2


def test_who_makes_heavy_runs_waits_for_nobody() -> None:
    clock = Clock()
    gathering = Gathering(1, FIXED, clock)
    for _ in range(100):
        gathering.record_arrival(alone=False)
        assert gathering.delay(1, clock.now) == 0
