"""`likely health`: whether a server is ready, for probes; quiet in its logs."""

from __future__ import annotations

from typing import Any

import click
import grpc

from likely.cli.connection import Connection, connected
from likely.client.line import positive, unreached
from likely.errors import InvalidInput, LikelyError, ModelNotFound, Unavailable

# The health protocol's response whose status is SERVING: messages of one field need no generated
# code on the client's side.
_SERVING = b"\x08\x01"
_LONGEST = 64  # of a model's name


@click.command()
@connected(timeout=3.0, token=False)
@click.option("--model", help="Ask for this model alone. [the whole server]")
def health(server: Connection, model: str | None) -> None:
    """End well if a server answers SERVING. No token is shown: health is told to all."""
    asked = b"" if model is None else _request(model)
    with server.route().channel(once=True) as channel:
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            answer = check(asked, timeout=positive(server.timeout))
        except grpc.RpcError as error:
            raise _told(error, server.address, model) from error
    if answer != _SERVING:
        what = server.address if model is None else f"{model} at {server.address}"
        raise Unavailable(f"{what} is up but not serving yet, or any more")
    click.echo("SERVING")


def _request(model: str) -> bytes:
    """The HealthCheckRequest whose `service`, its field 1, is that model's."""
    try:
        name = f"model/{model}".encode()
    except UnicodeEncodeError as error:
        raise InvalidInput("model", f"{model!r} is no UTF-8, as every name is") from error
    if len(model.encode()) > _LONGEST:
        raise InvalidInput("model", f"{model!r} is longer than {_LONGEST} bytes, as no name is")
    return b"\x0a" + bytes([len(name)]) + name


def _told(error: Any, address: str, model: str | None) -> LikelyError:
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return unreached(address, error.details())
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return ModelNotFound(model or "", f"no model {model} is served at {address}")
    return Unavailable(f"{address} does not answer: {error.code().name}")
