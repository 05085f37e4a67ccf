"""On how many cores what is all there is runs: one or all, whichever was sooner done of late."""

from __future__ import annotations

from likely.batching.batches import Runner
from likely.batching.tuning import Best

FIRST, LAST = 16, 256  # batches from one try of the other way to the next
CLEARLY = 0.9  # of what one way takes, the other one has to take at most to be better
_SMOOTHING = 0.3


class Width:
    """What a graph's batches run by that have all lanes to themselves.

    The warm-up found all cores to be sooner done than one. But all of them wait for the slowest at
    every node, and where neighbours take a core now and then, or a quota runs out, they are later.
    So times are compared as they come, and now and then the other way is tried.
    """

    def __init__(self, best: Best) -> None:
        """All cores, where the warm-up found them worth it.

        Args:
            best: what the warm-up found.
        """
        self._wide = best.wide
        self._fixed, self._pace = best.fixed, best.pace
        self._is_better = True
        # Of each way, as a multiple of what the warm-up expects of one core.
        self._takes = {True: 0.0, False: 1.0}
        self._every, self._left = FIRST, FIRST

    def choose(self) -> Runner | None:
        """What takes all cores for the next such batch; None where one core is to do."""
        if self._wide is None:
            return None
        self._left -= 1
        if self._left > 0:
            return self._wide if self._is_better else None
        self._left = self._every
        return None if self._is_better else self._wide

    def ran(self, rows: int, seconds: float, wide: bool) -> None:
        """Learns from such a run of so many rows."""
        expected = self._fixed + rows * self._pace
        if self._wide is None or not rows or not expected:
            return
        takes = seconds / expected
        if wide is self._is_better:
            before = self._takes[wide] or takes
            # One run may have stood still for a while, which is no reason to turn.
            self._takes[wide] = before + (min(takes, 2 * before) - before) * _SMOOTHING
            if self._takes[not wide] <= CLEARLY * self._takes[wide]:
                self._turn()
        else:  # the last try is long ago
            self._takes[wide] = takes
            if takes <= CLEARLY * self._takes[not wide]:
                self._turn()
            else:
                self._every = min(2 * self._every, LAST)

    def _turn(self) -> None:
        self._is_better = not self._is_better
        self._every = self._left = FIRST
