"""Traces as a collector gets them: whose they are, what lies within them, what they say."""

from __future__ import annotations

import importlib.util
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from likely import codec, tracing
from likely.errors import SettingsError
from likely.tracing import Tracing
from likely.v1.scoring_pb2 import ClassifyRequest, ScoreRequest
from tests.faults.alive import Caller, calling, on_toy, refused
from tests.faults.test_batching import rig

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry") is None,
    reason="the extra tracing is not installed",
)
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECONDS = 30


class Collector:
    """What was exported by OTLP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resource: dict[str, str] = {}
        self._news = threading.Condition()

    def heard(self, request: Any) -> None:
        with self._news:
            for of_resource in request.resource_spans:
                self.resource |= {
                    pair.key: pair.value.string_value for pair in of_resource.resource.attributes
                }
                for scope in of_resource.scope_spans:
                    self.spans += scope.spans
            self._news.notify_all()

    def request(self, name: str, code: int = 0) -> Any:
        """The span of a request to that method that ended so."""
        with self._news:
            found = self._news.wait_for(
                lambda: next((s for s in self.spans if self.is_one(s, name, code)), None), SECONDS
            )
            assert found, [span.name for span in self.spans]
            return found

    def is_one(self, span: Any, name: str, code: int) -> bool:
        status = attributes(span).get("rpc.grpc.status_code")
        return bool(span.name.endswith(f"/{name}") and status == code)

    def within(self, span: Any) -> dict[str, Any]:
        """The spans directly within one."""
        with self._news:
            return {s.name: s for s in self.spans if s.parent_span_id == span.span_id}


def attributes(span: Any) -> dict[str, Any]:
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes
    }


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, int]]:
    """A collector on a free port."""
    from opentelemetry.proto.collector.trace.v1 import (
        trace_service_pb2,
        trace_service_pb2_grpc,
    )

    heard = Collector()

    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            heard.heard(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield heard, port
    server.stop(0).wait()


@pytest.fixture(scope="module")
def traced(running: Running, collector: tuple[Collector, int]) -> Iterator[Live]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector[1]}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        with running(tracing=True, max_batch=4) as live:
            yield live


@pytest.fixture
def caller(traced: Live) -> Iterator[Caller]:
    with calling(traced.address) as found:
        yield found


@pytest.fixture
def heard(collector: tuple[Collector, int]) -> Collector:
    collector[0].spans.clear()
    return collector[0]


def sampled(flag: str = "01") -> tuple[tuple[str, str], ...]:
    return (("traceparent", f"00-{TRACE}-{PARENT}-{flag}"), ("x-request-id", "mine"))


def test_a_request_is_a_span_of_its_callers_trace(caller: Caller, heard: Collector) -> None:
    before = time.time_ns()
    caller.ask(on_toy(ClassifyRequest), metadata=sampled())
    span = heard.request("Classify")
    assert span.name == "likely.v1.ScoringService/Classify"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.kind == span.SPAN_KIND_SERVER
    assert attributes(span) == {
        "rpc.system": "grpc",
        "rpc.service": "likely.v1.ScoringService",
        "rpc.method": "Classify",
        "rpc.grpc.status_code": 0,
        "likely.model": "toy",
        "likely.images": 1,
        "likely.request_id": "mine",
    }
    assert heard.resource["service.name"] == "likely"
    assert heard.resource["deployment.environment"] == "test"
    within = heard.within(span)
    assert within.keys() == {"queue density", "run density", "queue conditional", "run conditional"}
    for part in within.values():
        assert part.trace_id == span.trace_id
        assert before <= span.start_time_unix_nano <= part.start_time_unix_nano + 1000
        assert part.start_time_unix_nano <= part.end_time_unix_nano
        assert part.end_time_unix_nano <= span.end_time_unix_nano + 1000
        assert attributes(part)["likely.rows"] == 1
    waited, ran = within["queue density"], within["run density"]
    assert abs(waited.end_time_unix_nano - ran.start_time_unix_nano) <= 1000


def test_rows_of_several_batches_are_several_runs(
    caller: Caller, heard: Collector, toy: Toy
) -> None:
    x = toy.draw(np.random.default_rng(1), 10)
    caller.ask(ScoreRequest(model_name="toy", images=codec.images(x)), metadata=sampled())
    span = heard.request("Score")
    parts = [s for s in heard.spans if s.parent_span_id == span.span_id]
    runs = [attributes(part) for part in parts if part.name == "run density"]
    assert sorted(run["likely.rows"] for run in runs) == [2, 4, 4]
    assert all(run["likely.batch_rows"] >= run["likely.rows"] for run in runs)
    assert [part.name for part in parts].count("queue density") == 1


def test_faults_are_marked_and_refusals_are_not(
    traced: Live, caller: Caller, heard: Collector
) -> None:
    refused(lambda: caller.ask(ScoreRequest(model_name="no")), grpc.StatusCode.NOT_FOUND)
    span = heard.request("Score", code=5)
    assert attributes(span)["likely.model"] == "unknown"
    assert span.status.code == span.status.STATUS_CODE_UNSET
    assert not span.parent_span_id

    def fail(_: Any) -> None:
        raise RuntimeError("injected")

    rigged = rig(traced)
    rigged.fails = fail
    refused(lambda: caller.ask(on_toy(ScoreRequest)), grpc.StatusCode.INTERNAL)
    span = heard.request("Score", code=13)
    rigged.fails = lambda _: None
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert "injected" not in str(span)


def test_what_the_caller_does_not_sample_is_not_sent(caller: Caller, heard: Collector) -> None:
    caller.ask(on_toy(ScoreRequest), metadata=sampled("00"))
    caller.ask(on_toy(ClassifyRequest), metadata=sampled())
    heard.request("Classify")
    assert not [span for span in heard.spans if span.name.endswith("/Score")]


def test_a_collector_that_is_gone_costs_nothing(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with running(tracing=True) as live, calling(live.address) as caller:
        for _ in range(5):
            assert caller.ask(on_toy(ScoreRequest)).scores
    # It has ended, too, though what it had to tell could not be sent.


def test_a_collector_that_does_not_answer_holds_no_end_up(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.2)
        with running(tracing=True) as live, calling(live.address) as caller:
            assert caller.ask(on_toy(ScoreRequest)).scores
            began = time.monotonic()
        assert time.monotonic() - began < 8  # OpenTelemetry would wait for 10, or 30


def test_without_the_extra_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match="extra of that name, which is not installed"):
        Tracing()
