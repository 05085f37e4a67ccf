"""Asks a gRPC server, in a process of its own: without pause, or at a rate whatever it answers.

Any server and any method will do: a target is an address, a method's path and a request's bytes,
which are sent as they are; answers are counted and not read. Reads a plan as JSON from each line
of standard input and writes a result as JSON to a line of standard output.
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

Ask: TypeAlias = Callable[[float], Awaitable[None]]

MOST_FIELDS = 10_000  # of an answer
LONGEST = 30.0  # seconds that a request may take where the plan names no deadline
# Connections are the channel's own, refusals are seen as they are, large answers come through.
OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked, and how.

    Attributes:
        address: of the server.
        method: path of the RPC, such as `/package.Service/Method`.
        request: file of the request's bytes.
        callers: each waits for its answer before it asks again; with a rate, not needed.
        rate: requests a second, at random (exponentially distributed) distances; 0 for callers.
        seconds: measured, at least.
        answers: counted, at least.
        warmup: seconds before, not measured.
        deadline: seconds of each request; 0 for none but a long one.
        cancelled: share of requests whose caller leaves before the answer.
        leaves_after: seconds until such a caller leaves, at most.
        connections: that requests are divided among.
        streams: whether each caller sends its requests through one bidirectional stream.
        window: messages that each stream has under way.
        outcomes: number of the repeated field that answers a stream's messages, one an entry; 0
            where each message has an answer of its own.
        watched: processes whose processor time is measured, by name.
        seed: of the distances and of who leaves.
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
    """What has come back, counted from an answer to an answer: so no part of one is lost."""

    def __init__(self, plan: Plan) -> None:
        self.ended = asyncio.Event()
        self._plan = plan
        self._warm = time.perf_counter() + plan.warmup
        self._began = self._seconds = 0.0
        self._cpu: dict[str, float] = {}
        self._codes: Counter[str] = Counter()
        self._latencies: dict[str, list[float]] = {}

    def count(self, code: str, due: float) -> None:
        """Counts what came to requests that were due at that time."""
        now = time.perf_counter()
        if now < self._warm or self.ended.is_set():
            return
        if not self._began:
            self._began, self._cpu = now, _cpu(self._plan)
            return
        self._codes[code] += 1
        self._latencies.setdefault(code, []).append(now - due)
        if now - self._began >= self._plan.seconds and self._codes.total() >= self._plan.answers:
            self._seconds, before = now - self._began, self._cpu
            self._cpu = {name: used - before[name] for name, used in _cpu(self._plan).items()}
            self.ended.set()

    def told(self) -> dict[str, Any]:
        """The result: counts, rate, latencies and processor time, all in seconds."""
        return {
            "seconds": self._seconds,
            "codes": dict(self._codes),
            "rate": self._codes["OK"] / self._seconds,
            "latency": {code: percentiles(found) for code, found in self._latencies.items()},
            "cpu": self._cpu,
        }


async def run(plan: Plan) -> dict[str, Any]:
    """What came of a plan.

    Raises:
        TimeoutError: too few answers came.
    """
    request = await asyncio.to_thread(plan.request.read_bytes)
    rng = random.Random(plan.seed)  # noqa: S311
    async with _channels(plan) as channels:
        tally = Tally(plan)
        asks = _asks(plan, channels, request, tally, rng)
        load = _open(asks, plan.rate, rng) if plan.rate else _closed(asks)
        working, ended = asyncio.create_task(load), asyncio.create_task(tally.ended.wait())
        limit = plan.warmup + plan.seconds + LONGEST
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
    return tally.told()


async def _closed(asks: Sequence[Ask]) -> None:
    """Callers that ask again as soon as they are answered."""

    async def caller(ask: Ask) -> None:
        while True:
            await ask(time.perf_counter())

    async with asyncio.TaskGroup() as group:
        for ask in asks:
            group.create_task(caller(ask))


async def _open(asks: Sequence[Ask], rate: float, rng: random.Random) -> None:
    """Requests at that rate. Latency counts from when one was due, not from when it was sent."""
    due, sent = time.perf_counter(), 0
    async with asyncio.TaskGroup() as group:
        while True:
            due += rng.expovariate(rate)
            # Waits at least one turn of the loop, for answers to come in beside.
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(_of(asks[sent % len(asks)], due))
            sent += 1


async def _of(ask: Ask, due: float) -> None:
    await ask(due)


def _asks(
    plan: Plan, channels: Sequence[grpc.aio.Channel], request: bytes, tally: Tally, rng: Any
) -> list[Ask]:
    """One way to ask for each caller, or for each connection where requests come at a rate."""
    if plan.streams:
        kinds = [_stream(plan, channel, request, tally) for channel in channels]
    else:
        kinds = [_unary(plan, channel, request, tally, rng) for channel in channels]
    if plan.rate:
        return [kind() for kind in kinds]
    return [kinds[i % len(kinds)]() for i in range(plan.callers)]


def _unary(
    plan: Plan, channel: grpc.aio.Channel, request: bytes, tally: Tally, rng: random.Random
) -> Callable[[], Ask]:
    call: Any = channel.unary_unary(plan.method)

    async def ask(began: float) -> None:
        answer = call(request, timeout=plan.deadline or LONGEST)
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

    return lambda: ask


def _stream(
    plan: Plan, channel: grpc.aio.Channel, request: bytes, tally: Tally
) -> Callable[[], Ask]:
    """Each caller has a stream, and as many messages under way as the window is wide."""
    method: Any = channel.stream_stream(plan.method)

    def opened() -> Ask:
        call = method()
        under_way: deque[float] = deque()

        async def ask(began: float) -> None:
            while len(under_way) < plan.window:
                await call.write(request)
                under_way.append(began)
            answer = await call.read()
            if answer is grpc.aio.EOF:
                raise RuntimeError(f"the stream ended: {await call.code()}")
            for _ in range(_entries(answer, plan.outcomes)):
                tally.count("OK", under_way.popleft())

        return ask

    return opened


def _entries(answer: bytes, field: int) -> int:
    if not field:
        return 1
    found = Reader(MOST_FIELDS).message(memoryview(answer), _outcomes(field), "an answer")
    return len(found["outcomes"])


def _outcomes(field: int) -> Schema:
    return {field: Field("outcomes", (Kind.BYTES,), many=True)}


@asynccontextmanager
async def _channels(plan: Plan) -> AsyncIterator[list[grpc.aio.Channel]]:
    channels = [
        grpc.aio.insecure_channel(plan.address, options=OPTIONS) for _ in range(plan.connections)
    ]
    try:
        await asyncio.wait_for(asyncio.gather(*(c.channel_ready() for c in channels)), LONGEST)
        yield channels
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


def _cpu(plan: Plan) -> dict[str, float]:
    return {"client": time.process_time()} | {
        name: cpu_seconds(pid) for name, pid in plan.watched.items()
    }


async def main() -> None:
    """Carries out the plans that come, one after the other."""
    reader = asyncio.get_running_loop()
    while line := await reader.run_in_executor(None, sys.stdin.readline):
        given = json.loads(line)
        result = await run(Plan(**{**given, "request": Path(given["request"])}))
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
