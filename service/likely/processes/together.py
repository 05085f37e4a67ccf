"""Metrics of several workers as those of one server: counters add up, across restarts too."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead


def count_as(index: int) -> None:
    """Lets this process write its metrics where `Together` reads them, as that worker.

    A worker that is begun anew under the same index goes on counting where the last one,
    however it ended, had come to.
    """
    values.ValueClass = values.MultiProcessValue(lambda: index)  # type: ignore[no-untyped-call]


class Together:
    """The metrics of all workers.

    Attributes:
        registry: what a scrape gives.
        environment: variables that a worker needs to write its metrics.
    """

    def __init__(self, folder: Path) -> None:
        """Metrics read from a folder that is private to this server."""
        self._folder = str(folder)
        self.environment = {"PROMETHEUS_MULTIPROC_DIR": self._folder}
        self.registry = CollectorRegistry()
        MultiProcessCollector(self.registry, self._folder)  # type: ignore[no-untyped-call]
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
        mark_process_dead(index, self._folder)  # type: ignore[no-untyped-call]
