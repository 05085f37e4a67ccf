"""A load generator in its own process: a closed loop of callers, or an open loop at a fixed rate.

It works with any gRPC server and method: a target is an address, the path of a method and the
bytes of a request, which are sent as they are; answers are counted and not decoded. It reads one
plan as JSON from each line of standard input, and writes its result as a line of JSON to standard
output.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio

from bench.serving.clocks import cpu_seconds, percentiles
from likely.bundle.wire import Field, Kind, Reader, Schema

SendRequest: TypeAlias = Callable[[float], Awaitable[None]]

MOST_FIELDS = 10_000  # most fields of an answer
DEFAULT_TIMEOUT = 30.0  # seconds: timeout of a request if the plan names no deadline
# Each channel has its own connection; no retries, so that refusals are seen; no limit of size.
OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One measurement: the target, and the load on it.

    Attributes:
        address: address of the server.
        method: path of the RPC, such as `/package.Service/Method`.
        request: file with the bytes of the request.
        callers: number of callers, each of which waits for its answer before it asks again;
            ignored if there is a rate.
        rate: requests per second, with exponentially distributed intervals; 0 for a closed loop
            of callers.
        seconds: least duration of the measurement.
        answers: least number of counted answers.
        warmup: seconds of load before the measurement.
        deadline: timeout of each request in seconds; 0 for `DEFAULT_TIMEOUT`.
        cancelled: share of requests that the caller cancels before the answer.
        leaves_after: most seconds until such a caller cancels.
        connections: number of connections that the requests are divided among.
        streams: whether each caller sends its requests on one bidirectional stream.
        window: number of messages in flight on each stream.
        outcomes: number of the repeated field whose entries answer one message of a stream each;
            0 if each message has its own answer.
        watched: processes whose CPU time is measured, by name.
        seed: seed of the intervals and of the cancellations.
    """

    address: str
    method: str
    request: Path
    callers: int = 1
    rate: float = 0.0
    seconds: float = 1.0
    answers: int = 1
    warmup: float = 0.2
    deadline: float = 0.0
    cancelled: float = 0.0
    leaves_after: float = 0.01
    connections: int = 4
    streams: bool = False
    window: int = 1
    outcomes: int = 0
    watched: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0


class Tally:
    """Counts the answers. A measurement begins and ends at an answer, so none counts in part."""

    def __init__(self, plan: Plan) -> None:
        self.ended = asyncio.Event()
        self._plan = plan
        self._warm_at = time.perf_counter() + plan.warmup
        self._began = self._seconds = 0.0
        self._cpu: dict[str, float] = {}
        self._codes: Counter[str] = Counter()
        self._latencies: dict[str, list[float]] = {}

    def count(self, code: str, due: float) -> None:
        """Counts the answer, with this status code, to a request that was due at that time."""
        now = time.perf_counter()
        if now < self._warm_at or self.ended.is_set():
            return
        if not self._began:
            self._began, self._cpu = now, _measure_cpu(self._plan)
            return
        self._codes[code] += 1
        self._latencies.setdefault(code, []).append(now - due)
        if now - self._began >= self._plan.seconds and self._codes.total() >= self._plan.answers:
            self._seconds, before = now - self._began, self._cpu
            self._cpu = {
                name: used - before[name] for name, used in _measure_cpu(self._plan).items()
            }
            self.ended.set()

    def result(self) -> dict[str, Any]:
        """The result: counts, requests per second, and latencies and CPU time in seconds."""
        return {
            "seconds": self._seconds,
            "codes": dict(self._codes),
            "rate": self._codes["OK"] / self._seconds,
            "latency": {
                code: percentiles(latencies) for code, latencies in self._latencies.items()
            },
            "cpu": self._cpu,
        }


async def run(plan: Plan) -> dict[str, Any]:
    """Carries out a plan; returns its result.

    Raises:
        TimeoutError: too few answers arrived in time.
    """
    request = await asyncio.to_thread(plan.request.read_bytes)
    rng = random.Random(plan.seed)  # noqa: S311
    async with _channels(plan) as channels:
        tally = Tally(plan)
        senders = _request_senders(plan, channels, request, tally, rng)
        load = _run_open_loop(senders, plan.rate, rng) if plan.rate else _run_closed_loop(senders)
        working, ended = asyncio.create_task(load), asyncio.create_task(tally.ended.wait())
        limit = plan.warmup + plan.seconds + DEFAULT_TIMEOUT
        done, _ = await asyncio.wait(
            [working, ended], timeout=limit, return_when=asyncio.FIRST_COMPLETED
        )
        working.cancel()
        ended.cancel()
        await asyncio.gather(working, ended, return_exceptions=True)
        if working in done:
            working.result()
        if ended not in done:
            raise TimeoutError(f"fewer than {plan.answers} answers in {limit:.0f} s")
    return tally.result()


async def _run_closed_loop(senders: Sequence[SendRequest]) -> None:
    """A closed loop: each caller asks again as soon as it is answered."""

    async def caller(send: SendRequest) -> None:
        while True:
            await send(time.perf_counter())

    async with asyncio.TaskGroup() as group:
        for send in senders:
            group.create_task(caller(send))


async def _run_open_loop(senders: Sequence[SendRequest], rate: float, rng: random.Random) -> None:
    """An open loop at a fixed rate; latency counts from when a request was due, not sent."""
    due, sent = time.perf_counter(), 0
    async with asyncio.TaskGroup() as group:
        while True:
            due += rng.expovariate(rate)
            # Sleeps for at least one turn of the event loop, so that answers can be read.
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(_send_due(senders[sent % len(senders)], due))
            sent += 1


async def _send_due(send: SendRequest, due: float) -> None:
    await send(due)


def _request_senders(
    plan: Plan, channels: Sequence[grpc.aio.Channel], request: bytes, tally: Tally, rng: Any
) -> list[SendRequest]:
    """One function that sends a request per caller, or per connection if there is a rate."""
    if plan.streams:
        factories = [_stream_sender_factory(plan, channel, request, tally) for channel in channels]
    else:
        factories = [
            _unary_sender_factory(plan, channel, request, tally, rng) for channel in channels
        ]
    if plan.rate:
        return [factory() for factory in factories]
    return [factories[i % len(factories)]() for i in range(plan.callers)]


def _unary_sender_factory(
    plan: Plan, channel: grpc.aio.Channel, request: bytes, tally: Tally, rng: random.Random
) -> Callable[[], SendRequest]:
    call: Any = channel.unary_unary(plan.method)

    async def send(began: float) -> None:
        answer = call(request, timeout=plan.deadline or DEFAULT_TIMEOUT)
        if plan.cancelled and rng.random() < plan.cancelled:
            asyncio.get_running_loop().call_later(rng.random() * plan.leaves_after, answer.cancel)
        try:
            await answer
        except grpc.aio.AioRpcError as error:
            tally.count(error.code().name, began)
        except asyncio.CancelledError:
            if not answer.cancelled():
                raise
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            tally.count("CANCELLED", began)
        else:
            tally.count("OK", began)

    return lambda: send


def _stream_sender_factory(
    plan: Plan, channel: grpc.aio.Channel, request: bytes, tally: Tally
) -> Callable[[], SendRequest]:
    """Each caller has its own stream, with `plan.window` messages in flight."""
    method: Any = channel.stream_stream(plan.method)

    def opened() -> SendRequest:
        call = method()
        under_way: deque[float] = deque()

        async def send(began: float) -> None:
            while len(under_way) < plan.window:
                await call.write(request)
                under_way.append(began)
            answer = await call.read()
            if answer is grpc.aio.EOF:
                raise RuntimeError(f"the stream ended: {await call.code()}")
            for _ in range(_count_outcomes(answer, plan.outcomes)):
                tally.count("OK", under_way.popleft())

        return send

    return opened


def _count_outcomes(answer: bytes, field: int) -> int:
    if not field:
        return 1
    message = Reader(MOST_FIELDS).read_message(
        memoryview(answer), _outcomes_schema(field), "an answer"
    )
    return len(message["outcomes"])


def _outcomes_schema(field: int) -> Schema:
    return {field: Field("outcomes", (Kind.BYTES,), repeated=True)}


@asynccontextmanager
async def _channels(plan: Plan) -> AsyncIterator[list[grpc.aio.Channel]]:
    channels = [
        grpc.aio.insecure_channel(plan.address, options=OPTIONS) for _ in range(plan.connections)
    ]
    try:
        await asyncio.wait_for(
            asyncio.gather(*(c.channel_ready() for c in channels)), DEFAULT_TIMEOUT
        )
        yield channels
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


def _measure_cpu(plan: Plan) -> dict[str, float]:
    return {"client": time.process_time()} | {
        name: cpu_seconds(pid) for name, pid in plan.watched.items()
    }


async def main() -> None:
    """Carries out the plans from standard input, one after another."""
    reader = asyncio.get_running_loop()
    while line := await reader.run_in_executor(None, sys.stdin.readline):
        fields = json.loads(line)
        result = await run(Plan(**{**fields, "request": Path(fields["request"])}))
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
