"""A value that is read from files, and read again when the files change."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from likely.errors import LikelyError

T = TypeVar("T")
INTERVAL = 1.0
_Stat = tuple[int, int, int, int]
_Mark = tuple[_Stat | None, ...]


def _ignore(_: object) -> None:
    """Does nothing: the default callback."""


class ReloadedValue(Generic[T]):
    """A value read from files. While the files cannot be used, the last value stays in force.

    Any thread may ask for it; only one of them reads the files at a time.
    """

    def __init__(
        self,
        paths: Sequence[str | PathLike[str]],
        read: Callable[[], T],
        *,
        check: Callable[[T], None] = _ignore,
        renewed: Callable[[T], None] = _ignore,
        failed: Callable[[str], None] = _ignore,
        interval: float = INTERVAL,
    ) -> None:
        """Reads the value for the first time.

        Args:
            paths: the files that determine the value.
            read: reads the value. A LikelyError or OSError is raised to the caller here, but
                only reported to `failed` at later reads.
            check: called with each value but the first before it is used; may raise as `read`.
            renewed: called with the value after each later read that succeeds.
            failed: called with the reason if a later read fails, once for each change of the files
                and reason.
            interval: minimum number of seconds between two checks of the files.
        """
        self._paths = [Path(path) for path in paths]
        self._read = read
        self._check = check
        self._renewed = renewed
        self._failed = failed
        self._interval = interval
        self._looking = Lock()
        self._seen = self._mark()
        self._reported: tuple[_Mark, str] | None = None
        self._next = time.monotonic() + interval
        self._value = read()

    def value(self) -> T:
        """Returns the latest value that could be read, checking the files if it is time to."""
        with self._looking:
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + self._interval
                self._reload_if_changed()
            return self._value

    def _reload_if_changed(self) -> None:
        # Taken before reading, so that a file written in the meantime differs at the next check.
        mark = self._mark()
        if mark == self._seen:
            return
        try:
            value = self._read()
            self._check(value)
        except (LikelyError, OSError) as error:  # retried at every check
            failure = mark, str(error)
            if failure != self._reported:
                self._failed(str(error))
            self._reported = failure
        else:
            self._seen, self._value = mark, value
            self._renewed(value)

    def _mark(self) -> _Mark:
        return tuple(_stat(path) for path in self._paths)


def _stat(path: Path) -> _Stat | None:
    try:
        status = path.stat()
    except OSError:
        return None
    # st_ctime_ns also changes with permissions, which may make a file readable.
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns
