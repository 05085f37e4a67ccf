"""gRPC reflection in versions v1alpha and v1; grpcio-reflection has only v1alpha."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

V1 = "grpc.reflection.v1.ServerReflection"


def add_reflection(services: Iterable[str], server: Any) -> None:
    """Adds reflection of the named services to a server, or to an object that acts as one.

    Version v1 differs from v1alpha only in its name, so one servicer answers both.
    """
    names = (*services, reflection.SERVICE_NAME, V1)
    _add_v1_schema()
    servicer = reflection.aio.ReflectionServicer(names)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = grpc.method_handlers_generic_handler(V1, {"ServerReflectionInfo": handler})
    server.add_generic_rpc_handlers((handlers,))


def _add_v1_schema() -> None:
    """Adds the schema of v1 to the descriptor pool, so that reflection can describe itself."""
    pool = descriptor_pool.Default()
    try:
        pool.FindFileContainingSymbol(V1)
    except KeyError:
        file = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(file)
        file.name, file.package = "grpc/reflection/v1/reflection.proto", "grpc.reflection.v1"
        file.ClearField("options")
        types = [field for message in file.message_type for field in message.field]
        methods = [method for service in file.service for method in service.method]
        for field in types:
            if field.type_name:
                field.type_name = field.type_name.replace(".v1alpha.", ".v1.")
        for method in methods:
            method.input_type = method.input_type.replace(".v1alpha.", ".v1.")
            method.output_type = method.output_type.replace(".v1alpha.", ".v1.")
        pool.AddSerializedFile(file.SerializeToString())
