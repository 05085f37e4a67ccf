"""Runs of few rows one after another, or of one size, whatever is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from likely.batching.batches import Runner
from likely.graphs import Array, Stop, filled, rows


class Portions:
    """Runs a graph on so many rows at most: more are divided, and fewer filled up where asked.

    What a run of few rows works on stays in a core's own cache, where that of a whole batch does
    not. And a runtime chooses its kernels, and with them the order in which they add, by the size
    of a run: where that is always the same, a row's bits do not depend on how many came with it.

    Attributes:
        spec: what the manifest says of the graph.
        providers: what really runs it.
    """

    def __init__(self, runner: Runner, size: int, *, fill: bool = False) -> None:
        """The same graph in runs of that size.

        Args:
            runner: runs the graph.
            size: rows of a run, at most.
            fill: whether runs of fewer are filled up to it.
        """
        self.spec = runner.spec
        self.providers = runner.providers
        self._runner = runner
        self._size = size
        self._fill = fill

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        """The outputs of that name."""
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
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    def empty(self, outputs: Sequence[str]) -> list[Array]:
        """The outputs of no rows."""
        return self._runner.empty(outputs)

    def _run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None
    ) -> list[Array]:
        """One run."""
        if not self._fill:
            return self._runner.run(feeds, outputs, stop)
        found = self._runner.run(filled(feeds, self._size), outputs, stop)
        return [array[: rows(feeds)] for array in found]
