"""Which addresses never leave the machine."""

from __future__ import annotations

import pytest

from likely.addresses import is_local


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
