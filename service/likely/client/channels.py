"""Channels to one server or several replicas, with or without TLS and tokens.

| address                              | what answers                                         |
| ------------------------------------ | ---------------------------------------------------- |
| `host:port`, `unix:path`             | that server                                          |
| `["10.0.0.1:50051", "10.0.0.2:..."]` | these replicas, in turn, as long as they are healthy |
| `dns:///name:port`                   | the same for all addresses that the name resolves to |

Health is the status that `grpc.health.v1` reports for each replica, watched on every connection:
a replica that drains, still loads or is gone gets no requests. gRPC retries requests that a
server refuses for now (UNAVAILABLE, RESOURCE_EXHAUSTED), after the delay that the server names,
if any. It also retries requests that a server cancels (CANCELLED), as a stopping server does with
late arrivals. gRPC does not retry once an answer has begun; if it ends too soon, the client
repeats the request. If one of several replicas does not find a model (NOT_FOUND), the client asks
the next ones at once. Only the feed itself reopens a feed's stream.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import grpc
import grpc.aio

from likely.addresses import check_address, is_local
from likely.client import credentials
from likely.errors import SettingsError
from likely.v1 import scoring_pb2

Token: TypeAlias = str | Callable[[], str]
File: TypeAlias = credentials.File
Address: TypeAlias = str | Sequence[str]

KEEPALIVE_TIME = 30.0  # seconds of silence during a request after which a keepalive ping is sent
KEEPALIVE_TIMEOUT = 20.0  # seconds in which the ping must be answered
LOOKUP_INTERVAL = 1.0  # least seconds between two DNS look-ups; gRPC's 30 outlast a rolling update
# Most seconds between two attempts to reach a replica; gRPC would go up to 120.
MAX_RECONNECT_DELAY = 2.0
# Bytes of the largest request that is retried; gRPC would stop at 256 KiB.
RETRY_BUFFER_BYTES = 1 << 30

_RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
}
_SCORING = scoring_pb2.DESCRIPTOR.services_by_name["ScoringService"]
# gRPC must not retry feeds: messages that it replays on a new stream may never be answered, and
# the feed itself knows which messages have no answer (docs/decisions/0018).
_FEEDS = [
    {"service": _SCORING.full_name, "method": method.name}
    for method in _SCORING.methods
    if method.client_streaming
]
_SERVICE_CONFIG: dict[str, Any] = {
    "methodConfig": [{"name": [{}], "retryPolicy": _RETRY}, {"name": _FEEDS}]
}
_FLEET_CONFIG = {
    **_SERVICE_CONFIG,
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": ""},
}


class Route:
    """The address and credentials of one server or its replicas; opens channels to them.

    A token is sent over encrypted connections and to addresses of this machine; elsewhere only
    with `plaintext_token`. Connections to addresses of this machine ignore `http_proxy`.

    Attributes:
        fleet: whether several replicas may answer, in turn.
    """

    def __init__(
        self,
        address: Address,
        *,
        token: Token | None = None,
        plaintext_token: bool = False,
        tls: bool = False,
        ca: File | None = None,
        certificate: File | None = None,
        key: File | None = None,
        server_name: str | None = None,
    ) -> None:
        """A route.

        Args:
            address: host:port, or any name that gRPC resolves; or the IP addresses, with ports, of
                several replicas.
            token: a bearer token, or a function called for the token of each request; white space
                around the token is removed.
            plaintext_token: whether the token may be sent unencrypted, for example to a proxy that
                adds TLS.
            tls: whether to encrypt; `ca`, `certificate` and `server_name` imply it.
            ca: PEM file of the certificate authorities to trust; None for gRPC's own.
            certificate: PEM file of the client's own certificate.
            key: PEM file of that certificate's key.
            server_name: name that the server's certificate must contain; None for the host of
                the address.

        Raises:
            SettingsError: the address is malformed, a file cannot be read, only one of certificate
                and key is given, one of several addresses is not an IP address with a port,
                several addresses are encrypted without a server name, the server name is not
                ASCII, the token is not valid, or it would be sent unencrypted to another machine.
        """
        check_address(address)
        several = [address] if isinstance(address, str) else list(address)
        if (certificate is None) != (key is None):
            raise SettingsError("certificate and key are given together, or neither")
        self._target = address if isinstance(address, str) else _target(several)
        self.fleet = not isinstance(address, str) or address.startswith("dns:")
        self._options: tuple[tuple[str, Any], ...] = (
            ("grpc.service_config", json.dumps(_FLEET_CONFIG if self.fleet else _SERVICE_CONFIG)),
            ("grpc.max_receive_message_length", -1),  # the request bounds the size of its answer
            ("grpc.max_send_message_length", -1),
            ("grpc.per_rpc_retry_buffer_size", RETRY_BUFFER_BYTES),
            ("grpc.dns_min_time_between_resolutions_ms", round(1000 * LOOKUP_INTERVAL)),
            ("grpc.max_reconnect_backoff_ms", round(1000 * MAX_RECONNECT_DELAY)),
            # Without keepalive, requests to a peer that vanished would wait for their deadlines.
            ("grpc.keepalive_time_ms", round(1000 * KEEPALIVE_TIME)),
            ("grpc.keepalive_timeout_ms", round(1000 * KEEPALIVE_TIMEOUT)),
            ("grpc.http2.ping_timeout_ms", round(1000 * KEEPALIVE_TIMEOUT)),
            ("grpc.http2.max_pings_without_data", 0),  # no limit on the number of pings
        )
        local = all(map(is_local, several))
        if local:
            self._options += (("grpc.enable_http_proxy", 0),)
        self._token = credentials.bearer(token) if isinstance(token, str) else token
        self._secure = tls or any(option is not None for option in (ca, certificate, server_name))
        if server_name is not None:
            if not server_name.isascii():
                raise SettingsError(f"{server_name!r} is no name of a server; it has ASCII letters")
            self._options += (("grpc.default_authority", server_name),)
        elif self._secure and "," in self._target:
            raise SettingsError(
                "several addresses have no one name that a certificate could bear; give it as "
                "server_name="
            )
        if token is not None and not (self._secure or local or plaintext_token):
            raise SettingsError(
                f"a token would go unencrypted to {self._target}; give tls=True, or ca= for the "
                "authority that vouches for the server, or plaintext_token where a proxy has TLS"
            )
        self._credentials = credentials.Credentials(ca, certificate, key)

    def channel(self, *, once: bool = False) -> grpc.Channel:
        """A channel; it connects when it is first used.

        Args:
            once: whether gRPC's retries are off.
        """
        options = (*self._options, ("grpc.enable_retries", int(not once)))
        if not self._secure:
            return grpc.insecure_channel(self._target, options=options)
        return grpc.secure_channel(self._target, self._credentials.of_channel(), options=options)

    def aio_channel(self, *, once: bool = False) -> grpc.aio.Channel:
        """As `channel`, for the running event loop."""
        options = (*self._options, ("grpc.enable_retries", int(not once)))
        if not self._secure:
            return grpc.aio.insecure_channel(self._target, options=options)
        return grpc.aio.secure_channel(
            self._target, self._credentials.of_channel(), options=options
        )

    def edition(self) -> int:
        """A number that grows when the TLS files change; new channels use the new content."""
        return self._credentials.edition()

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of the next request: the token, if any.

        Raises:
            SettingsError: the function for tokens returned no valid one.
        """
        if self._token is None:
            return ()
        token = self._token if isinstance(self._token, str) else credentials.bearer(self._token())
        return (("authorization", f"Bearer {token}"),)


def _target(addresses: Sequence[str]) -> str:
    """Several addresses as one gRPC target.

    Raises:
        SettingsError: there are none, one is not an IP address with a port, or they mix IPv4 and
            IPv6.
    """
    kinds = set()
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            kinds.add(ipaddress.ip_address(host.strip("[]")).version)
            int(port)
        except ValueError:
            raise SettingsError(
                f"{address!r} is no IP address with a port, as each of several has to be; a name "
                "that stands for several is given alone, as dns:///name:port"
            ) from None
    if len(kinds) != 1:
        raise SettingsError("several addresses are all IPv4 or all IPv6, and one at least")
    return f"ipv{kinds.pop()}:{','.join(addresses)}"
