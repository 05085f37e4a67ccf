"""`likely health`: whether a server is ready, for probes; quiet in its logs."""

from __future__ import annotations

from typing import Any

import click
import grpc

from likely.client import ADDRESS
from likely.errors import Unavailable

# The health protocol's empty HealthCheckRequest, and a response whose status is SERVING:
# two messages of at most two bytes need no generated code on the client's side.
_ASK, _SERVING = b"", b"\x08\x01"


@click.command()
@click.option(
    "--address", envvar="LIKELY_ADDRESS", default=ADDRESS, show_default=True, show_envvar=True
)
@click.option("--timeout", type=float, default=3.0, show_default=True, help="Seconds.")
def health(address: str, timeout: float) -> None:
    """End well if a server answers SERVING."""
    with grpc.insecure_channel(address) as channel:
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        try:
            answer = check(_ASK, timeout=timeout)
        except grpc.RpcError as error:
            raise Unavailable(f"{address} does not answer: {error.code().name}") from error
    if answer != _SERVING:
        raise Unavailable(f"{address} is up but not serving yet, or any more")
    click.echo("SERVING")
