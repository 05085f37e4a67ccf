"""`likely health`: whether a server is ready, for probes; quiet in its logs."""

from __future__ import annotations

from typing import Any

import click
import grpc

from likely.cli.connection import Connection, connected
from likely.errors import Unavailable

# The health protocol's empty HealthCheckRequest, and a response whose status is SERVING:
# two messages of at most two bytes need no generated code on the client's side.
_ASK, _SERVING = b"", b"\x08\x01"


@click.command()
@connected(timeout=3.0)
def health(server: Connection) -> None:
    """End well if a server answers SERVING; asks without the token."""
    with server.route().channel(once=True) as channel:
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            answer = check(_ASK, timeout=server.timeout)
        except grpc.RpcError as error:
            raise Unavailable(f"{server.address} does not answer: {error.code().name}") from error
    if answer != _SERVING:
        raise Unavailable(f"{server.address} is up but not serving yet, or any more")
    click.echo("SERVING")
