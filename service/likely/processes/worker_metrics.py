"""Combines the metrics of several workers; counters add up, across restarts too."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, values
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from likely.telemetry.metrics import READY, READY_MEANS

# Kinds of metrics to which only live workers count.
_LIVE_KINDS = ("gauge_livemax", "gauge_livesum")
# Bytes of a worker's metrics by kind, enough for eight models on which every method is called.
FILE_BYTES = {"counter": 1 << 19, "histogram": 5 << 18, **dict.fromkeys(_LIVE_KINDS, 1 << 17)}
MEBIBYTES = sum(FILE_BYTES.values()) >> 20  # per worker
_NOTHING = struct.pack("i", 0)  # header of a metrics file of which no bytes are used


def write_metrics_as(index: int) -> None:
    """Makes this process write its metrics as the worker with that index, for `WorkerMetrics`.

    A worker that is restarted under the same index continues from its predecessor's counts,
    however that one ended.
    """
    values.ValueClass = values.MultiProcessValue(lambda: index)  # type: ignore[no-untyped-call]


class WorkerMetrics:
    """The combined metrics of all workers.

    Workers map their metrics files into memory, and a process that writes to such a file while
    the disk is full is killed. The files are therefore written in full size before any worker
    starts.

    Attributes:
        registry: the metrics that a scrape returns.
        environment: environment variables that a worker needs to write its metrics.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        """Creates the metrics files.

        Args:
            folder: an empty folder, private to this server.
            workers: number of workers that should run.

        Raises:
            OSError: the folder cannot be written, or has not enough space.
        """
        self._folder = folder
        for index in range(workers):
            for kind, nbytes in FILE_BYTES.items():
                self._path(kind, index).write_bytes(bytes(nbytes))
        self.environment = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
        self.registry = CollectorRegistry()
        self.registry.register(_WorkersCollector(folder))
        wanted = Gauge("likely_workers_wanted", "Workers that should run.", registry=self.registry)
        wanted.set(workers)
        self._workers = Gauge(
            "likely_workers", "Workers that accept requests.", registry=self.registry
        )
        self._restarts = Counter(
            "likely_worker_restarts", "Workers restarted after they died.", registry=self.registry
        )

    def set_ready(self, count: int) -> None:
        """Sets the number of workers that accept requests."""
        self._workers.set(count)

    def count_restart(self) -> None:
        """Counts the restart of a worker that died."""
        self._restarts.inc()

    def clear_live_gauges(self, index: int) -> None:
        """Clears the live gauges of a worker that has ended; its counters stay."""
        for kind in _LIVE_KINDS:
            with self._path(kind, index).open("r+b") as file:
                file.write(_NOTHING)  # the file keeps its size

    def _path(self, kind: str, index: int) -> Path:
        return self._folder / f"{kind}_{index}.db"


class _WorkersCollector(MultiProcessCollector):
    """Collects the workers' metrics, and reports not ready if no worker reports readiness."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None, str(folder))  # type: ignore[no-untyped-call]

    def collect(self) -> Iterator[Metric]:
        metrics: Any = super().collect()  # type: ignore[no-untyped-call]
        names = set()
        for metric in metrics:
            names.add(metric.name)
            yield metric
        if READY not in names:
            yield GaugeMetricFamily(READY, READY_MEANS, value=0)
