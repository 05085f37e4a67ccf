"""Traces of OpenTelemetry: a span for each request, and within it one for each wait and run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from likely import machine
from likely.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

# Who looks at a trace is to look at the server for these; for the others, at its caller.
_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
_PARENT = ("traceparent", "tracestate")
LAST = 2.0  # seconds in which what is left may yet be sent


class Trace:
    """The span of one request while it runs, and those within it; times by the monotonic clock."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span)
        self._epoch = time.time_ns() - time.monotonic_ns()

    def waited(self, graph: str, since: float, until: float, rows: int) -> None:
        """So many rows have waited for a graph."""
        self._part(f"queue {graph}", since, until, {"likely.rows": rows})

    def ran(self, graph: str, since: float, until: float, rows: int, batch: int) -> None:
        """So many rows have run, in a batch of so many."""
        self._part(f"run {graph}", since, until, {"likely.rows": rows, "likely.batch_rows": batch})

    def end(self, code: str, number: int, attributes: Mapping[str, str | int]) -> None:
        """The request has been answered with that gRPC status, by name and number."""
        from opentelemetry.trace import StatusCode

        self._span.set_attributes({"rpc.grpc.status_code": number, **attributes})
        if code in _FAULTS:
            self._span.set_status(StatusCode.ERROR, code)
        self._span.end()

    def _part(self, name: str, since: float, until: float, attributes: Mapping[str, int]) -> None:
        span = self._tracer.start_span(
            name, self._context, attributes=attributes, start_time=self._time(since)
        )
        span.end(self._time(until))

    def _time(self, monotonic: float) -> int:
        return self._epoch + round(monotonic * 1e9)


class Tracing:
    """Sends traces by OTLP; OpenTelemetry's own variables say where to, and how many.

    Raises:
        SettingsError: the extra `tracing` is not installed.
    """

    def __init__(self) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise SettingsError(
                f"tracing needs the extra of that name, which is not installed: {error}"
            ) from error
        version = machine.version("likely") or ""
        own = Resource.create({"service.name": "likely", "service.version": version})
        resource = own.merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME counts more
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("likely", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self, service: str, method: str, metadata: Iterable[tuple[str, str | bytes]]
    ) -> Trace | None:
        """The trace of a request that has come; None for one that is not sampled."""
        from opentelemetry.trace import SpanKind

        carrier = {key: value for key, value in metadata if key in _PARENT}
        span = self._tracer.start_span(
            f"{service}/{method}",
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        )
        return Trace(self._tracer, span) if span.is_recording() else None

    def close(self) -> None:
        """Sends what is left, for some seconds at most."""
        # By itself it would wait half a minute for a collector that does not answer.
        cut = threading.Timer(LAST, self._exporter.shutdown)
        cut.daemon = True
        cut.start()
        self._provider.shutdown()
        cut.cancel()
