"""Files that are read again while serving."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from likely import logs
from likely.errors import SettingsError
from likely.fresh import ReloadedValue
from likely.serving.reloading import reloaded
from tests.faults.history import events


class Reader:
    """Reads a file, unless it is hindered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hindrance: Exception | None = None

    def __call__(self) -> str:
        if self.hindrance:
            raise self.hindrance
        return self.path.read_text()


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    """Of a file that says `old`."""
    (tmp_path / "file").write_text("old")
    return Reader(tmp_path / "file")


def test_what_hindered_a_reload_is_told_once_and_tried_until_it_passes(reader: Reader) -> None:
    out = io.StringIO()
    known = reloaded([reader.path], reader, logs.logger("debug", "json", out), interval=0)
    reader.path.write_text("newer")
    for hindrance in (OSError("too many open files"), SettingsError("it is no TOML")):
        reader.hindrance = hindrance
        assert [known.value() for _ in range(3)] == ["old"] * 3
    reader.hindrance = None
    assert [known.value() for _ in range(3)] == ["newer"] * 3
    logged = [(event["event"], event.get("reason")) for event in events(out.getvalue())]
    assert logged == [
        ("not reloaded", "too many open files"),
        ("not reloaded", "it is no TOML"),
        ("reloaded", None),
    ]


def moved(path: Path) -> None:
    """Another file of the same size and time, under the same inode where that is used again."""
    before = path.stat()
    path.write_text("new")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [moved, lambda path: path.write_text("newer")])
def test_whatever_changes_is_read(reader: Reader, change: Callable[[Path], object]) -> None:
    known = ReloadedValue([reader.path], reader, interval=0)
    change(reader.path)
    assert known.value() == reader.path.read_text()
