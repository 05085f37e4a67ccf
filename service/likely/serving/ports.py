"""What a server listens on: its connections' rules, and a port, encrypted where so set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc.aio

from likely.errors import SettingsError
from likely.settings import Settings

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


SILENCE = 60.0  # seconds without a word, after which a client is asked whether it is there
ANSWER = 20.0  # seconds that it has to say so
PINGS = 10.0  # seconds that clients leave between their own such questions, at least


def options(settings: Settings, shared: bool) -> list[tuple[str, Any]]:
    """gRPC's options of a server.

    Args:
        settings: what it runs with.
        shared: whether other processes listen on the same port.
    """
    aged = [("grpc.max_connection_age_ms", round(1000 * settings.connection_seconds))]
    return [
        ("grpc.max_receive_message_length", settings.request_bytes),
        ("grpc.max_send_message_length", -1),  # bounded by what a request may ask
        # Messages are received whole before anybody is asked for a token.
        ("grpc.max_concurrent_streams", settings.streams_per_connection),
        # Else those count too that have ended and are not yet freed, which no client can know of:
        # it asks for one more, and is refused where it should have waited.
        ("grpc.http.overload_protection", 0),
        # A taken port is an error, not a second server, unless that is the wish.
        ("grpc.so_reuseport", int(shared)),
        # Where a machine or a network is gone, nothing tells: its requests would wait for hours.
        ("grpc.keepalive_time_ms", round(1000 * SILENCE)),
        ("grpc.keepalive_timeout_ms", round(1000 * ANSWER)),
        # Where a ping of gRPC's own is on its way, no other is sent: it has to be as quick.
        ("grpc.http2.ping_timeout_ms", round(1000 * ANSWER)),
        ("grpc.http2.min_ping_interval_without_data_ms", round(1000 * PINGS)),
        ("grpc.keepalive_permit_without_calls", 1),
        *(aged if settings.connection_seconds else []),
    ]


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
