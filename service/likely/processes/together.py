"""Metrics of several workers as those of one server: counters add up, across restarts too."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, values
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from likely.telemetry.metrics import READY, READY_MEANS

_LIVING = ("gauge_livemax", "gauge_livesum")  # told by those that live
# Bytes of a worker's metrics, by their kind: those of eight models that are asked everything.
ROOM = {"counter": 1 << 19, "histogram": 5 << 18, **dict.fromkeys(_LIVING, 1 << 17)}
MEBIBYTES = sum(ROOM.values()) >> 20  # of a worker
_NOTHING = struct.pack("i", 0)  # how a file begins of which nothing is used


def count_as(index: int) -> None:
    """Lets this process write its metrics where `Together` reads them, as that worker.

    A worker that is begun anew under the same index goes on counting where the last one,
    however it ended, had come to.
    """
    values.ValueClass = values.MultiProcessValue(lambda: index)  # type: ignore[no-untyped-call]


class Together:
    """The metrics of all workers.

    Their files are mapped into memory, and a process that writes where the disk has no room left
    is killed for it: so they have their room before a worker begins.

    Attributes:
        registry: what a scrape gives.
        environment: variables that a worker needs to write its metrics.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        """Metrics read from a folder that is private to this server.

        Args:
            folder: empty.
            workers: how many there shall be.

        Raises:
            OSError: the folder has no room.
        """
        self._folder = folder
        for index in range(workers):
            for kind, room in ROOM.items():
                self._path(kind, index).write_bytes(bytes(room))
        self.environment = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
        self.registry = CollectorRegistry()
        self.registry.register(_Workers(folder))
        wanted = Gauge(
            "likely_workers_wanted", "Workers that there shall be.", registry=self.registry
        )
        wanted.set(workers)
        self._workers = Gauge(
            "likely_workers", "Workers that take requests.", registry=self.registry
        )
        self._restarts = Counter(
            "likely_worker_restarts", "Workers begun anew after a death.", registry=self.registry
        )

    def ready(self, count: int) -> None:
        """So many workers take requests."""
        self._workers.set(count)

    def restarted(self) -> None:
        """A worker has died and is begun anew."""
        self._restarts.inc()

    def ended(self, index: int) -> None:
        """That worker runs no more: what it counted stays, what was in flight is gone."""
        for kind in _LIVING:
            with self._path(kind, index).open("r+b") as file:
                file.write(_NOTHING)  # and keeps its room

    def _path(self, kind: str, index: int) -> Path:
        return self._folder / f"{kind}_{index}.db"


class _Workers(MultiProcessCollector):
    """What the workers wrote; the server is not ready where none of them lives to say so."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None, str(folder))  # type: ignore[no-untyped-call]

    def collect(self) -> Iterator[Metric]:
        told: Any = super().collect()  # type: ignore[no-untyped-call]
        names = set()
        for metric in told:
            names.add(metric.name)
            yield metric
        if READY not in names:
            yield GaugeMetricFamily(READY, READY_MEANS, value=0)
