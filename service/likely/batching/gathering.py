"""Whether a few rows wait for company before they run."""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST = 5e-3  # seconds that a request waits for others
WORTH = 4.0  # times the fixed cost of a run: so long a small batch waits for the next rows
SMOOTHING = 0.1
REMEMBERED = 0.1  # seconds in which somebody who was not alone is expected again


class Gathering:
    """How closely rows have followed one another of late, and so whether a small batch waits.

    A run costs something whatever its rows. Where that is much beside them, and rows come so
    fast that runs of single ones would keep a lane busy with it, it is worth a wait. A lone
    caller finds nobody waiting and nothing running, however fast it comes: it never waits.
    """

    def __init__(
        self, grain: int, fixed: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Nothing has come yet.

        Args:
            grain: so many rows wait for no others.
            fixed: seconds that a run costs whatever its rows.
            clock: seconds that only grow.
        """
        self._grain = grain
        self._lull = min(WORTH * fixed, LONGEST)
        self._clock = clock
        self._gap = LONGEST  # seconds between two that come, smoothed
        self._last = clock() - LONGEST
        self._met = self._last - REMEMBERED  # when somebody last found others there

    def came(self, *, alone: bool) -> None:
        """Someone has come.

        Args:
            alone: whether nothing waits or runs but what came now.
        """
        now = self._clock()
        self._gap += (min(now - self._last, LONGEST) - self._gap) * SMOOTHING
        self._last = now
        if not alone:
            self._met = now

    def wait(self, rows: int, since: float) -> float:
        """Seconds until these rows shall run, if nobody comes until then; 0 for now.

        Args:
            rows: that wait.
            since: when the first of those that wait came, by the clock.
        """
        if rows >= self._grain or self._gap > self._lull or self._last - self._met > REMEMBERED:
            return 0.0
        return max(0.0, min(self._last + self._lull, since + LONGEST) - self._clock())
