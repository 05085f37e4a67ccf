"""Adds scores and p-values to the density graph's outputs, for a whole batch, in its lane."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from likely.answers import Doubles
from likely.batching.batches import Runner
from likely.bundle import Graph
from likely.graphs import Array, Stop
from likely.outliers import Detector

RANKED = "ranked"
_LOG_PX, _STATISTICS, _LABEL = "log_px", "statistics", "label"
_COLUMNS = 4


class Ranked:
    """Runs the density graph, and adds the output `ranked` to the graph's own outputs.

    `ranked` is float64 (n, 4): log p(x) in nats, bits per dimension, the score of how unusual the
    picture is, and its p-value with the marginal guarantee. Where a statistic is not finite, the
    score is NaN and the p-value has no meaning.

    Attributes:
        spec: the manifest's description of the graph.
        providers: the execution providers that run the graph.
    """

    def __init__(self, runner: Runner, detector: Detector, dimensions: int) -> None:
        """Wraps the runner of a density graph.

        Args:
            runner: runs the graph.
            detector: turns the graph's statistics into scores and p-values.
            dimensions: number of pixels of a picture times its channels.
        """
        self.spec: Graph = runner.spec
        self.providers = runner.providers
        self._runner = runner
        self._detector = detector
        self._log_px_per_bit = -math.log(2) * dimensions  # log p(x) at one bit per dimension

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        """The outputs with these names, in this order."""
        if RANKED not in outputs:
            return self._runner.run(feeds, outputs, stop)
        graph_outputs = self._graph_outputs(outputs)
        arrays = dict(zip(graph_outputs, self._runner.run(feeds, graph_outputs, stop), strict=True))
        arrays[RANKED] = self._ranked(arrays[_LOG_PX], arrays[_STATISTICS], arrays.get(_LABEL))
        return [arrays[name] for name in outputs]

    def empty(self, outputs: Sequence[str]) -> list[Array]:
        """The outputs of a run with no rows."""
        graph_outputs = self._graph_outputs(outputs)
        arrays = dict(zip(graph_outputs, self._runner.empty(graph_outputs), strict=True))
        arrays[RANKED] = np.empty((0, _COLUMNS))
        return [arrays[name] for name in outputs]

    def _ranked(self, log_px: Array, statistics: Array, label: Array | None) -> Doubles:
        table = np.empty((len(log_px), _COLUMNS))
        table[:, 0] = log_px
        table[:, 1] = table[:, 0] / self._log_px_per_bit
        table[:, 2] = self._score(statistics, label)
        table[:, 3] = self._detector.p_value(table[:, 2])
        return table

    def _score(self, statistics: Array, label: Array | None) -> Doubles:
        finite = np.isfinite(statistics).all(1)
        if finite.all():
            return self._detector.score(statistics, label)
        score = np.full(len(statistics), np.nan)
        known = None if label is None else label[finite]
        score[finite] = self._detector.score(statistics[finite], known)
        return score

    def _graph_outputs(self, outputs: Sequence[str]) -> tuple[str, ...]:
        """The outputs that the graph itself must give to compute these."""
        needed = [_LOG_PX, _STATISTICS, *(o.name for o in self.spec.outputs if o.name == _LABEL)]
        return tuple(dict.fromkeys([*(o for o in outputs if o != RANKED), *needed]))
