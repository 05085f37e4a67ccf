"""Runs a graph in portions: a large batch as several small runs, or all runs at one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from likely.batching.batches import Runner
from likely.graphs import Array, Stop, pad_rows, rows


class Portions:
    """Runs a graph on a limited number of rows at a time.

    Larger inputs are divided into several runs, one after another. The working set of a small run
    fits a core's own cache, where that of a whole batch may not.

    Optionally, smaller runs are padded, so that all runs have the same size. A runtime chooses its
    kernels, and with them the order of additions, by the size of a run. If that size never changes,
    the bits of a row's outputs do not depend on how many rows are computed with it.

    Attributes:
        spec: the manifest's description of the graph.
        providers: the execution providers that really run the graph.
    """

    def __init__(self, runner: Runner, size: int, *, fill: bool = False) -> None:
        """Wraps a runner.

        Args:
            runner: runs the graph.
            size: maximum number of rows per run.
            fill: whether to pad smaller runs to `size` rows.
        """
        self.spec = runner.spec
        self.providers = runner.providers
        self._runner = runner
        self._size = size
        self._fill = fill

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        """Returns the named outputs, each over all rows of the feeds."""
        parts = [
            self._run(
                {name: feed[at : at + self._size] for name, feed in feeds.items()}, outputs, stop
            )
            for at in range(0, rows(feeds), self._size)
        ]
        if not parts:
            return self.empty(outputs)
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]

    def empty(self, outputs: Sequence[str]) -> list[Array]:
        """Returns the named outputs for zero rows."""
        return self._runner.empty(outputs)

    def _run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None
    ) -> list[Array]:
        """Runs at most `size` rows, padded if asked for; the padding's outputs are cut off."""
        if not self._fill:
            return self._runner.run(feeds, outputs, stop)
        arrays = self._runner.run(pad_rows(feeds, self._size), outputs, stop)
        return [array[: rows(feeds)] for array in arrays]
