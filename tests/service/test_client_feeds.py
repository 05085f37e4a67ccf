"""Feeds of both clients: in order, message by message, whatever happens to the stream."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from likely import AsyncClient, Client, LikelyError, Scores, statuses
from likely.answers import Classifications
from likely.client import feeds, plans
from likely.client.feeds import AsyncFeed, BlockingFeed
from likely.client.ledger import WINDOW, Ledger
from likely.errors import DeadlineExceeded, InvalidInput, NotAnswered, Overloaded, Unavailable
from likely.v1.scoring_pb2 import (
    ScoreOutcome,
    ScoreRequest,
    ScoreResponse,
    ScoreStreamRequest,
    ScoreStreamResponse,
)

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live.address, timeout=30) as client:
        yield client


@pytest.fixture
def x(toy: Toy) -> Any:
    return toy.draw(np.random.default_rng(4), 400)


def both(live: Live, client: Client, method: str, items: list[Any], **more: Any) -> list[list[Any]]:
    """What each client says of the items."""

    async def ask() -> list[Any]:
        async with AsyncClient(live.address, timeout=30) as other:
            return [outcome async for outcome in getattr(other, method)(items, **more)]

    return [list(getattr(client, method)(items, **more)), live.run(ask())]


def test_outcomes_are_those_of_single_requests_in_order(
    live: Live, client: Client, toy: Toy, x: Any
) -> None:
    items = [x[n : n + 1 + n % 3] for n in range(300)]
    for outcomes in both(live, client, "score_stream", items, alpha=0.2, surprise=True):
        assert len(outcomes) == len(items)
        for item, scores in zip(items, outcomes, strict=True):
            assert isinstance(scores, Scores)
            assert scores.alpha == 0.2
            assert scores.surprise is not None
            assert scores.surprise.shape == item.shape
            np.testing.assert_allclose(scores.log_px, toy.log_px(item), atol=1e-4)
    priors = [0.1, 0.1, 0.8]
    alone = client.classify(x[:50], priors=priors)
    for outcomes in both(live, client, "classify_stream", [*x[:50, None]], priors=priors):
        labels = [outcome.label[0] for outcome in outcomes]
        assert all(isinstance(outcome, Classifications) for outcome in outcomes)
        assert labels == alone.label.tolist()


def test_an_error_has_its_items_place(live: Live, client: Client, x: Any) -> None:
    good = x[:1]
    items = [good, x[0, 0], good, good + 4, np.zeros((1, 1, 4, 3), np.uint8), good, x[:101]]
    for outcomes in both(live, client, "score_stream", items):
        failed = [
            outcome.field if isinstance(outcome, InvalidInput) else None for outcome in outcomes
        ]
        named = [None, "images", None, "images.data", "images.shape[2]", None, "images.shape[0]"]
        assert failed == named


def test_what_is_larger_than_a_request_is_refused_alone(running: Running, x: Any) -> None:
    items = [x[:n] for n in (1, *range(90, 130), 400, 1)]
    limits = {"request_bytes": 1024, "images_per_request": 1000}
    with running(**limits) as live, Client(live.address, timeout=30) as client:
        for method in ("score_stream", "classify_stream"):
            for outcomes in both(live, client, method, items):
                refused = [isinstance(outcome, InvalidInput) for outcome in outcomes]
                fitting = refused.index(True)
                assert 900 < items[fitting].nbytes < 1024  # the rest is what is asked
                assert refused == [False] * fitting + [True] * (42 - fitting) + [False]
                assert "the server takes 1024" in str(outcomes[fitting])


def test_a_feed_of_nothing_ends(live: Live, client: Client) -> None:
    assert both(live, client, "score_stream", []) == [[], []]


def test_answers_do_not_wait_for_the_next_item(live: Live, client: Client, x: Any) -> None:
    answered = threading.Semaphore(1)

    def feed() -> Iterator[Any]:
        for n in range(5):
            assert answered.acquire(timeout=20)
            yield x[n : n + 1]

    for _ in client.score_stream(feed()):
        answered.release()

    async def ask() -> int:
        answers: asyncio.Queue[None] = asyncio.Queue()
        answers.put_nowait(None)

        async def source() -> AsyncIterator[Any]:
            for n in range(5):
                await asyncio.wait_for(answers.get(), 20)
                yield x[n : n + 1]

        async with AsyncClient(live.address, timeout=30) as other:
            count = 0
            async for _ in other.score_stream(source()):
                count += 1
                answers.put_nowait(None)
            return count

    assert live.run(ask()) == 5


class CutError(grpc.RpcError):
    """How a stream breaks."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "not now"

    def trailing_metadata(self) -> Any:
        return ()


class Stream:
    """A stream that gives these answers."""

    def __init__(self, answers: Any) -> None:
        self._answers = answers

    def __iter__(self) -> Iterator[Any]:
        return iter(self._answers)

    def __aiter__(self) -> AsyncIterator[Any]:
        return aiter(self._answers)

    def cancel(self) -> None:
        pass


def questions(read: Callable[[Any, Any], Any] = lambda answer, _: answer) -> plans.Questions[Any]:
    """Questions whose answers are read so."""
    ask = lambda _, version: ScoreRequest(model_version=version)  # noqa: E731
    return plans.Questions(ask, read, stream=ScoreStreamRequest)


def answer(message: Any) -> Any:
    """What answers that message."""
    outcome = ScoreOutcome(sequence_id=message.sequence_id, response=ScoreResponse())
    return ScoreStreamResponse(outcomes=[outcome])


def refused(message: Any) -> Any:
    """What says that there is no room for that message now."""
    failure = statuses.failure(Overloaded("full", 1.0), "id")
    outcome = ScoreOutcome(sequence_id=message.sequence_id, failure=failure)
    return ScoreStreamResponse(outcomes=[outcome])


def test_the_time_of_a_feed_is_counted_from_the_last_answer(x: Any) -> None:
    ledger = Ledger[Any](questions(), 5)
    for _ in range(40):
        ledger.add(x[:1])
    messages = [ledger.next(1.0) for _ in range(40)]
    for n, message in enumerate(messages):
        now = 1.0 + 4.0 * n
        assert ledger.time_left(now) > 0
        ledger.record(answer(message), now)
        assert len(ledger.take()) == 1
        assert ledger.time_left(now) == 5
    ledger.add(x[:1])
    assert ledger.next(500.0)
    assert ledger.time_left(504.0) == 1
    assert ledger.time_left(505.0) == 0


def test_what_is_refused_waits_its_turn_while_others_are_answered(x: Any) -> None:
    ledger = Ledger[Any](questions(), 5)
    for _ in range(11):
        ledger.add(x[:1])
    last, *others = [ledger.next(1.0) for _ in range(11)]
    for n, message in enumerate(others, 1):
        ledger.record(answer(message), 1.0 + 3 * n)
        ledger.record(refused(last), 1.0 + 3 * n)
        last = ledger.next(2.0 + 3 * n)
        assert last.sequence_id == 0
    assert ledger.take() == []
    ledger.record(refused(last), 33.0)
    ledger.record(refused(ledger.next(34.0)), 35.5)  # nobody else is answered any more
    assert isinstance(ledger.take()[0], Overloaded)


def test_a_stream_that_is_gone_takes_nothing_from_the_new_one(
    x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "delay", lambda _: 0.0)
    streams, late = list[Any](), list[Any]()

    def answers(messages: Iterator[Any]) -> Iterator[Any]:
        streams.append(messages)
        if len(streams) == 1:
            next(messages)
            raise CutError
        late.append(next(streams[0], None))
        yield from map(answer, messages)

    feed = BlockingFeed(lambda messages: Stream(answers(messages)), questions(), 30)
    assert len(list(feed.outcomes([*x[:3, None]]))) == 3

    async def async_answers(messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        streams.append(messages)
        if len(streams) == 1:
            await anext(messages)
            raise CutError
        late.append(await anext(streams[0], None))
        async for message in messages:
            yield answer(message)

    async def ask() -> int:
        feed = AsyncFeed(lambda messages: Stream(async_answers(messages)), questions(), 30)
        return len([outcome async for outcome in feed.outcomes([*x[:3, None]])])

    streams.clear()
    assert asyncio.run(ask()) == 3
    assert late == [None, None]


def test_an_answer_that_cannot_be_read_ends_a_feed_at_once(x: Any) -> None:
    class UnreadableError(Exception):
        pass

    def read(response: Any, _: tuple[int, ...]) -> Any:
        raise UnreadableError

    async def answers(messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for message in messages:
            yield answer(message)

    async def ask() -> None:
        feed = AsyncFeed(lambda messages: Stream(answers(messages)), questions(read), 30)
        async for _ in feed.outcomes([x[:1]]):
            pass

    with pytest.raises(UnreadableError):
        asyncio.run(ask())
    feed = BlockingFeed(lambda messages: Stream(map(answer, messages)), questions(read), 30)
    with pytest.raises(UnreadableError):
        list(feed.outcomes([x[:1]]))


def test_a_feed_of_a_client_that_is_closed_ends(live: Live, x: Any) -> None:
    async def ask() -> None:
        other = AsyncClient(live.address, timeout=30)
        begun = asyncio.Event()

        async def source() -> AsyncIterator[Any]:
            yield x[:1]
            await asyncio.Event().wait()

        async def read() -> None:
            async for _ in other.score_stream(source()):
                begun.set()

        reading = asyncio.create_task(read())
        await begun.wait()
        await other.close()
        with pytest.raises(LikelyError, match="closed"):
            await asyncio.wait_for(reading, 10)

    live.run(ask())


def test_a_consumer_that_holds_the_loop_finds_what_comes_after(x: Any) -> None:
    async def answers(messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for message in messages:
            for _ in range(5):  # turns of the loop, as grpc needs some
                await asyncio.sleep(0)
            yield answer(message)

    async def ask() -> int:
        feed = AsyncFeed(lambda messages: Stream(answers(messages)), questions(), 0.5)
        count = 0
        async for _ in feed.outcomes([*x[:10, None]]):
            count += 1
            if count == 3:
                time.sleep(0.6)
        return count

    assert asyncio.run(ask()) == 10


def test_others_run_while_a_synchronous_source_is_read(x: Any) -> None:
    async def answers(messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for message in messages:
            yield answer(message)

    async def ask() -> list[int]:
        turns, seen = 0, list[int]()

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        def source() -> Iterator[Any]:
            for _ in range(20):
                seen.append(turns)
                yield x[:1]

        running = asyncio.create_task(other())
        feed = AsyncFeed(lambda messages: Stream(answers(messages)), questions(), 30)
        assert len([outcome async for outcome in feed.outcomes(source())]) == 20
        running.cancel()
        return seen

    seen = asyncio.run(ask())
    assert len(set(seen)) == len(seen)


def test_a_source_that_was_cancelled_ends_its_feed(x: Any) -> None:
    async def answers(messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for message in messages:
            yield answer(message)

    async def source() -> AsyncIterator[Any]:
        yield x[:1]
        raise asyncio.CancelledError

    async def ask() -> int:
        feed = AsyncFeed(lambda messages: Stream(answers(messages)), questions(), 30)
        count = 0
        async with asyncio.timeout(5) as limit:
            with pytest.raises(asyncio.CancelledError):
                async for _ in feed.outcomes(source()):
                    count += 1
        assert not limit.expired()
        return count

    assert asyncio.run(ask()) == 1


class Breaking(grpc.GenericRpcHandler):
    """Breaks every stream, and has another server answer all else.

    Attributes:
        streams: the metadata of each.
    """

    def __init__(self, others: grpc.Channel) -> None:
        self.streams: list[dict[str, str | bytes]] = []
        self._others = others

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler[Any, Any]:
        method = handler_call_details.method
        if not method.endswith("Stream"):
            answer: Any = self._others.unary_unary(method)
            return grpc.unary_unary_rpc_method_handler(lambda request, _: answer(request))
        self.streams.append(dict(handler_call_details.invocation_metadata))
        return grpc.stream_stream_rpc_method_handler(self._refuse)

    def _refuse(self, _: Any, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")


@pytest.mark.parametrize("method", ["score_stream", "classify_stream"])
def test_a_broken_stream_is_begun_anew_by_the_feed_and_not_by_grpc(
    live: Live, x: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What gRPC sends anew of a stream may never be answered."""
    monkeypatch.setattr(feeds, "delay", lambda _: 0.0)
    with grpc.insecure_channel(live.address) as others:
        breaking, server = Breaking(others), grpc.server(ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((breaking,))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            with Client(address, timeout=30) as client, pytest.raises(Unavailable, match="not now"):
                list(getattr(client, method)([x[:1]]))
        finally:
            server.stop(None).wait()
    assert len(breaking.streams) == feeds.MAX_BREAKS
    assert not any("grpc-previous-rpc-attempts" in stream for stream in breaking.streams)


class Hanging(Breaking):
    """A server that ends every stream after a while, without an answer."""

    def __init__(self, others: grpc.Channel, seconds: float) -> None:
        super().__init__(others)
        self.seconds = seconds

    def _refuse(self, _: Any, context: grpc.ServicerContext) -> None:
        time.sleep(self.seconds)
        super()._refuse(_, context)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("idle", [True, False])
def test_streams_that_have_nothing_to_answer_may_break_as_often_as_they_like(
    live: Live, x: Any, idle: bool, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "delay", lambda _: 0.0)
    monkeypatch.setattr(feeds, "LONGEST_DELAY", 0.02)
    with grpc.insecure_channel(live.address) as others:
        hanging, server = Hanging(others, 0.04), grpc.server(ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((hanging,))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()

        def items() -> Iterator[Any]:
            until = time.monotonic() + 30
            while idle and len(hanging.streams) < 2 * feeds.MAX_BREAKS:
                assert time.monotonic() < until
                time.sleep(0.01)
            yield x[:1]

        async def paused() -> AsyncIterator[Any]:
            until = time.monotonic() + 30
            while idle and len(hanging.streams) < 2 * feeds.MAX_BREAKS:
                assert time.monotonic() < until
                await asyncio.sleep(0.01)
            yield x[:1]

        async def ask() -> None:
            async with AsyncClient(address, timeout=30) as client:
                async for _ in client.score_stream(paused()):
                    pass

        try:
            with pytest.raises(Unavailable, match="not now"):
                if kind is AsyncClient:
                    asyncio.run(ask())
                else:
                    with Client(address, timeout=30) as client:
                        list(client.score_stream(items()))
        finally:
            server.stop(None).wait()
    earlier = 2 * feeds.MAX_BREAKS if idle else 0
    assert earlier < len(hanging.streams) <= earlier + feeds.MAX_BREAKS


def test_what_a_feed_raises_comes_after_the_answers(live: Live, client: Client, x: Any) -> None:
    class BrokenError(Exception):
        pass

    def feed() -> Iterator[Any]:
        yield from x[:10, None]
        raise BrokenError

    found = []
    with pytest.raises(BrokenError):
        for outcome in client.score_stream(feed()):
            found.append(outcome)  # noqa: PERF402
    assert len(found) == 10

    async def ask() -> int:
        count = 0
        async with AsyncClient(live.address, timeout=30) as other:
            with pytest.raises(BrokenError):
                async for _ in other.score_stream(feed()):
                    count += 1
        return count

    assert live.run(ask()) == 10


def test_a_feed_is_read_only_a_little_ahead(client: Client, x: Any) -> None:
    read = 0

    def feed() -> Iterator[Any]:
        nonlocal read
        for n in range(5000):
            read += 1
            yield x[n % 400][None]

    outcomes = client.score_stream(feed())
    for taken in range(1, 20):
        next(outcomes)
        assert read <= taken + 2 * WINDOW + 1
    outcomes.close()  # type: ignore[attr-defined]
    assert client.score(x[:1]).log_px.shape == (1,)


def test_a_quota_slows_a_feed_and_loses_nothing(running: Running, x: Any) -> None:
    with (
        running(client_images_per_second=200, client_images_at_once=20) as live,
        Client(live.address, timeout=30) as client,
    ):
        outcomes = both(live, client, "score_stream", [*x[:60, None]])
    assert all(isinstance(outcome, Scores) for found in outcomes for outcome in found)


def test_what_stays_refused_is_told_in_the_end(
    running: Running, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"client_images_per_second": 0.01, "client_images_at_once": 2}
    with running(**limits) as live, Client(live.address, timeout=30) as client:
        client.model()  # the connection is made
        monkeypatch.setattr(client, "_timeout", 3)
        found = list(client.score_stream([*x[:3, None]]))
    assert [isinstance(outcome, Scores) for outcome in found] == [True, True, False]
    assert isinstance(found[2], Overloaded)


def test_a_client_without_retries_leaves_a_feed_at_what_is_refused(
    running: Running, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_: int) -> float:
        raise AssertionError

    monkeypatch.setattr(feeds, "delay", forbidden)
    streams = 0

    def broken(_: Any) -> Iterator[Any]:
        nonlocal streams
        streams += 1
        raise CutError
        yield

    feed = BlockingFeed(lambda each: Stream(broken(each)), questions(), 30, retries=False)
    with pytest.raises(Unavailable, match="not now"):
        list(feed.outcomes([x[:1]]))
    limits = {"client_images_per_second": 0.2, "client_images_at_once": 2}
    with running(**limits) as live, Client(live.address, timeout=30, retries=False) as client:

        async def ask() -> list[Any]:
            async with AsyncClient(live.address, timeout=30, retries=False) as other:
                return [outcome async for outcome in other.score_stream([*x[:5, None]])]

        for outcomes in (list(client.score_stream([*x[:5, None]])), live.run(ask())):
            assert any(isinstance(outcome, Overloaded) for outcome in outcomes)
    assert streams == 1


def test_a_broken_stream_is_begun_anew_and_nothing_is_lost(
    running: Running, toy: Toy, x: Any
) -> None:
    asked = threading.Event()
    resumed = threading.Event()
    found: list[Scores | LikelyError] = []

    def feed() -> Iterator[Any]:
        for n, each in enumerate(x):
            if n == 200:
                asked.set()
                assert resumed.wait(60)
            yield each[None]

    with running() as first:
        port, address = first.server.port, first.address
        client = Client(address, timeout=60)

        def ask() -> None:
            found.extend(client.score_stream(feed()))

        thread = threading.Thread(target=ask)
        thread.start()
        assert asked.wait(60)
    with running(port=port):
        resumed.set()
        thread.join(60)
    client.close()
    assert all(isinstance(outcome, Scores) for outcome in found)
    log_px = [outcome.log_px[0] for outcome in found if isinstance(outcome, Scores)]
    np.testing.assert_allclose(log_px, toy.log_px(x), atol=1e-4)


def test_a_server_that_is_gone_ends_a_feed(
    running: Running, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("likely.client.feeds.delay", lambda _: 0.01)
    with running() as live:
        client = Client(live.address, timeout=30)
        client.model()
    with client, pytest.raises(Unavailable):
        list(client.score_stream([x[:1]]))


def test_no_answer_in_time_ends_a_feed(
    live: Live, client: Client, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stuck(*_: Any, **__: Any) -> None:
        await asyncio.sleep(30)

    async def ask() -> None:
        async with AsyncClient(live.address, timeout=30) as other:
            await other.model()
            monkeypatch.setattr(other, "_timeout", 0.2)
            with pytest.raises(DeadlineExceeded):
                [outcome async for outcome in other.score_stream([x[:1]])]

    client.model()
    monkeypatch.setattr(live.server.registry.find("toy"), "score", stuck)
    live.run(ask())
    monkeypatch.setattr(client, "_timeout", 0.2)
    with pytest.raises(DeadlineExceeded):
        list(client.score_stream([x[:1]]))


def test_a_question_that_the_model_cannot_answer(
    running: Running, make_toy: Callable[..., Toy], x: Any
) -> None:
    bare = make_toy("bare", roles=("density",))
    with running(bundles=(bare.path,)) as live, Client(live.address) as client:
        (outcome,) = client.classify_stream([x[:1]])
    assert isinstance(outcome, NotAnswered)
