"""The client of the admin RPCs: which versions a server has, and what it shall do with them."""

from __future__ import annotations

from os import PathLike, fspath
from threading import Lock
from types import TracebackType
from typing import Any, Self

import grpc

from likely import codec
from likely.answers import ModelVersion
from likely.client.channels import Address, File, Route, Token
from likely.client.line import CLOSED, as_error, positive
from likely.client.values import built
from likely.errors import LikelyError
from likely.v1 import admin_pb2
from likely.v1.admin_pb2_grpc import AdminServiceStub

ADDRESS = "127.0.0.1:50052"
TIMEOUT = 600.0  # a load proves a bundle first, an unload waits for the requests that run
_START = "likely serve --admin-port PORT"


class AdminClient:
    """A client of one server's admin port; may be used as a context manager.

    Nothing is asked again by itself: a change whose answer was lost may have been made, and
    `versions` tells.
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
        """A client; connects at the first question.

        Args:
            address: host:port of the admin RPCs, which is not that of all others.
            timeout: seconds that one request may take.
            token: a bearer token of the scope `admin`, or what gives one for each request.
            plaintext_token: whether it may go out unencrypted, as to a proxy that has TLS.
            tls: whether to encrypt; `ca`, `certificate` and `server_name` imply it.
            ca: PEM file of the authorities that may vouch for the server; None for gRPC's own.
                It is read again when it changes, and so are the next two.
            certificate: PEM file that this client shows of itself.
            key: PEM file of that certificate's key.
            server_name: that the server's certificate has to bear; None for the address's own.

        Raises:
            SettingsError: as `likely.Client`.
        """
        self._timeout = positive(timeout)
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
        """Those that are served, then those on their way in or out, then refused bundles.

        Raises:
            LikelyError: Unavailable, DeadlineExceeded, AccessDenied or ServerFault.
        """
        answer = self._ask(self._stub.ListVersions, admin_pb2.ListVersionsRequest())
        return [codec.model_version(each) for each in answer.versions]

    def load(self, folder: str | PathLike[str]) -> ModelVersion:
        """Serves the bundle in a folder, once it has proved itself; in place of what it held.

        Args:
            folder: absolute, as the server sees it.

        Raises:
            BundleError: it is refused; what was served is served still.
            LikelyError: InvalidInput, DeviceError, or as `versions`.
        """
        request = built(admin_pb2.LoadModelRequest, folder=fspath(folder))
        return codec.model_version(self._ask(self._stub.LoadModel, request).version)

    def unload(self, model: str, version: str) -> None:
        """Serves a version no more; returns once its requests have ended and it is freed.

        Raises:
            Refused: a label names it.
            LikelyError: InvalidInput, ModelNotFound, or as `versions`.
        """
        request = built(admin_pb2.UnloadModelRequest, model_name=model, model_version=version)
        self._ask(self._stub.UnloadModel, request)

    def set_label(self, model: str, label: str, version: str | None) -> None:
        """Lets a label, `stable` or `canary`, name a version, or none.

        Raises:
            LikelyError: InvalidInput, ModelNotFound, or as `versions`.
        """
        request = built(
            admin_pb2.SetLabelRequest, model_name=model, label=label, model_version=version or ""
        )
        self._ask(self._stub.SetLabel, request)

    def rollback(self, model: str) -> ModelVersion:
        """The version that answered by default before the last change, which is stable now.

        Raises:
            Refused: there was none, or its folder does not hold it any more.
            BundleError: it has to be loaded again, and is refused.
            LikelyError: InvalidInput, ModelNotFound, or as `versions`.
        """
        request = built(admin_pb2.RollbackRequest, model_name=model)
        return codec.model_version(self._ask(self._stub.Rollback, request).version)

    def reset_drift(self, model: str, version: str | None = None) -> str:
        """The version whose test for drift has begun anew; None is the one that answers by default.

        Raises:
            LikelyError: InvalidInput, ModelNotFound, or as `versions`.
        """
        request = built(admin_pb2.ResetDriftRequest, model_name=model, model_version=version or "")
        found: str = self._ask(self._stub.ResetDrift, request).model_version
        return found

    def close(self) -> None:
        """Ends the connection."""
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
        """The RPCs, over a channel that shows what the files hold.

        Raises:
            LikelyError: it is closed.
        """
        with self._opening:
            if self._closed:
                raise LikelyError(CLOSED)
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
