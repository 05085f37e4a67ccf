"""Errors as gRPC statuses with google.rpc details, and back.

| error            | status              | details beside ErrorInfo and RequestInfo |
| ---------------- | ------------------- | ---------------------------------------- |
| InvalidInput     | INVALID_ARGUMENT    | BadRequest: the field                    |
| ModelNotFound    | NOT_FOUND           | ResourceInfo: the model                  |
| NotAnswered      | FAILED_PRECONDITION |                                          |
| Overloaded       | RESOURCE_EXHAUSTED  | RetryInfo                                |
| Unavailable      | UNAVAILABLE         | RetryInfo                                |
| DeadlineExceeded | DEADLINE_EXCEEDED   |                                          |
| Unauthenticated  | UNAUTHENTICATED     |                                          |
| AccessDenied     | PERMISSION_DENIED   |                                          |
| BundleError      | FAILED_PRECONDITION |                                          |
| DeviceError      | FAILED_PRECONDITION |                                          |
| Refused          | FAILED_PRECONDITION |                                          |
| MethodUnknown    | UNIMPLEMENTED       |                                          |
| anything else    | INTERNAL            |                                          |

docs/errors.md lists the reasons that ErrorInfo gives.
NotAnswered is not UNIMPLEMENTED: proxies and clients take that to mean a server too
old to know the method, whereas here another model on the same server may answer.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2

from likely import errors
from likely.v1 import failures_pb2

DOMAIN = "likely"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
RETRY_SECONDS = 1.0
LONGEST = 1000  # bytes of a text: clients reject answers with more than 8 KiB of metadata
# gRPC's messages for calls that the caller ended.
CALLER_ENDED = ("Channel closed", "Locally cancelled")
STREAM_RESET = "RST_STREAM"  # occurs in gRPC's message for a stream that was reset
# The whole message of gRPC's asyncio for a stream that ended during a write: the status is lost.
STATUS_LOST = "Internal error from Core"

_CODES: dict[type[Exception], tuple[grpc.StatusCode, str]] = {
    errors.InvalidInput: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
    errors.ModelNotFound: (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    errors.NotAnswered: (grpc.StatusCode.FAILED_PRECONDITION, "NOT_ANSWERED"),
    errors.Overloaded: (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    errors.Unavailable: (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
    errors.DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    errors.Unauthenticated: (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"),
    errors.AccessDenied: (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"),
    errors.BundleError: (grpc.StatusCode.FAILED_PRECONDITION, "BUNDLE_REFUSED"),
    errors.DeviceError: (grpc.StatusCode.FAILED_PRECONDITION, "DEVICE_MISSING"),
    errors.Refused: (grpc.StatusCode.FAILED_PRECONDITION, "CHANGE_REFUSED"),
    errors.MethodUnknown: (grpc.StatusCode.UNIMPLEMENTED, "METHOD_UNKNOWN"),
}
_ERRORS_BY_CODE: dict[grpc.StatusCode, type[errors.LikelyError]] = {
    grpc.StatusCode.FAILED_PRECONDITION: errors.NotAnswered,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessDenied,
    grpc.StatusCode.UNIMPLEMENTED: errors.MethodUnknown,
}
# Errors that only admin RPCs return, by their reason.
_ADMIN_ERRORS: dict[str, type[errors.LikelyError]] = {
    _CODES[kind][1]: kind for kind in (errors.BundleError, errors.DeviceError, errors.Refused)
}
_RETRYABLE: dict[grpc.StatusCode, type[errors.Overloaded | errors.Unavailable]] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
}
_INTERNAL = (grpc.StatusCode.INTERNAL, "INTERNAL")
_NUMBERS = {code.value[0]: code for code in grpc.StatusCode}

REASONS: dict[str, grpc.StatusCode] = {
    **{reason: code for code, reason in (*_CODES.values(), _INTERNAL)},
    "TOKEN_MISSING": grpc.StatusCode.UNAUTHENTICATED,
    "TOKEN_EXPIRED": grpc.StatusCode.UNAUTHENTICATED,
}
"""Every reason that ErrorInfo can give, with its status."""

M = TypeVar("M", bound=Message)
Metadata = tuple[tuple[str, str | bytes], ...]


class FailedCall(Protocol):
    """A failed call as grpc raises it, blocking or asynchronous."""

    def code(self) -> grpc.StatusCode:
        """Its status code."""

    def details(self) -> str | None:
        """Its message."""

    def trailing_metadata(self) -> Any:
        """Its trailing metadata: pairs of key and value."""


def is_public(error: Exception) -> TypeGuard[errors.LikelyError]:
    """Whether callers get the error's text; the texts of other errors stay in the log."""
    return type(error) in _CODES


def status(error: Exception, request_id: str) -> tuple[grpc.StatusCode, str, Metadata]:
    """The code, message and trailing metadata that report an error to the caller."""
    rich = _status(error, request_id)
    metadata: Metadata = ((DETAILS_KEY, rich.SerializeToString()),)
    if (delay := _delay(error)) is not None:
        metadata += ((PUSHBACK_KEY, str(round(delay * 1000))),)
    return _CODES.get(type(error), _INTERNAL)[0], rich.message, metadata


def failure(error: Exception, request_id: str) -> failures_pb2.Failure:
    """The failure that reports an error with one message of a stream to the caller."""
    return failures_pb2.Failure.FromString(_status(error, request_id).SerializeToString())


def error(failure: FailedCall) -> errors.LikelyError:
    """The error that a failed call reports."""
    return _error(failure.code(), failure.details() or "", _rich_status(failure))


def error_of(failure: failures_pb2.Failure) -> errors.LikelyError:
    """The error that the failure of one message of a stream reports."""
    rich = status_pb2.Status.FromString(failure.SerializeToString())
    return _error(code_of(failure.code), rich.message, rich)


def code_of(number: int) -> grpc.StatusCode:
    """The status code with that number; UNKNOWN if there is none."""
    return _NUMBERS.get(number, grpc.StatusCode.UNKNOWN)


def _status(error: Exception, request_id: str) -> status_pb2.Status:
    code, reason = _CODES.get(type(error), _INTERNAL)
    if isinstance(error, errors.Unauthenticated):
        reason = error.reason
    message = (
        _shorten(error.public_message)
        if is_public(error)
        else f"internal error, request {request_id}"
    )
    rich = status_pb2.Status(code=code.value[0], message=message)
    details = [
        details_pb2.ErrorInfo(reason=reason, domain=DOMAIN),
        details_pb2.RequestInfo(request_id=request_id),
        *_details(error),
    ]
    for detail in details:
        rich.details.add().Pack(detail)
    return rich


def _error(
    code: grpc.StatusCode, message: str, rich: status_pb2.Status | None
) -> errors.LikelyError:
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        bad = _detail(rich, details_pb2.BadRequest)
        first = next(iter(bad.field_violations), None) if bad else None
        return errors.InvalidInput(*((first.field, first.description) if first else ("", message)))
    if code is grpc.StatusCode.NOT_FOUND:
        resource = _detail(rich, details_pb2.ResourceInfo)
        return errors.ModelNotFound(resource.resource_name if resource else "", message)
    if retryable := _RETRYABLE.get(code):
        retry = _detail(rich, details_pb2.RetryInfo)
        return retryable(
            message, retry.retry_delay.ToTimedelta().total_seconds() if retry else None
        )
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return errors.Unauthenticated(message, _reason(rich) or "TOKEN_INVALID")
    if kind := _ADMIN_ERRORS.get(_reason(rich)) or _ERRORS_BY_CODE.get(code):
        return kind(message)
    cancelled = code is grpc.StatusCode.CANCELLED and not message.startswith(CALLER_ENDED)
    if rich is None and (cancelled or STREAM_RESET in message or message == STATUS_LOST):
        # Our server's own statuses have details. This one came from a proxy that lost its server,
        # or from gRPC, which cancels requests that arrive as it stops. If our server's status was
        # lost on the way, the next attempt gets it again.
        return errors.Unavailable(message)
    return errors.ServerFault(message if code is grpc.StatusCode.INTERNAL else f"{code}: {message}")


def _details(error: Exception) -> list[Message]:
    if isinstance(error, errors.InvalidInput):
        violation = details_pb2.BadRequest.FieldViolation(
            field=_shorten(error.field), description=_shorten(error.description)
        )
        return [details_pb2.BadRequest(field_violations=[violation])]
    if isinstance(error, errors.ModelNotFound):
        resource = details_pb2.ResourceInfo(
            resource_type="likely.v1.Model",
            resource_name=_shorten(error.resource),
            description=_shorten(str(error)),
        )
        return [resource]
    if (delay := _delay(error)) is not None:
        duration = Duration()
        duration.FromMilliseconds(round(delay * 1000))
        return [details_pb2.RetryInfo(retry_delay=duration)]
    return []


def _shorten(text: str) -> str:
    """The text, cut after `LONGEST` bytes."""
    data = text.encode(errors="replace")
    return f"{data[:LONGEST].decode(errors='ignore')}…" if len(data) > LONGEST else data.decode()


def _delay(error: Exception) -> float | None:
    if not isinstance(error, errors.Overloaded | errors.Unavailable):
        return None
    return RETRY_SECONDS if error.retry_after is None else error.retry_after


def _rich_status(failure: FailedCall) -> status_pb2.Status | None:
    for key, value in failure.trailing_metadata() or ():
        if key == DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None  # not from our server: its code and message are still used
    return None


def _reason(rich: status_pb2.Status | None) -> str:
    """The reason in the ErrorInfo of our server; empty if there is none."""
    info = _detail(rich, details_pb2.ErrorInfo)
    return info.reason if info else ""


def _detail(rich: status_pb2.Status | None, kind: type[M]) -> M | None:
    message = kind()
    if rich and any(packed.Unpack(message) for packed in rich.details):
        return message
    return None
