"""Runs of one size, whatever is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from likely.batching.batches import Runner
from likely.graphs import Array, Stop, filled, rows


class Filled:
    """Runs a graph on so many rows always: fewer are filled up, more are divided.

    A runtime chooses its kernels, and with them the order in which they add, by the size of a
    run. Where that is always the same, a row's bits do not depend on how many came with it.

    Attributes:
        spec: what the manifest says of the graph.
        providers: what really runs it.
    """

    def __init__(self, runner: Runner, size: int) -> None:
        """The same graph in runs of one size.

        Args:
            runner: runs the graph.
            size: rows of every run.
        """
        self.spec = runner.spec
        self.providers = runner.providers
        self._runner = runner
        self._size = size

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        """The outputs of that name."""
        count, parts = rows(feeds), []
        for start in range(0, count, self._size):
            part = {name: feed[start : start + self._size] for name, feed in feeds.items()}
            found = self._runner.run(filled(part, self._size), outputs, stop)
            parts.append([array[: count - start] for array in found])
        if not parts:
            return self.empty(outputs)
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    def empty(self, outputs: Sequence[str]) -> list[Array]:
        """The outputs of no rows."""
        return self._runner.empty(outputs)
