"""Any request message, to every RPC of a real server: an answer or a status that is documented."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from likely import statuses
from likely.bundle import MANIFEST
from likely.inference.inference_pb2 import InferParameter, ModelInferRequest
from likely.serving import tallies
from likely.serving.openinference import operations
from likely.v1 import admin_pb2, images_pb2
from likely.v1.admin_pb2_grpc import AdminServiceStub
from tests.faults.alive import SECONDS, Caller, calling, detail, is_well
from tests.faults.rpcs import ADMIN, OURS, Rpc, listed

if TYPE_CHECKING:
    from likely.bundle import Manifest
    from tests.conftest import Live, Running, Toy

ASKING = [rpc for rpc in OURS if rpc.service != ADMIN]
CHANGING = [rpc for rpc in OURS if rpc.service == ADMIN]
FEW = settings(
    max_examples=60,
    deadline=None,
    # A machine that stands still for seconds is no reason to fail.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FAULTS = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
SMALL = st.integers(-2, 60)
LENGTHS = st.sampled_from([-1, 0, 2**63 - 1])
F = FieldDescriptor
SCALARS: dict[int, Any] = {
    F.TYPE_BYTES: st.binary(max_size=40) | st.sampled_from([bytes(9), b"\1" * 9]),
    F.TYPE_BOOL: st.booleans(),
    F.TYPE_DOUBLE: st.floats() | st.sampled_from([0.05, 0.5, 1.0]),
    F.TYPE_FLOAT: st.floats(width=32),
    F.TYPE_INT64: SMALL | st.integers(-(2**63), 2**63 - 1),
    F.TYPE_INT32: SMALL | st.integers(-(2**31), 2**31 - 1),
    F.TYPE_UINT64: st.integers(0, 2**64 - 1),
    F.TYPE_UINT32: st.integers(0, 2**32 - 1),
    F.TYPE_ENUM: st.integers(0, 9),
}
# What a text may well be, by its field's name.
VERSIONS = ["", "1.0", "2.0"]
WORDS = {
    "model_name": ["toy"],
    "name": ["toy", "toy/encode", "images", "mask", "count", "p_value"],
    "model_version": VERSIONS,
    "version": VERSIONS,
    "label": ["stable", "canary"],
    "direction": ["brightness"],
    "folder": ["/", "/missing", "/\0", "/" + "x" * 300, "/" + "x" * 10_000],
    "key": sorted({name for each in operations.OPERATIONS for name in each.settings}),
}
LEVELS = st.lists(st.integers(0, 3), min_size=9, max_size=9).map(bytes)
ONE = st.builds(images_pb2.Images, data=LEVELS, shape=st.just((1, 1, 3, 3)))
USUAL = {
    "images": ONE,
    "others": ONE,
    "mask": st.lists(st.integers(0, 1), min_size=9, max_size=9).map(bytes),
    "features": st.just(bytes(8)),
    "points": st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=3),
    "count": st.integers(1, 20),
}
OTHERWISE = ["toy", "1.0", "", "stable", "brightness"]
LONG = ["x" * 10_000, "é" * 10_000]


@cache
def messages(kind: Any) -> Any:
    """Messages of that kind: any of their fields set, or what the toy takes but for two fields."""
    fields = {field.name: values(field) for field in kind.DESCRIPTOR.fields}
    if not fields:
        return st.builds(kind)
    good = {field.name: usual(field) for field in kind.DESCRIPTOR.fields if is_usual(field)}
    others = st.lists(st.sampled_from(sorted(fields)), max_size=2, unique=True)
    nearly = others.flatmap(
        lambda names: st.fixed_dictionaries({**good, **{name: fields[name] for name in names}})
    )
    given = st.fixed_dictionaries({}, optional=fields) | nearly
    return given.map(lambda given: kind(**given))


def is_usual(field: Any) -> bool:
    """Whether the toy asks for that field."""
    return field.name in (WORDS if field.type == F.TYPE_STRING else USUAL)


def usual(field: Any) -> Any:
    """What the toy takes there; one picture where pictures are asked."""
    return USUAL[field.name] if field.name in USUAL else st.sampled_from(WORDS[field.name])


def values(field: Any) -> Any:
    if field.message_type is images_pb2.Images.DESCRIPTOR:
        return pictures() | messages(images_pb2.Images)
    if field.message_type and field.message_type.GetOptions().map_entry:
        key, value = (values(each) for each in field.message_type.fields)
        return st.dictionaries(key, value, max_size=3)
    if field.message_type:
        kind: Any = GetMessageClass(field.message_type)
        one = messages(kind)
    else:
        one = texts(field.name) if field.type == F.TYPE_STRING else SCALARS[field.type]
    return st.lists(one, max_size=5) if field.is_repeated else one


def texts(name: str) -> Any:
    return st.sampled_from([*WORDS.get(name, OTHERWISE), *LONG]) | st.text(max_size=20)


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


@st.composite
def questions(draw: Any, manifest: Manifest) -> ModelInferRequest:
    """What one of the toy's models of the Open Inference Protocol takes, but for one thing."""
    operation = draw(st.sampled_from(operations.OPERATIONS))
    request = ModelInferRequest(model_name=operations.full_name(manifest.name, operation))
    spoilt = draw(st.sampled_from(["shape", "settings", "settings"]))
    n, is_raw = draw(st.sampled_from([0, 1, 4])), draw(st.booleans())
    for tensor in operation.inputs(manifest):
        if tensor.optional and draw(st.booleans()):
            continue
        shape = [n if length < 0 else length for length in tensor.shape]
        given = request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        size = math.prod(shape)
        most = 1 if tensor.datatype == "BOOL" else manifest.levels - 1
        elements = draw(st.lists(st.integers(0, most), min_size=size, max_size=size))
        stored = np.array(elements, tensor.type.dtype)
        if is_raw:
            request.raw_input_contents.append(stored.tobytes())
        else:
            getattr(given.contents, tensor.type.field).extend(stored.tolist())
        if spoilt == "shape":
            given.shape[draw(st.integers(0, len(shape) - 1))] = draw(LENGTHS)
    names = [tensor.name for tensor in operation.outputs(manifest)]
    for name in draw(st.lists(st.sampled_from(names), max_size=3, unique=True)):
        request.outputs.add(name=name)
    if spoilt == "settings" and operation.settings:
        for _ in range(draw(st.integers(1, 2))):
            key = draw(st.sampled_from(sorted(operation.settings)))
            request.parameters[key].CopyFrom(draw(messages(InferParameter)))
    return request


@pytest.fixture
def caller(live: Live) -> Iterator[Caller]:
    with calling(live.address) as made:
        yield made
    is_well(live)


def answered(rpc: Rpc, channel: grpc.Channel, requests: Sequence[Any]) -> None:
    """Returns if the requests are answered, each message of a stream too, or refused as told."""
    try:
        answers = rpc.ask(channel, requests)
    except grpc.RpcError as failure:
        documented(failure)
        return
    if rpc.method.client_streaming:
        outcomes = [each for answer in answers for each in getattr(answer, "outcomes", [answer])]
        assert len(outcomes) == len(requests)
    for answer in answers:
        assert not {statuses.code_of(number) for number in tallies.codes(answer)} & {*FAULTS}
        assert "internal error" not in getattr(answer, "error_message", "")


def documented(failure: Any) -> None:
    """Returns if the failure is one that callers can understand, and tells no secret."""
    assert failure.code() not in (*FAULTS, grpc.StatusCode.UNIMPLEMENTED), failure
    details = dict(failure.trailing_metadata() or ())
    assert statuses.DETAILS_KEY in details, f"the server did not say so, or not why: {failure}"
    reason = detail(failure, error_details_pb2.ErrorInfo).reason
    assert statuses.REASONS[reason] is failure.code()
    assert "Traceback" not in failure.details()


def test_every_service_is_asked(caller: Caller) -> None:
    found = {name for name in listed(caller.channel) if not name.startswith("grpc.")}
    assert found == {rpc.service for rpc in (*ASKING, *CHANGING)}


@pytest.mark.parametrize("rpc", ASKING, ids=str)
@FEW
@given(data=st.data())
def test_any_request_is_answered_or_refused(
    caller: Caller, manifest: Manifest, rpc: Rpc, data: st.DataObject
) -> None:
    kind = messages(rpc.request)
    if rpc.request is ModelInferRequest:
        kind = questions(manifest) | questions(manifest) | kind
    requests = (
        data.draw(st.lists(kind, max_size=5)) if rpc.method.client_streaming else [data.draw(kind)]
    )
    for request in requests:
        asked = request.request if "request" in request.DESCRIPTOR.fields_by_name else request
        if "model_name" in asked.DESCRIPTOR.fields_by_name and data.draw(st.booleans()):
            asked.model_name, asked.model_version = "toy", ""
    answered(rpc, caller.channel, requests)


@pytest.mark.parametrize("rpc", ASKING, ids=str)
@FEW
@given(data=st.binary(max_size=200))
def test_any_bytes_are_answered_or_refused(caller: Caller, rpc: Rpc, data: bytes) -> None:
    try:
        rpc.ask_bytes(caller.channel, data)
    except grpc.RpcError as failure:
        documented(failure)


@dataclass(frozen=True)
class Changed:
    """A server of its own, whose models requests may change.

    Attributes:
        live: the server.
        channel: to its admin RPCs.
        good: folders of the bundles that it serves at first.
        folders: those, and others that are refused, always or now and then.
    """

    live: Live
    channel: grpc.Channel
    good: frozenset[str]
    folders: Sequence[str]

    def restore(self) -> None:
        """Serves what was served at first, as every state must allow."""
        admin: Any = AdminServiceStub(self.channel)
        if versions := self.served():
            for label in ("stable", "canary"):
                request = admin_pb2.SetLabelRequest(model_name="toy", label=label)
                admin.SetLabel(request, timeout=SECONDS)
        for version in versions:
            if version.folder not in self.good:
                unload = admin_pb2.UnloadModelRequest(
                    model_name="toy", model_version=version.model_version
                )
                admin.UnloadModel(unload, timeout=SECONDS)
        for folder in self.good:
            admin.LoadModel(admin_pb2.LoadModelRequest(folder=folder), timeout=SECONDS)
        found = self.served()
        assert {version.folder for version in found} == self.good
        assert not [version for version in found if version.labels]

    def served(self) -> list[Any]:
        """The versions that are served."""
        admin: Any = AdminServiceStub(self.channel)
        answer = admin.ListVersions(admin_pb2.ListVersionsRequest(), timeout=SECONDS)
        serving = admin_pb2.VERSION_STATE_SERVING
        return [version for version in answer.versions if version.state == serving]


@pytest.fixture(scope="module")
def changeable(
    running: Running, make_toy: Callable[..., Toy], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Changed]:
    toys = [
        make_toy(version=version, seed=seed, roles=("density",))
        for version, seed in (("1.0", 0), ("2.0", 0), ("1.0", 1))
    ]
    *good, another = [str(toy.path) for toy in toys]
    broken, copy = (tmp_path_factory.mktemp("folder") / name for name in ("broken", "copy"))
    broken.mkdir()
    (broken / MANIFEST).write_text("{}")
    shutil.copytree(toys[0].path, copy)
    folders = [*good, another, str(broken), str(broken / MANIFEST), str(copy)]
    bundles = tuple(toy.path for toy in toys[:2])
    with (
        running(bundles=bundles, admin_port=0, lanes=1, max_batch=8) as live,
        calling(f"127.0.0.1:{live.server.admin_port}") as caller,
    ):
        yield Changed(live, caller.channel, frozenset(good), folders)


@pytest.fixture
def changed(changeable: Changed) -> Iterator[Changed]:
    yield changeable
    changeable.restore()
    is_well(changeable.live)


@pytest.mark.parametrize("rpc", CHANGING, ids=str)
@FEW
@given(data=st.data())
def test_any_change_is_made_or_refused(changed: Changed, rpc: Rpc, data: st.DataObject) -> None:
    changed.restore()
    for each in [*data.draw(st.lists(st.sampled_from(CHANGING), max_size=3)), rpc]:
        request = data.draw(messages(each.request))
        if "model_name" in request.DESCRIPTOR.fields_by_name and data.draw(st.booleans()):
            request.model_name = "toy"
        if "folder" in request.DESCRIPTOR.fields_by_name and data.draw(st.booleans()):
            request.folder = data.draw(st.sampled_from(changed.folders))
        answered(each, changed.channel, [request])


@pytest.mark.parametrize("rpc", CHANGING, ids=str)
@FEW
@given(data=st.binary(max_size=200))
def test_any_bytes_change_or_are_refused(changed: Changed, rpc: Rpc, data: bytes) -> None:
    try:
        rpc.ask_bytes(changed.channel, data)
    except grpc.RpcError as failure:
        documented(failure)
