"""The metrics of requests, times, pictures, verdicts and served models, and their exporter."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)

from likely import machine
from likely.answers import Verdict
from likely.batching.traffic import FAILED, SHED, Traffic
from likely.errors import SettingsError
from likely.telemetry.monitor import Monitor, UnloadedVersions

if TYPE_CHECKING:
    from likely.engine import Engine

M = TypeVar("M", Counter, Gauge, Histogram)
INFERRING = ("ModelInfer", "ModelStreamInfer")  # answered by every model
METHODS = (
    "Score", "ScoreStream", "Classify", "ClassifyStream", "Encode", "Generate", "Complete",
    "Decode", "Traverse", "Interpolate", *INFERRING,
)  # fmt: skip
STREAMS = ("ScoreStream", "ClassifyStream", "ModelStreamInfer")
JUDGING = ("Score", "Classify")
CODES = ("OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL")
READY = "likely_ready"
READY_MEANS = "1 while requests are accepted, as health reports; the maximum over workers."
_VERDICTS = {int(verdict): verdict.name.lower() for verdict in Verdict}
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class CachedChildren(dict[tuple[str, ...], M]):
    """Caches a metric's children by label values: `labels` is too slow to call per request."""

    def __init__(self, metric: M) -> None:
        super().__init__()
        self._metric: M = metric

    def __missing__(self, labels: tuple[str, ...]) -> M:
        child: M = self._metric.labels(*labels)
        self[labels] = child
        return child


class Metrics:
    """The metrics of one server, in a registry of their own.

    Label values are bounded: methods are those of the contract, models those served.

    Attributes:
        registry: the registry of all these metrics.
        traffic: the metrics of queues and batches.
        monitor: the metrics of scored pictures.
    """

    def __init__(self, drift_level: float = 0.0, workers: int = 1) -> None:
        """Metrics that start at 0.

        Args:
            drift_level: accepted probability of a false drift alarm; 0 for no test.
            workers: number of worker processes.
        """
        # Help texts are short, as the metrics files of several workers repeat them in every series.
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.traffic = Traffic(self.registry)
        self.monitor = Monitor(self.registry, drift_level, workers)
        counter = partial(Counter, registry=self.registry)
        # With several workers, a scrape returns the largest value.
        gauge = partial(Gauge, multiprocess_mode="livemax", registry=self.registry)
        self._requests = CachedChildren(
            counter("likely_requests", "Requests answered.", ("method", "model", "code"))
        )
        self._seconds = CachedChildren(
            Histogram(
                "likely_request_seconds",
                "Seconds from arrival to the end of the answer.",
                ("method", "model"),
                buckets=SECONDS,
                registry=self.registry,
            )
        )
        self._running = CachedChildren(
            Gauge(
                "likely_requests_in_flight",
                "Requests being answered now, by method.",
                ("method",),
                multiprocess_mode="livesum",
                registry=self.registry,
            )
        )
        self._messages = CachedChildren(
            counter(
                "likely_stream_messages",
                "Stream messages answered.",
                ("method", "model", "code"),
            )
        )
        self._images = CachedChildren(
            counter(
                "likely_images",
                "Pictures in answers.",
                ("method", "model"),
            )
        )
        self._verdicts = CachedChildren(
            counter(
                "likely_verdicts",
                "Pictures by verdict.",
                ("method", "model", "verdict"),
            )
        )
        self._models = gauge(
            "likely_model_info",
            "1 for each served version, 0 once it is no longer served; `provider` is the execution "
            "provider that its sessions prefer.",
            ("name", "version", "digest", "provider"),
        )
        self._served: set[tuple[str, ...]] = set()
        self._unloaded = UnloadedVersions[tuple[str, ...]](workers)
        self._ready = gauge(READY, READY_MEANS)
        self._loads = counter(
            "likely_loads", "Versions that started to be served, by model.", ("model",)
        )
        self._refusals = gauge(
            "likely_refused_bundles",
            "Bundles that should be served but were refused, until they load or disappear.",
        )
        self._watch_lost = gauge(
            "likely_watch_lost",
            "1 while the watched folder cannot be read, or contains none of the served bundles.",
        )
        self._refused = counter(
            "likely_load_failures",
            "Bundles refused while serving, by reason; what was served before is still served.",
            ("reason",),
        )
        build = gauge(
            "likely_build_info",
            "1; the labels are the running versions of likely, Python and the runtime.",
            ("version", "python", "runtime"),
        )
        runtime = ",".join(f"{name}=={number}" for name, number in machine.runtimes().items())
        build.labels(machine.version("likely") or "", platform.python_version(), runtime).set(1)

    def began(self, method: str) -> None:
        """Counts a request that has arrived."""
        self._running[(method,)].inc()

    def ended(self, method: str, model: str, code: str, seconds: float) -> None:
        """Counts a request that has been answered."""
        self._running[(method,)].dec()
        self._requests[method, model, code].inc()
        self._seconds[method, model].observe(seconds)

    def count_stream_message(self, method: str, model: str, code: str) -> None:
        """Counts a stream message that has been answered."""
        self._messages[method, model, code].inc()

    def count_answer(self, method: str, model: str, images: int, verdicts: Sequence[int]) -> None:
        """Counts the pictures of an answer, and their verdicts, given as numbers of `Verdict`."""
        if images:
            self._images[method, model].inc(images)
        for verdict in set(verdicts):
            self._verdicts[method, model, _VERDICTS[verdict]].inc(verdicts.count(verdict))

    def set_served(self, engines: Iterable[Engine]) -> None:
        """Records that these models, and no others, are served from now on."""
        engines = list(engines)
        self.monitor.set_served(engines)
        served = {_labels_of(engine) for engine in engines}
        gone = self._served - served
        for labels in gone:
            self._models.labels(*labels).set(0)
        for labels in self._unloaded.pop_expired(gone, served):
            self._models.remove(*labels)
        for labels in served:
            self._models.labels(*labels).set(1)
        for name, *_ in served - self._served:
            self._loads.labels(name).inc()
        for engine in engines:
            self._create_series(engine)
        self._served = served

    def _create_series(self, engine: Engine) -> None:
        """Creates the series that alerts watch, at 0: `rate` misses a series' first increment."""
        name = engine.manifest.name
        for reason in SHED:
            self.traffic.shed.labels(name, reason)
        for reason in FAILED:
            self.traffic.failures.labels(name, reason)
        self.traffic.restarts.labels(name)
        judges = any(map(engine.answers, JUDGING))
        for method in METHODS:
            if method not in INFERRING and not engine.answers(method.removesuffix("Stream")):
                continue
            for code in CODES:
                self._requests[method, name, code]
                if method in STREAMS:
                    self._messages[method, name, code]
            for verdict in Verdict if judges and method.startswith((*JUDGING, *INFERRING)) else ():
                self._verdicts[method, name, verdict.name.lower()]

    def set_ready(self, ready: bool) -> None:
        """Records whether requests are accepted."""
        self._ready.set(ready)

    def set_refused(self, count: int) -> None:
        """Records how many bundles are refused at present."""
        self._refusals.set(count)

    def set_watch_lost(self, lost: bool) -> None:
        """Records whether the watched folder is lost."""
        self._watch_lost.set(lost)

    def count_load_failure(self, reason: str) -> None:
        """Counts a bundle that was refused while serving."""
        self._refused.labels(reason).inc()


def _labels_of(engine: Engine) -> tuple[str, ...]:
    manifest = engine.manifest
    provider = engine.providers[0] if engine.providers else "none"
    return manifest.name, manifest.version, engine.digest, provider


class Exporter:
    """The HTTP server that Prometheus scrapes.

    Attributes:
        port: the port on which it listens.

    Raises:
        SettingsError: the address cannot be listened on.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise SettingsError(
                f"metrics cannot listen on {host}:{port}: {error.strerror or error}"
            ) from error
        self.port = self._server.server_port

    def close(self) -> None:
        """Stops listening, and waits for the server's thread to end."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
