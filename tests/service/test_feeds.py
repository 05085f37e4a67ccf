"""Feeds: what one stream asks is merged, bounded, and answered or refused message by message."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from likely import codec, errors, statuses
from likely.answers import Limits
from likely.batching.admission import Quota
from likely.batching.traffic import Traffic
from likely.serving import feeds, merging
from likely.serving.doors import Door
from likely.v1 import scoring_pb2
from likely.v1.images_pb2 import Images
from likely.v1.scoring_pb2 import (
    ClassifyRequest,
    ClassifyStreamRequest,
    ScoreRequest,
    ScoreResponse,
    ScoreStreamRequest,
)
from likely.v1.scoring_pb2_grpc import ScoringServiceStub

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy

LIMITS = Limits(100, 100, 8, 1 << 20)


@pytest.fixture
def stub(live: Live) -> Iterator[ScoringServiceStub]:
    with grpc.insecure_channel(live.address) as channel:
        yield ScoringServiceStub(channel)


@pytest.fixture
def x(toy: Toy) -> Any:
    return toy.draw(np.random.default_rng(3), 120)


def score(x: Any, **more: Any) -> ScoreRequest:
    return ScoreRequest(**{"model_name": "toy", "images": codec.images(x), **more})


def outcomes_of(stub: ScoringServiceStub, requests: list[Any]) -> dict[int, Any]:
    """The outcome of each message of a stream, by its number; each comes once."""
    kind: Any
    kind, call = (
        (ScoreStreamRequest, stub.ScoreStream)
        if isinstance(requests[0], ScoreRequest)
        else (ClassifyStreamRequest, stub.ClassifyStream)
    )
    messages = [kind(sequence_id=n, request=each) for n, each in enumerate(requests)]
    found: Any = call(iter(messages), timeout=60)
    outcomes = [outcome for answer in found for outcome in answer.outcomes]
    by_number = {outcome.sequence_id: outcome for outcome in outcomes}
    assert len(outcomes) == len(by_number) == len(requests)
    return by_number


def cut(x: Any, sizes: tuple[int, ...]) -> list[Any]:
    """The pictures, so many at a time, again and again."""
    parts, at, n = [], 0, 0
    while at < len(x):
        size = sizes[n % len(sizes)]
        parts.append(x[at : at + size])
        at, n = at + max(size, 0), n + 1
    return parts


def test_each_message_is_answered_as_a_call_of_its_own(stub: ScoringServiceStub, x: Any) -> None:
    settings: list[dict[str, Any]] = [{}, {"surprise": True}, {"alpha": 0.2}, {}, {}]
    parts = cut(x, (1, 1, 3, 0, 70))
    requests = [score(part, **settings[n // 7 % 5]) for n, part in enumerate(parts)]
    for n, outcome in outcomes_of(stub, requests).items():
        shape = parts[n].shape if requests[n].surprise else None
        mine, alone = (
            codec.scores(outcome.response, shape),
            codec.scores(stub.Score(requests[n]), shape),
        )
        assert mine.alpha == alone.alpha
        # A graph that export did not write may differ in a last digit, in batches.
        np.testing.assert_allclose(mine.log_px, alone.log_px, rtol=1e-6)
        if mine.surprise is not None and alone.surprise is not None:
            np.testing.assert_allclose(mine.surprise, alone.surprise, rtol=1e-6)
    priors = [[], [0.1, 0.2, 0.7]]
    asked = [
        ClassifyRequest(model_name="toy", images=codec.images(part), priors=priors[n // 9 % 2])
        for n, part in enumerate(parts)
    ]
    for n, outcome in outcomes_of(stub, asked).items():
        found = codec.classifications(outcome.response, 3)
        expected = codec.classifications(stub.Classify(asked[n]), 3)
        np.testing.assert_allclose(found.posterior, expected.posterior, rtol=1e-5)
        assert len(found.label) == len(parts[n])


def test_a_bad_message_is_refused_alone(stub: ScoringServiceStub, x: Any) -> None:
    def raw(data: bytes, *shape: int) -> ScoreRequest:
        return ScoreRequest(model_name="toy", images=Images(data=data, shape=shape))

    good = score(x[:1])
    bad = {
        "images.data": [raw(bytes(8), 1, 1, 3, 3), raw(bytes(10), 1, 1, 3, 3), score(x[:1] + 4)],
        "images.shape": [raw(bytes(9), 9)],
        "images.shape[0]": [raw(b"", -1, 1, 3, 3)],
        "images.shape[2]": [raw(bytes(9), 1, 1, 9, 1)],
        "alpha": [score(x[:1], alpha=2)],
        "guarantee": [score(x[:1], guarantee=7)],
        "model_name": [score(x[:1], model_name="other"), score(x[:1], model_name="")],
        "model_version": [score(x[:1], model_version="!")],
    }
    flat = [(field, request) for field, requests in bad.items() for request in requests]
    requests = [good, *(each for _, request in flat for each in (request, good))]
    outcomes = outcomes_of(stub, requests)
    alone = stub.Score(good)
    for n in range(0, len(requests), 2):
        assert outcomes[n].response == alone
    for n, (field, _) in enumerate(flat):
        assert outcomes[2 * n + 1].failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        error = statuses.error_of(outcomes[2 * n + 1].failure)
        assert isinstance(error, errors.InvalidInput)
        assert error.field == field


def test_messages_are_merged_as_far_as_one_request_may_go_and_parted_as_little_as_needed(
    running: Running, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(images_per_request=16) as live, grpc.insecure_channel(live.address) as channel:
        engine, asked = live.server.registry.find("toy"), list[int]()
        ask, cursed = engine.score, x[17]

        async def noted(x: Any, *args: Any, **more: Any) -> Any:
            asked.append(len(x))
            await asyncio.sleep(0.05)  # all messages have come by the second
            if any(np.array_equal(each, cursed) for each in x):
                raise errors.Overloaded("not this one")
            return await ask(x, *args, **more)

        monkeypatch.setattr(engine, "score", noted)
        outcomes = outcomes_of(ScoringServiceStub(channel), [score(each[None]) for each in x])
    failed = [n for n, outcome in outcomes.items() if outcome.HasField("failure")]
    assert failed == [n for n in range(len(x)) if np.array_equal(x[n], cursed)]
    assert max(asked) == 16
    assert len(asked) < len(x) / 2 + 10 * len(failed)


def test_what_no_message_causes_is_told_of_all_at_once(
    live: Live, stub: ScoringServiceStub, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()

    async def gone(x: Any, *_: Any, **__: Any) -> Any:
        asked.append(len(x))
        await asyncio.sleep(0.05)  # all messages have come by the second
        raise errors.Unavailable("the queue failed and was restarted")

    monkeypatch.setattr(live.server.registry.find("toy"), "score", gone)
    outcomes = outcomes_of(stub, [score(each[None]) for each in x])
    codes = {outcome.failure.code for outcome in outcomes.values()}
    assert codes == {grpc.StatusCode.UNAVAILABLE.value[0]} and len(outcomes) == len(x)
    assert sum(asked) == len(x) > len(asked)


def test_an_unknown_model_or_version_is_not_found(stub: ScoringServiceStub, x: Any) -> None:
    (outcome,) = outcomes_of(stub, [score(x[:1], model_name="other")]).values()
    error = statuses.error_of(outcome.failure)
    assert isinstance(error, errors.ModelNotFound)
    assert error.resource == "other"
    outcomes = outcomes_of(stub, [score(x[:1], model_version="9"), score(x[:1])])
    assert isinstance(statuses.error_of(outcomes[0].failure), errors.ModelNotFound)
    assert len(outcomes[1].response.scores) == 1


def test_a_fault_is_of_one_message_and_tells_nothing_but_its_request_id(
    live: Live, stub: ScoringServiceStub, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = live.server.registry.find("toy")
    ask, cursed = engine.score, x[17]

    async def broken(x: Any, *args: Any, **more: Any) -> Any:
        if any(np.array_equal(each, cursed) for each in x):
            raise RuntimeError("the secret of the house")
        return await ask(x, *args, **more)

    monkeypatch.setattr(engine, "score", broken)
    outcomes = outcomes_of(stub, [score(each[None]) for each in x])
    failed = [n for n, outcome in outcomes.items() if outcome.HasField("failure")]
    assert failed == [n for n in range(len(x)) if np.array_equal(x[n], cursed)]
    failure = outcomes[17].failure
    assert failure.code == grpc.StatusCode.INTERNAL.value[0]
    lines = [json.loads(line) for line in live.log.getvalue().splitlines()]
    fault = [line for line in lines if line["event"] == "fault"][-1]
    assert failure.message == f"internal error, request {fault['request_id']}"
    assert b"secret" not in failure.SerializeToString()
    assert "the secret of the house" in fault["exception"]


def test_bytes_that_are_no_message_end_the_stream(live: Live) -> None:
    with grpc.insecure_channel(live.address) as channel:
        call: Any = channel.stream_stream("/likely.v1.ScoringService/ScoreStream")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([b"\xff" * 40]), timeout=30))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_messages_are_counted(running: Running, x: Any) -> None:
    with running() as live:
        with grpc.insecure_channel(live.address) as channel:
            outcomes_of(
                ScoringServiceStub(channel),
                [score(x[:3]), score(x[:1], alpha=2.0), score(x[:1]), score(x[:1], model_name="o")],
            )
        with urllib.request.urlopen(live.metrics_url, timeout=10) as answer:
            text = answer.read().decode()
    for line in (
        'likely_images_total{method="ScoreStream",model="toy"} 4.0',
        'likely_stream_messages_total{code="OK",method="ScoreStream",model="toy"} 2.0',
        'likely_stream_messages_total{code="INVALID_ARGUMENT",method="ScoreStream",model="toy"} '
        "2.0",
        'likely_requests_total{code="OK",method="ScoreStream",model="toy"} 1.0',
        'likely_requests_in_flight{method="ScoreStream"} 0.0',
    ):
        assert line in text


def test_a_server_that_ends_answers_what_it_read(running: Running, x: Any) -> None:
    with running() as live, grpc.insecure_channel(live.address) as channel:
        hold = asyncio.Event()

        def messages() -> Iterator[ScoreStreamRequest]:
            for n in range(20):
                yield ScoreStreamRequest(sequence_id=n, request=score(x[n : n + 1]))
            asyncio.run_coroutine_threadsafe(hold.wait(), live.loop).result(60)  # open, and idle

        found: Any = ScoringServiceStub(channel).ScoreStream(messages(), timeout=60)
        answered = 0
        while answered < 20:
            answered += len(next(found).outcomes)
        live.run(live.server.stop(30))  # would take half a minute if it waited for the stream
        with pytest.raises(grpc.RpcError) as caught:
            next(found)
        live.loop.call_soon_threadsafe(hold.set)
        error = statuses.error(caught.value)
        assert isinstance(error, errors.Unavailable)


class Fed:
    """A feed whose messages, answers and door are at hand."""

    def __init__(self, count: int, answer: Callable[[Any], Any], door: Door | None = None) -> None:
        self.read = 0
        self._count = count
        self.feed: feeds.Feed[Any] = feeds.Feed(answer, door or Door(), LIMITS)

    async def messages(self) -> AsyncIterator[ScoreStreamRequest]:
        request = score(np.zeros((1, 1, 3, 3), np.uint8))
        for n in range(self._count):
            self.read += 1
            yield ScoreStreamRequest(sequence_id=n, request=request)
            await asyncio.sleep(0)


async def empty(request: ScoreRequest) -> ScoreResponse:
    return ScoreResponse(
        scores=[scoring_pb2.Score() for _ in range(request.images.shape[0])], model_version="1"
    )


def test_what_is_not_answered_is_bounded() -> None:
    async def run() -> None:
        go = asyncio.Event()

        async def stuck(request: ScoreRequest) -> ScoreResponse:
            await go.wait()
            return await empty(request)

        fed = Fed(1000, stuck)
        async with aclosing(fed.feed.outcomes(fed.messages())) as found:
            first = asyncio.ensure_future(anext(found))
            for _ in range(3000):
                await asyncio.sleep(0)
            assert fed.read == feeds.MAX_UNANSWERED
            go.set()
            count = len(await first)
            async for outcomes in found:
                assert fed.read - count <= feeds.MAX_UNANSWERED
                count += len(outcomes)
        assert count == fed.read == 1000

    asyncio.run(run())


def test_what_comes_while_a_run_lasts_is_run_together() -> None:
    async def run() -> None:
        sizes: list[int] = []
        all_read = asyncio.Event()

        async def slow(request: ScoreRequest) -> ScoreResponse:
            sizes.append(request.images.shape[0])
            await all_read.wait()
            return await empty(request)

        fed = Fed(200, slow)
        async with aclosing(fed.feed.outcomes(fed.messages())) as found:
            first = asyncio.ensure_future(anext(found))
            while fed.read < 200:
                await asyncio.sleep(0)
            all_read.set()
            numbers = [n for n, _ in await first]
            numbers += [n async for outcomes in found for n, _ in outcomes]
        assert sorted(numbers) == list(range(200))
        assert sum(sizes) == 200
        assert max(sizes) == feeds.MAX_GROUP_ROWS
        assert len(sizes) <= feeds.CONCURRENT_GROUPS + -(-200 // feeds.MAX_GROUP_ROWS)

    asyncio.run(run())


def test_a_message_that_is_refused_is_counted_once() -> None:
    async def run() -> None:
        traffic, sizes = Traffic(), []
        quota, all_read = Quota(1e-6, 4, traffic=traffic), asyncio.Event()
        quota.take("", 2)

        async def spent(request: ScoreRequest) -> ScoreResponse:
            await all_read.wait()
            sizes.append(merging.rows(request))
            with quota.charged(sizes[-1], "m"):
                return await empty(request)

        fed = Fed(40, spent)
        async with aclosing(fed.feed.outcomes(fed.messages())) as found:
            first = asyncio.ensure_future(anext(found))
            while fed.read < 40:
                await asyncio.sleep(0)
            all_read.set()
            outcomes = [*await first, *[each async for more in found for each in more]]
        assert max(sizes) > 1
        refused = [n for n, answer in outcomes if isinstance(answer, errors.Overloaded)]
        assert len(refused) == 38
        assert traffic.shed.labels("m", "quota")._value.get() == 38

    asyncio.run(run())


def test_answers_that_nobody_takes_are_bounded_too() -> None:
    async def run() -> None:
        fed = Fed(1000, empty)
        async with aclosing(fed.feed.outcomes(fed.messages())) as found:
            await anext(found)
            for _ in range(3000):
                await asyncio.sleep(0)
            assert fed.read == feeds.MAX_UNANSWERED

    asyncio.run(run())


@pytest.mark.parametrize("groups", [2, 16])
def test_no_more_is_computed_than_is_read(groups: int) -> None:
    """An answer may be a thousand times as large as its request."""
    computed = 0

    async def answer(request: ScoreRequest) -> ScoreResponse:
        nonlocal computed
        computed += 1
        return ScoreResponse(model_version=request.model_version)

    async def messages() -> AsyncIterator[ScoreStreamRequest]:
        for n in range(100):
            yield ScoreStreamRequest(sequence_id=n)

    async def read() -> None:
        feed: feeds.Feed[ScoreResponse] = feeds.Feed(
            answer, Door(), LIMITS, concurrent_groups=groups, merges=False
        )
        numbers = []
        async with aclosing(feed.outcomes(messages())) as found:
            async for outcomes in found:
                for _ in range(20):
                    await asyncio.sleep(0)  # as one who reads slowly
                numbers += [n for n, _ in outcomes]
                assert computed <= len(numbers) + groups
        assert sorted(numbers) == list(range(100))

    asyncio.run(read())


def test_a_closed_door_ends_a_feed_with_its_answers() -> None:
    async def run() -> None:
        door = Door()
        fed = Fed(1000, empty, door)
        numbers: list[int] = []
        with pytest.raises(errors.Unavailable):
            async with aclosing(fed.feed.outcomes(fed.messages())) as found:
                async for outcomes in found:
                    numbers += [n for n, _ in outcomes]
                    if len(numbers) > 100:
                        door.close()
        assert sorted(numbers) == list(range(fed.read))
        assert 100 < fed.read < 1000

    asyncio.run(run())


def test_a_feed_that_is_left_leaves_nothing_running() -> None:
    async def run() -> None:
        async def stuck(_: ScoreRequest) -> ScoreResponse:
            await asyncio.Event().wait()
            raise AssertionError

        fed = Fed(10, stuck)
        task = asyncio.ensure_future(anext(fed.feed.outcomes(fed.messages())))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=8), maps=st.booleans())
def test_merging_and_parting_lose_nothing(sizes: list[int], maps: bool) -> None:
    total = sum(sizes)
    x = np.arange(total * 4, dtype=np.uint8).reshape(total, 1, 2, 2)
    edges = np.cumsum([0, *sizes])
    parts = [x[a:b] for a, b in pairwise(edges)]
    whole = merging.merge([score(part) for part in parts])
    assert whole == score(x)
    answer = ScoreResponse(
        model_version="1",
        alpha=0.1,
        scores=[scoring_pb2.Score(p_value=n) for n in range(total)],
        surprise=x.tobytes() if maps else b"",
    )
    found = merging.split(answer, [score(part) for part in parts])
    for part, (a, b) in zip(found, pairwise(edges), strict=True):
        assert (part.model_version, part.alpha) == ("1", 0.1)
        assert [each.p_value for each in part.scores] == list(range(a, b))
        assert part.surprise == (x[a:b].tobytes() if maps else b"")
