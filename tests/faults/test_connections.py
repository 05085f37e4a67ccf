"""Connections: peers that vanish without a word, pings, and an age at which they end."""

from __future__ import annotations

import asyncio
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from likely import AsyncClient, Client, Unavailable
from likely.client import channels
from likely.serving import ports
from likely.v1.scoring_pb2 import ScoreRequest, ScoreStreamRequest
from likely.v1.scoring_pb2_grpc import ScoringServiceStub
from tests.faults import http2
from tests.faults.alive import SECONDS, calling, is_well, on_toy

if TYPE_CHECKING:
    from tests.conftest import Running

STREAM = "/likely.v1.ScoringService/ScoreStream"
pytestmark = pytest.mark.fault(39)


class Wire:
    """A way to a server that can be cut without a word: what is sent then gets lost."""

    def __init__(self, address: str, listening: socket.socket) -> None:
        host, port = listening.getsockname()
        self.address = f"{host}:{port}"
        self.cut = threading.Event()
        self._to = address
        self._listening = listening
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for end in (self._listening, *self._sockets):
            end.close()

    def _accept(self) -> None:
        host, _, port = self._to.rpartition(":")
        try:
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection((host, int(port)))
                self._sockets += client, server
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()
        except OSError:
            pass  # closed

    def _carry(self, giver: socket.socket, taker: socket.socket) -> None:
        try:
            while data := giver.recv(1 << 16):
                if not self.cut.is_set():
                    taker.sendall(data)
        except OSError:
            pass  # closed


@contextmanager
def wire(address: str) -> Iterator[Wire]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        between = Wire(address, listening)
        try:
            yield between
        finally:
            between.close()


def test_a_server_that_vanished_is_noticed_before_the_deadline(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "KEEPALIVE_TIME", 0.5)
    monkeypatch.setattr(channels, "KEEPALIVE_TIMEOUT", 0.5)
    with (
        running() as live,
        wire(live.address) as between,
        Client(between.address, timeout=600, retries=False) as client,
    ):
        client.score([[[0] * 3] * 3])
        between.cut.set()
        began = time.monotonic()
        with pytest.raises(Unavailable):
            client.score([[[0] * 3] * 3])
        assert time.monotonic() - began < SECONDS
        is_well(live)


def test_a_client_that_vanished_leaves_nothing(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "KEEPALIVE_TIME", 0.5)
    monkeypatch.setattr(ports, "KEEPALIVE_TIMEOUT", 0.5)
    body = ScoreStreamRequest(request=on_toy(ScoreRequest)).SerializeToString()
    asked = struct.pack(">BI", 0, len(body)) + body
    with running() as live, http2.connected(live.address, patience=SECONDS) as there:
        there.sendall(http2.headers(1, STREAM))
        there.sendall(http2.frame(http2.DATA, stream=1, payload=asked))
        kinds = [kind for kind, *_ in http2.frames(there)]  # until the server closes
        assert http2.DATA in kinds and http2.PING in kinds
        is_well(live)


def test_a_connection_has_so_many_streams_at_once(running: Running) -> None:
    with running(streams_per_connection=2) as live, calling(live.address) as caller:
        asked = health_pb2.HealthCheckRequest()
        watches = [caller.health.Watch(asked, timeout=SECONDS) for _ in range(2)]
        assert all(next(watch).status for watch in watches)
        scored = caller.scoring.Score.future(on_toy(ScoreRequest), timeout=SECONDS)
        is_well(live)  # over another connection
        assert not scored.done()
        watches[0].cancel()
        assert len(scored.result().scores) == 1


def test_what_is_more_than_a_connection_may_have_at_once_waits(running: Running) -> None:
    with running(streams_per_connection=20) as live:
        with calling(live.address) as caller:
            caller.ask(on_toy(ScoreRequest))  # from here on it knows the limit
            calls = [caller.scoring.Score.future(on_toy(ScoreRequest)) for _ in range(400)]
            assert all(len(call.result(SECONDS).scores) == 1 for call in calls)
        asyncio.run(burst(live.address))
        is_well(live)


async def burst(address: str) -> None:
    """Asks much at once of one connection: by a bare stub, and by a client that tries once."""
    alone = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, alone) as channel:
        stub: Any = ScoringServiceStub(channel)
        await stub.Score(on_toy(ScoreRequest))
        calls = (stub.Score(on_toy(ScoreRequest), timeout=SECONDS) for _ in range(400))
        assert all(len(answer.scores) == 1 for answer in await asyncio.gather(*calls))
    async with AsyncClient(address, retries=False) as client:
        x = [[[0] * 3] * 3]
        await client.score(x)
        assert len(await asyncio.gather(*(client.score(x) for _ in range(400)))) == 400


def test_pings_of_patient_clients_are_answered(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "MIN_PING_SECONDS", 0.1)
    pings = {
        "keepalive_time_ms": 400,
        "keepalive_timeout_ms": 1000 * SECONDS,
        "http2.max_pings_without_data": 0,
    }
    with running() as live, calling(live.address, **pings) as caller:
        asked: queue.SimpleQueue[ScoreStreamRequest | None] = queue.SimpleQueue()
        answers = caller.scoring.ScoreStream(iter(asked.get, None), timeout=SECONDS)
        for _ in range(2):
            asked.put(ScoreStreamRequest(request=on_toy(ScoreRequest)))
            assert next(answers).outcomes[0].HasField("response")
            time.sleep(3)  # in which it is pinged more often than gRPC's own five minutes allow
        asked.put(None)
        assert list(answers) == []


def test_connections_end_at_their_age_and_no_request_does(running: Running) -> None:
    with running(connection_seconds=0.3) as live, http2.connected(live.address) as there:
        with calling(live.address) as caller:
            end = time.monotonic() + 2
            while time.monotonic() < end:
                caller.ask(on_toy(ScoreRequest))
        assert any(kind == http2.GOAWAY for kind, *_ in http2.frames(there))
        is_well(live)
