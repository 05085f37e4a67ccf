"""HTTP/2 frames by hand, for what a well-behaved client never sends."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
LARGEST = 1 << 14
WINDOW = 4  # INITIAL_WINDOW_SIZE, among the settings
END_STREAM, END_HEADERS, ACK = 1, 4, 1


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(
        ">I", stream
    ) + payload  # fmt: skip


def headers(stream: int, path: str, *, end: bool = False, **more: str) -> bytes:
    """The frame that begins an RPC; every field stands in it literally."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    block = b"".join(b"\0" + _string(name) + _string(value) for name, value in fields.items())
    return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream, block)


def message(stream: int, body: bytes, *, compressed: bool = False) -> bytes:
    """The frames of an RPC's only request."""
    data = struct.pack(">BI", compressed, len(body)) + body
    parts = [data[at : at + LARGEST] for at in range(0, len(data), LARGEST)]
    ends = [0] * (len(parts) - 1) + [END_STREAM]
    return b"".join(frame(DATA, end, stream, part) for end, part in zip(ends, parts, strict=True))


def setting(number: int, value: int) -> bytes:
    """The frame that sets one thing of a connection."""
    return frame(SETTINGS, payload=struct.pack(">HI", number, value))


@contextmanager
def connected(address: str, *, greet: bool = True, patience: float = 10) -> Iterator[socket.socket]:
    """A connection; `greet` begins it as HTTP/2."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), patience) as there:
        if greet:
            there.sendall(PREFACE + frame(SETTINGS))
        yield there


def frames(there: socket.socket) -> Iterator[tuple[int, int, int, bytes]]:
    """What the server sends, as (kind, flags, stream, payload), until it closes."""
    while head := _exactly(there, 9):
        size = int.from_bytes(head[:3], "big")
        kind, flags = head[3], head[4]
        yield kind, flags, int.from_bytes(head[5:], "big"), _exactly(there, size)


def status(there: socket.socket) -> int:
    """The grpc-status that ends the only RPC of a connection; every field stands literally."""
    for kind, flags, _, payload in frames(there):
        if kind == HEADERS and flags & END_STREAM:
            _, _, rest = payload.partition(b"grpc-status")
            return int(rest[1 : 1 + rest[0]])
    raise ConnectionError("the server closed without a status")


def _string(text: str) -> bytes:
    data = text.encode()
    head, left = bytearray([min(len(data), 127)]), len(data) - 127
    while left >= 128:
        head.append(left % 128 | 128)
        left //= 128
    if left >= 0:
        head.append(left)
    return bytes(head) + data


def _exactly(there: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        try:
            part = there.recv(size - len(data))
        except ConnectionError:
            return b""
        if not part:
            return b""
        data += part
    return data
