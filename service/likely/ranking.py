"""The density graph with its p-values: ranked for a whole batch at a time, in a lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from likely.bundle import Graph
from likely.graphs import Array, Session, Stop
from likely.outliers import Detector

P_VALUE, STATISTICS = "p_value", "statistics"


class Ranked:
    """Runs the density graph; has `p_value` beside the graph's own outputs.

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
        """The outputs of that name; the p-value is float64 (n,), NaN where a statistic is."""
        if P_VALUE not in outputs:
            return self._session.run(feeds, outputs, stop)
        own = _own(outputs)
        found = dict(zip(own, self._session.run(feeds, own, stop), strict=True))
        found[P_VALUE] = self._p_value(found[STATISTICS])
        return [found[name] for name in outputs]

    def empty(self, outputs: Sequence[str]) -> list[Array]:
        """The outputs of no rows."""
        own = _own(outputs)
        found = dict(zip(own, self._session.empty(own), strict=True)) | {P_VALUE: np.empty(0)}
        return [found[name] for name in outputs]

    def _p_value(self, statistics: Array) -> Array:
        finite = np.isfinite(statistics).all(1)
        if finite.all():
            return self._detector.p_value(statistics)
        p_value = np.full(len(statistics), np.nan)
        p_value[finite] = self._detector.p_value(statistics[finite])
        return p_value


def _own(outputs: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*(o for o in outputs if o != P_VALUE), STATISTICS)))
