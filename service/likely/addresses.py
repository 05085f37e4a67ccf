"""Checks of addresses: whether a client can dial one, and whether it stays on this machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from likely.errors import SettingsError

_LOCAL_SCHEMES = ("unix:", "unix-abstract:")
# Schemes that gRPC resolves.
_GRPC_SCHEMES = (*_LOCAL_SCHEMES, "dns:", "ipv4:", "ipv6:", "vsock:", "xds:")


def check_address(address: str | Sequence[str]) -> None:
    """Checks that a client can dial an address; of several addresses, only that they are strings.

    Raises:
        SettingsError: an address is no string, or a single one has another scheme, such as
            `http://`, or no port.
    """
    if not isinstance(address, str):
        if not isinstance(address, Sequence) or not all(isinstance(item, str) for item in address):
            raise SettingsError(f"{address!r} is no address; 127.0.0.1:50051 would be one")
        return
    host, _, port = address.rpartition(":")
    has_port = port.isdecimal() and 0 < int(port) < 1 << 16
    if address.startswith(_GRPC_SCHEMES) or (host and "/" not in host and has_port):
        return
    raise SettingsError(
        f"{address!r} is no address that a client can dial; it takes host:port, such as "
        "127.0.0.1:50051, without http://, or unix:path, or dns:///name:port"
    )


def is_local(address: str) -> bool:
    """Whether what is sent to an address stays on this machine.

    Args:
        address: a host, host:port, or a `unix:` socket. A name that has to be looked up does
            not count as local, except `localhost`.
    """
    if address.startswith(_LOCAL_SCHEMES):
        return True
    host = address.rsplit(":", 1)[0] if address.count(":") == 1 else address
    if address.startswith("["):
        host = address[1:].partition("]")[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
