"""The health service of `grpc.health.v1`.

It replaces the servicer of grpcio-health-checking, whose Watch holds a lock while it writes: a
single watcher that does not read would block all others, every change, and the server's shutdown.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Reports the health of each service; must be used on the event loop's thread only."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()  # replaced after each change
        self._ended = False

    def set(self, service: str, status: int) -> None:
        """Sets the status of a service, unless the shutdown has been announced."""
        if not self._ended:
            self._statuses[service] = status
            self._wake()

    def end(self) -> None:
        """Sets all services to NOT_SERVING, permanently."""
        self._ended = True
        self._statuses = dict.fromkeys(self._statuses, NOT_SERVING)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> health_pb2.HealthCheckResponse:
        """Returns the status of one service."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "health knows no such service")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, _: object
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Yields the status of one service and its changes; a slow reader may miss some."""
        sent = None
        while True:
            changed, status = self._changed, self._statuses.get(request.service, _UNKNOWN)
            if status != sent:
                sent = status
                yield health_pb2.HealthCheckResponse(status=status)
            await changed.wait()
