"""Whether a model's answers may leave: what is not finite stays here and is counted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from likely.batching import callers
from likely.batching.traffic import Traffic
from likely.errors import ServerFault, Unavailable
from likely.graphs import Array


def _nobody() -> None:
    """Nobody has to be told."""


class Trust:
    """How far one model version can be believed.

    Attributes:
        healthy: false once so many answers in a row of one graph had to be withheld.
        lost: called when that happens.
    """

    def __init__(self, name: str, patience: int, traffic: Traffic) -> None:
        """Full trust.

        Args:
            name: of the model.
            patience: answers withheld in a row of one graph, until the version is unhealthy;
                0 for any number.
            traffic: is told of them.
        """
        self.healthy = True
        self.lost: Callable[[], None] = _nobody
        self._name = name
        self._patience = patience
        self._withheld = traffic.withheld.labels(name)
        self._unhealthy = traffic.unhealthy.labels(name)
        self._in_a_row: dict[str, int] = {}  # by graph: where others are well, it is still ill

    def require(self) -> None:
        """Returns while the version is healthy.

        Raises:
            Unavailable: it is not: another server, or another version, may answer.
        """
        if not self.healthy:
            raise Unavailable(
                f"this version of model {self._name} gave {self._patience} answers in a row "
                "that were not finite, and answers no more"
            )

    def check(self, graph: str, *arrays: Array) -> None:
        """Returns if all values of a graph's answer are finite.

        What is asked again in parts is not counted: each of them is.

        Raises:
            ServerFault: one is not; it must not leave the service.
        """
        for values in arrays:
            if not np.isfinite(values).all():
                break
        else:
            if self._in_a_row:
                self._in_a_row.pop(graph, None)
            return
        if callers.current().counted:
            self._count(graph)
        raise ServerFault("the model gave a value that is not finite")

    def _count(self, graph: str) -> None:
        self._withheld.inc()
        in_a_row = self._in_a_row[graph] = self._in_a_row.get(graph, 0) + 1
        if self.healthy and self._patience and in_a_row >= self._patience:
            self.healthy = False
            self._unhealthy.inc()
            self.lost()

    def end(self) -> None:
        """Is not counted any more, where it was unhealthy."""
        if not self.healthy:
            self._unhealthy.dec()
