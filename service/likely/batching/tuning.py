"""What suits this model on this machine: found by running it, not guessed."""

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

HOP = 1e-4  # seconds that a batch costs beside its run: to a lane and back, apart and together
BETWEEN = 2e-3  # seconds that are lost from batch to batch while all cores are busy
AT_ONCE = 1e-3  # seconds that a run may hold the event loop up
SLOWER = 1.05  # times the least cost a row: up to it larger runs are preferred, being fewer
NEAR = 1.05  # a small batch this near to the fastest one is better: it holds up less
FEWER = 1.1  # lanes are fewer than cores only where that is faster by so much
SPARE = 0.25  # a batch is large enough once a run's fixed cost is this share of its rows' cost
SOONER = 1.25  # times as fast as one core, all cores have to run a single row
TURNS = 8  # of trying both, at most


@dataclass(frozen=True, slots=True)
class Best:
    """How a graph runs best.

    Attributes:
        rows: of a batch, at most.
        grain: the fewest rows that are worth a run of their own while others come or run.
        pace: seconds a row, in a full batch.
        at_once: the most rows that are run where they came, on the event loop: the way to a
            lane and back would take longer.
        fixed: seconds that a run costs whatever its rows.
        run: rows of each run, where a batch is sooner done in several; 0 where in one.
        wide: runs what has all lanes to itself, on all cores; None where that is not sooner.
    """

    rows: int
    grain: int = 1
    pace: float = 0.0
    at_once: int = 0
    fixed: float = 0.0
    run: int = 0
    wide: Runner | None = None

    def told(self) -> dict[str, object]:
        """What a log says of it."""
        pace = float(f"{1000 * self.pace:.3g}")
        return {
            "rows": self.rows,
            "rows_a_run": self.run or self.rows,
            "ms_a_row": pace,
            "alone_on_all_cores": self.wide is not None,
        }


def batch(
    runner: Runner,
    sample: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    most: int,
    step: int,
    seconds: float,
    growth: float | None = None,
) -> Best:
    """The batch size that gives most rows a second, or a smaller one that is near; in which runs.

    Args:
        runner: what runs the graph.
        sample: inputs of at least one row.
        outputs: what is asked for.
        most: the largest size that is tried.
        step: each size is so many times the one before.
        seconds: to spend on timed runs; the one in hand is finished, and a size too slow, or
            too large for the memory there is, ends the search.
        growth: how many times as long the next size is expected to take; `step` by default.

    Raises:
        OutOfMemory: there is no memory for a single row.
    """
    on_card = runner.providers[0] != CPU
    # A run on the processor is its thread's own: what others take of the core is not counted.
    clock = time.perf_counter if on_card else time.thread_time
    end = clock() + seconds
    took: dict[int, float] = {}
    size = 1
    while True:
        try:
            if on_card or size == 1:
                # What is built once is no row's: at the first run, and on a card for each size.
                end += _timed(runner, sample, outputs, size, clock)
            took[size] = _timed(runner, sample, outputs, size, clock)
        except OutOfMemory:
            if not took:
                raise
            break
        if size == most or clock() + (growth or step) * took[size] > end:
            break
        size = min(size * step, most)
    # A core's times are disturbed, and the first of a size grows memory: the fastest counts, of
    # all sizes or of none, as a size that was run again looks quicker beside the others.
    while not on_card and clock() + sum(took.values()) < end:
        for size in took:
            took[size] = min(took[size], _timed(runner, sample, outputs, size, clock))
    run = max(took) if on_card else _quickest(took)
    if not on_card:  # in runs of that size, whatever more is asked for takes as long a row
        sizes = (step**i for i in range(most.bit_length()))
        took |= {size: size / run * took[run] for size in sizes if run < size <= most}
    costs = {size: (spent + BETWEEN) / size for size, spent in took.items()}
    rows = min(size for size, cost in costs.items() if cost <= NEAR * min(costs.values()))
    pace = took[rows] / rows
    each = max((took[rows] - took[1]) / (rows - 1), 1e-7) if rows > 1 else pace
    fixed = max(0.0, took[1] - each) + HOP
    grain = min(rows, math.ceil(fixed / each / SPARE))
    at_once = max((size for size, spent in took.items() if spent <= AT_ONCE), default=0)
    return Best(rows, grain, pace, min(rows, at_once), fixed, run if run < rows else 0)


def lanes(
    runner: Runner,
    sample: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    rows: int,
    most: int,
    seconds: float,
) -> int:
    """How many runs at once give most rows a second: `most`, unless fewer are clearly better.

    Args:
        runner: what runs the graph.
        sample: inputs of at least one row.
        outputs: what is asked for.
        rows: of each run.
        most: cores that there are.
        seconds: to spend, about.
    """
    candidates = sorted({most, *(1 << i for i in range(most.bit_length()) if 1 << i < most)})
    if len(candidates) == 1:
        return most
    feeds = _repeated(sample, rows)
    share, rates = seconds / (2 * len(candidates)), dict.fromkeys(candidates, 0.0)
    with ThreadPoolExecutor(most) as pool:

        def count(until: float) -> int:
            runs = 0
            while time.perf_counter() < until or not runs:
                runner.run(feeds, outputs)
                runs += 1
            return runs

        for _ in range(2):  # twice, in turns: a disturbance then hits one round only
            for n in candidates:
                began = time.perf_counter()
                runs = sum(pool.map(count, [began + share] * n))
                rates[n] = max(rates[n], runs / (time.perf_counter() - began))
    return max(n for n in candidates if FEWER * rates[n] >= max(rates.values()))


def is_sooner(
    wide: Runner,
    narrow: Runner,
    sample: Mapping[str, Array],
    outputs: Sequence[str],
    *,
    seconds: float,
) -> bool:
    """Whether one row's run on all cores is clearly sooner done than that on one.

    Args:
        wide: runs the graph on all cores.
        narrow: runs it on one.
        sample: inputs of at least one row.
        outputs: what is asked for.
        seconds: to spend, about.
    """
    took, end = {wide: math.inf, narrow: math.inf}, time.perf_counter() + seconds
    for runner in took:
        _timed(runner, sample, outputs, 1, time.perf_counter)  # what is built once is no row's
    sooner = False
    for turn in range(1, TURNS + 1):
        for runner in took:
            spent = _timed(runner, sample, outputs, 1, time.perf_counter)
            took[runner] = min(took[runner], spent)
        sooner = SOONER * took[wide] <= took[narrow]
        if time.perf_counter() > end or (sooner and turn >= TURNS / 2):
            break
    return sooner


def _quickest(took: Mapping[int, float]) -> int:
    """The size of run that takes least a row, or a larger one that is near."""
    least = min(spent / size for size, spent in took.items())
    return max(size for size, spent in took.items() if spent / size <= SLOWER * least)


def _timed(
    runner: Runner,
    sample: Mapping[str, Array],
    outputs: Sequence[str],
    size: int,
    clock: Callable[[], float],
) -> float:
    feeds = _repeated(sample, size)
    began = clock()
    runner.run(feeds, outputs)
    return max(clock() - began, 1e-7)


def _repeated(sample: Mapping[str, Array], size: int) -> dict[str, Array]:
    """The sample's rows over and over, so many of them."""
    return {
        name: np.take(rows, np.arange(size) % len(rows), axis=0) for name, rows in sample.items()
    }
