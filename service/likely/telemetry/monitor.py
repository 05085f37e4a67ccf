"""Metrics and drift tests of scored pictures, which are collected and processed in batches."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge

from likely.answers import Doubles
from likely.drift import Martingale, Reference
from likely.telemetry.histograms import BulkHistogram

if TYPE_CHECKING:
    from likely.engine import Engine

K = TypeVar("K", bound=tuple[str, ...])
METHODS = ("Score", "Classify")  # tested separately: some callers send the same pictures to both
KEPT = 16  # the metrics of this many versions remain after they were unloaded
PERIOD = 0.2  # seconds for which pictures are collected
NATS = (10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000, 3000, 5000, 7000,
        10000)  # fmt: skip
NATS_PER_DIMENSION = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 1.2, 1.4, 1.6, 1.8, 2, 2.25, 2.5, 2.75, 3,
                      3.5, 4, 4.5, 5, 5.5)  # fmt: skip
P_VALUES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9,
            0.95, 0.98, 0.99, 0.995, 1)  # fmt: skip


class Families:
    """The metrics of scored pictures, for all versions.

    Attributes:
        nats: histogram of -log p(x) in nats, by model and version.
        per_dimension: histogram of -log p(x) in nats per pixel and channel, by model and version.
        p_values: histogram of the returned p-values, by model and version.
        pictures: counter of pictures that the drift test has used, by model, version and method.
        logs: gauge of log10 of the martingale, by model, version and method.
        alarms: gauge that is 1 once the martingale has reached the threshold, by model, version
            and method.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        model = ("model", "version")
        stream = (*model, "method")
        self.nats = BulkHistogram(
            "likely_negative_log_likelihood_nats",
            "-log p(x) of pictures scored or classified, in nats.",
            model,
            buckets=NATS,
            registry=registry,
        )
        self.per_dimension = BulkHistogram(
            "likely_negative_log_likelihood_nats_per_dimension",
            "-log p(x) of pictures scored or classified, in nats per pixel and channel.",
            model,
            buckets=NATS_PER_DIMENSION,
            registry=registry,
        )
        self.p_values = BulkHistogram(
            "likely_p_value",
            "Calibrated p-values of pictures scored or classified.",
            model,
            buckets=P_VALUES,
            registry=registry,
        )
        self.pictures = Counter(
            "likely_drift_images",
            "Pictures that the drift test has used, by model, version and method.",
            stream,
            registry=registry,
        )
        self.logs = Gauge(
            "likely_drift_log10_martingale",
            "log10 of the drift test's martingale; the maximum over workers.",
            stream,
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.alarms = Gauge(
            "likely_drift_alarm",
            "1 once the martingale has reached the threshold, until the drift test is restarted.",
            stream,
            multiprocess_mode="livemax",
            registry=registry,
        )

    def remove(self, model: str, version: str) -> None:
        """Removes the metrics of a version."""
        for family in (self.nats, self.per_dimension, self.p_values):
            family.remove(model, version)
        for method in METHODS:
            for stream in (self.pictures, self.logs, self.alarms):
                stream.remove(model, version, method)


class UnloadedVersions(Generic[K]):
    """Label values of versions that were unloaded; the metrics of old ones are removed."""

    def __init__(self, workers: int) -> None:
        """No versions yet.

        Args:
            workers: number of processes; prometheus_client removes no labels if there are several.
        """
        self._kept = KEPT if workers == 1 else math.inf
        self._since: dict[K, None] = {}  # ordered by when they were unloaded

    def pop_expired(self, unloaded: Iterable[K], served: Iterable[K]) -> list[K]:
        """Returns the versions whose metrics are to be removed, and forgets these.

        Args:
            unloaded: versions that are no longer served since the last call.
            served: versions that are served now.
        """
        self._since |= dict.fromkeys(unloaded)
        for labels in served:
            self._since.pop(labels, None)
        excess = max(0, len(self._since) - self._kept)
        expired = [labels for at, labels in enumerate(self._since) if at < excess]
        for labels in expired:
            del self._since[labels]
        return expired


class Monitor:
    """Records the scores of one process, and tests whether they drift.

    Use it only in the thread of the event loop. Label values are bounded: models and versions
    are those served.

    Attributes:
        threshold: log10 of the martingale that raises the alarm; inf without a test.
    """

    def __init__(self, registry: CollectorRegistry, level: float = 0.0, workers: int = 1) -> None:
        """A monitor.

        Args:
            registry: the registry of its metrics.
            level: the accepted probability that a served version ever raises a false alarm;
                0 for no test.
            workers: number of worker processes that share the level.
        """
        self.threshold = math.log10(workers * len(METHODS) / level) if level else math.inf
        self._families = Families(registry)
        Gauge(
            "likely_drift_log10_threshold",
            "log10 of the martingale that raises the drift alarm; +Inf without a test.",
            multiprocess_mode="livemax",
            registry=registry,
        ).set(self.threshold)
        self._watched: dict[Engine, _VersionMonitor] = {}
        self._unloaded = UnloadedVersions[tuple[str, str]](workers)
        self._timer: asyncio.TimerHandle | None = None

    def set_served(self, engines: Iterable[Engine]) -> None:
        """These models, and no others, are monitored from now on."""
        self.flush()
        served = [engine for engine in engines if engine.answers("Score")]
        gone = [engine for engine in self._watched if engine not in served]
        for engine in gone:
            self._watched.pop(engine).end()
        for engine in served:
            if engine not in self._watched:
                self._watched[engine] = _VersionMonitor(self._families, engine, self.threshold)
        for labels in self._unloaded.pop_expired(map(_labels_of, gone), map(_labels_of, served)):
            self._families.remove(*labels)

    def collect(self, engine: Engine, method: str, rows: Doubles) -> None:
        """Pictures have been scored by one of `METHODS`; called in the event loop.

        Args:
            engine: the engine that scored them.
            method: the method.
            rows: the rows of the `ScoreTable`, float64 (n, 4).
        """
        watched = self._watched.get(engine)
        if watched is None:
            return  # being unloaded: no longer monitored
        watched.gathered[method].append(rows)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PERIOD, self.flush)

    def flush(self) -> None:
        """Processes the pictures that were collected."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        for watched in self._watched.values():
            watched.flush()

    def reset(self, engine: Engine) -> None:
        """Restarts the drift tests of a version."""
        self.flush()
        if engine in self._watched:
            self._watched[engine].begin()


class _VersionMonitor:
    """The metrics and tests of one served version.

    Attributes:
        gathered: by method, the rows of `ScoreTable`s that are not processed yet.
    """

    def __init__(self, families: Families, engine: Engine, threshold: float) -> None:
        labels = _labels_of(engine)
        self.gathered: dict[str, list[Doubles]] = {method: [] for method in METHODS}
        self._dimensions = engine.manifest.dimensions
        self._threshold = threshold
        self._nats = families.nats.labels(*labels)
        self._per_dimension = families.per_dimension.labels(*labels)
        self._p_values = families.p_values.labels(*labels)
        self._pictures = {m: families.pictures.labels(*labels, m) for m in METHODS}
        self._logs = {m: families.logs.labels(*labels, m) for m in METHODS}
        self._alarms = {m: families.alarms.labels(*labels, m) for m in METHODS}
        self._reference = Reference(engine.detector.scores)
        self._tests: dict[str, Martingale] = {}
        self.begin()

    def begin(self) -> None:
        """Restarts the tests."""
        if math.isfinite(self._threshold):
            self._tests = {method: Martingale(self._reference) for method in METHODS}
        self.end()

    def end(self) -> None:
        """Resets the gauges, so that no alarm remains."""
        for gauge in (*self._logs.values(), *self._alarms.values()):
            gauge.set(0)

    def flush(self) -> None:
        for method, gathered in self.gathered.items():
            if not gathered:
                continue
            self.gathered[method] = []
            log_px, _, unusualness, p_value = np.ascontiguousarray(np.concatenate(gathered).T)
            self._nats.observe_all(-log_px)
            self._per_dimension.observe_all(-log_px / self._dimensions)
            self._p_values.observe_all(p_value)
            if method in self._tests:
                self._update_test(method, unusualness)

    def _update_test(self, method: str, unusualness: Doubles) -> None:
        test = self._tests[method]
        test.bet(unusualness)
        self._pictures[method].inc(len(unusualness))
        self._logs[method].set(test.log / math.log(10))
        self._alarms[method].set(float(test.highest >= self._threshold * math.log(10)))


def _labels_of(engine: Engine) -> tuple[str, str]:
    return engine.manifest.name, engine.manifest.version
