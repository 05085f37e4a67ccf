"""The guard, called as gRPC calls it: what it answers, counts and sends before an answer."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

from likely import logs
from likely.serving.guard import Guard
from likely.telemetry.metrics import Metrics
from likely.v1.failures_pb2 import Failure
from likely.v1.scoring_pb2 import Score, ScoreOutcome, ScoreResponse, ScoreStreamResponse, Verdict
from likely.versions.registry import Registry

OURS, HEALTH = "likely.v1.ScoringService", "grpc.health.v1.Health"
ANSWERED, REFUSED = 0, grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
SCORE = Score(verdict=Verdict.VERDICT_ACCEPTED)


class Context:
    """What gRPC tells of a call, and what it is told to send."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self.sent: list[Any] = []
        self.status: grpc.StatusCode | None = None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def set_trailing_metadata(self, metadata: Any) -> None:
        self.trailer = dict(metadata)

    def time_remaining(self) -> float | None:
        return self.seconds

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def code(self) -> grpc.StatusCode | None:
        return self.status

    async def send_initial_metadata(self, _: Any) -> None:
        self.sent.append("initial metadata")

    async def write(self, answer: Any) -> None:
        self.sent.append(answer)

    async def abort(self, code: grpc.StatusCode, message: str, _: Any) -> None:
        self.status = code
        raise grpc.aio.AbortError(message)


@pytest.fixture
def guard() -> Guard:
    registry = Registry()
    registry.fill([SimpleNamespace(manifest=SimpleNamespace(name="toy", version="1"))])  # type: ignore[list-item]
    return Guard(registry, Metrics(), logs.logger(stream=io.StringIO()))


def counted(guard: Guard, name: str) -> dict[str, float]:
    """The values of a counter that are not 0, by its label `code`."""
    samples = (s for metric in guard._metrics.registry.collect() for s in metric.samples)
    return {s.labels["code"]: s.value for s in samples if s.name == name and s.value}


def ask(guard: Guard, handler: Any, service: str, context: Context) -> Any:
    wrapped: Any = guard.wrap_handler(handler, service, "Method")
    call = wrapped.unary_stream if handler.response_streaming else wrapped.unary_unary

    async def run() -> Any:
        async with asyncio.timeout(10):
            return await call(b"", context)

    return asyncio.run(run())


def unary(answer: Any) -> Any:
    async def answer_it(_: bytes, __: Any) -> Any:
        return answer

    return grpc.unary_unary_rpc_method_handler(answer_it)


def streaming(*answers: Any) -> Any:
    async def answer_it(_: bytes, __: Any) -> AsyncIterator[Any]:
        for answer in answers:
            yield answer

    return grpc.unary_stream_rpc_method_handler(answer_it)


@pytest.mark.parametrize(("seconds", "late"), [(0.0, True), (-1.0, True), (9.0, False)])
def test_what_arrives_after_its_deadline_is_not_begun(
    guard: Guard, seconds: float, late: bool
) -> None:
    context, answer = Context(seconds), ScoreResponse(scores=[SCORE])
    if not late:
        assert ask(guard, unary(answer), OURS, context) is answer
        assert counted(guard, "likely_requests_total") == {"OK": 1}
        return
    with pytest.raises(grpc.aio.AbortError, match="passed when the request came"):
        ask(guard, unary(answer), OURS, context)
    assert context.status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert counted(guard, "likely_requests_total") == {"DEADLINE_EXCEEDED": 1}


@pytest.mark.parametrize(
    ("service", "handler", "answered"),
    [
        (HEALTH, unary("well"), True),
        (HEALTH, streaming("well"), False),
        (OURS, unary(ScoreResponse()), False),
        (OURS, streaming(ScoreStreamResponse()), False),
    ],
    ids=["check", "watch", "request", "stream"],
)
def test_behind_a_closed_door_only_a_health_check_is_answered(
    guard: Guard, service: str, handler: Any, answered: bool
) -> None:
    guard.door.turn_away()
    context = Context()
    if answered:
        assert ask(guard, handler, service, context) == "well"
        return
    with pytest.raises(grpc.aio.AbortError, match="shutting down"):
        ask(guard, handler, service, context)
    assert context.status is grpc.StatusCode.UNAVAILABLE and not context.sent


def test_initial_metadata_go_before_the_first_answer_alone(guard: Guard) -> None:
    answers, context = [ScoreStreamResponse() for _ in range(3)], Context()
    ask(guard, streaming(*answers), OURS, context)
    assert context.sent == ["initial metadata", *answers]
    empty = Context()
    ask(guard, streaming(), OURS, empty)
    assert not empty.sent


def test_each_outcome_of_a_stream_counts_with_its_own_code(guard: Guard) -> None:
    def outcomes(*codes: int) -> ScoreStreamResponse:
        return ScoreStreamResponse(
            outcomes=[
                ScoreOutcome(failure=Failure(code=code))
                if code
                else ScoreOutcome(response=ScoreResponse(scores=[SCORE]))
                for code in codes
            ]
        )

    ask(guard, streaming(outcomes(ANSWERED, REFUSED, ANSWERED), outcomes(REFUSED)), OURS, Context())
    messages = counted(guard, "likely_stream_messages_total")
    assert messages == {"OK": 2, "RESOURCE_EXHAUSTED": 2}
    assert counted(guard, "likely_requests_total") == {"OK": 1}
