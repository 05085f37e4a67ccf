"""Which way is taken by what is all there is, as both ways take longer or shorter."""

from __future__ import annotations

from typing import Any

import pytest

from likely.batching.tuning import Best
from likely.batching.width import MAX_TRIAL_INTERVAL, MIN_TRIAL_INTERVAL, Width

WIDE: Any = object()
ONE = 0.01  # seconds that a row takes on one core, as the warm-up has it


def run(width: Width, times: int, *, wide: float, one: float = 1.0, rows: int = 1) -> str:
    """So many batches, each taking that multiple of ONE a row; w and 1 tell the ways taken."""
    ways = ""
    for _ in range(times):
        taken = width.choose()
        assert taken in (WIDE, None)
        width.record_run(rows, (wide if taken else one) * ONE * rows, taken is WIDE)
        ways += "w" if taken else "1"
    return ways


@pytest.fixture
def width() -> Width:
    return Width(Best(4, pace=ONE, wide=WIDE))


def test_where_there_is_one_way_it_is_taken() -> None:
    width = Width(Best(4, pace=ONE))
    assert width.choose() is None
    width.record_run(1, ONE, wide=False)
    assert {width.choose() for _ in range(2 * MAX_TRIAL_INTERVAL)} == {None}


def test_all_cores_are_taken_while_they_are_sooner(width: Width) -> None:
    ways = run(width, 40 * MAX_TRIAL_INTERVAL, wide=0.6, rows=3)
    assert ways[: MIN_TRIAL_INTERVAL - 1] == "w" * (MIN_TRIAL_INTERVAL - 1)
    tries = [at for at, way in enumerate(ways) if way == "1"]
    assert 1 < len(tries) < 60  # ever more seldom


def test_a_core_that_others_want_is_done_without(width: Width) -> None:
    run(width, 3 * MAX_TRIAL_INTERVAL, wide=0.6)
    ways = run(width, 4 * MAX_TRIAL_INTERVAL, wide=3.0, one=1.2)
    assert ways.index("1") < MIN_TRIAL_INTERVAL
    assert ways[MIN_TRIAL_INTERVAL:].count("w") < 10
    assert "11111" in ways[:MIN_TRIAL_INTERVAL]


def test_all_cores_are_taken_again_once_they_are_free(width: Width) -> None:
    run(width, 20 * MAX_TRIAL_INTERVAL, wide=3.0, one=1.2)
    ways = run(width, 2 * MAX_TRIAL_INTERVAL, wide=0.6)
    assert ways.index("w") <= MAX_TRIAL_INTERVAL
    assert ways[MAX_TRIAL_INTERVAL:].count("1") < MAX_TRIAL_INTERVAL / 4


def test_one_run_that_stood_still_turns_nothing_for_long(width: Width) -> None:
    run(width, 8, wide=0.6)
    run(width, 1, wide=50)
    assert run(width, 3, wide=0.6) == "www"


def test_ways_that_take_the_same_are_not_changed(width: Width) -> None:
    ways = run(width, 10 * MAX_TRIAL_INTERVAL, wide=0.97)
    assert ways.count("1") < 20
