"""Archives of arrays that are none: refused by the error that is the reader's own."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from likely.bundle import arrays
from likely.errors import BundleError

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
    ],
)
def test_what_is_no_array_of_numbers_is_refused(header: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no archive of arrays"):
        arrays.read(archive(tmp_path / "a.npz", header))
