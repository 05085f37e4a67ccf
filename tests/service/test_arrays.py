"""Archives of arrays that are none: refused by the error that is the reader's own."""

from __future__ import annotations

import errno
import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from likely.bundle import arrays
from likely.errors import BundleError, OutOfMemory

HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }"


def archive(path: Path, header: str, data: bytes = b"abc") -> Path:
    entry = np.lib.format.magic(1, 0) + struct.pack("<H", len(header)) + header.encode() + data
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.npy", entry)
    return path


def test_numbers_are_read(tmp_path: Path) -> None:
    assert arrays.read(archive(tmp_path / "a.npz", HEADER))["x"].tolist() == [97, 98, 99]


@pytest.mark.parametrize(
    "header",
    [
        HEADER + "  (",  # numpy's reader of old headers ends in a TokenError: fuzzing found it
        HEADER.replace("|u1", "|O"),
        HEADER.replace("(3,)", "(-3,)"),
        HEADER.replace("(3,)", "(4,)"),
        "",
        "-" * 9000,  # which Python's parser calls a lack of memory
    ],
)
def test_what_is_no_array_of_numbers_is_refused(header: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no archive of arrays") as caught:
        arrays.read(archive(tmp_path / "a.npz", header))
    assert caught.value.reason == "arrays"


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"PK\5\6" + bytes(18),
        b"PK\5\6" + bytes(8) + b"\xff" * 8 + bytes(2),
        b"PK\5\6" + bytes(8) + struct.pack("<LL", 8, 0) + bytes(2),
    ],
)
def test_an_archive_that_is_broken_is_no_file_that_cannot_be_read(
    start: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.npz").write_bytes(start)
    try:
        assert arrays.read(tmp_path / "a.npz") == {}  # an empty one is whole
    except BundleError as error:
        assert error.reason == "arrays"


@pytest.mark.parametrize("reads", range(6))
def test_what_cannot_be_read_now_is_not_broken(
    reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = archive(tmp_path / "a.npz", HEADER)

    class Failing(io.FileIO):
        left = reads

        def read(self, size: int | None = -1, /) -> bytes:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return super().read(size) or b""

    monkeypatch.setattr("zipfile.io.open", Failing)
    with pytest.raises(BundleError, match="cannot be read: Stale file handle") as caught:
        arrays.read(path)
    assert caught.value.reason == "unreadable"


def test_an_error_that_is_being_handled_tells_nothing_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"no archive")
    try:
        raise OSError(errno.EIO, "of something else")
    except OSError:
        with pytest.raises(BundleError) as caught:
            arrays.read(tmp_path / "a.npz")
    assert caught.value.reason == "arrays"


def test_what_there_is_no_memory_for_is_not_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(zipfile.ZipExtFile, "read", failing)
    with pytest.raises(OutOfMemory, match="no memory for the arrays"):
        arrays.read(archive(tmp_path / "a.npz", HEADER))
