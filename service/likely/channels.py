"""How a client reaches a server: plainly or encrypted, with a token or without."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio

from likely.addresses import is_local
from likely.errors import SettingsError

Token: TypeAlias = str | Callable[[], str]
File: TypeAlias = str | PathLike[str]
Options: TypeAlias = tuple[tuple[str, Any], ...]


class Route:
    """The way to one server, and what is shown on it.

    A token goes over an encrypted connection, or to an address of this machine; nowhere else.
    """

    def __init__(
        self,
        address: str,
        *,
        token: Token | None = None,
        tls: bool = False,
        ca: File | None = None,
        certificate: File | None = None,
        key: File | None = None,
    ) -> None:
        """A route.

        Args:
            address: host:port, or any name that gRPC resolves.
            token: a bearer token, or what gives one for each request.
            tls: whether to encrypt; `ca` and `certificate` imply it.
            ca: PEM file of the authorities that may vouch for the server; None for gRPC's own.
            certificate: PEM file that this client shows of itself.
            key: PEM file of that certificate's key.

        Raises:
            SettingsError: a file cannot be read, one of certificate and key is missing, or
                the token would go unencrypted to another machine.
        """
        if (certificate is None) != (key is None):
            raise SettingsError("certificate and key are given together, or neither")
        self._address = address
        self._token = token
        self._secure = tls or ca is not None or certificate is not None
        if token is not None and not self._secure and not is_local(address):
            raise SettingsError(
                f"a token would go unencrypted to {address}; give tls=True, or ca= for the "
                "authority that vouches for the server"
            )
        self._roots, self._key, self._certificate = (_pem(file) for file in (ca, key, certificate))

    def channel(self, options: Options = ()) -> grpc.Channel:
        """A channel; connects when it is first used."""
        if not self._secure:
            return grpc.insecure_channel(self._address, options=options)
        return grpc.secure_channel(self._address, self._credentials(), options=options)

    def aio_channel(self, options: Options = ()) -> grpc.aio.Channel:
        """A channel of the running event loop; connects when it is first used."""
        if not self._secure:
            return grpc.aio.insecure_channel(self._address, options=options)
        return grpc.aio.secure_channel(self._address, self._credentials(), options=options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with the next request."""
        if self._token is None:
            return ()
        token = self._token if isinstance(self._token, str) else self._token()
        return (("authorization", f"Bearer {token}"),)

    def _credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self._roots, self._key, self._certificate)


def _pem(file: File | None) -> bytes | None:
    if file is None:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}") from error
