"""Chooses whether a lone batch runs on one core or on all, by which was faster recently."""

from __future__ import annotations

from likely.batching.batches import Runner
from likely.batching.tuning import Best

# Lone batches between two trials of the other way: at first, at most.
MIN_TRIAL_INTERVAL, MAX_TRIAL_INTERVAL = 16, 256
# A way is better only if it takes at most this fraction of the other way's time.
MAX_TIME_RATIO = 0.9
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
        self._fixed, self._pace = best.fixed_cost, best.pace
        self._wide_is_better = True
        # Time per way (True: all cores), as a multiple of the time expected of one core.
        self._relative_times = {True: 0.0, False: 1.0}
        self._trial_interval, self._runs_to_trial = MIN_TRIAL_INTERVAL, MIN_TRIAL_INTERVAL

    def choose(self) -> Runner | None:
        """Returns the runner on all cores for the next lone batch, or None to use one core."""
        if self._wide is None:
            return None
        self._runs_to_trial -= 1
        if self._runs_to_trial > 0:
            return self._wide if self._wide_is_better else None
        self._runs_to_trial = self._trial_interval
        return None if self._wide_is_better else self._wide

    def record_run(self, rows: int, seconds: float, wide: bool) -> None:
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
        if wide is self._wide_is_better:
            before = self._relative_times[wide] or takes
            # A single run may have been stalled, which is no reason to switch.
            self._relative_times[wide] = before + (min(takes, 2 * before) - before) * _SMOOTHING
            if self._relative_times[not wide] <= MAX_TIME_RATIO * self._relative_times[wide]:
                self._switch()
        else:  # a trial; the one before is too old to average with
            self._relative_times[wide] = takes
            if takes <= MAX_TIME_RATIO * self._relative_times[not wide]:
                self._switch()
            else:
                self._trial_interval = min(2 * self._trial_interval, MAX_TRIAL_INTERVAL)

    def _switch(self) -> None:
        self._wide_is_better = not self._wide_is_better
        self._trial_interval = self._runs_to_trial = MIN_TRIAL_INTERVAL
