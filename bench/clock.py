"""Measures the CPU time of calls, interleaved so that they can be compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LEAST_SECONDS = 0.05  # least seconds of one measurement; shorter calls are repeated within it
LEAST_TOTAL_SECONDS = 8.0  # least seconds of CPU for all rounds together


@dataclass(frozen=True)
class Timing:
    """CPU time of one call in seconds: minimum and median over the rounds."""

    minimum: float
    median: float

    def ratio_to(self, other: Timing) -> Timing:
        """The ratio of the minima and the ratio of the medians."""
        return Timing(self.minimum / other.minimum, self.median / other.median)

    def scaled_by(self, factor: float) -> Timing:
        """Both times, multiplied by a factor."""
        return Timing(self.minimum * factor, self.median * factor)


def time_interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Measures every call once per round, in at least `rounds` rounds.

    If the machine slows down for a while, it slows all calls, so their ratios hold. Calls shorter
    than `LEAST_SECONDS` are repeated within a round. Rounds continue until `LEAST_TOTAL_SECONDS`
    seconds have passed, because the minimum of short calls takes many rounds to find.
    """
    repeats = {
        name: max(1, math.ceil(LEAST_SECONDS / _time_call(call))) for name, call in calls.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    start = time.process_time()
    while (
        len(taken[next(iter(calls))]) < rounds or time.process_time() - start < LEAST_TOTAL_SECONDS
    ):
        for name, call in calls.items():
            taken[name].append(_time_call(call, repeats[name]))
    return {name: Timing(min(times), statistics.median(times)) for name, times in taken.items()}


def _time_call(call: Callable[[], object], repeats: int = 1) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return max(time.process_time() - start, 1e-9) / repeats
