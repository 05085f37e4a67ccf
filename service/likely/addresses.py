"""Where servers listen and clients ask: whether an address ever leaves this machine."""

from __future__ import annotations

import ipaddress

_HERE = ("unix:", "unix-abstract:")


def is_local(address: str) -> bool:
    """Whether only this machine can hear what goes to that address.

    Args:
        address: a host, host:port, or a `unix:` socket. A name that has to be looked up is
            not local, `localhost` excepted.
    """
    if address.startswith(_HERE):
        return True
    host = address.rsplit(":", 1)[0] if address.count(":") == 1 else address
    if address.startswith("["):
        host = address[1:].partition("]")[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
