"""The ports of a server: options of its connections, and listening with or without TLS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc.aio

from likely.errors import SettingsError
from likely.settings import Settings

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


KEEPALIVE_TIME = 60.0  # seconds without traffic after which a client gets a keepalive ping
KEEPALIVE_TIMEOUT = 20.0  # seconds that it has to answer the ping
MIN_PING_SECONDS = 10.0  # minimum seconds between a client's own pings


def options(settings: Settings, shared: bool) -> list[tuple[str, Any]]:
    """Returns the gRPC options of a server.

    Args:
        settings: the server's settings.
        shared: whether other processes listen on the same port.
    """
    aged = [("grpc.max_connection_age_ms", round(1000 * settings.connection_seconds))]
    return [
        ("grpc.max_receive_message_length", settings.request_bytes),
        ("grpc.max_send_message_length", -1),  # bounded by what a request may ask
        # Bounded, as messages are received completely before a token is checked.
        ("grpc.max_concurrent_streams", settings.streams_per_connection),
        # With overload protection, streams that have ended but are not freed yet would count as
        # well. Clients cannot know of them: a new request would be refused instead of waiting.
        ("grpc.http.overload_protection", 0),
        # A port that is taken is an error, unless other processes are meant to share it.
        ("grpc.so_reuseport", int(shared)),
        # Nothing reports that a machine or a network is gone; requests would wait for hours.
        ("grpc.keepalive_time_ms", round(1000 * KEEPALIVE_TIME)),
        ("grpc.keepalive_timeout_ms", round(1000 * KEEPALIVE_TIMEOUT)),
        # No keepalive ping is sent while another ping of gRPC's is under way, so its timeout is
        # the same.
        ("grpc.http2.ping_timeout_ms", round(1000 * KEEPALIVE_TIMEOUT)),
        ("grpc.http2.min_ping_interval_without_data_ms", round(1000 * MIN_PING_SECONDS)),
        ("grpc.keepalive_permit_without_calls", 1),
        *(aged if settings.connection_seconds else []),
    ]


def listen(
    server: grpc.aio.Server, settings: Settings, host: str, port: int, log: FilteringBoundLogger
) -> int:
    """Lets a server listen on an address, and returns the bound port.

    Raises:
        SettingsError: the server cannot listen on the address, or a certificate cannot be used.
    """
    # An IPv6 address is written in brackets before a port.
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if settings.tls_certificate is None or settings.tls_key is None:
            return server.add_insecure_port(address)
        from likely.serving import tls  # only if used: most servers are behind a proxy with TLS

        credentials = tls.server_credentials(
            settings.tls_certificate, settings.tls_key, settings.tls_client_ca, log
        )
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise SettingsError(
            f"gRPC cannot listen on {host}:{port}: in use, not this machine's, or not allowed"
        ) from error
