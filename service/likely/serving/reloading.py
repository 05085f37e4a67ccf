"""Values that are read again when their files change, with log events for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from likely.fresh import INTERVAL, ReloadedValue

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

T = TypeVar("T")


def reloaded(
    paths: Sequence[Path],
    read: Callable[[], T],
    log: FilteringBoundLogger,
    interval: float = INTERVAL,
) -> ReloadedValue[T]:
    """Reads a value from files, and reads it again when they change.

    Args:
        paths: the files that determine the value.
        read: reads the value. A LikelyError or OSError is raised to the caller here, but only
            logged at later reads.
        log: receives reloads and failures to reload.
        interval: minimum number of seconds between two checks of the files.
    """
    files = [str(path) for path in paths]
    return ReloadedValue(
        paths,
        read,
        renewed=lambda _: log.info("reloaded", files=files),
        failed=lambda reason: log.error("not reloaded", files=files, reason=reason),
        interval=interval,
    )
