"""Withholds a model's answers that are not finite, and counts them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from likely.batching import callers
from likely.batching.traffic import Traffic
from likely.errors import ServerFault, Unavailable
from likely.graphs import Array


def _do_nothing() -> None:
    """Does nothing: the default callback."""


class Trust:
    """Whether one model version can be trusted.

    Attributes:
        healthy: false once too many answers of one graph in a row were withheld.
        on_unhealthy: callback for the moment when that happens.
    """

    def __init__(self, name: str, withheld_limit: int, traffic: Traffic) -> None:
        """Starts with a healthy version.

        Args:
            name: the model's name.
            withheld_limit: number of answers of one graph, withheld in a row, after which the
                version is unhealthy; 0 for no limit.
            traffic: the metrics of withheld answers and unhealthy versions.
        """
        self.healthy = True
        self.on_unhealthy: Callable[[], None] = _do_nothing
        self._name = name
        self._withheld_limit = withheld_limit
        self._withheld = traffic.withheld.labels(name)
        self._unhealthy = traffic.unhealthy.labels(name)
        self._in_a_row: dict[str, int] = {}  # by graph: sound answers of others do not reset it

    def require(self) -> None:
        """Checks that the version is healthy.

        Raises:
            Unavailable: it is not; another server, or another version, may answer.
        """
        if not self.healthy:
            raise Unavailable(
                f"this version of model {self._name} gave {self._withheld_limit} answers in a row "
                "that were not finite, and no longer answers"
            )

    def check(self, graph: str, *arrays: Array) -> None:
        """Checks that all values of a graph's answer are finite.

        A withheld answer is not counted if the request will be repeated in parts, because each
        part is counted.

        Raises:
            ServerFault: a value is not finite, so the answer must not leave the service.
        """
        for values in arrays:
            if not np.isfinite(values).all():
                break
        else:
            if self._in_a_row:
                self._in_a_row.pop(graph, None)
            return
        if callers.current().counted:
            self._count_withheld(graph)
        raise ServerFault("the model gave a value that is not finite")

    def _count_withheld(self, graph: str) -> None:
        self._withheld.inc()
        in_a_row = self._in_a_row[graph] = self._in_a_row.get(graph, 0) + 1
        if self.healthy and self._withheld_limit and in_a_row >= self._withheld_limit:
            self.healthy = False
            self._unhealthy.inc()
            self.on_unhealthy()

    def end(self) -> None:
        """Stops counting the version as unhealthy, if it was."""
        if not self.healthy:
            self._unhealthy.dec()
