"""The server's certificate, which may be exchanged while it serves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from likely.errors import SettingsError
from likely.serving.fresh import INTERVAL, Fresh

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


def server_credentials(
    certificate: Path,
    key: Path,
    client_ca: Path | None,
    log: FilteringBoundLogger,
    interval: float = INTERVAL,
) -> grpc.ServerCredentials:
    """Credentials that every handshake takes from the files as they are then.

    Args:
        certificate: PEM, the server's own first, then what its clients need to believe it.
        key: PEM, of that certificate.
        client_ca: PEM; where given, a client must show a certificate that it signed.
        log: where an exchange is told, and files that are no pair.
        interval: seconds between two looks at the files.

    Raises:
        SettingsError: a file cannot be read, or they do not belong together.
    """
    paths = [certificate, key, *([client_ca] if client_ca else [])]
    fresh = Fresh(paths, lambda: _configuration(certificate, key, client_ca), log, interval)
    last = fresh.value()

    def exchanged() -> grpc.ServerCertificateConfiguration | None:
        """The new certificate; None where it is the last one."""
        nonlocal last
        if (now := fresh.value()) is last:
            return None
        last = now
        return now

    return grpc.dynamic_ssl_server_credentials(
        last,
        exchanged,  # type: ignore[arg-type]  # None is documented, and not in the stub
        require_client_authentication=client_ca is not None,
    )


def _configuration(
    certificate: Path, key: Path, client_ca: Path | None
) -> grpc.ServerCertificateConfiguration:
    chain, secret = _pem(certificate), _pem(key)
    _check_pair(chain, secret, f"{certificate} and {key}")
    roots = None
    if client_ca:
        roots = _pem(client_ca)
        _check_roots(roots, client_ca)
    return grpc.ssl_server_certificate_configuration([(secret, chain)], roots)


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error


def _check_pair(chain: bytes, secret: bytes, told: str) -> None:
    """Returns if these belong together: gRPC takes any two files, and fails every handshake."""
    try:
        own = x509.load_pem_x509_certificates(chain)[0].public_key()
        key = serialization.load_pem_private_key(secret, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SettingsError(f"{told} are no PEM certificate and its key, unencrypted") from None
    if own != key:
        raise SettingsError(f"{told} do not belong together")


def _check_roots(roots: bytes, path: Path) -> None:
    try:
        x509.load_pem_x509_certificates(roots)
    except ValueError:
        raise SettingsError(f"{path} holds no PEM certificates") from None
