"""Changes that one RPC asks of all workers."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from likely import logs
from likely.processes import fanout
from likely.processes.fanout import Fanout, Version
from likely.v1 import admin_pb2, admin_pb2_grpc

LOG = logs.logger("debug", "json", io.StringIO())
SHOWN = (("authorization", "Bearer x"), ("x-request-id", "id-1"))


class Worker(admin_pb2_grpc.AdminServiceServicer):
    """Makes a change as a worker does: to the end, whether its caller waits or not."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.made = 0
        self.shown: set[str] = set()
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def SetLabel(
        self, request: admin_pb2.SetLabelRequest, context: Any
    ) -> admin_pb2.SetLabelResponse:
        self.shown |= {key for key, _ in context.invocation_metadata()}
        await self.goes_on.wait()
        if self.refuses:
            await context.abort(grpc.StatusCode.NOT_FOUND, "it is not here")
        self.made += 1
        return admin_pb2.SetLabelResponse()

    async def UnloadModel(
        self, request: admin_pb2.UnloadModelRequest, context: Any
    ) -> admin_pb2.UnloadModelResponse:
        if self.refuses:
            await context.abort(grpc.StatusCode.NOT_FOUND, "it is not here")
        return admin_pb2.UnloadModelResponse()

    async def _other(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    LoadModel = Rollback = ResetDrift = _other

    async def ListVersions(
        self, request: admin_pb2.ListVersionsRequest, context: Any
    ) -> admin_pb2.ListVersionsResponse:
        return admin_pb2.ListVersionsResponse()


class Past(Worker):
    """A worker that serves these versions, and of its own past would go back to that one."""

    def __init__(self, served: Collection[str], former: str) -> None:
        super().__init__()
        self.served = set(served)
        self.former = former
        self.refusal: grpc.StatusCode | None = None
        self.asked: list[str] = []

    async def Rollback(
        self, request: admin_pb2.RollbackRequest, context: Any
    ) -> admin_pb2.RollbackResponse:
        self.asked.append("back")
        version = admin_pb2.ModelVersion(
            model_name="toy", model_version=self.former, folder=f"/{self.former}"
        )
        return admin_pb2.RollbackResponse(version=version)

    async def LoadModel(
        self, request: admin_pb2.LoadModelRequest, context: Any
    ) -> admin_pb2.LoadModelResponse:
        self.asked.append(f"load {request.folder}")
        if self.refusal:
            await context.abort(self.refusal, "it is not loaded")
        self.served.add(request.folder.strip("/"))
        return admin_pb2.LoadModelResponse()

    async def SetLabel(
        self, request: admin_pb2.SetLabelRequest, context: Any
    ) -> admin_pb2.SetLabelResponse:
        self.asked.append(f"{request.model_name}:{request.label}={request.model_version}")
        if request.model_version not in self.served:
            await context.abort(grpc.StatusCode.NOT_FOUND, "it is not here")
        return admin_pb2.SetLabelResponse()


class Workers:
    """Several workers, the RPC that asks them all, and what the supervisor is told."""

    def __init__(self, workers: list[Worker], stub: Any, restarted: list[int]) -> None:
        self.workers = workers
        self.settled: list[Collection[int]] = []
        self.unloaded: list[Version | None] = []
        self.restarted = restarted
        self._stub = stub

    @property
    def made(self) -> list[int]:
        return [worker.made for worker in self.workers]

    async def ask(self, seconds: float = 30) -> tuple[grpc.StatusCode, str]:
        try:
            request = admin_pb2.SetLabelRequest()
            await self._stub.SetLabel(request, metadata=SHOWN, timeout=seconds)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        return grpc.StatusCode.OK, ""

    async def unload(self, version: str) -> None:
        request = admin_pb2.UnloadModelRequest(model_name="toy", model_version=version)
        await self._stub.UnloadModel(request, timeout=30)

    async def roll_back(self) -> str:
        request = admin_pb2.RollbackRequest(model_name="toy")
        answer = await self._stub.Rollback(request, timeout=30)
        return str(answer.version.model_version)


@asynccontextmanager
async def together(folder: Path, *workers: Worker) -> AsyncIterator[Workers]:
    sockets = [(index, folder / f"{index}.sock") for index in range(len(workers))]
    servers = [grpc.aio.server() for _ in (*workers, None)]
    for worker, server, (_, socket) in zip(workers, servers, sockets, strict=False):
        admin_pb2_grpc.add_AdminServiceServicer_to_server(worker, server)
        server.add_insecure_port(f"unix:{socket}")
    settled: list[Collection[int]] = []
    unloaded: list[Version | None] = []
    restarted: list[int] = []

    def record(served: object, asked: Collection[int], version: Version | None) -> None:
        settled.append(asked)
        unloaded.append(version)

    servicer = Fanout(lambda: sockets, record, restarted.append, LOG)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer, servers[-1])
    port = servers[-1].add_insecure_port("127.0.0.1:0")
    for server in servers:
        await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        found = Workers(list(workers), admin_pb2_grpc.AdminServiceStub(channel), restarted)
        found.settled, found.unloaded = settled, unloaded
        yield found
    for server in reversed(servers):
        await server.stop(0)


def test_a_change_is_made_by_all(tmp_path: Path) -> None:
    async def work() -> None:
        async with together(tmp_path, Worker(), Worker(), Worker()) as workers:
            assert await workers.ask() == (grpc.StatusCode.OK, "")
            assert workers.made == [1, 1, 1]
            assert (workers.settled, workers.restarted) == ([{0, 1, 2}], [])
            for worker in workers.workers:  # a token may end before the last one is asked
                assert worker.shown & {key for key, _ in SHOWN} == {"x-request-id"}

    asyncio.run(work())


def test_what_is_unloaded_is_told(tmp_path: Path) -> None:
    async def work() -> None:
        async with together(tmp_path, Worker(), Worker()) as workers:
            await workers.ask()
            await workers.unload("2")
            assert workers.unloaded == [None, ("toy", "2")]
        async with together(tmp_path, Worker(refuses=True)) as workers:
            with pytest.raises(grpc.aio.AioRpcError):
                await workers.unload("2")
            assert workers.unloaded == []

    asyncio.run(work())


def test_what_the_first_refuses_nobody_is_asked(tmp_path: Path) -> None:
    async def work() -> None:
        async with together(tmp_path, Worker(refuses=True), Worker()) as workers:
            assert await workers.ask() == (grpc.StatusCode.NOT_FOUND, "it is not here")
            assert workers.made == [0, 0]
            assert (workers.settled, workers.restarted) == ([], [])

    asyncio.run(work())


def test_who_cannot_follow_is_told_of_and_the_change_stands(tmp_path: Path) -> None:
    async def work() -> None:
        async with together(tmp_path, Worker(), Worker(refuses=True), Worker()) as workers:
            assert await workers.ask() == (grpc.StatusCode.OK, "")
            assert workers.made == [1, 0, 1]
            assert (workers.settled, workers.restarted) == ([{0, 1, 2}], [1])

    asyncio.run(work())


@pytest.mark.parametrize("slow", [0, 1])
def test_a_change_that_takes_long_is_asked_of_all_and_leaves_others_their_turn(
    slow: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout, "CHANGE_SECONDS", 2.0)

    async def work() -> None:
        async with together(tmp_path, Worker(), Worker()) as workers:
            workers.workers[slow].goes_on.clear()
            code, _ = await workers.ask()
            late = grpc.StatusCode.DEADLINE_EXCEEDED
            assert code is (grpc.StatusCode.OK if slow else late)
            assert (workers.made[1 - slow], workers.settled, workers.restarted) == (1, [{0, 1}], [])
            workers.workers[slow].goes_on.set()
            assert await workers.ask() == (grpc.StatusCode.OK, "")

    asyncio.run(work())


@pytest.mark.parametrize("slow", [0, 1])
def test_a_change_goes_on_without_its_caller(slow: int, tmp_path: Path) -> None:
    async def work() -> None:
        async with together(tmp_path, Worker(), Worker()) as workers:
            workers.workers[slow].goes_on.clear()
            code, _ = await workers.ask(seconds=3)
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            workers.workers[slow].goes_on.set()
            async with asyncio.timeout(30):
                while not workers.settled:
                    await asyncio.sleep(0.01)
            assert workers.made == [1, 1]
            assert workers.restarted == []

    asyncio.run(work())


def test_all_go_back_to_where_the_first_does(tmp_path: Path) -> None:
    async def work() -> None:
        first, other, bare = Past("123", "2"), Past("123", "1"), Past("3", "1")
        async with together(tmp_path, first, other, bare) as workers:
            assert await workers.roll_back() == "2"
            assert first.asked == ["back"]
            assert other.asked == ["toy:stable=2"]
            assert bare.asked == ["toy:stable=2", "load /2", "toy:stable=2"]
            assert (workers.settled, workers.restarted) == ([{0, 1, 2}], [])

    asyncio.run(work())


@pytest.mark.parametrize(
    "refusal", [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED]
)
def test_who_cannot_go_back_is_told_of(refusal: grpc.StatusCode, tmp_path: Path) -> None:
    async def work() -> None:
        bare = Past("3", "1")
        bare.refusal = refusal
        async with together(tmp_path, Past("123", "2"), bare) as workers:
            assert await workers.roll_back() == "2"
            assert (workers.settled, workers.restarted) == ([{0, 1}], [1])

    asyncio.run(work())
