"""A client's token and TLS files, reread when they change."""

from __future__ import annotations

import ssl
import time
from abc import ABC, abstractmethod
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Generic, TypeAlias, TypeVar

import grpc

from likely.errors import SettingsError

File: TypeAlias = str | PathLike[str]
_Mark: TypeAlias = tuple[int, int, int, int] | None
T = TypeVar("T")

LOOK = 1.0  # least seconds between two checks of the files


class _Files(ABC, Generic[T]):
    """The content of files, reread when they change; unusable files leave the former content."""

    def __init__(self, *files: File | None) -> None:
        self._files = files
        self._looking = Lock()
        self._next = time.monotonic() + LOOK
        self._seen = self._marks()
        self._held = self._read()
        self._edition = 1

    def edition(self) -> int:
        """A number that grows when the content changes; checks the files at most once a second."""
        with self._looking:
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + LOOK
                self._look()
            return self._edition

    def _look(self) -> None:
        # Stat before reading: if a file is written in between, the next check sees a difference.
        marks = self._marks()
        if marks == self._seen:
            return
        try:
            held = self._read()
            self._check()
        except (OSError, SettingsError):  # the next check tries again
            return
        self._seen = marks
        if held != self._held:
            self._held = held
            self._edition += 1

    def _marks(self) -> tuple[_Mark, ...]:
        return tuple(_mark(file) for file in self._files)

    @abstractmethod
    def _read(self) -> T:
        """The current content.

        Raises:
            SettingsError: a file cannot be read.
        """

    def _check(self) -> None:
        """Raises OSError if the reread content cannot be used."""


class TokenFile(_Files[str]):
    """A bearer token in a file that is renewed, for example by Kubernetes; returns the newest."""

    def __init__(self, file: File) -> None:
        """Reads the token for the first time.

        Args:
            file: path of a file that contains the token alone; white space around it is removed.

        Raises:
            SettingsError: the file cannot be read, or contains no token.
        """
        super().__init__(file)

    def __call__(self) -> str:
        """The token for the next request."""
        self.edition()
        return self._held

    def _read(self) -> str:
        (file,) = self._files
        try:
            return bearer((_bytes(file) or b"").decode())
        except (UnicodeDecodeError, SettingsError):
            raise SettingsError(f"{file} holds no token: one word of ASCII characters") from None


class Credentials(_Files[tuple[bytes | None, ...]]):
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
        super().__init__(ca, key, certificate)

    def of_channel(self) -> grpc.ChannelCredentials:
        """The TLS credentials for a channel that is opened now."""
        return grpc.ssl_channel_credentials(*self._held)

    def _read(self) -> tuple[bytes | None, ...]:
        return tuple(map(_bytes, self._files))

    def _check(self) -> None:
        """Raises OSError if a file is not PEM, or certificate and key do not match."""
        ca, key, certificate = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if ca is not None:
            context.load_verify_locations(ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key, password="")


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


def _mark(file: File | None) -> _Mark:
    if file is None:
        return None
    try:
        found = Path(file).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _bytes(file: File | None) -> bytes | None:
    if file is None:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}") from error
