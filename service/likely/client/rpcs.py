"""The RPCs of the channel that both clients use, their retries, and the client's errors."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeAlias

import grpc

from likely import statuses
from likely.client.catalogue import Catalogue, Request
from likely.client.channels import Address
from likely.errors import (
    DeadlineExceeded,
    Forked,
    InvalidInput,
    LikelyError,
    Overloaded,
    SettingsError,
    Unavailable,
)
from likely.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    latent_pb2,
    latent_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
)

ADDRESS = "127.0.0.1:50051"
TIMEOUT = 60.0
MAX_TIMEOUT = 1e9  # seconds, about 31 years; gRPC treats a time that no clock can hold as 0
CLIENT_CLOSED = "this client is closed; make another one to ask on"
CLOSED_TOO_EARLY = "this client was closed before all was answered"
# Backoff in seconds before a request is repeated after a cut-off answer.
RETRY_DELAYS = (0.2, 0.4, 0.8)
# Beginnings of gRPC's message if no server was reached.
_UNREACHED = ("failed to connect", "errors resolving", "DNS resolution", "connections to all")
# Parts of that message if a server was reached but TLS failed.
_TLS_FAILURES = ("Tls handshake failed", "Hostname Verification Check failed", "SSL_ERROR_SSL")
_HUNG_UP = "Socket closed"  # part of it if a peer hung up: a server with TLS, or a proxy with none
# gRPC's whole message after a timeout, whether or not a server was reached or had begun to answer.
_TIMED_OUT = ("Deadline Exceeded", "Stream removed (Deadline Exceeded)")

Kind: TypeAlias = type[
    Request
    | generation_pb2.GenerateRequest
    | generation_pb2.CompleteRequest
    | scoring_pb2.ScoreStreamRequest
    | scoring_pb2.ClassifyStreamRequest
]


class ServerRpcs:
    """The RPCs of one server, over a channel that is opened when the first RPC is requested.

    A new channel replaces it when the certificate files change; calls on the old one run to their
    end undisturbed. gRPC's threads do not survive a fork, so a channel can only be used in the
    process that opened it.
    """

    def __init__(
        self,
        open_channel: Callable[[], Any],
        edition: Callable[[], int],
        address: Address,
        catalogue: Catalogue,
    ) -> None:
        self._open = open_channel
        self._edition = edition
        self._opened = 0  # edition of the certificate files that the channel uses
        self._catalogue = catalogue
        self._address = address if isinstance(address, str) else ", ".join(address)
        self._closed = False
        self._channel: Any = None
        self._calls: dict[Kind, Any] = {}
        self._process = 0
        self._opening = Lock()

    def begin(self, kind: Kind, request: Any, **options: Any) -> Any:
        """Begins the RPC for requests of this type, and returns gRPC's call.

        Args:
            kind: type of the request, or of the messages.
            request: the request, or an iterator of the messages of a stream.
            options: arguments of gRPC's callables, such as `timeout` and `metadata`.

        Raises:
            Forked: another process opened the channel.
            LikelyError: the client is closed.
        """
        rpc = self._rpc(kind)
        try:
            return rpc(request, **options)
        except ValueError as error:  # another thread has just closed the channel
            if not self._closed:
                raise
            raise LikelyError(CLIENT_CLOSED) from error

    def _rpc(self, kind: Kind) -> Any:
        if self._closed:
            raise LikelyError(CLIENT_CLOSED)
        if self._calls and self._process != os.getpid():
            raise Forked(
                f"this client was used in process {self._process}, which then forked this one; "
                "make a client in each process, or start processes by spawn"
            )
        edition = self._edition()
        if edition > self._opened:
            with self._opening:  # two threads must not open a channel each
                if edition > self._opened:
                    self._channel = self._open()
                    self._process = os.getpid()
                    self._calls = _calls(self._channel)
                    self._opened = edition
        return self._calls[kind]

    def close(self) -> Any:
        """Closes the channel if this process opened it; for asyncio, returns an awaitable."""
        self._closed = True
        if self._calls and self._process == os.getpid():
            return self._channel.close()
        return None

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Translates the failure of a call in this context to a `LikelyError`.

        An asyncio call that was cancelled because the channel was closed raises one too: the
        caller's own task is not cancelled.
        """
        try:
            yield
        except asyncio.CancelledError as end:
            task = asyncio.current_task()
            if not self._closed or (task and task.cancelling()):
                raise
            raise LikelyError(CLOSED_TOO_EARLY) from end
        except grpc.RpcError as failure:
            error = self.error(failure)
            if isinstance(error, InvalidInput):  # an outdated description may be the cause
                self._catalogue.clear()
            raise error from failure

    def error(self, failure: Any) -> LikelyError:
        """The error of a failed call, which may have failed because the client was closed."""
        if self._closed and failure.code() is grpc.StatusCode.CANCELLED:
            return LikelyError(CLOSED_TOO_EARLY)
        return as_error(failure, self._address)


class Retries:
    """Retries of requests whose answers are cut off, and the time that is left for them.

    gRPC's own retries end once the headers of an answer have arrived. All requests of this service
    are idempotent.
    """

    def __init__(self, timeout: float, enabled: bool) -> None:
        """The retries of one request, or of several one after another.

        Args:
            timeout: maximum seconds for each request with its retries.
            enabled: whether to retry at all.
        """
        self._timeout = timeout
        self._pauses = RETRY_DELAYS if enabled else ()
        self._times = 0
        self._end = 0.0

    def reset(self) -> None:
        """An answer has arrived: the next request has its own retries and timeout."""
        self._times = 0

    def time_left(self) -> float:
        """Seconds left for the request that is sent now."""
        now = time.monotonic()
        if not self._times:
            self._end = now + self._timeout
        return self._end - now

    def retry_delay(self, error: LikelyError, *, begun: bool = False) -> float:
        """Seconds to wait before the same request is sent again.

        Args:
            error: the error that ended the answer.
            begun: whether part of the answer had arrived. In this case gRPC has not retried, so a
                temporary refusal by the server is retried here.

        Raises:
            LikelyError: the error itself, if the request is not to be repeated.
        """
        again = isinstance(error, Unavailable | Overloaded)
        if self._times >= len(self._pauses) or not (again if begun else _is_cut(error)):
            raise error
        seconds = max(self._pauses[self._times], _named_delay(error))
        self._times += 1
        if seconds >= self._end - time.monotonic():
            raise error
        return seconds

    def resume_delay(self, error: LikelyError) -> float:
        """Seconds to wait before partly received draws resume; 0 unless the server is too busy.

        Raises:
            LikelyError: the error itself, if the server names a delay beyond the timeout.
        """
        seconds = _named_delay(error) if isinstance(error, Overloaded) else 0.0
        if seconds >= self._timeout:
            raise error
        return seconds


def _named_delay(error: LikelyError) -> float:
    """The delay in seconds that the server named for the next attempt; 0 if it named none."""
    named = error.retry_after if isinstance(error, Unavailable | Overloaded) else None
    return named or 0.0


def _is_cut(error: LikelyError) -> bool:
    """Whether the connection to a server broke: a refusal by our servers would name a delay."""
    failure: Any = error.__cause__
    return (
        isinstance(failure, grpc.RpcError)
        and isinstance(error, Unavailable)
        and error.retry_after is None
        and not (failure.details() or "").startswith(_UNREACHED)
    )


def as_error(failure: Any, address: str, start: str = "likely serve") -> LikelyError:
    """The error of a failed call; if no server answers, or not in time, it names the address.

    Args:
        failure: the error that grpc raised.
        address: the address that was called.
        start: the command that would start the server there.
    """
    error = statuses.error(failure)
    if isinstance(error, Unavailable) and str(error).startswith(_UNREACHED):
        return unreachable_error(address, str(error), start)
    if isinstance(error, DeadlineExceeded) and str(error) in _TIMED_OUT:
        return DeadlineExceeded(
            f"the timeout ended before a likely server at {address} had answered; "
            f"where none runs, `{start}` starts one. gRPC says: {error}"
        )
    return error


def unreachable_error(address: str, words: str, start: str = "likely serve") -> Unavailable:
    """The error for an address where no server answers; it ends with gRPC's own message."""
    if any(sign in words for sign in _TLS_FAILURES):
        return Unavailable(
            f"no connection with {address}: is TLS on one side only, or the server's certificate "
            f"not trusted, or of another name? gRPC says: {words}"
        )
    closed = " (or one asks for TLS)" if _HUNG_UP in words else ""
    return Unavailable(
        f"no likely server answers at {address}{closed}; `{start}` starts one. gRPC says: {words}"
    )


def valid_timeout(timeout: float) -> float:
    """The timeout unchanged, if it is valid.

    Raises:
        SettingsError: it is not a number above 0, or it exceeds `MAX_TIMEOUT` seconds.
    """
    if not isinstance(timeout, int | float) or not 0 < timeout <= MAX_TIMEOUT:
        raise SettingsError(
            f"timeout = {timeout!r} is not allowed; it should be seconds above 0, "
            f"at most {MAX_TIMEOUT:,.0f}"
        )
    return timeout


def _calls(channel: Any) -> dict[Kind, Any]:
    scoring = scoring_pb2_grpc.ScoringServiceStub(channel)
    generation = generation_pb2_grpc.GenerationServiceStub(channel)
    latent = latent_pb2_grpc.LatentServiceStub(channel)
    models = models_pb2_grpc.ModelServiceStub(channel)
    return {
        scoring_pb2.ScoreRequest: scoring.Score,
        scoring_pb2.ClassifyRequest: scoring.Classify,
        scoring_pb2.EncodeRequest: scoring.Encode,
        scoring_pb2.ScoreStreamRequest: scoring.ScoreStream,
        scoring_pb2.ClassifyStreamRequest: scoring.ClassifyStream,
        generation_pb2.GenerateRequest: generation.Generate,
        generation_pb2.CompleteRequest: generation.Complete,
        latent_pb2.DecodeRequest: latent.Decode,
        latent_pb2.TraverseRequest: latent.Traverse,
        latent_pb2.InterpolateRequest: latent.Interpolate,
        models_pb2.ListModelsRequest: models.ListModels,
        models_pb2.GetModelRequest: models.GetModel,
    }
