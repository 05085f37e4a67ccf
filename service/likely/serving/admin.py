"""The admin RPCs, which call the lifecycle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc.aio

from likely import codec
from likely.errors import InvalidInput
from likely.v1 import admin_pb2, admin_pb2_grpc
from likely.versions.lifecycle import Lifecycle
from likely.versions.registry import check_name

Context = grpc.aio.ServicerContext[Any, Any]
LONGEST = 4095  # maximum bytes of a path on Linux


class Admin(admin_pb2_grpc.AdminServiceServicer):
    """Changes which models are served."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle

    async def ListVersions(
        self, request: admin_pb2.ListVersionsRequest, context: Context
    ) -> admin_pb2.ListVersionsResponse:
        """Lists every version, and every bundle that was refused."""
        await self._lifecycle.check_refused()
        versions = self._lifecycle.versions()
        return admin_pb2.ListVersionsResponse(
            versions=[codec.version_message(version) for version in versions]
        )

    async def LoadModel(
        self, request: admin_pb2.LoadModelRequest, context: Context
    ) -> admin_pb2.LoadModelResponse:
        """Serves the bundle in a folder."""
        folder = Path(request.folder)
        if not folder.is_absolute() or "\0" in request.folder:
            raise InvalidInput("folder", f"{request.folder[:200]!r} is not an absolute path")
        if (nbytes := len(request.folder.encode())) > LONGEST:
            raise InvalidInput("folder", f"{nbytes} bytes; a path has at most {LONGEST}")
        version = await self._lifecycle.load(folder)
        return admin_pb2.LoadModelResponse(version=codec.version_message(version))

    async def UnloadModel(
        self, request: admin_pb2.UnloadModelRequest, context: Context
    ) -> admin_pb2.UnloadModelResponse:
        """Unloads a version and frees it."""
        check_name("model_version", request.model_version)
        await self._lifecycle.unload(request.model_name, request.model_version)
        return admin_pb2.UnloadModelResponse()

    async def SetLabel(
        self, request: admin_pb2.SetLabelRequest, context: Context
    ) -> admin_pb2.SetLabelResponse:
        """Points a label at a version."""
        await self._lifecycle.set_label(request.model_name, request.label, request.model_version)
        return admin_pb2.SetLabelResponse()

    async def Rollback(
        self, request: admin_pb2.RollbackRequest, context: Context
    ) -> admin_pb2.RollbackResponse:
        """Makes the previous default version the stable one."""
        version = await self._lifecycle.rollback(request.model_name)
        return admin_pb2.RollbackResponse(version=codec.version_message(version))

    async def ResetDrift(
        self, request: admin_pb2.ResetDriftRequest, context: Context
    ) -> admin_pb2.ResetDriftResponse:
        """Restarts the drift test."""
        version = await self._lifecycle.reset_drift(request.model_name, request.model_version)
        return admin_pb2.ResetDriftResponse(model_version=version)
