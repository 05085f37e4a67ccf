"""A client's token and TLS files, reread when they change."""

from __future__ import annotations

import ssl
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import grpc

from likely.errors import SettingsError
from likely.fresh import ReloadedValue

File: TypeAlias = str | PathLike[str]

CHECK_INTERVAL = 1.0  # least seconds between two checks of the files


class TokenFile:
    """A bearer token in a file that is renewed, for example by Kubernetes; returns the newest."""

    def __init__(self, file: File) -> None:
        """Reads the token for the first time.

        Args:
            file: path of a file that contains the token alone; white space around it is removed.

        Raises:
            SettingsError: the file cannot be read, or contains no token.
        """
        self._token = ReloadedValue([file], lambda: _token(file), interval=CHECK_INTERVAL)

    def __call__(self) -> str:
        """The token for the next request."""
        return self._token.value()


class Credentials:
    """The PEM files of a route; a channel keeps the content they had when it was opened."""

    def __init__(self, ca: File | None, certificate: File | None, key: File | None) -> None:
        """Reads the files for the first time.

        Args:
            ca: file of the certificate authorities to trust; None for gRPC's own.
            certificate: file of the client's own certificate.
            key: file of that certificate's key.

        Raises:
            SettingsError: a file cannot be read.
        """
        self._files = ca, key, certificate
        paths = [file for file in self._files if file is not None]
        self._content = ReloadedValue(
            paths, self._read, check=self._check, renewed=self._renew, interval=CHECK_INTERVAL
        )
        self._held = self._content.value()
        self._edition = 1

    def edition(self) -> int:
        """A number that grows when the content changes; checks the files at most once a second."""
        self._content.value()
        return self._edition

    def of_channel(self) -> grpc.ChannelCredentials:
        """The TLS credentials for a channel that is opened now."""
        return grpc.ssl_channel_credentials(*self._held)

    def _read(self) -> tuple[bytes | None, ...]:
        return tuple(map(_bytes, self._files))

    def _check(self, _: object) -> None:
        """Raises OSError if a file is not PEM, or certificate and key do not match."""
        ca, key, certificate = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if ca is not None:
            context.load_verify_locations(ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key, password="")

    def _renew(self, held: tuple[bytes | None, ...]) -> None:
        if held != self._held:
            self._held = held
            self._edition += 1


def bearer(token: str) -> str:
    """The token without white space around it, such as a newline at the end of a secret's file.

    Raises:
        SettingsError: a header cannot contain this token.
    """
    word = token.strip() if isinstance(token, str) else ""  # a function may return anything
    if not (word and word.isascii() and word.isprintable() and " " not in word):
        # The message must not contain the token, which is secret.
        raise SettingsError("a token is one word of printable ASCII characters")
    return word


def _token(file: File) -> str:
    try:
        return bearer((_bytes(file) or b"").decode())
    except (UnicodeDecodeError, SettingsError):
        raise SettingsError(f"{file} holds no token: one word of ASCII characters") from None


def _bytes(file: File | None) -> bytes | None:
    if file is None:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}") from error
