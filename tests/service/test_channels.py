"""How clients reach one server or several, and what they do where one refuses or is gone."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from likely import AsyncClient, Client, SettingsError, codec
from likely.client.channels import Route
from likely.errors import LikelyError, Overloaded, Unavailable
from likely.v1.generation_pb2 import GenerateRequest
from likely.v1.scoring_pb2 import ScoreRequest
from likely.v1.scoring_pb2_grpc import ScoringServiceStub

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy

FEEDS = 30


@pytest.fixture
def x(toy: Toy) -> Any:
    return toy.draw(np.random.default_rng(4), 20)


def shown(method: Any) -> list[tuple[str, Any, Any]]:
    """A method's parameters: their names, kinds and defaults."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]


def test_both_clients_have_the_same_methods() -> None:
    methods = {name for name in vars(Client) if not name.startswith("_")}
    assert methods == {name for name in vars(AsyncClient) if not name.startswith("_")}
    assert {"score", "classify_stream", "complete", "close"} <= methods
    for name in (*methods, "__init__"):
        assert shown(getattr(Client, name)) == shown(getattr(AsyncClient, name)), name


@pytest.mark.parametrize(
    ("addresses", "sentence"),
    [
        (["localhost:50051"], "'localhost:50051' is no IP address with a port"),
        (["10.0.0.1"], "'10.0.0.1' is no IP address with a port"),
        (["10.0.0.1:1", "[::1]:2"], "all IPv4 or all IPv6"),
        ([], "one at least"),
    ],
)
def test_addresses_that_are_none_are_refused(addresses: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence.replace("[", r"\[")):
        Client(addresses)


def test_a_name_of_a_server_is_ascii() -> None:
    with pytest.raises(SettingsError, match="is no name of a server"):
        Client("127.0.0.1:1", server_name="\udce9")


def test_a_token_goes_unencrypted_to_no_other_machine_of_several() -> None:
    Route(["127.0.0.1:1", "127.0.0.2:2"], token="secret")
    for addresses in (["127.0.0.1:1", "10.0.0.1:2"], "dns:///models.example.org:1"):
        with pytest.raises(SettingsError, match="unencrypted"):
            Route(addresses, token="secret")


@pytest.mark.parametrize("token", ["", "\n", "two words", "secret\nx-admin: yes", "sécret", "a\0b"])
def test_a_token_that_is_no_header_is_one_sentence(token: str, live: Live, x: Any) -> None:
    with pytest.raises(SettingsError, match="one word of printable ASCII") as caught:
        Route(live.address, token=token)
    assert "secret" not in str(caught.value)
    with Client(live.address, token=lambda: token, timeout=30) as client:
        for ask in (client.models, lambda: client.score(x), lambda: [*client.score_stream([x])]):
            with pytest.raises(SettingsError, match="one word of printable ASCII"):
                ask()

    async def work() -> None:
        async with AsyncClient(live.address, token=lambda: token, timeout=30) as other:
            with pytest.raises(SettingsError, match="one word of printable ASCII"):
                await other.score(x)
            with pytest.raises(SettingsError, match="one word of printable ASCII"):
                _ = [outcome async for outcome in other.score_stream([x])]

    asyncio.run(work())


@pytest.mark.parametrize("token", [None, b"secret"])
def test_a_function_that_gives_no_text_gives_no_token(token: Any) -> None:
    with pytest.raises(SettingsError, match="one word of printable ASCII"):
        Route("127.0.0.1:1", token=lambda: token).metadata()


def test_the_end_of_a_line_is_no_part_of_a_token(live: Live) -> None:
    for token in ("secret\n", lambda: " secret\r\n"):
        assert Route(live.address, token=token).metadata() == (("authorization", "Bearer secret"),)
        with Client(live.address, token=token, timeout=30) as client:
            assert client.models()

        async def work(token: Any = token) -> None:
            async with AsyncClient(live.address, token=token, timeout=30) as other:
                assert await other.models()

        asyncio.run(work())


def test_a_name_is_looked_up_and_a_replica_tried_often(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []
    for module in (grpc, grpc.aio):
        monkeypatch.setattr(
            module, "insecure_channel", lambda _, options: opened.append(dict(options))
        )
    route = Route("dns:///models.example.org:1")
    route.channel()
    route.aio_channel()
    for options in opened:
        assert options["grpc.dns_min_time_between_resolutions_ms"] == 1000  # of 30000
        assert options["grpc.max_reconnect_backoff_ms"] == 2000  # of 120000
    assert len(opened) == 2


@pytest.mark.parametrize("address", ["127.0.0.1:PORT", "localhost:PORT", ["127.0.0.1:PORT"]])
def test_no_proxy_hears_what_goes_to_this_machine(
    live: Live, address: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        filled = json.loads(json.dumps(address).replace("PORT", str(live.server.port)))
        with Client(filled, token="secret", timeout=30) as client:
            described = client.model()

        async def ask() -> None:
            async with AsyncClient(filled, token="secret", timeout=30) as other:
                assert await other.model() == described

        live.run(ask())


def counted(live: Live, monkeypatch: pytest.MonkeyPatch, tally: Counter[int], name: int) -> None:
    engine = live.server.registry.find("toy")
    score = engine.score

    async def counting(*args: Any, **more: Any) -> Any:
        tally[name] += 1
        return await score(*args, **more)

    monkeypatch.setattr(engine, "score", counting)


def test_replicas_take_turns_and_one_that_ends_is_left_out(
    running: Running, toy: Toy, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally: Counter[int] = Counter()
    with running() as stays:
        with running() as goes:
            counted(stays, monkeypatch, tally, 0)
            counted(goes, monkeypatch, tally, 1)
            client = Client([stays.address, goes.address], timeout=30)
            client.model()
            while min(tally[0], tally[1]) < 10:  # both are connected, and found healthy
                client.score(x[:1])
        before = tally.copy()
        for each in x:
            np.testing.assert_allclose(
                client.score(each[None]).log_px, toy.log_px(each[None]), atol=1e-4
            )
        assert tally[1] == before[1]
        assert tally[0] == before[0] + len(x)
        client.close()


def test_a_replica_that_is_not_ready_gets_nothing(
    running: Running, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running() as ready, running(load=False) as loading:
        asked: list[str] = []
        find = loading.server.registry.lease

        def noted(name: str, version: str = "") -> Any:
            asked.append(name)
            return find(name, version)

        monkeypatch.setattr(loading.server.registry, "lease", noted)
        with Client([loading.address, ready.address], timeout=30) as client:
            for _ in range(30):
                client.score(x[:1])
    assert not asked


def test_a_refused_request_comes_again_when_the_server_said(
    running: Running, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = np.tile(x, (2000, 1, 1, 1))  # more than gRPC keeps of a request by itself
    with running(images_per_request=1 << 20) as live, Client(live.address, timeout=30) as client:
        client.model()
        engine, came = live.server.registry.find("toy"), list[float]()
        score = engine.score

        async def busy(*args: Any, **more: Any) -> Any:
            came.append(time.monotonic())
            if len(came) < 3:
                raise Overloaded("busy", retry_after=0.6)  # gRPC's own delay would be 0.2
            return await score(*args, **more)

        monkeypatch.setattr(engine, "score", busy)
        assert len(client.score(x[:1]).log_px) == 1
        assert len(came) == 3
        assert min(np.diff(came)) >= 0.59
        came.clear()
        assert len(client.score(large).log_px) == len(large)
        assert len(came) == 3


class Stopping(grpc.GenericRpcHandler):
    """Cancels the first request of each, as a server that stops, and has another server answer.

    Of the streams it cancels so many.
    """

    def __init__(self, others: grpc.Channel, streams: int = 1) -> None:
        self.asked: Counter[str] = Counter()
        self._others = others
        self._streams = streams

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler[Any, Any]:
        method = handler_call_details.method
        self.asked[method] += 1
        first = self.asked[method] <= (self._streams if method.endswith("Stream") else 1)

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            if first:
                context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")
            forwarded: Any = self._others.unary_unary(method)
            return forwarded(request)

        def answers(messages: Any, context: grpc.ServicerContext) -> Any:
            if first:
                context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")
            forwarded: Any = self._others.stream_stream(method)
            yield from forwarded(messages)

        if method.endswith("Stream"):
            return grpc.stream_stream_rpc_method_handler(answers)
        return grpc.unary_unary_rpc_method_handler(answer)


def test_what_a_server_cancelled_is_asked_again(live: Live, x: Any) -> None:
    async def ask(address: str) -> None:
        async with AsyncClient(address, timeout=30) as other:
            assert len((await other.score(x)).log_px) == len(x)
            assert len([each async for each in other.score_stream([x])]) == 1

    with grpc.insecure_channel(live.address) as others:
        for turn in range(2):
            stopping, server = Stopping(others), grpc.server(ThreadPoolExecutor(4))
            server.add_generic_rpc_handlers((stopping,))
            address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            server.start()
            try:
                if turn:
                    live.run(ask(address))
                else:
                    with Client(address, timeout=30) as client:
                        assert len(client.score(x).log_px) == len(x)
                        assert len(list(client.score_stream([x]))) == 1
            finally:
                server.stop(None).wait()
            assert set(stopping.asked.values()) == {2}


def test_a_stream_whose_status_was_lost_is_asked_again(live: Live, x: Any) -> None:
    # Of a stream that ends while it is sent on, asyncio's gRPC says "Internal error from Core",
    # about one time in seven.
    async def ask(other: AsyncClient) -> None:
        assert len([each async for each in other.score_stream([x] * 40)]) == 40

    async def ask_often(address: str) -> None:
        async with AsyncClient(address, timeout=30) as other:
            await other.model()
            await asyncio.gather(*(ask(other) for _ in range(FEEDS)))

    with grpc.insecure_channel(live.address) as others:
        stopping, server = Stopping(others, FEEDS), grpc.server(ThreadPoolExecutor(2 * FEEDS))
        server.add_generic_rpc_handlers((stopping,))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            live.run(ask_often(address))
        finally:
            server.stop(None).wait()
    [streams] = [count for method, count in stopping.asked.items() if method.endswith("Stream")]
    assert streams == 2 * FEEDS


class Breaking(grpc.GenericRpcHandler):
    """Has another server answer, and breaks each stream of draws off after so many chunks."""

    def __init__(self, others: grpc.Channel, chunks: int) -> None:
        self.asked: list[GenerateRequest] = []
        self._others = others
        self._chunks = chunks

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler[Any, Any]:
        method = handler_call_details.method

        def answers(request: bytes, context: grpc.ServicerContext) -> Any:
            self.asked.append(GenerateRequest.FromString(request))
            forwarded: Any = self._others.unary_stream(method)
            drawing = forwarded(request)
            for chunk, message in enumerate(drawing, 1):
                yield message
                if chunk == self._chunks:
                    drawing.cancel()
                    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

        if method.endswith("/Generate"):
            return grpc.unary_stream_rpc_method_handler(answers)
        forwarded: Any = self._others.unary_unary(method)
        return grpc.unary_unary_rpc_method_handler(lambda request, _: forwarded(request))


@pytest.fixture
def breaking(running: Running) -> Iterator[Callable[[int], AbstractContextManager[Any]]]:
    """What stands before a server that draws in chunks of 2, in requests of 10."""

    @contextmanager
    def begin(chunks: int) -> Iterator[tuple[Breaking, str, str]]:
        breaking, server = Breaking(others, chunks), grpc.server(ThreadPoolExecutor(4))
        server.add_generic_rpc_handlers((breaking,))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield breaking, address, live.address
        finally:
            server.stop(None).wait()

    with (
        running(images_per_chunk=2, images_per_generation=10) as live,
        grpc.insecure_channel(live.address) as others,
    ):
        yield begin


@pytest.mark.parametrize("seed", [None, 7])
def test_draws_go_on_where_their_stream_broke_off(
    breaking: Callable[[int], AbstractContextManager[Any]], seed: int | None
) -> None:
    async def generate(address: str, seed: int) -> Any:
        async with AsyncClient(address) as client:
            return await client.generate(15, seed=seed)

    with breaking(2) as (between, address, there):
        with Client(address) as client, Client(there) as direct:
            drawn = client.generate(15, seed=seed)
            again = direct.generate(15, seed=drawn.seed)
        parts = [(request.first_index, request.count) for request in between.asked]
        # Ten in three streams; of the last five, the third stream has the last one.
        assert parts == [(0, 10), (4, 6), (8, 2), (10, 5), (14, 1)]
        assert {request.seed for request in between.asked[1:]} == {drawn.seed}
        other = asyncio.run(generate(address, drawn.seed))
    for each in (again, other):
        assert np.array_equal(drawn.images, each.images)
        assert np.array_equal(drawn.label, each.label)


def test_draws_that_break_off_at_once_or_shall_not_be_asked_again_fail(
    breaking: Callable[[int], AbstractContextManager[Any]],
) -> None:
    with breaking(1) as (between, address, _):
        with Client(address, retries=False) as client, pytest.raises(Unavailable):
            client.generate(4, seed=1)
        assert len(between.asked) == 1


def test_what_its_caller_cancels_ends_at_once(
    live: Live, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Semaphore(0)

    async def stuck(*_: Any, **__: Any) -> None:
        asked.release()
        await asyncio.sleep(60)

    async def ask() -> None:
        async with AsyncClient(live.address, timeout=50) as other:
            task = asyncio.create_task(other.score(x[:1]))
            while not asked.acquire(blocking=False):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with Client(live.address, timeout=50) as client, ThreadPoolExecutor(1) as aside:
        client.model()
        monkeypatch.setattr(live.server.registry.find("toy"), "score", stuck)
        live.run(ask())
        waiting = aside.submit(client.score, x[:1])
        assert asked.acquire(timeout=30)
        client.close()
        with pytest.raises(LikelyError, match="was closed before all was answered"):
            waiting.result(30)
    assert not asked.acquire(blocking=False)


def test_a_client_after_a_fork_says_so(live: Live, x: Any) -> None:
    with Client(live.address, timeout=30) as client:
        client.score(x[:1])
        reading, writing = os.pipe()
        with warnings.catch_warnings():  # of the very thing that this is about
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:  # nothing of pytest's may run here
            try:
                client.score(x[:1])
                outcome = "answered"
            except BaseException as error:
                outcome = f"{type(error).__name__}: {error}"
            os.write(writing, outcome.encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            outcome = pipe.read()
        os.waitpid(child, 0)
        assert outcome.startswith(f"Forked: this client was used in process {os.getpid()}")
        assert len(client.score(x[:1]).log_px) == 1


def test_what_asks_once_does_not_ask_again(
    live: Live, x: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def busy(*_: Any, **__: Any) -> None:
        asked.append("score")
        raise Overloaded("busy", retry_after=0.01)

    monkeypatch.setattr(live.server.registry.find("toy"), "score", busy)
    request = ScoreRequest(model_name="toy", images=codec.images(x))
    with (
        Route(live.address).channel(once=True) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        ScoringServiceStub(channel).Score(request, timeout=30)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert asked == ["score"]
