"""The options of every command that asks a server: its address, credentials and encryption."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from likely.client import ADDRESS, TIMEOUT, AdminClient, Client, TokenFile
from likely.client.channels import Route
from likely.client.rpcs import MAX_TIMEOUT

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Connection:
    """The values of the options."""

    address: str
    timeout: float
    token: str | None
    token_file: Path | None
    plaintext_token: bool
    tls: bool
    ca: Path | None
    certificate: Path | None
    key: Path | None
    server_name: str | None

    def client(self) -> Client:
        """A client of that server."""
        return Client(self.address, timeout=self.timeout, **self._token(), **self._encryption())

    def admin(self) -> AdminClient:
        """A client of that server's admin port."""
        return AdminClient(
            self.address, timeout=self.timeout, **self._token(), **self._encryption()
        )

    def route(self) -> Route:
        """The route to that server, without a token."""
        return Route(self.address, **self._encryption())

    def _token(self) -> dict[str, Any]:
        token = TokenFile(self.token_file) if self.token_file else self.token
        return {"token": token, "plaintext_token": self.plaintext_token}

    def _encryption(self) -> dict[str, Any]:
        return {
            "tls": self.tls, "ca": self.ca, "certificate": self.certificate, "key": self.key,
            "server_name": self.server_name,
        }  # fmt: skip


def server_options(
    timeout: float = TIMEOUT,
    *,
    optional: bool = False,
    token: bool = True,
    address: str = ADDRESS,
    variable: str = "LIKELY_ADDRESS",
) -> Callable[[F], F]:
    """Returns a decorator that adds the options, and passes `server: Connection` to a command.

    Args:
        timeout: default number of seconds of a request.
        optional: whether the command can do without a server. `server` is then None if neither
            the command line nor the environment gives an address.
        token: whether the command sends a token.
        address: default address of the server.
        variable: the environment variable that may give the address.
    """

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            names = Connection.__dataclass_fields__
            connection = Connection(**{name: arguments.pop(name) for name in names})
            if token:
                connection = _with_one_token(connection)
            command(server=None if connection.address is None else connection, **arguments)

        # click passes the options by name, so the two functions may have different signatures.
        decorated = cast("F", run)
        for option in _options(timeout, None if optional else address, variable, token):
            decorated = option(decorated)
        return decorated

    return decorate


def on_the_command_line(option: str) -> bool:
    """Whether an option is given on the command line, not by the environment or a default."""
    source = click.get_current_context().get_parameter_source(option)
    return source is click.core.ParameterSource.COMMANDLINE


def _not_empty(_: click.Context, __: click.Parameter, address: str | None) -> str | None:
    """Refuses an empty address, which comes from a shell variable that is not set.

    Raises:
        BadParameter: the address is empty.
    """
    if address is not None and not address.strip():
        raise click.BadParameter("it is empty; it must be host:port")
    return address


def _with_one_token(connection: Connection) -> Connection:
    """The same connection with one token: that of the command line before the environment's.

    Raises:
        UsageError: both are on the command line, or both in the environment.
    """
    if not (connection.token and connection.token_file):
        return connection
    named = on_the_command_line("token")
    if named == on_the_command_line("token_file"):
        raise click.UsageError("give either --token or --token-file (or their variables)")
    return replace(connection, token_file=None) if named else replace(connection, token=None)


def _options(
    timeout: float, address: str | None, variable: str, token: bool
) -> tuple[Callable[[F], F], ...]:
    file = click.Path(dir_okay=False, path_type=Path)
    return (
        click.option(
            "--server-name", envvar="LIKELY_SERVER_NAME", show_envvar=True,
            help="Name in the server's certificate, if it is not the address.",
        ),
        click.option(
            "--key", type=file, envvar="LIKELY_KEY", show_envvar=True, help="PEM file of its key."
        ),
        click.option(
            "--certificate", type=file, envvar="LIKELY_CERTIFICATE", show_envvar=True,
            help="PEM file of the client's certificate.",
        ),
        click.option(
            "--ca", type=file, envvar="LIKELY_CA", show_envvar=True,
            help="PEM file of the authorities that may have signed the server's certificate.",
        ),
        click.option(
            "--tls", is_flag=True,
            help="Encrypt; --ca, --certificate and --server-name imply it.",
        ),
        click.option(
            "--plaintext-token", is_flag=True, hidden=not token,
            help="Send the token unencrypted, as to a proxy that adds TLS.",
        ),
        click.option(
            "--token-file", type=file, envvar="LIKELY_TOKEN_FILE", show_envvar=True,
            hidden=not token, help="A file with a token, read again when it changes.",
        ),
        click.option(
            "--token", envvar="LIKELY_TOKEN", show_envvar=True, hidden=not token,
            help="A bearer token; others can see the options of a command, not its environment.",
        ),
        click.option(
            "--timeout", type=click.FloatRange(0, MAX_TIMEOUT, min_open=True), default=timeout,
            show_default=True, help="Seconds for each request.",
        ),
        click.option(
            "--address", envvar=variable, default=address, show_default=True, show_envvar=True,
            callback=_not_empty,
            help="The server." if address else "A server to ask, instead of a bundle.",
        ),
    )  # fmt: skip
