"""Chooses whether a lone batch runs on one core or on all, by which was faster recently."""

from __future__ import annotations

from likely.batching.batches import Runner
from likely.batching.tuning import Best

FIRST, LAST = 16, 256  # lone batches between two trials of the other way: at first, at most
CLEARLY = 0.9  # a way is better only if it takes at most this fraction of the other way's time
_SMOOTHING = 0.3


class Width:
    """Chooses between one core and all cores for a graph's lone batches.

    A lone batch is one that runs while nothing else of its version runs or waits. The warm-up found
    all cores to be faster for it. But a run on all cores waits for the slowest core at every node,
    so it is slower if other processes take a core now and then, or if a CPU quota runs out. The
    times of lone batches are therefore compared continually, and the other way is tried from time
    to time.
    """

    def __init__(self, best: Best) -> None:
        """Starts with all cores, if the warm-up found them worthwhile.

        Args:
            best: result of the warm-up for this graph.
        """
        self._wide = best.wide
        self._fixed, self._pace = best.fixed, best.pace
        self._is_better = True
        # Time per way (True: all cores), as a multiple of the time expected of one core.
        self._takes = {True: 0.0, False: 1.0}
        self._every, self._left = FIRST, FIRST

    def choose(self) -> Runner | None:
        """Returns the runner on all cores for the next lone batch, or None to use one core."""
        if self._wide is None:
            return None
        self._left -= 1
        if self._left > 0:
            return self._wide if self._is_better else None
        self._left = self._every
        return None if self._is_better else self._wide

    def ran(self, rows: int, seconds: float, wide: bool) -> None:
        """Learns from the run of a lone batch.

        Args:
            rows: number of rows that ran.
            seconds: duration of the run.
            wide: whether it ran on all cores.
        """
        expected = self._fixed + rows * self._pace
        if self._wide is None or not rows or not expected:
            return
        takes = seconds / expected
        if wide is self._is_better:
            before = self._takes[wide] or takes
            # A single run may have been stalled, which is no reason to switch.
            self._takes[wide] = before + (min(takes, 2 * before) - before) * _SMOOTHING
            if self._takes[not wide] <= CLEARLY * self._takes[wide]:
                self._turn()
        else:  # a trial; the one before is too old to average with
            self._takes[wide] = takes
            if takes <= CLEARLY * self._takes[not wide]:
                self._turn()
            else:
                self._every = min(2 * self._every, LAST)

    def _turn(self) -> None:
        self._is_better = not self._is_better
        self._every = self._left = FIRST
