"""The client of the admin RPCs, which list, load, unload and label a server's versions."""

from __future__ import annotations

from os import PathLike, fspath
from threading import Lock
from types import TracebackType
from typing import Any, Self

import grpc

from likely import codec
from likely.answers import ModelVersion
from likely.client.channels import Address, File, Route, Token
from likely.client.rpcs import CLIENT_CLOSED, as_error, valid_timeout
from likely.client.values import build_message
from likely.errors import LikelyError
from likely.v1 import admin_pb2
from likely.v1.admin_pb2_grpc import AdminServiceStub

ADDRESS = "127.0.0.1:50052"
TIMEOUT = 600.0  # seconds: a load tests the bundle first, an unload waits for running requests
_START = "likely serve --admin-port PORT"


class AdminClient:
    """A client of one server's admin port; also a context manager.

    It never retries. A change whose answer was lost may have been made: call `versions` to find
    out.
    """

    def __init__(
        self,
        address: Address = ADDRESS,
        *,
        timeout: float = TIMEOUT,
        token: Token | None = None,
        plaintext_token: bool = False,
        tls: bool = False,
        ca: File | None = None,
        certificate: File | None = None,
        key: File | None = None,
        server_name: str | None = None,
    ) -> None:
        """A client; it connects at the first request.

        Args:
            address: host:port of the admin RPCs, which differs from that of all other RPCs.
            timeout: maximum duration of one request, in seconds.
            token: a bearer token with the scope `admin`, or a function called for the token of
                each request.
            plaintext_token: whether the token may be sent unencrypted, for example to a proxy that
                adds TLS.
            tls: whether to encrypt; `ca`, `certificate` and `server_name` imply it.
            ca: PEM file of the certificate authorities to trust; None for gRPC's own. This file,
                `certificate` and `key` are reread when they change.
            certificate: PEM file of the client's own certificate.
            key: PEM file of that certificate's key.
            server_name: name that the server's certificate must contain; None for the host of
                the address.

        Raises:
            SettingsError: as `likely.Client`.
        """
        self._timeout = valid_timeout(timeout)
        self._address = address if isinstance(address, str) else ", ".join(address)
        self._route = Route(
            address,
            token=token,
            plaintext_token=plaintext_token,
            tls=tls,
            ca=ca,
            certificate=certificate,
            key=key,
            server_name=server_name,
        )
        self._opening, self._closed = Lock(), False
        self._open(self._route.edition())

    def versions(self) -> list[ModelVersion]:
        """All versions: served, then loading, then draining; then all refused bundles.

        Raises:
            LikelyError: Unavailable, DeadlineExceeded, AccessDenied or ServerFault.
        """
        answer = self._ask(self._stub.ListVersions, admin_pb2.ListVersionsRequest())
        return [codec.model_version(version) for version in answer.versions]

    def load(self, folder: str | PathLike[str]) -> ModelVersion:
        """Serves the bundle in a folder, once it has passed its checks.

        It replaces the version that was served from that folder.

        Args:
            folder: absolute path on the server.

        Raises:
            BundleError: the bundle is refused; the served versions stay.
            LikelyError: InvalidInput, DeviceError, or as `versions`.
        """
        request = build_message(admin_pb2.LoadModelRequest, folder=fspath(folder))
        return codec.model_version(self._ask(self._stub.LoadModel, request).version)

    def unload(self, model: str, version: str) -> None:
        """Withdraws a version; returns once its requests have ended and its memory is free.

        Raises:
            Refused: a label names the version.
            LikelyError: InvalidInput, ModelNotFound, or as `versions`.
        """
        request = build_message(
            admin_pb2.UnloadModelRequest, model_name=model, model_version=version
        )
        self._ask(self._stub.UnloadModel, request)

    def set_label(self, model: str, label: str, version: str | None) -> None:
        """Points a label, `stable` or `canary`, at a version, or removes it (None).

        Raises:
            LikelyError: InvalidInput, ModelNotFound, or as `versions`.
        """
        request = build_message(
            admin_pb2.SetLabelRequest, model_name=model, label=label, model_version=version or ""
        )
        self._ask(self._stub.SetLabel, request)

    def rollback(self, model: str) -> ModelVersion:
        """Makes stable the version that was the default before the last change, and returns it.

        Raises:
            Refused: there was no such version, or its folder no longer contains it.
            BundleError: the version must be loaded again, and is refused.
            LikelyError: InvalidInput, ModelNotFound, or as `versions`.
        """
        request = build_message(admin_pb2.RollbackRequest, model_name=model)
        return codec.model_version(self._ask(self._stub.Rollback, request).version)

    def reset_drift(self, model: str, version: str | None = None) -> str:
        """Restarts the drift test of a version (None: the default one), and returns that version.

        Raises:
            LikelyError: InvalidInput, ModelNotFound, or as `versions`.
        """
        request = build_message(
            admin_pb2.ResetDriftRequest, model_name=model, model_version=version or ""
        )
        resolved_version: str = self._ask(self._stub.ResetDrift, request).model_version
        return resolved_version

    def close(self) -> None:
        """Closes the connection."""
        with self._opening:
            self._closed = True
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _stub(self) -> Any:
        """The RPCs, over a channel that uses the current content of the certificate files.

        Raises:
            LikelyError: the client is closed.
        """
        with self._opening:
            if self._closed:
                raise LikelyError(CLIENT_CLOSED)
            edition = self._route.edition()
            if edition > self._opened:
                self._open(edition)
            return self._rpcs

    def _open(self, edition: int) -> None:
        self._channel, self._opened = self._route.channel(once=True), edition
        self._rpcs: Any = AdminServiceStub(self._channel)

    def _ask(self, call: Any, request: Any) -> Any:
        try:
            return call(request, timeout=self._timeout, metadata=self._route.metadata())
        except grpc.RpcError as failure:
            raise as_error(failure, self._address, _START) from failure
        except ValueError as error:  # another thread has just closed the channel
            if not self._closed:
                raise
            raise LikelyError(CLIENT_CLOSED) from error
