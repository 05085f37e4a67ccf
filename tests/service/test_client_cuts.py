"""Answers that are cut off once they have begun: gRPC asks for none of them again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from likely import AsyncClient, Client, DeadlineExceeded, Overloaded, Unavailable, statuses
from likely.client.rpcs import RETRY_DELAYS, Retries

if TYPE_CHECKING:
    from tests.conftest import Live, Toy

GRPC = 5  # attempts of gRPC itself, where the machine is so slow that it sees no beginning


class Cutting(grpc.GenericRpcHandler):
    """Cuts off answers of one method, and has another server give all others.

    Attributes:
        address: of the server that it is.
        method: whose answers are cut off.
        cuts: how many yet.
        after: messages that come before.
        code: that the end has.
        trailer: that comes with it.
        asked: requests for that method.
    """

    address: str

    def __init__(self, others: grpc.Channel) -> None:
        self.method, self.cuts, self.after, self.asked = "", 0, 0, 0
        self.code = grpc.StatusCode.UNAVAILABLE
        self.trailer: Any = ()
        self._others = others

    def set(self, method: str, cuts: int, after: int = 0) -> None:
        """Cuts off so many answers of that method."""
        self.method, self.cuts, self.after, self.asked = method, cuts, after, 0

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler[Any, Any]:
        method = handler_call_details.method
        named = method.endswith(f"/{self.method}")
        self.asked += named

        def cut(context: grpc.ServicerContext) -> None:
            self.cuts -= 1
            with suppress(ValueError):  # a message has gone, and the metadata before it
                context.send_initial_metadata(())
            time.sleep(0.02)  # gRPC itself asks again where both ends of an answer come together
            context.set_trailing_metadata(self.trailer)
            context.abort(self.code, "Stream removed (Socket closed)")

        def one(request: Any, context: grpc.ServicerContext) -> Any:
            if named and self.cuts:
                cut(context)
            answer: Any = self._others.unary_unary(method)
            return answer(request)

        def several(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            answers: Any = self._others.unary_stream(method)
            for n, message in enumerate(answers(request)):
                if named and self.cuts and n == self.after:
                    cut(context)
                yield message

        if method.endswith(("/Generate", "/Complete")):
            return grpc.unary_stream_rpc_method_handler(several)
        return grpc.unary_unary_rpc_method_handler(one)


@pytest.fixture
def cutting(live: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cutting]:
    monkeypatch.setattr("likely.client.rpcs.RETRY_DELAYS", (0.0,) * len(RETRY_DELAYS))
    with grpc.insecure_channel(live.address) as others:
        cutting, server = Cutting(others), grpc.server(ThreadPoolExecutor(4))
        server.add_generic_rpc_handlers((cutting,))
        cutting.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield cutting
        finally:
            server.stop(None).wait()


QUESTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "GetModel": lambda client, _: client.model(),
    "Score": lambda client, x: client.score(x),
    "Classify": lambda client, x: client.classify(x),
    "Generate": lambda client, _: client.generate(300, seed=3),
    "Complete": lambda client, x: client.complete(x, x > 1, completions=2, seed=3),
}


@pytest.mark.parametrize(
    ("method", "after"),
    [*((method, 0) for method in QUESTIONS), ("Generate", 1), ("Complete", 1)],
)
def test_an_answer_that_is_cut_off_is_asked_for_again(
    live: Live, cutting: Cutting, toy: Toy, method: str, after: int
) -> None:
    x = toy.draw(np.random.default_rng(4), 250)
    question = QUESTIONS[method]

    async def ask() -> Any:
        async with AsyncClient(cutting.address, timeout=30) as client:
            return asdict(await question(client, x))

    with Client(live.address, timeout=30) as client:
        whole = asdict(question(client, x))
    with Client(cutting.address, timeout=30) as client:
        cutting.set(method, len(RETRY_DELAYS), after)
        np.testing.assert_equal(asdict(question(client, x)), whole)
        assert cutting.cuts == 0
        assert cutting.asked > len(RETRY_DELAYS)
    cutting.set(method, len(RETRY_DELAYS), after)
    np.testing.assert_equal(live.run(ask()), whole)
    assert cutting.cuts == 0


@pytest.mark.parametrize("method", QUESTIONS)
def test_what_is_always_cut_off_is_told_in_the_end(
    live: Live, cutting: Cutting, toy: Toy, method: str
) -> None:
    x = toy.draw(np.random.default_rng(4), 5)

    async def ask(*, retries: bool) -> None:
        async with AsyncClient(cutting.address, timeout=30, retries=retries) as client:
            await QUESTIONS[method](client, x)

    for retries in (True, False):
        least = 1 + len(RETRY_DELAYS) * retries
        most = least * (GRPC if retries else 1)
        cutting.set(method, 1000)
        with (
            Client(cutting.address, timeout=30, retries=retries) as client,
            pytest.raises(Unavailable, match="Stream removed"),
        ):
            QUESTIONS[method](client, x)
        assert least <= cutting.asked <= most
        cutting.set(method, 1000)
        with pytest.raises(Unavailable, match="Stream removed"):
            live.run(ask(retries=retries))
        assert least <= cutting.asked <= most


@pytest.mark.parametrize("refusal", [Unavailable, Overloaded])
@pytest.mark.parametrize("method", ["Generate", "Complete"])
def test_an_answer_that_a_server_ends_for_now_is_asked_for_again(
    live: Live, cutting: Cutting, toy: Toy, method: str, refusal: type[Exception]
) -> None:
    x, question = toy.draw(np.random.default_rng(4), 20), QUESTIONS[method]
    # As a server does that ends, or one whose queue is full when the next draws are to run.
    cutting.code, _, cutting.trailer = statuses.status(refusal("not now", 0.05), "1")

    async def ask(*, retries: bool = True) -> Any:
        async with AsyncClient(cutting.address, timeout=30, retries=retries) as client:
            return await question(client, x)

    with Client(live.address, timeout=30) as client:
        whole = asdict(question(client, x))
    with Client(cutting.address, timeout=30) as client:
        cutting.set(method, 2, after=1)
        np.testing.assert_equal(asdict(question(client, x)), whole)
    cutting.set(method, 2, after=1)
    np.testing.assert_equal(asdict(live.run(ask())), whole)
    assert cutting.cuts == 0
    with Client(cutting.address, timeout=30, retries=False) as client:
        cutting.set(method, 2, after=1)
        with pytest.raises(refusal):
            question(client, x)
        with pytest.raises(refusal):
            live.run(ask(retries=False))
    assert cutting.asked == 2


def test_the_pause_before_is_what_the_server_names() -> None:
    ended, busy, lost = Unavailable("", 1.5), Overloaded("", 2.5), Unavailable("")
    retries = Retries(60, enabled=True)
    retries.time_left()
    assert retries.retry_delay(ended, begun=True) == 1.5
    assert retries.retry_delay(busy, begun=True) == 2.5
    assert retries.retry_delay(lost, begun=True) == RETRY_DELAYS[2]
    with pytest.raises(Unavailable):  # as often as there are pauses
        retries.retry_delay(lost, begun=True)
    for refused in (ended, busy):  # gRPC has asked again
        retries.reset()
        retries.time_left()
        with pytest.raises(type(refused)):
            retries.retry_delay(refused)
    assert (retries.resume_delay(ended), retries.resume_delay(busy)) == (0, 2.5)
    short = Retries(1, enabled=True)
    short.time_left()
    with pytest.raises(Unavailable):
        short.retry_delay(ended, begun=True)
    with pytest.raises(Overloaded):
        short.resume_delay(busy)


def test_draws_that_come_go_on_after_a_deadline(live: Live, cutting: Cutting) -> None:
    async def ask() -> Any:
        async with AsyncClient(cutting.address, timeout=30) as client:
            return await client.generate(50, seed=3)

    cutting.code = grpc.StatusCode.DEADLINE_EXCEEDED
    with Client(live.address, timeout=30) as client:
        whole = client.generate(50, seed=3).images
    with Client(cutting.address, timeout=30) as client:
        cutting.set("Generate", 2, after=1)
        assert np.array_equal(client.generate(50, seed=3).images, whole)
        cutting.set("Generate", 2, after=1)
        assert np.array_equal(live.run(ask()).images, whole)
        assert (cutting.cuts, cutting.asked) == (0, 3)
        cutting.set("Generate", 2)  # nothing came
        with pytest.raises(DeadlineExceeded):
            client.generate(50, seed=3)
        assert cutting.asked == 1
