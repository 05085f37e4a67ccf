"""Measures which batch size, run size and number of lanes suit a graph on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from likely.batching.batches import Runner
from likely.errors import OutOfMemory
from likely.graphs import CPU, Array

# Seconds per batch beside its run: thread hop, joining the inputs, dividing the outputs.
BATCH_OVERHEAD = 1e-4
BATCH_GAP = 2e-3  # seconds lost between two batches while all cores are busy
MAX_LOOP_SECONDS = 1e-3  # seconds for which a run may block the event loop
# A larger run may cost this much more per row than the fastest, as each run costs.
RUN_TOLERANCE = 1.05
# A smaller batch this close to the fastest is preferred, as it delays others less.
BATCH_TOLERANCE = 1.05
# Fewer lanes than cores are used only if they are faster by this factor.
MIN_SPEEDUP_OF_FEWER_LANES = 1.1
# A run is worthwhile if its fixed cost is at most this fraction of its rows' cost.
MAX_FIXED_COST_RATIO = 0.25
# All cores are used for a lone row if they are faster than one by this factor.
MIN_SPEEDUP_OF_ALL_CORES = 1.25
MAX_ROUNDS = 8  # rounds in which one core and all cores are compared, at most


@dataclass(frozen=True, slots=True)
class Best:
    """How a graph runs best.

    Attributes:
        rows: maximum number of rows per batch.
        min_rows: minimum number of rows that are worth a run of their own while others arrive or
            run.
        pace: seconds per row in a full batch; 0 if not measured.
        loop_rows: maximum number of rows that run on the event loop instead of in a lane.
        fixed_cost: seconds that a run costs whatever its number of rows.
        rows_per_run: rows per run, if a batch is faster in several runs; 0 for one run per batch.
        wide: runner on all cores for lone batches; None if that is not faster.
    """

    rows: int
    min_rows: int = 1
    pace: float = 0.0
    loop_rows: int = 0
    fixed_cost: float = 0.0
    rows_per_run: int = 0
    wide: Runner | None = None

    def log_fields(self) -> dict[str, object]:
        """Returns the fields that describe it in a log."""
        pace = float(f"{1000 * self.pace:.3g}")
        return {
            "rows": self.rows,
            "rows_a_run": self.rows_per_run or self.rows,
            "ms_a_row": pace,
            "alone_on_all_cores": self.wide is not None,
        }


def find_best_batch(
    runner: Runner,
    sample: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    most: int,
    step: int,
    seconds: float,
    growth: float | None = None,
) -> Best:
    """Finds the batch size with the most rows per second, or a smaller one that is close.

    Also finds the size of the runs into which a batch is divided.

    Args:
        runner: runs the graph.
        sample: inputs of at least one row.
        outputs: names of the outputs to compute.
        most: the largest size to try.
        step: ratio of two successive sizes.
        seconds: time to spend on timed runs. A run in progress is finished. A size that is too
            slow, or too large for the memory, ends the search.
        growth: expected ratio of the times of two successive sizes; `step` by default.

    Raises:
        OutOfMemory: there is no memory for a single row.
    """
    on_card = runner.providers[0] != CPU
    # On CPUs, the time of the thread is measured, so that other processes on the core do not count.
    clock = time.perf_counter if on_card else time.thread_time
    end = clock() + seconds
    took: dict[int, float] = {}
    size = 1
    while True:
        try:
            if on_card or size == 1:
                # Excludes one-time setup: at the first run, and on a card for each size.
                end += _time_run(runner, sample, outputs, size, clock)
            took[size] = _time_run(runner, sample, outputs, size, clock)
        except OutOfMemory:
            if not took:
                raise
            break
        if size == most or clock() + (growth or step) * took[size] > end:
            break
        size = min(size * step, most)
    # Times on CPUs are noisy, and the first run of a size allocates memory, so the fastest of
    # several counts. All sizes are run again or none, as a size that was run more often looks
    # faster than the others.
    while not on_card and clock() + sum(took.values()) < end:
        for size in took:
            took[size] = min(took[size], _time_run(runner, sample, outputs, size, clock))
    run = max(took) if on_card else _fastest_run_size(took)
    if not on_card:  # larger batches are divided into runs of that size, at the same time per row
        sizes = (step**i for i in range(most.bit_length()))
        took |= {size: size / run * took[run] for size in sizes if run < size <= most}
    costs = {size: (spent + BATCH_GAP) / size for size, spent in took.items()}
    rows = min(
        size for size, cost in costs.items() if cost <= BATCH_TOLERANCE * min(costs.values())
    )
    pace = took[rows] / rows
    row_seconds = max((took[rows] - took[1]) / (rows - 1), 1e-7) if rows > 1 else pace
    fixed = max(0.0, took[1] - row_seconds) + BATCH_OVERHEAD
    min_rows = min(rows, math.ceil(fixed / row_seconds / MAX_FIXED_COST_RATIO))
    loop_rows = max((size for size, spent in took.items() if spent <= MAX_LOOP_SECONDS), default=0)
    return Best(rows, min_rows, pace, min(rows, loop_rows), fixed, run if run < rows else 0)


def find_lane_count(
    runner: Runner,
    sample: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    rows: int,
    most: int,
    seconds: float,
) -> int:
    """Finds the number of concurrent runs with the most rows per second.

    The result is `most`, unless a smaller number is clearly faster.

    Args:
        runner: runs the graph.
        sample: inputs of at least one row.
        outputs: names of the outputs to compute.
        rows: rows per run.
        most: number of cores.
        seconds: approximate time to spend.
    """
    candidates = sorted({most, *(1 << i for i in range(most.bit_length()) if 1 << i < most)})
    if len(candidates) == 1:
        return most
    feeds = _repeat_rows(sample, rows)
    share, rates = seconds / (2 * len(candidates)), dict.fromkeys(candidates, 0.0)
    with ThreadPoolExecutor(most) as pool:

        def count(until: float) -> int:
            runs = 0
            while time.perf_counter() < until or not runs:
                runner.run(feeds, outputs)
                runs += 1
            return runs

        for _ in range(2):  # in two rounds, so that a disturbance affects only one of them
            for n in candidates:
                began = time.perf_counter()
                runs = sum(pool.map(count, [began + share] * n))
                rates[n] = max(rates[n], runs / (time.perf_counter() - began))
    return max(
        n for n in candidates if MIN_SPEEDUP_OF_FEWER_LANES * rates[n] >= max(rates.values())
    )


def is_faster_on_all_cores(
    wide: Runner,
    narrow: Runner,
    sample: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    seconds: float,
) -> bool:
    """Whether a run of one row on all cores is clearly faster than on one core.

    Args:
        wide: runs the graph on all cores.
        narrow: runs it on one core.
        sample: inputs of at least one row.
        outputs: names of the outputs to compute.
        seconds: approximate time to spend.
    """
    took, end = {wide: math.inf, narrow: math.inf}, time.perf_counter() + seconds
    for runner in took:
        _time_run(runner, sample, outputs, 1, time.perf_counter)  # excludes one-time setup
    sooner = False
    for turn in range(1, MAX_ROUNDS + 1):
        for runner in took:
            spent = _time_run(runner, sample, outputs, 1, time.perf_counter)
            took[runner] = min(took[runner], spent)
        sooner = MIN_SPEEDUP_OF_ALL_CORES * took[wide] <= took[narrow]
        if time.perf_counter() > end or (sooner and turn >= MAX_ROUNDS / 2):
            break
    return sooner


def _fastest_run_size(took: Mapping[int, float]) -> int:
    """The run size that takes the least time per row, or a larger one that is close."""
    least = min(spent / size for size, spent in took.items())
    return max(size for size, spent in took.items() if spent / size <= RUN_TOLERANCE * least)


def _time_run(
    runner: Runner,
    sample: Mapping[str, Array],
    outputs: Sequence[str],
    size: int,
    clock: Callable[[], float],
) -> float:
    feeds = _repeat_rows(sample, size)
    began = clock()
    runner.run(feeds, outputs)
    return max(clock() - began, 1e-7)


def _repeat_rows(sample: Mapping[str, Array], size: int) -> dict[str, Array]:
    """The sample's rows, repeated up to `size` rows."""
    return {
        name: np.take(rows, np.arange(size) % len(rows), axis=0) for name, rows in sample.items()
    }
