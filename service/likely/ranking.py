"""The density graph with its scores: combined for a whole batch at a time, in a lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from likely.bundle import Graph
from likely.graphs import Array, Session, Stop
from likely.outliers import Detector

UNUSUALNESS, STATISTICS, LABEL = "unusualness", "statistics", "label"


class Ranked:
    """Runs the density graph; has `unusualness` beside the graph's own outputs.

    Attributes:
        spec: what the manifest says of the graph.
        providers: what really runs it.
    """

    def __init__(self, session: Session, detector: Detector) -> None:
        self.spec: Graph = session.spec
        self.providers = session.providers
        self._session = session
        self._detector = detector

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        """The outputs of that name; unusualness is float64 (n,), NaN where a statistic is."""
        if UNUSUALNESS not in outputs:
            return self._session.run(feeds, outputs, stop)
        own = self._own(outputs)
        found = dict(zip(own, self._session.run(feeds, own, stop), strict=True))
        found[UNUSUALNESS] = self._score(found[STATISTICS], found.get(LABEL))
        return [found[name] for name in outputs]

    def empty(self, outputs: Sequence[str]) -> list[Array]:
        """The outputs of no rows."""
        own = self._own(outputs)
        found = dict(zip(own, self._session.empty(own), strict=True))
        found[UNUSUALNESS] = np.empty(0)
        return [found[name] for name in outputs]

    def _score(self, statistics: Array, label: Array | None) -> Array:
        finite = np.isfinite(statistics).all(1)
        if finite.all():
            return self._detector.score(statistics, label)
        score = np.full(len(statistics), np.nan)
        known = None if label is None else label[finite]
        score[finite] = self._detector.score(statistics[finite], known)
        return score

    def _own(self, outputs: Sequence[str]) -> tuple[str, ...]:
        """What the graph itself must give for these outputs."""
        needed = [STATISTICS, *(spec.name for spec in self.spec.outputs if spec.name == LABEL)]
        return tuple(dict.fromkeys([*(o for o in outputs if o != UNUSUALNESS), *needed]))
