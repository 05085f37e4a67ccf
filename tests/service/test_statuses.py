"""Every public error comes to the caller as what it was; any other stays untold."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from likely import errors, statuses


class Failed:
    """A failed call as a client sees it."""

    def __init__(self, code: grpc.StatusCode, message: str, metadata: Any) -> None:
        self._status = code, message, metadata

    def code(self) -> grpc.StatusCode:
        return self._status[0]

    def details(self) -> str:
        return self._status[1]

    def trailing_metadata(self) -> Any:
        return self._status[2]


PUBLIC = [
    errors.InvalidInput("images.shape[0]", "-1 is negative"),
    errors.InvalidInput("", "no message"),
    errors.ModelNotFound("a@2", "no a@2"),
    errors.NotAnswered("no encode graph"),
    errors.Overloaded("queue is full", 0.25),
    errors.Unavailable("loading", 2.5),
    errors.DeadlineExceeded("too late"),
    errors.AccessDenied("the token lacks the scope score"),
    errors.Unauthenticated("no token", "TOKEN_MISSING"),
    errors.MethodUnknown("no such method"),
]


@pytest.mark.parametrize("error", PUBLIC, ids=lambda error: type(error).__name__)
def test_there_and_back(error: errors.LikelyError) -> None:
    again = statuses.error(Failed(*statuses.status(error, "id-1")))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize("error", PUBLIC, ids=lambda error: type(error).__name__)
def test_each_carries_its_reason_and_the_request(error: errors.LikelyError) -> None:
    code, _, metadata = statuses.status(error, "id-1")
    rich = status_pb2.Status.FromString(dict(metadata)[statuses.DETAILS_KEY])
    assert rich.code == code.value[0]
    info = error_details_pb2.ErrorInfo()
    assert rich.details[0].Unpack(info)
    assert info.domain == "likely"
    assert statuses.REASONS[info.reason] is code
    request = error_details_pb2.RequestInfo()
    assert rich.details[1].Unpack(request)
    assert request.request_id == "id-1"


@pytest.mark.parametrize("text", ["x", "é", "\N{BAR CHART}", "\0", "\ud800"])
@pytest.mark.parametrize(
    "made", [errors.BundleError, errors.Overloaded, lambda text: errors.ModelNotFound(text, text),
             lambda text: errors.InvalidInput(text, text)],
)  # fmt: skip
def test_however_long_a_text_the_caller_is_told(made: Any, text: str) -> None:
    _, message, metadata = statuses.status(made(10_000 * text), "i" * 64)
    assert message.endswith("…")
    rich = dict(metadata)[statuses.DETAILS_KEY]
    assert isinstance(rich, bytes)
    # Of 8192 bytes, of which a few small headers have some.
    assert len(quote(message)) + len(base64.b64encode(rich)) < 7900


@pytest.mark.parametrize("error", [errors.Overloaded("full", 0.25), errors.Unavailable("no")])
def test_what_may_be_retried_says_when(error: errors.LikelyError) -> None:
    _, _, metadata = statuses.status(error, "id-1")
    expected = "250" if isinstance(error, errors.Overloaded) else "1000"
    assert dict(metadata)[statuses.PUSHBACK_KEY] == expected


@pytest.mark.parametrize(
    "error", [ValueError("secret"), KeyError("secret"), errors.ServerFault("secret")]
)
def test_a_fault_tells_the_request_id_alone(error: Exception) -> None:
    code, message, metadata = statuses.status(error, "id-1")
    assert code is grpc.StatusCode.INTERNAL
    assert message == "internal error, request id-1"
    assert b"secret" not in dict(metadata)[statuses.DETAILS_KEY]
    assert isinstance(statuses.error(Failed(code, message, metadata)), errors.ServerFault)


def test_what_a_library_says_of_a_bundle_stays_in_the_log() -> None:
    error = errors.BundleError("a.onnx does not open", "graph", "[ONNXRuntimeError] : secret")
    code, message, metadata = statuses.status(error, "id-1")
    assert (code, message) == (grpc.StatusCode.FAILED_PRECONDITION, "a.onnx does not open")
    assert b"secret" not in dict(metadata)[statuses.DETAILS_KEY]
    assert str(error) == "a.onnx does not open: [ONNXRuntimeError] : secret"


def test_a_stream_that_a_proxy_cut_off_may_be_asked_for_again() -> None:
    cut = "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))"
    found = statuses.error(Failed(grpc.StatusCode.INTERNAL, cut, ()))
    assert isinstance(found, errors.Unavailable) and str(found) == cut
    lost = statuses.error(Failed(grpc.StatusCode.INTERNAL, statuses.STATUS_LOST, ()))
    assert isinstance(lost, errors.Unavailable)
    code, message, metadata = statuses.status(errors.ServerFault("RST_STREAM"), "id-1")
    assert isinstance(statuses.error(Failed(code, message, metadata)), errors.ServerFault)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("CANCELLED", errors.Unavailable),
        ("", errors.Unavailable),
        ("Channel closed!", errors.ServerFault),
        ("Locally cancelled by application!", errors.ServerFault),
    ],
)
def test_what_a_server_that_stops_cancelled_may_be_asked_again(
    message: str, kind: type[errors.LikelyError]
) -> None:
    assert type(statuses.error(Failed(grpc.StatusCode.CANCELLED, message, ()))) is kind


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidInput),
        (grpc.StatusCode.NOT_FOUND, errors.ModelNotFound),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
        (grpc.StatusCode.UNIMPLEMENTED, errors.MethodUnknown),
        (grpc.StatusCode.UNKNOWN, errors.ServerFault),
    ],
)
@pytest.mark.parametrize("metadata", [None, (), ((statuses.DETAILS_KEY, b"\xff\xff"),)])
def test_a_proxy_without_details_is_understood(
    code: grpc.StatusCode, kind: type[errors.LikelyError], metadata: Any
) -> None:
    assert type(statuses.error(Failed(code, "message", metadata))) is kind
