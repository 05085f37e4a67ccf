"""OpenTelemetry traces: a span for each request, with child spans for its waits and runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from likely import machine
from likely.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

# Codes that mark a span as an error: the server is at fault. With others, the caller is.
_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
_PARENT = ("traceparent", "tracestate")
FLUSH_SECONDS = 2.0  # seconds in which the remaining spans may be sent at the end


class Trace:
    """The span of a running request, and its child spans; times are of the monotonic clock."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span)
        self._epoch = time.time_ns() - time.monotonic_ns()

    def waited(self, graph: str, since: float, until: float, rows: int) -> None:
        """Records that rows of the request waited for a graph."""
        self._record_child(f"queue {graph}", since, until, {"likely.rows": rows})

    def ran(self, graph: str, since: float, until: float, rows: int, batch: int) -> None:
        """Records that rows of the request ran, in a batch of `batch` rows."""
        self._record_child(
            f"run {graph}", since, until, {"likely.rows": rows, "likely.batch_rows": batch}
        )

    def end(self, code: str, number: int, attributes: Mapping[str, str | int]) -> None:
        """Ends the request's span with a gRPC status, given by its name and number."""
        from opentelemetry.trace import StatusCode

        self._span.set_attributes({"rpc.grpc.status_code": number, **attributes})
        if code in _FAULTS:
            self._span.set_status(StatusCode.ERROR, code)
        self._span.end()

    def _record_child(
        self, name: str, since: float, until: float, attributes: Mapping[str, int]
    ) -> None:
        span = self._tracer.start_span(
            name, self._context, attributes=attributes, start_time=self._to_epoch_ns(since)
        )
        span.end(self._to_epoch_ns(until))

    def _to_epoch_ns(self, monotonic: float) -> int:
        return self._epoch + round(monotonic * 1e9)


class Tracing:
    """Sends traces by OTLP; OpenTelemetry's own variables set the destination and sampling.

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
        defaults = Resource.create({"service.name": "likely", "service.version": version})
        # OTEL_SERVICE_NAME takes precedence.
        resource = defaults.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("likely", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self, service: str, method: str, metadata: Iterable[tuple[str, str | bytes]]
    ) -> Trace | None:
        """Starts the trace of a request that has arrived; None if it is not sampled."""
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
        """Sends the remaining spans, for at most `FLUSH_SECONDS` seconds."""
        # By itself, the provider waits half a minute for a collector that does not answer.
        timer = threading.Timer(FLUSH_SECONDS, self._exporter.shutdown)
        timer.daemon = True
        timer.start()
        self._provider.shutdown()
        timer.cancel()
