"""The admin RPCs before several workers: each is handed on to all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from likely.errors import Unavailable
from likely.v1 import admin_pb2, admin_pb2_grpc

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

Context = grpc.aio.ServicerContext[Any, Any]
Metadata = Sequence[tuple[str, str | bytes]]
HANDED_ON = ("x-request-id",)
LONGEST = 600.0  # seconds of a worker's change, after which others have their turn
SOON = 10.0  # seconds in which a worker says what it serves
LATE = grpc.StatusCode.DEADLINE_EXCEEDED
# Channels share a connection: one that was begun earlier, for others, is given up meanwhile.
ALONE = (("grpc.use_local_subchannel_pool", 1),)
Version = tuple[str, str]  # name and version


class Fanout(admin_pb2_grpc.AdminServiceServicer):
    """Hands each change on to the first worker, and what that one makes to all others.

    Callers are let in before it; the workers' sockets ask for no token. A refused change changes
    nothing, and all go back to where the first one does; a worker that cannot follow is begun
    anew. A change once begun is carried through, whether its caller waits or not.
    """

    def __init__(
        self,
        sockets: Callable[[], Sequence[tuple[int, Path]]],
        settled: Callable[[admin_pb2.ListVersionsResponse, Collection[int], Version | None], None],
        strayed: Callable[[int], None],
        log: FilteringBoundLogger,
    ) -> None:
        """A servicer.

        Args:
            sockets: numbers and admin sockets of the workers that are ready.
            settled: is told after each change what is served now, which workers were asked, and
                which version was unloaded, if one was.
            strayed: is told of a worker that could not make a change.
            log: where is told that nobody says what is served after a change.
        """
        self._sockets = sockets
        self._settled = settled
        self._strayed = strayed
        self._log = log
        self._turn = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()

    async def ListVersions(
        self, request: admin_pb2.ListVersionsRequest, context: Context
    ) -> admin_pb2.ListVersionsResponse:
        """What the first worker serves."""
        (_, first), *_ = self._ready()
        seconds = context.time_remaining()
        asked = _ask(first, "ListVersions", request, _handed_on(context), seconds)
        answer: admin_pb2.ListVersionsResponse = await _answered(asked, context)
        return answer

    async def LoadModel(
        self, request: admin_pb2.LoadModelRequest, context: Context
    ) -> admin_pb2.LoadModelResponse:
        """Serves the bundle in a folder."""
        answer: admin_pb2.LoadModelResponse = await self._change("LoadModel", request, context)
        return answer

    async def UnloadModel(
        self, request: admin_pb2.UnloadModelRequest, context: Context
    ) -> admin_pb2.UnloadModelResponse:
        """Serves a version no more, and frees it."""
        answer: admin_pb2.UnloadModelResponse = await self._change("UnloadModel", request, context)
        return answer

    async def SetLabel(
        self, request: admin_pb2.SetLabelRequest, context: Context
    ) -> admin_pb2.SetLabelResponse:
        """Lets a label name a version."""
        answer: admin_pb2.SetLabelResponse = await self._change("SetLabel", request, context)
        return answer

    async def Rollback(
        self, request: admin_pb2.RollbackRequest, context: Context
    ) -> admin_pb2.RollbackResponse:
        """Makes the previous version the stable one."""
        answer: admin_pb2.RollbackResponse = await self._change("Rollback", request, context)
        return answer

    async def ResetDrift(
        self, request: admin_pb2.ResetDriftRequest, context: Context
    ) -> admin_pb2.ResetDriftResponse:
        """Begins the test for drift anew."""
        answer: admin_pb2.ResetDriftResponse = await self._change("ResetDrift", request, context)
        return answer

    def _ready(self) -> Sequence[tuple[int, Path]]:
        if ready := self._sockets():
            return ready
        raise Unavailable("no worker is ready")

    async def _change(self, method: str, request: Any, context: Context) -> Any:
        change = asyncio.create_task(self._carried(method, request, _handed_on(context)))
        self._changes.add(change)
        change.add_done_callback(self._ended)
        return await _answered(asyncio.shield(change), context)

    async def _carried(self, method: str, request: Any, metadata: Metadata) -> Any:
        async with self._turn:
            (_, first), *others = asked = self._ready()
            answer, late = None, None
            try:
                answer = await _ask(first, method, request, metadata, LONGEST)
            except grpc.aio.AioRpcError as error:
                if error.code() is not LATE:
                    raise
                late = error  # as of a drain: it goes on there, and so it shall elsewhere
            if isinstance(answer, admin_pb2.RollbackResponse):
                # With another past, a step back leads elsewhere: they are told where it led.
                following = [_make_stable(socket, answer.version, metadata) for _, socket in others]
            else:
                following = [_ask(each, method, request, metadata, LONGEST) for _, each in others]
            followed = await asyncio.gather(*following, return_exceptions=True)
            sockets = [first]
            for (index, socket), outcome in zip(others, followed, strict=True):
                if isinstance(outcome, Exception) and not _is_late(outcome):
                    self._strayed(index)
                else:
                    sockets.append(socket)
            if (served := await served_by(sockets, metadata)) is None:
                self._log.error("change not remembered")
            else:
                unloads = isinstance(request, admin_pb2.UnloadModelRequest)
                unloaded = (request.model_name, request.model_version) if unloads else None
                self._settled(served, {index for index, _ in asked}, unloaded)
            if late:
                raise late
            return answer

    def _ended(self, change: asyncio.Task[Any]) -> None:
        self._changes.discard(change)
        if not change.cancelled():
            change.exception()  # seen, should its caller be gone


async def served_by(
    sockets: Sequence[Path], metadata: Metadata = ()
) -> admin_pb2.ListVersionsResponse | None:
    """What is served, as the first of those workers says that still lives; None if none does."""
    everything = admin_pb2.ListVersionsRequest()
    for socket in sockets:
        try:
            served: admin_pb2.ListVersionsResponse = await _ask(
                socket, "ListVersions", everything, metadata, SOON
            )
        except grpc.aio.AioRpcError:
            continue
        return served
    return None


async def is_silent(socket: Path) -> bool:
    """Whether a worker does not answer in time; one that ends does, by refusing."""
    async with grpc.aio.insecure_channel(f"unix:{socket}", options=ALONE) as channel:
        health = health_pb2_grpc.HealthStub(channel)  # as requests, these would be counted
        try:
            await health.Check(health_pb2.HealthCheckRequest(), timeout=SOON)
        except grpc.aio.AioRpcError as error:
            return error.code() is LATE
    return False


async def _ask(
    socket: Path, method: str, request: Any, metadata: Metadata, seconds: float | None = None
) -> Any:
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        call: Awaitable[Any] = getattr(stub, method)(request, metadata=metadata, timeout=seconds)
        return await call


async def _make_stable(socket: Path, version: admin_pb2.ModelVersion, metadata: Metadata) -> None:
    """Lets a worker make that version stable, and load it first if it does not serve it.

    Raises:
        AioRpcError: it cannot.
        TimeoutError: it loads for too long.
    """
    label = admin_pb2.SetLabelRequest(
        model_name=version.model_name, label="stable", model_version=version.model_version
    )
    try:
        await _ask(socket, "SetLabel", label, metadata, LONGEST)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
    else:
        return
    load = admin_pb2.LoadModelRequest(folder=version.folder)
    try:
        await _ask(socket, "LoadModel", load, metadata, LONGEST)
    except grpc.aio.AioRpcError as error:
        if _is_late(error):  # which for a change is well, but here another follows
            raise TimeoutError from error
        raise
    await _ask(socket, "SetLabel", label, metadata, LONGEST)


def _is_late(outcome: Exception) -> bool:
    return isinstance(outcome, grpc.aio.AioRpcError) and outcome.code() is LATE


async def _answered(asked: Awaitable[Any], context: Context) -> Any:
    """The worker's answer, or its refusal as it stands."""
    try:
        return await asked
    except grpc.aio.AioRpcError as error:
        details = tuple(error.trailing_metadata() or ())
        await context.abort(error.code(), error.details() or "", details)


def _handed_on(context: Context) -> Metadata:
    return [(key, value) for key, value in context.invocation_metadata() or () if key in HANDED_ON]
