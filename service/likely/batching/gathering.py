"""Decides whether a small batch waits for more rows before it runs."""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_WAIT = 5e-3  # seconds that a request waits for others, at most
# A batch waits for the next request for at most this multiple of the fixed cost.
MAX_GAP_FACTOR = 4.0
SMOOTHING = 0.1
OVERLAP_MEMORY = 0.1  # seconds during which a request that found others makes batches wait


class Gathering:
    """Tracks how closely requests follow one another, and so whether a small batch waits.

    A run has a fixed cost, whatever its number of rows. Waiting pays off if that cost is high
    beside the cost of the rows, and if requests arrive so fast that runs of single rows would keep
    a lane busy with it. A lone caller never waits: however fast its requests come, they find no
    other request waiting or running.
    """

    def __init__(
        self, min_rows: int, fixed: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Starts with no arrivals.

        Args:
            min_rows: number of rows from which on a batch does not wait.
            fixed: fixed cost of a run, in seconds.
            clock: returns monotonic time in seconds.
        """
        self._min_rows = min_rows
        self._max_gap = min(MAX_GAP_FACTOR * fixed, MAX_WAIT)
        self._clock = clock
        self._gap = MAX_WAIT  # seconds between two arrivals, smoothed
        self._last = clock() - MAX_WAIT
        # When an arrival last found others waiting or running.
        self._last_overlap = self._last - OVERLAP_MEMORY

    def record_arrival(self, *, alone: bool) -> None:
        """Notes an arrival.

        Args:
            alone: whether no other request waits or runs.
        """
        now = self._clock()
        self._gap += (min(now - self._last, MAX_WAIT) - self._gap) * SMOOTHING
        self._last = now
        if not alone:
            self._last_overlap = now

    def delay(self, rows: int, first_arrival: float) -> float:
        """Returns the seconds until the waiting rows run if no request arrives; 0 for at once.

        Args:
            rows: number of rows that wait.
            first_arrival: arrival of the first waiting request, by the clock.
        """
        if (
            rows >= self._min_rows
            or self._gap > self._max_gap
            or self._last - self._last_overlap > OVERLAP_MEMORY
        ):
            return 0.0
        return max(0.0, min(self._last + self._max_gap, first_arrival + MAX_WAIT) - self._clock())
