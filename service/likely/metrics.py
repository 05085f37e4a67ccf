"""What Prometheus is told: requests, time, pictures, verdicts, and which models really run."""

from __future__ import annotations

import collections
import platform
from collections.abc import Iterable
from typing import TYPE_CHECKING

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
from likely.errors import SettingsError
from likely.traffic import Traffic

if TYPE_CHECKING:
    from likely.engine import Engine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one server in a registry of their own.

    Labels are bounded: methods are those of the contract, models those served.

    Attributes:
        registry: all of them.
        traffic: those of queues and batches.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.traffic = Traffic(self.registry)
        self._requests = Counter(
            "likely_requests",
            "Requests answered.",
            ("method", "model", "code"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "likely_request_seconds",
            "Time from a request's arrival to the end of its answer.",
            ("method",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._running = Gauge(
            "likely_requests_in_flight",
            "Requests that are being answered.",
            ("method",),
            registry=self.registry,
        )
        self._images = Counter(
            "likely_images",
            "Pictures scored, classified, encoded or drawn.",
            ("method", "model"),
            registry=self.registry,
        )
        self._verdicts = Counter(
            "likely_verdicts",
            "Pictures by what was decided about them.",
            ("method", "model", "verdict"),
            registry=self.registry,
        )
        self._models = Gauge(
            "likely_model_info",
            "1 for each model served, by the execution provider that its sessions prefer.",
            ("name", "version", "digest", "provider"),
            registry=self.registry,
        )
        build = Gauge(
            "likely_build_info",
            "1, with the versions that run.",
            ("version", "python", "runtime"),
            registry=self.registry,
        )
        runtime = ",".join(f"{name}=={number}" for name, number in machine.runtimes().items())
        build.labels(machine.version("likely") or "", platform.python_version(), runtime).set(1)

    def began(self, method: str) -> None:
        """A request has arrived."""
        self._running.labels(method).inc()

    def ended(self, method: str, model: str, code: str, seconds: float) -> None:
        """A request has been answered."""
        self._running.labels(method).dec()
        self._requests.labels(method, model, code).inc()
        self._seconds.labels(method).observe(seconds)

    def answered(self, method: str, model: str, images: int, verdicts: Iterable[Verdict]) -> None:
        """Pictures have been answered for."""
        if images:
            self._images.labels(method, model).inc(images)
        for verdict, n in collections.Counter(verdicts).items():
            self._verdicts.labels(method, model, verdict.name.lower()).inc(n)

    def serving(self, engines: Iterable[Engine]) -> None:
        """These models are served from now on."""
        self._models.clear()
        for engine in engines:
            manifest = engine.manifest
            provider = engine.providers[0] if engine.providers else "none"
            self._models.labels(manifest.name, manifest.version, engine.digest, provider).set(1)


class Exporter:
    """The HTTP server that Prometheus scrapes.

    Attributes:
        port: where it listens.

    Raises:
        SettingsError: the address cannot be listened on.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, host, metrics.registry)
        except OSError as error:
            raise SettingsError(
                f"metrics cannot listen on {host}:{port}: {error.strerror or error}"
            ) from error
        self.port = self._server.server_port

    def close(self) -> None:
        """Stops listening; waits for the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
