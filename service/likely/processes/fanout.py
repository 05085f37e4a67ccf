"""The admin RPCs before several workers: each is handed on to all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from likely.errors import Unavailable
from likely.v1 import admin_pb2, admin_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
HANDED_ON = ("authorization", "x-request-id")


class Fanout(admin_pb2_grpc.AdminServiceServicer):
    """Hands each change on to the first worker, and what that one makes to all others.

    So a refused change changes nothing; a worker that cannot follow is begun anew.
    """

    def __init__(
        self,
        sockets: Callable[[], Sequence[tuple[int, Path]]],
        settled: Callable[[admin_pb2.ListVersionsResponse], None],
        strayed: Callable[[int], None],
    ) -> None:
        """A servicer.

        Args:
            sockets: numbers and admin sockets of the workers that are ready.
            settled: is told after each change what is served now.
            strayed: is told of a worker that could not make a change.
        """
        self._sockets = sockets
        self._settled = settled
        self._strayed = strayed
        self._turn = asyncio.Lock()

    async def ListVersions(
        self, request: admin_pb2.ListVersionsRequest, context: Context
    ) -> admin_pb2.ListVersionsResponse:
        """What the first worker serves."""
        first, *_ = self._ready()
        answer: admin_pb2.ListVersionsResponse = await self._ask(
            first[1], "ListVersions", request, context
        )
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
        async with self._turn:
            (_, first), *others = self._ready()
            answer = await self._ask(first, method, request, context)
            asked = [self._ask(socket, method, request, context) for _, socket in others]
            followed = await asyncio.gather(*asked, return_exceptions=True)
            for (index, _), outcome in zip(others, followed, strict=True):
                if isinstance(outcome, Exception):
                    self._strayed(index)
            everything = admin_pb2.ListVersionsRequest()
            self._settled(await self._ask(first, "ListVersions", everything, context))
            return answer

    async def _ask(self, socket: Path, method: str, request: Any, context: Context) -> Any:
        metadata = [
            (key, value) for key, value in context.invocation_metadata() or () if key in HANDED_ON
        ]
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            call: Awaitable[Any] = getattr(stub, method)(
                request, metadata=metadata, timeout=context.time_remaining()
            )
            try:
                return await call
            except grpc.aio.AioRpcError as error:
                details = tuple(error.trailing_metadata() or ())
                await context.abort(error.code(), error.details() or "", details)
