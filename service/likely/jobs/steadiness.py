"""Tests whether a picture's answers depend on the other pictures of the same run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from likely.answers import Pixels, joined

if TYPE_CHECKING:
    from likely.engine import Engine

ROWS = 17  # more than kernels process at once, and not a multiple of that
SIZES = (1, 3, ROWS)


def batch_invariant(engine: Engine, x: Pixels, filled: int = 0) -> bool:
    """Whether an engine gives each picture the same bits in any run.

    On a processor, the graphs that `likely-export` writes do. Other graphs may add in another
    order if a batch has another size. If all runs have the same size, only a picture's position
    and the other pictures of the run can matter.

    Args:
        engine: the engine, idle.
        x: uint8 (n, c, h, w), at least one picture.
        filled: number of rows that every run is padded to; 0 if runs are not padded.
    """
    rows = np.resize(x, (max(ROWS, filled), *x.shape[1:]))
    every, backwards, few = slice(None), slice(None, None, -1), slice(3)
    tries = [(every, size) for size in SIZES]
    if filled:  # fewer single pictures: each costs a whole run
        tries = [(every, len(rows)), (backwards, len(rows)), (every, ROWS), (few, 1)]
    whole, *others = (
        (which, asyncio.run(_answers(engine, rows[which], size))) for which, size in tries
    )
    return all(
        np.array_equal(expected[which], other)
        for which, answers in others
        for expected, other in zip(whole[1], answers, strict=True)
    )


async def _answers(engine: Engine, x: Pixels, size: int) -> list[npt.NDArray[Any]]:
    parts = [x[at : at + size] for at in range(0, len(x), size)]
    scores = joined([(await engine.score(part, 0.5)).scores() for part in parts])
    arrays: list[npt.NDArray[Any]] = [scores.log_px, scores.unusualness]
    if engine.answers("Classify"):
        labels = joined([await engine.classify(part, 0.5) for part in parts])
        arrays += [labels.log_pxy, labels.posterior]
    return arrays
