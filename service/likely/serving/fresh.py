"""A value made from files, and made anew while serving when the files change."""

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
    """What files say; files that cannot be used leave the last value in force until they can."""

    def __init__(
        self,
        paths: Sequence[Path],
        read: Callable[[], T],
        log: FilteringBoundLogger,
        interval: float = INTERVAL,
    ) -> None:
        """The value, read for the first time.

        Args:
            paths: the files whose change means a new value.
            read: makes the value; its LikelyError or OSError is raised here, and logged later on.
            log: where reloads and what hinders them are told.
            interval: seconds between two looks at the files.
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
        """The newest value that could be read."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._interval
            self._look()
        return self._value

    def _look(self) -> None:
        # Marked before it is read: a file written meanwhile differs at the next look.
        mark = self._mark()
        if mark == self._seen:
            return
        files = [str(path) for path in self._paths]
        try:
            self._value = self._read()
        except (LikelyError, OSError) as error:  # tried again at every look
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
    # The last tells of permissions too: what could not be read may be readable now.
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns
