"""CPU time of calls that are to be compared with one another."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LONG_ENOUGH = 0.05  # seconds of one measurement; shorter calls are repeated within it
SETTLED = 8.0  # seconds of CPU after which more rounds of short calls are not needed


@dataclass(frozen=True)
class Timing:
    """Seconds of CPU that one call took, over the rounds."""

    minimum: float
    median: float

    def over(self, other: Timing) -> Timing:
        """Minimum over minimum and median over median."""
        return Timing(self.minimum / other.minimum, self.median / other.median)

    def times(self, factor: float) -> Timing:
        """Both, multiplied."""
        return Timing(self.minimum * factor, self.median * factor)


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """The time of every call, each measured once a round, in so many rounds at least.

    A machine that slows down for a while slows all of them, so their ratios hold. Calls
    shorter than `LONG_ENOUGH` are repeated within a round, and there are more rounds of
    short calls, whose minimum is found late: until `SETTLED`.
    """
    repeats = {
        name: max(1, math.ceil(LONG_ENOUGH / _seconds(call))) for name, call in calls.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    start = time.process_time()
    while len(taken[next(iter(calls))]) < rounds or time.process_time() - start < SETTLED:
        for name, call in calls.items():
            taken[name].append(_seconds(call, repeats[name]))
    return {name: Timing(min(times), statistics.median(times)) for name, times in taken.items()}


def _seconds(call: Callable[[], object], repeats: int = 1) -> float:
    start = time.process_time()
    for _ in range(repeats):
        call()
    return max(time.process_time() - start, 1e-9) / repeats
