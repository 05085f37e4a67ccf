"""The guard around every RPC: checks access, decodes, maps errors to statuses, logs, counts.

grpc.aio by itself answers undecodable bytes, and handlers that raise, with UNKNOWN and the
exception's text. Here requests arrive as bytes and are decoded inside the guard, so that both
get a proper status.

The guard runs for every request, and with a small model it costs more than the model. What does
not depend on the request is therefore looked up once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import grpc.aio

from likely import statuses
from likely.batching import callers
from likely.batching.callers import Caller, Priority
from likely.errors import DeadlineExceeded, DeviceLost, InvalidInput, MethodUnknown, Unavailable
from likely.serving import tallies
from likely.serving.access import UNKNOWN, Gate, Holder
from likely.serving.doors import Door
from likely.telemetry.metrics import Metrics
from likely.tracing import Trace, Tracing
from likely.v1.failures_pb2 import Failure
from likely.versions.registry import Registry

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

REQUEST_ID = "x-request-id"
PRIORITY = "likely-priority"
_OUR_PACKAGES = ("likely.", "inference.")
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Deserializer: TypeAlias = Callable[[bytes], Any] | None
Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]


@dataclass(slots=True)
class Call:
    """What is known of an RPC while it runs, for metrics and its line in the access log.

    Attributes:
        service: full name of the service.
        method: name of the method.
        is_ours: whether it is a request of our services or the Open Inference Protocol, and not
            a probe of health or reflection.
        request_id: identifies the request.
        began: when it began, in seconds of the monotonic clock.
        model: the requested model, as metrics and logs name it.
        code: name of its status code.
        images: number of pictures answered.
        holder: name of the token's holder; empty if there is none.
        accepted: False if it arrived after the door had been closed.
        trace: its trace; None if it is not traced.
    """

    service: str
    method: str
    is_ours: bool
    request_id: str
    began: float
    model: str = ""
    code: str = "OK"
    images: int = 0
    holder: str = ""
    accepted: bool = True
    trace: Trace | None = None


def _ignore(_: DeviceLost) -> None:
    """Ignores the loss of a device."""


class GuardedServices(grpc.GenericRpcHandler):
    """The services of one server behind a guard; generated code adds them as to a server.

    Methods are registered by name only. For each method that is registered individually, grpc.aio
    keeps a task, and it starts to wait for all of these tasks again at every request. An
    interceptor would cost two coroutines per request.
    """

    def __init__(self, guard: Guard, server: grpc.aio.Server) -> None:
        self._guard = guard
        self._services: list[grpc.GenericRpcHandler] = []
        self._handlers: dict[str, Handler] = {}  # guarded handlers of existing methods, by path
        # One name for all unknown methods, so that callers cannot add values to logs and metrics.
        self._unknown_handler = guard.wrap_handler(_NO_METHOD, UNKNOWN, UNKNOWN)
        server.add_generic_rpc_handlers((self,))

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Adds services."""
        self._services += handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Does nothing, as the same methods are added as generic handlers."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """Returns the guarded handler of an RPC; for an unknown RPC, one that refuses it."""
        path = handler_call_details.method
        return self._handlers.get(path) or self._find_handler(path, handler_call_details)

    def _find_handler(self, path: str, details: grpc.HandlerCallDetails) -> Handler:
        handlers = (service.service(details) for service in self._services)
        handler = next((handler for handler in handlers if handler), None)
        if handler is None:
            return self._unknown_handler
        service, _, method = path.removeprefix("/").rpartition("/")
        self._handlers[path] = self._guard.wrap_handler(handler, service, method)
        return self._handlers[path]


class Guard:
    """Guards every RPC of a server.

    Attributes:
        door: tracks accepted requests, and refuses new ones at shutdown.
    """

    def __init__(
        self,
        registry: Registry,
        metrics: Metrics,
        log: FilteringBoundLogger,
        gate: Gate | None = None,
        *,
        tracing: Tracing | None = None,
        slow_reader_seconds: float = 60.0,
        on_device_lost: Callable[[DeviceLost], None] = _ignore,
    ) -> None:
        """Creates a guard.

        Args:
            registry: knows the models' names, which alone may appear in logs and metrics.
            metrics: metrics in which RPCs are counted.
            log: receives RPCs and faults.
            gate: checks the callers' tokens; None admits everybody.
            tracing: traces RPCs; None for no tracing.
            slow_reader_seconds: how long a stream waits for a caller that does not read.
            on_device_lost: called when the device is gone.
        """
        self.door = Door()
        self._registry = registry
        self._metrics = metrics
        self._log = log.bind()  # a logger that was never bound would bind itself at each event
        self._logs_all = log.is_enabled_for(logging.DEBUG)
        self._gate = gate or Gate()
        self._tracing = tracing
        self._slow_reader_seconds = slow_reader_seconds
        self._on_device_lost = on_device_lost
        self._probes: set[asyncio.Timeout] = set()

    def end_probes(self) -> None:
        """Ends health watches and reflection streams, which would last until the drain's end."""
        for probe in self._probes:
            probe.reschedule(0)

    def wrap_handler(self, handler: Handler, service: str, method: str) -> Handler:
        """Wraps a method's handler in the guard."""
        name = "_".join(
            "stream" if streams else "unary"
            for streams in (handler.request_streaming, handler.response_streaming)
        )
        inner: Any = getattr(handler, name)
        is_stream = handler.response_streaming
        run_guarded = partial(
            self._run_guarded, service, method, service.startswith(_OUR_PACKAGES), is_stream
        )
        receive = self._decode_stream if handler.request_streaming else self._decode_request
        deserialize = handler.request_deserializer

        async def unary(data: Any, context: Context) -> Any:
            async def work(call: Call) -> Any:
                answer = await inner(receive(call, data, deserialize), context)
                self._count_answer(call, answer)
                return answer

            return await run_guarded(context, work)

        async def stream(data: Any, context: Context) -> None:
            async def work(call: Call) -> None:
                is_first = True
                async with aclosing(inner(receive(call, data, deserialize), context)) as answers:
                    async for answer in answers:
                        self._count_answer(call, answer)
                        await self._write(answer, context, is_first)
                        is_first = False

            await run_guarded(context, work)

        make: Any = getattr(grpc, f"{name}_rpc_method_handler")
        guarded: Handler = make(
            stream if is_stream else unary, response_serializer=handler.response_serializer
        )
        return guarded

    async def _run_guarded(
        self,
        service: str,
        method: str,
        is_ours: bool,
        is_stream: bool,
        context: Context,
        work: Callable[[Call], Awaitable[Any]],
    ) -> Any:
        # The work is passed as a function, as nested generator-based context managers would cost
        # more than the rest of the guard.
        metadata: Metadata = context.invocation_metadata() or ()
        call = Call(service, method, is_ours, _request_id(metadata), time.monotonic())
        # Trailing metadata, as initial metadata would commit the call, so that no client
        # would retry it.
        trailer = ((REQUEST_ID, call.request_id),)
        context.set_trailing_metadata(trailer)
        if call.is_ours:
            self._metrics.began(method)
            if self._tracing:
                call.trace = self._tracing.begin(service, method, metadata)
        try:
            holder = self._gate.admit(service, metadata)
            call.holder = holder.name if holder else ""
            callers.announce(_caller(call, context, metadata, holder))
            # Single health checks are answered.
            if self.door.closed and (is_stream or call.is_ours):
                call.accepted = False
                await self.door.refuse()
            if not call.is_ours:
                return await self._run_probe(call, work)
            with self.door.inside():
                return await work(call)
        except grpc.aio.AbortError:
            call.code = _code_name(context.code())
            raise
        except asyncio.CancelledError:
            call.code = "DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED"
            raise
        except Exception as error:
            refusal = statuses.status(
                self.public_error(error, method, call.request_id), call.request_id
            )
            call.code = refusal[0].name
        finally:
            self._record_end(call)
        # Counted and logged before this, as a caller that does not read makes it wait.
        code, message, details = refusal
        return await context.abort(code, message, (*trailer, *details))

    def public_error(self, error: Exception, method: str, request_id: str) -> Exception:
        """Returns the error that callers get for an error, and logs it if it is a fault."""
        if isinstance(error, DeviceLost):
            self._on_device_lost(error)
            return Unavailable("the device is gone; the server shuts down, to be restarted")
        if not statuses.is_public(error):
            self._log.error("fault", method=method, request_id=request_id, exc_info=error)
        return error

    def failure(self, error: Exception, method: str, request_id: str) -> Failure:
        """Returns the failure that the caller gets for one message of a stream."""
        return statuses.failure(self.public_error(error, method, request_id), request_id)

    def count_stream_message(self, method: str, request: Any, code: int) -> None:
        """Counts one message of a stream that was answered with a status code; 0 is OK.

        Needed for streams whose answers do not contain the codes (`tallies.codes`), or that ask
        several models.
        """
        self._metrics.count_stream_message(
            method, self._known_model(request), statuses.code_of(code).name
        )

    async def _write(self, answer: Any, context: Context, is_first: bool) -> None:
        # Waits until the caller's flow-control window has room, so that no pictures are drawn
        # that it does not read.
        try:
            async with asyncio.timeout(self._slow_reader_seconds):
                if is_first:  # gRPC cannot end a call whose initial metadata wait with an answer
                    await context.send_initial_metadata(())
                await context.write(answer)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the caller did not read an answer within {self._slow_reader_seconds:g} seconds"
            ) from None

    async def _run_probe(self, call: Call, work: Callable[[Call], Awaitable[Any]]) -> Any:
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._probes.add(limit)
                return await work(call)
        except TimeoutError:
            if not limit.expired():  # some other time limit
                raise
            raise Unavailable("the server is shutting down") from None
        finally:
            self._probes.discard(limit)

    def _record_end(self, call: Call) -> None:
        seconds = time.monotonic() - call.began
        if call.is_ours:
            self._metrics.ended(call.method, call.model, call.code, seconds)
        if call.trace:
            call.trace.end(
                call.code,
                grpc.StatusCode[call.code].value[0],
                {
                    "likely.model": call.model,
                    "likely.images": call.images,
                    "likely.request_id": call.request_id,
                },
            )
        # Successes are only counted, as a line each would cost as much as a small model's run.
        notable = call.is_ours and call.code not in ("OK", "RESOURCE_EXHAUSTED")
        if notable or self._logs_all:
            self._log_call(call, seconds, self._log.info if notable else self._log.debug)

    def _log_call(self, call: Call, seconds: float, log: Callable[..., object]) -> None:
        log(
            "rpc",
            method=call.method,
            model=call.model,
            code=call.code,
            images=call.images,
            **({"holder": call.holder} if call.holder else {}),
            **({} if call.accepted else {"accepted": False}),
            seconds=round(seconds, 6),
            request_id=call.request_id,
        )

    def _decode_request(self, call: Call, data: bytes, deserialize: Deserializer) -> Any:
        request = _decode(data, deserialize)
        call.model = self._known_model(request)
        return request

    def _known_model(self, request: Any) -> str:
        """Returns the requested model's name for logs and metrics."""
        name = tallies.model_name(request)
        # One value for all unknown names, so that callers cannot add values to logs and metrics.
        return name if not name or self._registry.has_model(name) else "unknown"

    async def _decode_stream(
        self, call: Call, stream: AsyncIterator[bytes], deserialize: Deserializer
    ) -> Any:
        async for data in stream:
            # All messages of a stream ask the same model, which the first one names.
            yield (
                _decode(data, deserialize)
                if call.model
                else self._decode_request(call, data, deserialize)
            )

    def _count_answer(self, call: Call, answer: Any) -> None:
        if call.is_ours:
            images = tallies.picture_count(answer)
            call.images += images
            model = tallies.model_name(answer) or call.model
            self._metrics.count_answer(call.method, model, images, tallies.verdicts(answer))
            for number in tallies.codes(answer):
                self._metrics.count_stream_message(
                    call.method, call.model, statuses.code_of(number).name
                )


async def _refuse_unknown(_: Any, __: Context) -> AsyncIterator[Any]:
    raise MethodUnknown("this server has no such service or method")
    yield


_NO_METHOD: Handler = grpc.stream_stream_rpc_method_handler(_refuse_unknown)


def _decode(data: bytes, deserialize: Deserializer) -> Any:
    try:
        return deserialize(data) if deserialize else data
    except Exception as error:
        raise InvalidInput("", "the request's bytes are no message of the RPC's type") from error


def _caller(call: Call, context: Context, metadata: Metadata, holder: Holder | None) -> Caller:
    """Returns the caller: the token's holder, otherwise the address.

    Raises:
        DeadlineExceeded: the deadline has already passed.
    """
    seconds = context.time_remaining()
    if seconds is not None and seconds <= 0:
        raise DeadlineExceeded("the deadline had passed when the request came")
    return Caller(
        # The address without its port, which changes with each connection.
        holder.client if holder else context.peer().rpartition(":")[0],
        Priority.BULK if (PRIORITY, "bulk") in metadata else None,
        None if seconds is None else time.monotonic() + seconds,
        request_id=call.request_id,
        trace=call.trace,
        scopes=holder.scopes if holder else None,
    )


def _request_id(metadata: Metadata) -> str:
    for key, value in metadata:
        if key == REQUEST_ID and isinstance(value, str) and _SANE_ID.fullmatch(value):
            return value
    return os.urandom(16).hex()  # not from `random`, whose state any library may reset


def _code_name(code: grpc.StatusCode | int | None) -> str:
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code
    return next((known.name for known in grpc.StatusCode if known.value[0] == number), "UNKNOWN")
