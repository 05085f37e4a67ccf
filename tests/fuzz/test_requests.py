"""Any request message, to every RPC of a real server: an answer or a status that is documented."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.rpc import error_details_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from likely import statuses
from likely.v1 import generation_pb2, images_pb2, latent_pb2, models_pb2, scoring_pb2
from tests.faults.alive import Caller, calling, detail, is_well

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Live

REQUESTS = [
    scoring_pb2.ScoreRequest,
    scoring_pb2.ClassifyRequest,
    scoring_pb2.EncodeRequest,
    generation_pb2.GenerateRequest,
    generation_pb2.CompleteRequest,
    latent_pb2.DecodeRequest,
    latent_pb2.TraverseRequest,
    latent_pb2.InterpolateRequest,
    models_pb2.ListModelsRequest,
    models_pb2.GetModelRequest,
]
METHODS = [
    f"/{service.full_name}/{method.name}"
    for file in (scoring_pb2, generation_pb2, latent_pb2, models_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SMALL = st.integers(-2, 60)
F = FieldDescriptor
SCALARS: dict[int, Any] = {
    F.TYPE_STRING: st.sampled_from(["toy", "1.0", "", "stable", "brightness"])
    | st.text(max_size=20),
    F.TYPE_BYTES: st.binary(max_size=40) | st.sampled_from([bytes(9), b"\1" * 9]),
    F.TYPE_BOOL: st.booleans(),
    F.TYPE_DOUBLE: st.floats() | st.sampled_from([0.05, 0.5, 1.0]),
    F.TYPE_FLOAT: st.floats(width=32),
    F.TYPE_INT64: SMALL | st.integers(-(2**63), 2**63 - 1),
    F.TYPE_INT32: SMALL | st.integers(-(2**31), 2**31 - 1),
    F.TYPE_UINT32: st.integers(0, 2**32 - 1),
    F.TYPE_ENUM: st.integers(0, 9),
}


def messages(kind: Any) -> Any:
    """Messages of that kind, with any of their fields set."""
    fields = {field.name: values(field) for field in kind.DESCRIPTOR.fields}
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: kind(**given))


def values(field: Any) -> Any:
    if field.message_type is images_pb2.Images.DESCRIPTOR:
        return pictures() | messages(images_pb2.Images)
    one = (
        messages(field.message_type._concrete_class) if field.message_type else SCALARS[field.type]
    )
    return st.lists(one, max_size=5) if field.is_repeated else one


def pictures() -> Any:
    """Mostly what the toy takes, so that requests come further than to the first check."""
    return st.integers(0, 4).flatmap(
        lambda n: st.builds(
            images_pb2.Images,
            data=st.binary(min_size=9 * n, max_size=9 * n)
            | st.lists(st.integers(0, 3), min_size=9 * n, max_size=9 * n).map(bytes),
            shape=st.just((n, 1, 3, 3)),
        )
    )


@pytest.fixture
def caller(live: Live) -> Iterator[Caller]:
    with calling(live.address) as made:
        yield made
    is_well(live)


def documented(failure: Any) -> None:
    """Returns if the failure is one that callers can understand, and tells no secret."""
    assert failure.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL), failure
    details = dict(failure.trailing_metadata() or ())
    assert statuses.DETAILS_KEY in details, f"the server did not say so, or not why: {failure}"
    reason = detail(failure, error_details_pb2.ErrorInfo).reason
    assert statuses.REASONS[reason] is failure.code()
    assert "Traceback" not in failure.details()


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.DESCRIPTOR.name)
@FEW
@given(data=st.data())
def test_any_request_is_answered_or_refused(caller: Caller, kind: Any, data: st.DataObject) -> None:
    request = data.draw(messages(kind))
    if "model_name" in kind.DESCRIPTOR.fields_by_name and data.draw(st.booleans()):
        request.model_name, request.model_version = "toy", ""
    try:
        caller.ask(request)
    except grpc.RpcError as failure:
        documented(failure)


@pytest.mark.parametrize("method", METHODS)
@FEW
@given(data=st.binary(max_size=200))
def test_any_bytes_are_answered_or_refused(caller: Caller, method: str, data: bytes) -> None:
    call: Any = caller.channel.unary_stream(method)
    try:
        list(call(data, timeout=30))
    except grpc.RpcError as failure:
        documented(failure)
