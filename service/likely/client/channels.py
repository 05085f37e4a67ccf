"""How a client reaches a server or several: plainly or encrypted, with a token or without.

| address                             | who answers                                              |
| ----------------------------------- | -------------------------------------------------------- |
| `host:port`, `unix:path`            | that server                                              |
| `["10.0.0.1:50051", "10.0.0.2:..."]` | these replicas, each request the next one that is healthy |
| `dns:///name:port`                  | the same for all addresses that the name stands for       |

Health is what `grpc.health.v1` says of each replica, watched on every connection: one that
drains, still loads or is gone gets no requests. What a server refuses for now (UNAVAILABLE,
RESOURCE_EXHAUSTED), gRPC asks again, after the delay that the server names, where it names one;
so it does with what a server cancelled (CANCELLED), as one that stops does with late newcomers.
Of an answer that has begun gRPC asks for nothing again; where it ends too soon, the client does.
What one of several does not find (NOT_FOUND), the client itself asks the next ones for at once.
Streams that ask are begun anew by their feed, and by nobody else.
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

SILENCE = 30.0  # seconds that a server may say nothing to a request before it is asked for a sign
ANSWER = 20.0  # seconds that it has to give one
LOOKUP = 1.0  # seconds between two look-ups of a name; gRPC's 30 outlast a rolling update
RECONNECT = 2.0  # seconds between two attempts to reach a replica; gRPC would go up to 120
LARGEST = 1 << 30  # bytes of a request that is asked again; gRPC would stop at 256 KiB

_RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
}
_SCORING = scoring_pb2.DESCRIPTOR.services_by_name["ScoringService"]
# gRPC is not to ask a feed again: what it sends anew of a stream may never be answered, and a feed
# knows itself what has its answer.
_FEEDS = [
    {"service": _SCORING.full_name, "method": method.name}
    for method in _SCORING.methods
    if method.client_streaming
]
_SERVICE: dict[str, Any] = {
    "methodConfig": [{"name": [{}], "retryPolicy": _RETRY}, {"name": _FEEDS}]
}
_FLEET = {
    **_SERVICE,
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": ""},
}


class Route:
    """The way to one server or its replicas, and what is shown on it.

    A token goes over an encrypted connection, or to an address of this machine; elsewhere only by
    `plaintext_token`. To an address of this machine no proxy is asked the way, whatever
    `http_proxy` says.

    Attributes:
        fleet: whether several may answer, each request another one.
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
            address: host:port, or any name that gRPC resolves; or the IP addresses of
                several replicas.
            token: a bearer token, or what gives one for each request; blanks round it do not count.
            plaintext_token: whether it may go out unencrypted, as to a proxy that has TLS.
            tls: whether to encrypt; `ca`, `certificate` and `server_name` imply it.
            ca: PEM file of the authorities that may vouch for the server; None for gRPC's own.
            certificate: PEM file that this client shows of itself.
            key: PEM file of that certificate's key.
            server_name: that the server's certificate has to bear; None for the address's own.

        Raises:
            SettingsError: a file cannot be read, one of certificate and key is missing, one
                of several addresses is no IP address, several are encrypted and have no
                server name, that name is not ASCII, or the token is none or would go
                unencrypted to another machine.
        """
        check_address(address)
        several = [address] if isinstance(address, str) else list(address)
        if (certificate is None) != (key is None):
            raise SettingsError("certificate and key are given together, or neither")
        self._target = address if isinstance(address, str) else _target(several)
        self.fleet = not isinstance(address, str) or address.startswith("dns:")
        self._options: tuple[tuple[str, Any], ...] = (
            ("grpc.service_config", json.dumps(_FLEET if self.fleet else _SERVICE)),
            ("grpc.max_receive_message_length", -1),  # bounded by what was asked
            ("grpc.max_send_message_length", -1),
            ("grpc.per_rpc_retry_buffer_size", LARGEST),
            ("grpc.dns_min_time_between_resolutions_ms", round(1000 * LOOKUP)),
            ("grpc.max_reconnect_backoff_ms", round(1000 * RECONNECT)),
            # A peer that a network lost would keep its requests until their deadlines.
            ("grpc.keepalive_time_ms", round(1000 * SILENCE)),
            ("grpc.keepalive_timeout_ms", round(1000 * ANSWER)),
            ("grpc.http2.ping_timeout_ms", round(1000 * ANSWER)),
            ("grpc.http2.max_pings_without_data", 0),  # no limit to how often it is asked
        )
        local = all(map(is_local, several))
        if local:
            self._options += (("grpc.enable_http_proxy", 0),)
        self._token = credentials.bearer(token) if isinstance(token, str) else token
        self._secure = tls or any(each is not None for each in (ca, certificate, server_name))
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
        """A channel; connects when it is first used.

        Args:
            once: whether what is refused for now is left at that.
        """
        options = (*self._options, ("grpc.enable_retries", int(not once)))
        if not self._secure:
            return grpc.insecure_channel(self._target, options=options)
        return grpc.secure_channel(self._target, self._credentials.of_channel(), options=options)

    def aio_channel(self, *, once: bool = False) -> grpc.aio.Channel:
        """A channel of the running event loop, as `channel`."""
        options = (*self._options, ("grpc.enable_retries", int(not once)))
        if not self._secure:
            return grpc.aio.insecure_channel(self._target, options=options)
        return grpc.aio.secure_channel(
            self._target, self._credentials.of_channel(), options=options
        )

    def edition(self) -> int:
        """Grows when the files hold something else, which a new channel shows and believes."""
        return self._credentials.edition()

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with the next request.

        Raises:
            SettingsError: what gives tokens gave none.
        """
        if self._token is None:
            return ()
        token = self._token if isinstance(self._token, str) else credentials.bearer(self._token())
        return (("authorization", f"Bearer {token}"),)


def _target(addresses: Sequence[str]) -> str:
    """Several addresses as one name that gRPC resolves.

    Raises:
        SettingsError: there is none, one is no IP address with a port, or they are of two kinds.
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
