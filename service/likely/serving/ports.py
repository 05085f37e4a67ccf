"""A port to listen on: encrypted where the settings name a certificate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc.aio

from likely.errors import SettingsError
from likely.settings import Settings

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


def listen(
    server: grpc.aio.Server, settings: Settings, host: str, port: int, log: FilteringBoundLogger
) -> int:
    """The port that is bound.

    Raises:
        SettingsError: the address cannot be listened on, or a certificate cannot be used.
    """
    # An IPv6 address stands in brackets before a port.
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if settings.tls_certificate is None or settings.tls_key is None:
            return server.add_insecure_port(address)
        from likely.serving import tls  # most servers stand behind a proxy that has it

        credentials = tls.server_credentials(
            settings.tls_certificate, settings.tls_key, settings.tls_client_ca, log
        )
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise SettingsError(
            f"gRPC cannot listen on {host}:{port}: in use, not this machine's, or not allowed"
        ) from error
