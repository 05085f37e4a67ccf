"""The supervisor's admin RPCs: each change is forwarded to all workers."""

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
FORWARDED_KEYS = ("x-request-id",)
CHANGE_SECONDS = 600.0  # seconds to wait for a worker's change before the next change starts
ANSWER_SECONDS = 10.0  # seconds for a worker to answer what it serves, or a health check
LATE = grpc.StatusCode.DEADLINE_EXCEEDED
# Channels share connections by default: if the connection that an earlier call began is given up
# meanwhile, a health check would fail early, and hide that the worker hangs.
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
Version = tuple[str, str]  # name and version


class Fanout(admin_pb2_grpc.AdminServiceServicer):
    """Forwards each change to the first worker and, if that one accepts it, to all others.

    If the first worker refuses a change, nothing changes. After a rollback, the other workers
    make the same version stable as the first one. A worker that cannot follow a change is
    restarted. Once started, a change completes whether its caller waits or not.

    Callers are authenticated before they get here; the workers' sockets require no token.
    """

    def __init__(
        self,
        sockets: Callable[[], Sequence[tuple[int, Path]]],
        remember_change: Callable[
            [admin_pb2.ListVersionsResponse, Collection[int], Version | None], None
        ],
        restart_worker: Callable[[int], None],
        log: FilteringBoundLogger,
    ) -> None:
        """Creates a servicer.

        Args:
            sockets: returns the numbers and admin sockets of the workers that are ready.
            remember_change: called after each change with what is served now, the numbers of the
                workers that were asked, and the version that was unloaded, if any.
            restart_worker: restarts a worker, given its number, that could not make a change.
            log: receives an error if no worker reports what is served after a change.
        """
        self._sockets = sockets
        self._remember_change = remember_change
        self._restart_worker = restart_worker
        self._log = log
        self._change_lock = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()

    async def ListVersions(
        self, request: admin_pb2.ListVersionsRequest, context: Context
    ) -> admin_pb2.ListVersionsResponse:
        """Lists the versions of the first worker."""
        (_, first), *_ = self._ready_workers()
        seconds = context.time_remaining()
        asked = _call_worker(first, "ListVersions", request, _forwarded_metadata(context), seconds)
        answer: admin_pb2.ListVersionsResponse = await _relay_answer(asked, context)
        return answer

    async def LoadModel(
        self, request: admin_pb2.LoadModelRequest, context: Context
    ) -> admin_pb2.LoadModelResponse:
        """Serves the bundle in a folder."""
        answer: admin_pb2.LoadModelResponse = await self._forward_change(
            "LoadModel", request, context
        )
        return answer

    async def UnloadModel(
        self, request: admin_pb2.UnloadModelRequest, context: Context
    ) -> admin_pb2.UnloadModelResponse:
        """Unloads a version and frees it."""
        answer: admin_pb2.UnloadModelResponse = await self._forward_change(
            "UnloadModel", request, context
        )
        return answer

    async def SetLabel(
        self, request: admin_pb2.SetLabelRequest, context: Context
    ) -> admin_pb2.SetLabelResponse:
        """Points a label at a version."""
        answer: admin_pb2.SetLabelResponse = await self._forward_change(
            "SetLabel", request, context
        )
        return answer

    async def Rollback(
        self, request: admin_pb2.RollbackRequest, context: Context
    ) -> admin_pb2.RollbackResponse:
        """Makes the previous default version the stable one."""
        answer: admin_pb2.RollbackResponse = await self._forward_change(
            "Rollback", request, context
        )
        return answer

    async def ResetDrift(
        self, request: admin_pb2.ResetDriftRequest, context: Context
    ) -> admin_pb2.ResetDriftResponse:
        """Restarts the drift test."""
        answer: admin_pb2.ResetDriftResponse = await self._forward_change(
            "ResetDrift", request, context
        )
        return answer

    def _ready_workers(self) -> Sequence[tuple[int, Path]]:
        if ready := self._sockets():
            return ready
        raise Unavailable("no worker is ready")

    async def _forward_change(self, method: str, request: Any, context: Context) -> Any:
        change = asyncio.create_task(
            self._apply_change(method, request, _forwarded_metadata(context))
        )
        self._changes.add(change)
        change.add_done_callback(self._discard_change)
        return await _relay_answer(asyncio.shield(change), context)

    async def _apply_change(self, method: str, request: Any, metadata: Metadata) -> Any:
        async with self._change_lock:
            (_, first), *others = asked = self._ready_workers()
            answer, late = None, None
            try:
                answer = await _call_worker(first, method, request, metadata, CHANGE_SECONDS)
            except grpc.aio.AioRpcError as error:
                if error.code() is not LATE:
                    raise
                late = error  # e.g. of a drain, which continues there, so the others follow
            if isinstance(answer, admin_pb2.RollbackResponse):
                # Workers with another history would roll back to another version, so they are
                # told which one.
                following = [_make_stable(socket, answer.version, metadata) for _, socket in others]
            else:
                following = [
                    _call_worker(socket, method, request, metadata, CHANGE_SECONDS)
                    for _, socket in others
                ]
            followed = await asyncio.gather(*following, return_exceptions=True)
            sockets = [first]
            for (index, socket), outcome in zip(others, followed, strict=True):
                if isinstance(outcome, Exception) and not _is_late(outcome):
                    self._restart_worker(index)
                else:
                    sockets.append(socket)
            if (served := await list_served(sockets, metadata)) is None:
                self._log.error("change not remembered")
            else:
                unloads = isinstance(request, admin_pb2.UnloadModelRequest)
                unloaded = (request.model_name, request.model_version) if unloads else None
                self._remember_change(served, {index for index, _ in asked}, unloaded)
            if late:
                raise late
            return answer

    def _discard_change(self, change: asyncio.Task[Any]) -> None:
        self._changes.discard(change)
        if not change.cancelled():
            change.exception()  # marks it retrieved, in case the caller has left


async def list_served(
    sockets: Sequence[Path], metadata: Metadata = ()
) -> admin_pb2.ListVersionsResponse | None:
    """Lists the versions of the first worker that answers; None if none does."""
    everything = admin_pb2.ListVersionsRequest()
    for socket in sockets:
        try:
            served: admin_pb2.ListVersionsResponse = await _call_worker(
                socket, "ListVersions", everything, metadata, ANSWER_SECONDS
            )
        except grpc.aio.AioRpcError:
            continue
        return served
    return None


async def is_silent(socket: Path) -> bool:
    """Whether a worker does not answer in time; a worker that ends answers by refusing."""
    async with grpc.aio.insecure_channel(f"unix:{socket}", options=OWN_CONNECTION) as channel:
        health = health_pb2_grpc.HealthStub(channel)  # health checks are not counted as requests
        try:
            await health.Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError as error:
            return error.code() is LATE
    return False


async def _call_worker(
    socket: Path, method: str, request: Any, metadata: Metadata, seconds: float | None = None
) -> Any:
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        call: Awaitable[Any] = getattr(stub, method)(request, metadata=metadata, timeout=seconds)
        return await call


async def _make_stable(socket: Path, version: admin_pb2.ModelVersion, metadata: Metadata) -> None:
    """Makes a version stable in a worker, which loads it first if it does not serve it.

    Raises:
        AioRpcError: the worker refuses.
        TimeoutError: loading takes too long.
    """
    label = admin_pb2.SetLabelRequest(
        model_name=version.model_name, label="stable", model_version=version.model_version
    )
    try:
        await _call_worker(socket, "SetLabel", label, metadata, CHANGE_SECONDS)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
    else:
        return
    load = admin_pb2.LoadModelRequest(folder=version.folder)
    try:
        await _call_worker(socket, "LoadModel", load, metadata, CHANGE_SECONDS)
    except grpc.aio.AioRpcError as error:
        if _is_late(error):  # acceptable for a last change, but here another one follows
            raise TimeoutError from error
        raise
    await _call_worker(socket, "SetLabel", label, metadata, CHANGE_SECONDS)


def _is_late(outcome: Exception) -> bool:
    return isinstance(outcome, grpc.aio.AioRpcError) and outcome.code() is LATE


async def _relay_answer(asked: Awaitable[Any], context: Context) -> Any:
    """Returns the worker's answer, or aborts with the worker's own status and details."""
    try:
        return await asked
    except grpc.aio.AioRpcError as error:
        details = tuple(error.trailing_metadata() or ())
        await context.abort(error.code(), error.details() or "", details)


def _forwarded_metadata(context: Context) -> Metadata:
    return [
        (key, value) for key, value in context.invocation_metadata() or () if key in FORWARDED_KEYS
    ]
