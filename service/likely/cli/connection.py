"""The options of every command that asks a server: where it is and what is shown to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from likely.client import ADDRESS, TIMEOUT, AdminClient, Client, TokenFile
from likely.client.channels import Route
from likely.client.line import LONGEST

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Connection:
    """What the options say."""

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
        """The way to that server, without a token."""
        return Route(self.address, **self._encryption())

    def _token(self) -> dict[str, Any]:
        token = TokenFile(self.token_file) if self.token_file else self.token
        return {"token": token, "plaintext_token": self.plaintext_token}

    def _encryption(self) -> dict[str, Any]:
        return {
            "tls": self.tls, "ca": self.ca, "certificate": self.certificate, "key": self.key,
            "server_name": self.server_name,
        }  # fmt: skip


def connected(
    timeout: float = TIMEOUT,
    *,
    optional: bool = False,
    token: bool = True,
    address: str = ADDRESS,
    variable: str = "LIKELY_ADDRESS",
) -> Callable[[F], F]:
    """Adds the options, and gives the command its `server: Connection`.

    Args:
        timeout: seconds of a request, where none are named.
        optional: whether the command can do without a server: then `server` is None where
            neither the command line nor the environment names an address.
        token: whether the command shows one.
        address: of the server, where none is named.
        variable: of the environment that may name it.
    """

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            names = Connection.__dataclass_fields__
            connection = Connection(**{name: given.pop(name) for name in names})
            if token:
                connection = _with_one_token(connection)
            command(server=None if connection.address is None else connection, **given)

        # click fills the options in by name, so that the two need not have one signature.
        decorated = cast("F", run)
        for option in _options(timeout, None if optional else address, variable, token):
            decorated = option(decorated)
        return decorated

    return decorate


def on_the_command_line(option: str) -> bool:
    """Whether the option of that name is given there, and not by the environment."""
    source = click.get_current_context().get_parameter_source(option)
    return source is click.core.ParameterSource.COMMANDLINE


def _not_empty(_: click.Context, __: click.Parameter, address: str | None) -> str | None:
    """The address, if one is named; an empty one is a variable of the shell's that is not set.

    Raises:
        BadParameter: it is empty.
    """
    if address is not None and not address.strip():
        raise click.BadParameter("it is empty; host:port is asked")
    return address


def _with_one_token(connection: Connection) -> Connection:
    """The same, with the token alone that is shown: the command line's before a variable's.

    Raises:
        UsageError: there are two in the same place.
    """
    if not (connection.token and connection.token_file):
        return connection
    named = on_the_command_line("token")
    if named == on_the_command_line("token_file"):
        raise click.UsageError("either --token or --token-file (or their variables)")
    return replace(connection, token_file=None) if named else replace(connection, token=None)


def _options(
    timeout: float, address: str | None, variable: str, token: bool
) -> tuple[Callable[[F], F], ...]:
    file = click.Path(dir_okay=False, path_type=Path)
    return (
        click.option(
            "--server-name", envvar="LIKELY_SERVER_NAME", show_envvar=True,
            help="What the server's certificate has to bear, if not the address.",
        ),
        click.option(
            "--key", type=file, envvar="LIKELY_KEY", show_envvar=True, help="PEM file, its key."
        ),
        click.option(
            "--certificate", type=file, envvar="LIKELY_CERTIFICATE", show_envvar=True,
            help="PEM file that the client shows of itself.",
        ),
        click.option(
            "--ca", type=file, envvar="LIKELY_CA", show_envvar=True,
            help="PEM file of who vouches for the server.",
        ),
        click.option(
            "--tls", is_flag=True,
            help="Encrypt; --ca, --certificate and --server-name imply it.",
        ),
        click.option(
            "--plaintext-token", is_flag=True, hidden=not token,
            help="Show the token unencrypted, as to a proxy that has TLS.",
        ),
        click.option(
            "--token-file", type=file, envvar="LIKELY_TOKEN_FILE", show_envvar=True,
            hidden=not token, help="A file that holds one, read again when it changes.",
        ),
        click.option(
            "--token", envvar="LIKELY_TOKEN", show_envvar=True, hidden=not token,
            help="A bearer token; others can see the options of a command, not its environment.",
        ),
        click.option(
            "--timeout", type=click.FloatRange(0, LONGEST, min_open=True), default=timeout,
            show_default=True, help="Seconds a request.",
        ),
        click.option(
            "--address", envvar=variable, default=address, show_default=True, show_envvar=True,
            callback=_not_empty,
            help="The server." if address else "A server to ask, in place of a bundle.",
        ),
    )  # fmt: skip
