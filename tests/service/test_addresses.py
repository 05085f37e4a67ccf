"""Which addresses never leave the machine."""

from __future__ import annotations

from typing import Any

import pytest

from likely import AsyncClient, Client, SettingsError
from likely.addresses import check_address, is_local


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("localhost", True),
        ("localhost:50051", True),
        ("127.0.0.1", True),
        ("127.8.0.1:1", True),
        ("::1", True),
        ("[::1]:50051", True),
        ("unix:/run/likely.sock", True),
        ("0.0.0.0", False),
        ("::", False),
        ("[::]:50051", False),
        ("10.0.0.1:50051", False),
        ("example.org:50051", False),
        ("localhost.example.org:1", False),
        ("dns:///localhost:1", False),
        ("127.0.0.1.example.org", False),
        ("", False),
    ],
)
def test_only_loopback_is_local(address: str, local: bool) -> None:
    assert is_local(address) is local


@pytest.mark.parametrize(
    "address",
    ["h:1", "127.0.0.1:50051", "[::1]:50051", "unix:/run/l.sock", "dns:///name:1", "dns:name",
     "ipv4:10.0.0.1:1,10.0.0.2:1", ["10.0.0.1:1"]],
)  # fmt: skip
def test_what_grpc_resolves_may_be_dialled(address: str | list[str]) -> None:
    check_address(address)


@pytest.mark.parametrize(
    "address",
    ["http://h:1", "grpc://h:1", "h", "10.0.0.1", ":1", "h:", "h:x", "h:65536", "", 50051, [50051]],
)
def test_what_is_no_address_is_refused_before_it_is_dialled(address: Any) -> None:
    for client in (Client, AsyncClient):
        with pytest.raises(SettingsError, match="is no address"):
            client(address)
