"""Every RPC that a server has, as the descriptors tell: a new one is tested unnamed."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import likely
from likely.serving import reflecting
from tests.faults.alive import SECONDS

ADMIN = "likely.v1.AdminService"  # on a port of its own


@dataclass(frozen=True)
class Rpc:
    """One RPC, asked as a stream of messages, whether it is one or not."""

    service: str
    method: MethodDescriptor

    def __str__(self) -> str:
        return f"{self.service}/{self.method.name}"

    @property
    def request(self) -> Any:
        """The type of its requests."""
        return GetMessageClass(self.method.input_type)

    def ask(self, channel: grpc.Channel, requests: Iterable[Any]) -> list[Any]:
        """What it answers."""
        call: Any = channel.stream_stream(
            f"/{self}",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=GetMessageClass(self.method.output_type).FromString,
        )
        return list(call(iter(requests), timeout=SECONDS))

    def ask_bytes(self, channel: grpc.Channel, data: bytes) -> list[bytes]:
        """What it answers to these bytes."""
        call: Any = channel.stream_stream(f"/{self}")
        return list(call(iter([data]), timeout=SECONDS))


def _generated() -> Iterator[Any]:
    """The modules that were made of our protos."""
    root = Path(likely.__file__).parent
    for path in sorted(root.rglob("*_pb2.py")):
        inner = path.relative_to(root).with_suffix("").parts
        yield importlib.import_module(".".join((likely.__name__, *inner)))


def _of(modules: Iterable[Any]) -> tuple[Rpc, ...]:
    return tuple(
        Rpc(service.full_name, method)
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    )


OURS = _of(_generated())
_REFLECTION = _of([reflection_pb2])
THEIRS = (
    *_of([health_pb2]),
    *_REFLECTION,
    *(Rpc(reflecting.V1, rpc.method) for rpc in _REFLECTION),
)


def listed(channel: grpc.Channel) -> set[str]:
    """The services that a server itself tells of, and the admin's."""
    (answer,) = _REFLECTION[0].ask(channel, [_REFLECTION[0].request(list_services="")])
    return {ADMIN, *(service.name for service in answer.list_services_response.service)}
