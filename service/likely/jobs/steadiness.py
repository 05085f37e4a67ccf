"""Whether a picture's answers depend on the pictures that were run beside it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from likely.answers import Pixels
from likely.client.plans import joined

if TYPE_CHECKING:
    from likely.engine import Engine

ROWS = 17  # more than what kernels take at once, and no multiple of it
SIZES = (1, 3, ROWS)


def steady(engine: Engine, x: Pixels) -> bool:
    """Whether an engine gives each picture the same bits in batches of different sizes.

    The graphs that `likely-export` writes do; others may add up in another order, where a
    batch has another size.

    Args:
        engine: idle.
        x: uint8 (n, c, h, w), at least one picture.
    """
    rows = np.resize(x, (ROWS, *x.shape[1:]))
    found = [asyncio.run(_answers(engine, rows, size)) for size in SIZES]
    return all(
        np.array_equal(each, other)
        for others in found[1:]
        for each, other in zip(found[0], others, strict=True)
    )


async def _answers(engine: Engine, x: Pixels, size: int) -> list[npt.NDArray[Any]]:
    parts = [x[at : at + size] for at in range(0, len(x), size)]
    scores = joined([(await engine.score(part, 0.5)).scores() for part in parts])
    found: list[npt.NDArray[Any]] = [scores.log_px, scores.unusualness]
    if engine.answers("Classify"):
        labels = joined([await engine.classify(part, 0.5) for part in parts])
        found += [labels.log_pxy, labels.posterior]
    return found
