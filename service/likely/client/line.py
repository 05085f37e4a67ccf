"""What both clients ask over: a channel, opened at the first question, in one process."""

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
LONGEST = 1e9  # seconds, some 31 years; gRPC takes what no clock can hold for no time at all
CLOSED = "this client is closed; make another one to ask on"
ENDED = "this client was closed before all was answered"
PAUSES = (0.2, 0.4, 0.8)  # seconds before a request is put again whose answer was cut off
# How gRPC's words begin where no server was reached at all.
_UNREACHED = ("failed to connect", "errors resolving", "DNS resolution", "connections to all")
# What is among them where a server was reached whose TLS failed.
_INSECURE = ("Tls handshake failed", "Hostname Verification Check failed", "SSL_ERROR_SSL")
_CLOSED = "Socket closed"  # by a server that asks for TLS, or by what stands for none
# All that it says where the time was over, be a server reached or not, or an answer under way.
_LATE = ("Deadline Exceeded", "Stream removed (Deadline Exceeded)")

Kind: TypeAlias = type[
    Request
    | generation_pb2.GenerateRequest
    | generation_pb2.CompleteRequest
    | scoring_pb2.ScoreStreamRequest
    | scoring_pb2.ClassifyStreamRequest
]


class Line:
    """The RPCs of one server, over a channel that is opened when the first is asked for.

    Another takes its place when the files of its certificates change; what runs on the former one
    ends there, undisturbed. gRPC's threads do not survive a fork, so that a channel is of the
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
        self._opened = 0  # the edition that the channel is of
        self._catalogue = catalogue
        self._where = address if isinstance(address, str) else ", ".join(address)
        self._closed = False
        self._channel: Any = None
        self._calls: dict[Kind, Any] = {}
        self._process = 0
        self._opening = Lock()

    def call(self, kind: Kind) -> Any:
        """The RPC that carries requests of that kind.

        Raises:
            Forked: another process opened the channel.
            LikelyError: it is closed.
        """
        if self._closed:
            raise LikelyError(CLOSED)
        if self._calls and self._process != os.getpid():
            raise Forked(
                f"this client was used in process {self._process}, which then forked this one; "
                "make a client in each process, or start processes by spawn"
            )
        edition = self._edition()
        if edition > self._opened:
            with self._opening:  # or a second thread would open a second channel
                if edition > self._opened:
                    self._channel = self._open()
                    self._process = os.getpid()
                    self._calls = _calls(self._channel)
                    self._opened = edition
        return self._calls[kind]

    def close(self) -> Any:
        """Ends the channel, if this process has one; awaitable where the channel's end is."""
        self._closed = True
        if self._calls and self._process == os.getpid():
            return self._channel.close()
        return None

    @contextmanager
    def told(self) -> Iterator[None]:
        """Raises grpc's errors within the block as the LikelyErrors that they tell of.

        So too asyncio's CancelledError, where `close` cancelled the call and nobody its task.
        """
        try:
            yield
        except asyncio.CancelledError as end:
            task = asyncio.current_task()
            if not self._closed or (task and task.cancelling()):
                raise
            raise LikelyError(ENDED) from end
        except grpc.RpcError as failure:
            error = self.error(failure)
            if isinstance(error, InvalidInput):  # it may have been asked by what is old
                self._catalogue.clear()
            raise error from failure

    def error(self, failure: Any) -> LikelyError:
        """The error that a failed call tells of, be it that the channel ended under it."""
        if self._closed and failure.code() is grpc.StatusCode.CANCELLED:
            return LikelyError(ENDED)
        return as_error(failure, self._where)


class Repeats:
    """How often a request is put again whose answer was cut off, and the time that is left to it.

    What gRPC itself asks again ends where an answer's headers have come. All requests of ours
    may be answered twice.
    """

    def __init__(self, timeout: float, retries: bool) -> None:
        """Of a request, or of several after one another.

        Args:
            timeout: seconds for each, with all its repetitions.
            retries: whether there are any.
        """
        self._timeout = timeout
        self._pauses = PAUSES if retries else ()
        self._times = 0
        self._end = 0.0

    def reset(self) -> None:
        """There was an answer: another request comes next, with time of its own."""
        self._times = 0

    def left(self) -> float:
        """Seconds for the request that is put now."""
        now = time.monotonic()
        if not self._times:
            self._end = now + self._timeout
        return self._end - now

    def pause(self, error: LikelyError, *, begun: bool = False) -> float:
        """Seconds before the same request is put again.

        Args:
            error: that ended the answer.
            begun: whether some of it had come, so that gRPC has not asked again what the server
                refused for now.

        Raises:
            LikelyError: the error, if that is not worth it.
        """
        again = isinstance(error, Unavailable | Overloaded)
        if self._times >= len(self._pauses) or not (again if begun else _is_cut(error)):
            raise error
        seconds = max(self._pauses[self._times], _wish(error))
        self._times += 1
        if seconds >= self._end - time.monotonic():
            raise error
        return seconds

    def rest(self, error: LikelyError) -> float:
        """Seconds before draws of which some had come go on; none but where a server is too busy.

        Raises:
            LikelyError: the error, if the server wants more of them than a request has.
        """
        seconds = _wish(error) if isinstance(error, Overloaded) else 0.0
        if seconds >= self._timeout:
            raise error
        return seconds


def _wish(error: LikelyError) -> float:
    """Seconds that the server named before one more attempt; 0 where it named none."""
    named = error.retry_after if isinstance(error, Unavailable | Overloaded) else None
    return named or 0.0


def _is_cut(error: LikelyError) -> bool:
    """Whether a connection ended on the way: no server of ours says it, and one was reached."""
    failure: Any = error.__cause__
    return (
        isinstance(failure, grpc.RpcError)
        and isinstance(error, Unavailable)
        and error.retry_after is None
        and not (failure.details() or "").startswith(_UNREACHED)
    )


def as_error(failure: Any, address: str, start: str = "likely serve") -> LikelyError:
    """The error that a failed call tells of, be it that nobody answers there, or not in time.

    Args:
        failure: as grpc raises it.
        address: that was asked.
        start: the command that would start what was asked.
    """
    error = statuses.error(failure)
    if isinstance(error, Unavailable) and str(error).startswith(_UNREACHED):
        return unreached(address, str(error), start)
    if isinstance(error, DeadlineExceeded) and str(error) in _LATE:
        return DeadlineExceeded(
            f"the timeout ended before a likely server at {address} had answered; "
            f"where none runs, `{start}` starts one. gRPC says: {error}"
        )
    return error


def unreached(address: str, words: str, start: str = "likely serve") -> Unavailable:
    """What says that nobody answers there, before gRPC's own words."""
    if any(sign in words for sign in _INSECURE):
        return Unavailable(
            f"no connection with {address}: is TLS on one side only, or the server's certificate "
            f"not trusted, or of another name? gRPC says: {words}"
        )
    closed = " (or one asks for TLS)" if _CLOSED in words else ""
    return Unavailable(
        f"no likely server answers at {address}{closed}; `{start}` starts one. gRPC says: {words}"
    )


def positive(timeout: float) -> float:
    """The same seconds, if there are any, and not too many.

    Raises:
        SettingsError: it is no number above 0, or above `LONGEST`.
    """
    if not isinstance(timeout, int | float) or not 0 < timeout <= LONGEST:
        raise SettingsError(
            f"timeout = {timeout!r} is not allowed; it should be seconds above 0, "
            f"at most {LONGEST:,.0f}"
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
