"""A bare grpc.aio server that returns each request unchanged: the cost of gRPC in Python itself.

Prints its port, and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

SERVICE = "bench.Echo"
UNARY, STREAM = f"/{SERVICE}/Echo", f"/{SERVICE}/EchoStream"


async def echo(request: bytes, _: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    """Returns the request."""
    return request


async def echo_stream(
    requests: AsyncIterator[bytes], _: grpc.aio.ServicerContext[Any, Any]
) -> AsyncIterator[bytes]:
    """Returns the requests, one by one."""
    async for request in requests:
        yield request


async def main() -> None:
    """Serves on a free port of the loopback interface."""
    server = grpc.aio.server()
    handlers: dict[str, Any] = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "EchoStream": grpc.stream_stream_rpc_method_handler(echo_stream),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
