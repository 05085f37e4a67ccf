"""Adds p-values to the density graph's outputs, for a whole batch at once, in the lane's thread."""

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
    """Runs the density graph; has `ranked` beside the graph's own outputs.

    That is float64 (n, 4): log p(x) in nats, bits a dimension, how unusual the picture is, and
    its p-value with the marginal guarantee. Where a statistic is not finite, the third is NaN
    and the fourth means nothing.

    Attributes:
        spec: what the manifest says of the graph.
        providers: what really runs it.
    """

    def __init__(self, runner: Runner, detector: Detector, dimensions: int) -> None:
        """A ranked density graph.

        Args:
            runner: runs the graph.
            detector: turns its statistics into scores and p-values.
            dimensions: of a picture: pixels times channels.
        """
        self.spec: Graph = runner.spec
        self.providers = runner.providers
        self._runner = runner
        self._detector = detector
        self._bit = -math.log(2) * dimensions  # what a bit a dimension is in log p(x)

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        """The outputs of that name."""
        if RANKED not in outputs:
            return self._runner.run(feeds, outputs, stop)
        own = self._own(outputs)
        found = dict(zip(own, self._runner.run(feeds, own, stop), strict=True))
        found[RANKED] = self._ranked(found[_LOG_PX], found[_STATISTICS], found.get(_LABEL))
        return [found[name] for name in outputs]

    def empty(self, outputs: Sequence[str]) -> list[Array]:
        """The outputs of no rows."""
        own = self._own(outputs)
        found = dict(zip(own, self._runner.empty(own), strict=True))
        found[RANKED] = np.empty((0, _COLUMNS))
        return [found[name] for name in outputs]

    def _ranked(self, log_px: Array, statistics: Array, label: Array | None) -> Doubles:
        table = np.empty((len(log_px), _COLUMNS))
        table[:, 0] = log_px
        table[:, 1] = table[:, 0] / self._bit
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

    def _own(self, outputs: Sequence[str]) -> tuple[str, ...]:
        """What the graph itself must give for these outputs."""
        needed = [_LOG_PX, _STATISTICS, *(o.name for o in self.spec.outputs if o.name == _LABEL)]
        return tuple(dict.fromkeys([*(o for o in outputs if o != RANKED), *needed]))
