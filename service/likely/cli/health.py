"""`likely health`: tells probes whether a server is ready; servers log it only at debug level."""

from __future__ import annotations

from typing import Any

import click
import grpc

from likely.cli.connection import Connection, server_options
from likely.client.rpcs import unreachable_error, valid_timeout
from likely.errors import InvalidInput, LikelyError, ModelNotFound, Unavailable

# The health protocol's response with status SERVING, encoded: messages of one field need no
# generated code in the client.
_SERVING = b"\x08\x01"
_LONGEST = 64  # bytes of a model's name


@click.command()
@server_options(timeout=3.0, token=False)
@click.option("--model", help="Ask for this model alone. [the whole server]")
def health(server: Connection, model: str | None) -> None:
    """Exit with 0 if a server answers SERVING. No token is sent: health needs none."""
    asked = b"" if model is None else _request(model)
    with server.route().channel(once=True) as channel:
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            answer = check(asked, timeout=valid_timeout(server.timeout))
        except grpc.RpcError as error:
            raise _error_of(error, server.address, model) from error
    if answer != _SERVING:
        what = server.address if model is None else f"{model} at {server.address}"
        raise Unavailable(f"{what} is up but not serving yet, or any more")
    click.echo("SERVING")


def _request(model: str) -> bytes:
    """The encoded HealthCheckRequest whose `service`, field 1, is that of the model."""
    try:
        name = f"model/{model}".encode()
    except UnicodeEncodeError as error:
        raise InvalidInput("model", f"{model!r} is no UTF-8, so it is no name") from error
    if len(model.encode()) > _LONGEST:
        raise InvalidInput("model", f"{model!r} is longer than {_LONGEST} bytes, so it is no name")
    return b"\x0a" + bytes([len(name)]) + name


def _error_of(error: Any, address: str, model: str | None) -> LikelyError:
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return unreachable_error(address, error.details())
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return ModelNotFound(model or "", f"no model {model} is served at {address}")
    return Unavailable(f"{address} does not answer: {error.code().name}")
