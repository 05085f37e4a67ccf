"""What a client shows of itself and whom it believes, read again when the files change."""

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

LOOK = 1.0  # seconds between two looks at the files


class _Files(ABC, Generic[T]):
    """What files hold; those that cannot be used leave what was read before, until they can."""

    def __init__(self, *files: File | None) -> None:
        self._files = files
        self._looking = Lock()
        self._next = time.monotonic() + LOOK
        self._seen = self._marks()
        self._held = self._read()
        self._edition = 1

    def edition(self) -> int:
        """Grows when the files hold something else; they are looked at once a second."""
        with self._looking:
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + LOOK
                self._look()
            return self._edition

    def _look(self) -> None:
        # Marked before it is read: a file written meanwhile differs at the next look.
        marks = self._marks()
        if marks == self._seen:
            return
        try:
            held = self._read()
            self._check()
        except (OSError, SettingsError):  # tried again at every look
            return
        self._seen = marks
        if held != self._held:
            self._held = held
            self._edition += 1

    def _marks(self) -> tuple[_Mark, ...]:
        return tuple(_mark(file) for file in self._files)

    @abstractmethod
    def _read(self) -> T:
        """What they hold now.

        Raises:
            SettingsError: a file cannot be read.
        """

    def _check(self) -> None:
        """Raises OSError if what was read again cannot be used."""


class TokenFile(_Files[str]):
    """A bearer token in a file, as Kubernetes or an agent renews it; gives the newest one."""

    def __init__(self, file: File) -> None:
        """The token that the file holds now.

        Args:
            file: holds it, and nothing else but blanks round it.

        Raises:
            SettingsError: it cannot be read, or holds no token.
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
    """The PEM files of a route; a channel keeps what they held when it was opened."""

    def __init__(self, ca: File | None, certificate: File | None, key: File | None) -> None:
        """What the files hold now.

        Args:
            ca: of the authorities that may vouch for the server; None for gRPC's own.
            certificate: that this client shows of itself.
            key: of that certificate.

        Raises:
            SettingsError: a file cannot be read.
        """
        super().__init__(ca, key, certificate)

    def of_channel(self) -> grpc.ChannelCredentials:
        """What a channel that is opened now shows and believes."""
        return grpc.ssl_channel_credentials(*self._held)

    def _read(self) -> tuple[bytes | None, ...]:
        return tuple(map(_bytes, self._files))

    def _check(self) -> None:
        """Raises OSError if the files are no PEM, or certificate and key no pair."""
        ca, key, certificate = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if ca is not None:
            context.load_verify_locations(ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key, password="")


def bearer(token: str) -> str:
    """A token without the blanks round it, such as the line's end that a secret was written with.

    Raises:
        SettingsError: it is none that a header can hold.
    """
    word = token.strip() if isinstance(token, str) else ""  # a function may give anything
    if not (word and word.isascii() and word.isprintable() and " " not in word):
        raise SettingsError("a token is one word of printable ASCII characters")  # it is secret
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
