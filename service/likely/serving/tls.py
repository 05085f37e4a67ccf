"""The server's TLS credentials, whose certificate may be replaced while serving."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from likely.errors import SettingsError
from likely.fresh import INTERVAL
from likely.serving.reloading import reloaded

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


def server_credentials(
    certificate: Path,
    key: Path,
    client_ca: Path | None,
    log: FilteringBoundLogger,
    interval: float = INTERVAL,
) -> grpc.ServerCredentials:
    """Returns credentials that are reloaded from the files at handshakes, if the files changed.

    Args:
        certificate: PEM file: the server's certificate, then the intermediate certificates that
            clients need to verify it.
        key: PEM file with the private key of that certificate.
        client_ca: PEM file with certificates of authorities. If given, clients must present a
            certificate that one of them signed.
        log: receives reloads, and files that do not belong together.
        interval: minimum number of seconds between two checks of the files.

    Raises:
        SettingsError: a file cannot be read, or certificate and key do not belong together.
    """
    paths = [certificate, key, *([client_ca] if client_ca else [])]
    known = reloaded(paths, lambda: _configuration(certificate, key, client_ca), log, interval)
    last = known.value()

    def changed_configuration() -> grpc.ServerCertificateConfiguration | None:
        """Returns the new certificate; None if it has not changed."""
        nonlocal last
        if (now := known.value()) is last:
            return None
        last = now
        return now

    return grpc.dynamic_ssl_server_credentials(
        last,
        changed_configuration,  # type: ignore[arg-type]  # None is documented, and not in the stub
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


def _check_pair(chain: bytes, secret: bytes, paths: str) -> None:
    """Checks that certificate and key match; gRPC accepts any two and fails every handshake."""
    try:
        certified = x509.load_pem_x509_certificates(chain)[0].public_key()
        key = serialization.load_pem_private_key(secret, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SettingsError(f"{paths} are not a PEM certificate and its unencrypted key") from None
    if certified != key:
        raise SettingsError(f"{paths} do not belong together")


def _check_roots(roots: bytes, path: Path) -> None:
    try:
        x509.load_pem_x509_certificates(roots)
    except ValueError:
        raise SettingsError(f"{path} holds no PEM certificates") from None
