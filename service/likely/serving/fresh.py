"""A value that is read from files, and read again when the files change."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from likely.errors import LikelyError

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

T = TypeVar("T")
INTERVAL = 1.0
_Stat = tuple[int, int, int, int]
_Mark = tuple[_Stat | None, ...]


class Fresh(Generic[T]):
    """A value read from files. While the files cannot be used, the last value stays in force."""

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], T],
        log: FilteringBoundLogger,
        interval: float = INTERVAL,
    ) -> None:
        """Reads the value for the first time.

        Args:
            paths: the files that determine the value.
            read: reads the value. A LikelyError or OSError is raised to the caller here, but only
                logged at later reads.
            log: receives reloads and failures to reload.
            interval: minimum number of seconds between two checks of the files.
        """
        self._paths = tuple(paths)
        self._read = read
        self._log = log
        self._interval = interval
        self._seen = self._mark()
        self._told: tuple[_Mark, str] | None = None
        self._next = time.monotonic() + interval
        self._value = read()

    def value(self) -> T:
        """Returns the latest value that could be read, checking the files if it is time to."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._interval
            self._look()
        return self._value

    def _look(self) -> None:
        # Taken before reading, so that a file written in the meantime differs at the next check.
        mark = self._mark()
        if mark == self._seen:
            return
        files = [str(path) for path in self._paths]
        try:
            self._value = self._read()
        except (LikelyError, OSError) as error:  # retried at every check
            if self._told != (mark, str(error)):
                self._log.error("not reloaded", files=files, reason=str(error))
            self._told = mark, str(error)
        else:
            self._seen = mark
            self._log.info("reloaded", files=files)

    def _mark(self) -> _Mark:
        return tuple(_stat(path) for path in self._paths)


def _stat(path: Path) -> _Stat | None:
    try:
        found = path.stat()
    except OSError:
        return None
    # st_ctime_ns also changes with permissions, which may make a file readable.
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns
