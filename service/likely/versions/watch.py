"""Polls a folder of bundles, and loads, replaces and unloads bundles as its contents change.

The folder is polled because network file systems send no notifications, and neither do
the links by which a cluster switches volumes.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from likely.errors import BundleError, DeviceLost, LikelyError
from likely.versions.lifecycle import Lifecycle, is_bundle

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from likely.telemetry.metrics import Metrics

Mark = tuple[tuple[str, int, int, int, int], ...]
MIN_DELAY, MAX_DELAY = 60.0, 3600.0  # bounds of the backoff, in seconds, after a lack of memory


@dataclass(frozen=True, slots=True)
class _MemoryShortage:
    """A bundle that could not be loaded for lack of memory.

    Attributes:
        freed: number of versions that had been freed by then.
        pause: seconds to wait before the next attempt.
        until: when that wait is over, in seconds of the monotonic clock.
    """

    freed: int
    pause: float
    until: float


class Watcher:
    """Follows a folder whose subfolders, or their subfolders, are bundles.

    A folder without a manifest is not a bundle yet. A bundle is loaded once two successive polls
    have found the same files, as a copy may write the manifest first.

    If the watched folder cannot be read, or contains none of the bundles that are served from it,
    its volume is probably not mounted, or a copy failed. The folder then counts as lost, and
    nothing is unloaded until it contains a served bundle again.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float,
        lifecycle: Lifecycle,
        metrics: Metrics,
        log: FilteringBoundLogger,
        device_lost: Callable[[DeviceLost], None],
        unloaded: Collection[tuple[str, str]] = (),
    ) -> None:
        """Creates a watcher; `begin` and `run` do the work.

        Args:
            folder: contains `<bundle>` or `<model>/<version>` folders.
            seconds: time between two polls.
            lifecycle: loads and unloads bundles.
            metrics: record whether the folder is lost.
            log: receives the same, and skipped or kept folders.
            device_lost: called if a load finds that the device is gone.
            unloaded: names and versions of bundles that are not loaded until their files change.
        """
        self._folder = folder
        self._seconds = seconds
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._log = log
        self._device_lost = device_lost
        self._unloaded = unloaded
        self._seen: dict[Path, Mark] = {}
        # Files of each bundle at its last attempt; None for one that is retried at every poll.
        self._attempted: dict[Path, Mark | None] = {}
        self._shortages: dict[Path, _MemoryShortage] = {}
        self._kept: set[Path] = set()  # folders that are gone, but whose versions stay served
        self._unread: dict[Path, str] = {}  # folders that could not be read, and why
        self._lost_reason = ""  # why the folder is lost; empty if it is not

    async def begin(self) -> None:
        """Loads the bundles that are there now; refused ones are counted, logged and retried."""
        self._seen = await self._scan()
        for path, mark in self._seen.items() if self._unloaded else ():
            if await self._lifecycle.read_identity(path) in self._unloaded:
                self._attempted[path] = mark
        await self._load_changed(self._seen)

    async def run(self) -> None:
        """Polls the folder until cancelled."""
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self._poll()
            except Exception as error:  # polling continues after a failure
                self._log.error("fault", folder=str(self._folder), exc_info=error)

    async def _poll(self) -> None:
        await self._lifecycle.check_refused()
        try:
            marks = await self._scan()
        except OSError as error:
            self._record_loss(error.strerror or str(error))
            return
        if not marks and self._any_served(self._attempted):
            self._record_loss("no bundle is left in it")
            return
        before, self._seen = self._seen, marks
        await self._load_changed(
            {path: mark for path, mark in self._seen.items() if before.get(path) == mark}
        )
        gone = set(self._attempted) - set(before) - set(marks)
        if self._any_served(gone) and not self._any_served(marks):
            self._record_loss("none of the served bundles is left in it")
            return
        self._record_loss("")
        await self._unload_gone(gone)

    def _any_served(self, folders: Iterable[Path]) -> bool:
        """Whether a served version came from one of these folders."""
        return any(map(self._lifecycle.serves_folder, folders))

    def _record_loss(self, reason: str) -> None:
        """Records and logs why the folder is lost; with an empty reason, that it is not lost."""
        self._metrics.set_watch_lost(bool(reason))
        if reason and reason != self._lost_reason:
            self._log.error("watched folder lost", folder=str(self._folder), reason=reason)
        elif self._lost_reason and not reason:
            self._log.info("watched folder found", folder=str(self._folder))
        self._lost_reason = reason

    async def _scan(self) -> dict[Path, Mark]:
        unread: dict[Path, str] = {}
        marks = await asyncio.to_thread(scan, self._folder, self._seen, unread)
        for path in unread.keys() - self._unread.keys():
            self._log.warning("passed over", folder=str(path), reason=unread[path])
        self._unread = unread
        return marks

    async def _load_changed(self, settled: dict[Path, Mark]) -> None:
        for path, mark in settled.items():
            if self._attempted.get(path) == mark and not self._should_retry(path):
                continue
            try:
                await self._lifecycle.load(path)
            except BundleError as error:
                if error.reason == "memory":
                    self._schedule_retry(path, self._attempted.get(path) == mark)
                else:
                    self._shortages.pop(path, None)
                # A refused bundle is not retried until it changes, unless it could not be read.
                self._attempted[path] = mark if error.reason != "unreadable" else None
            except LikelyError as error:
                self._attempted[path] = None
                if isinstance(error, DeviceLost):
                    self._device_lost(error)
            else:
                self._attempted[path] = mark
                self._shortages.pop(path, None)

    def _should_retry(self, path: Path) -> bool:
        """Whether a bundle that lacked memory should be tried again now."""
        short = self._shortages.get(path)
        if short is None:
            return False
        return self._lifecycle.freed > short.freed or time.monotonic() >= short.until

    def _schedule_retry(self, path: Path, again: bool) -> None:
        # Retries are rare, because a load that takes all memory may kill the server.
        short, pause = self._shortages.get(path) if again else None, MIN_DELAY
        if short:
            pause = short.pause
            if self._lifecycle.freed == short.freed:  # it was retried because its wait was over
                pause = min(2 * pause, MAX_DELAY)
        self._shortages[path] = _MemoryShortage(
            self._lifecycle.freed, pause, time.monotonic() + pause
        )

    async def _unload_gone(self, gone: set[Path]) -> None:
        for path in gone:
            try:
                await self._lifecycle.folder_emptied(path)
            except LikelyError as error:  # retried at every poll
                if path not in self._kept:
                    self._log.warning("kept", folder=str(path), message=str(error))
                self._kept.add(path)
            else:
                del self._attempted[path]
                self._shortages.pop(path, None)
                self._kept.discard(path)


def scan(
    folder: Path,
    before: Mapping[Path, Mark] = MappingProxyType({}),
    unread: dict[Path, str] | None = None,
) -> dict[Path, Mark]:
    """Returns the bundles among a folder's subfolders and theirs, each with a mark.

    A mark consists of the names and status of the bundle's files; it changes when they do.

    Args:
        folder: contains the bundles.
        before: result of the last scan, used for folders that cannot be read now.
        unread: receives the folders that cannot be read now, and why.

    Raises:
        OSError: the folder itself cannot be read.
    """
    marks: dict[Path, Mark] = {}
    unread = {} if unread is None else unread
    for path in _folders(folder):
        try:
            bundles = [path] if is_bundle(path) else _folders(path)
        except (FileNotFoundError, NotADirectoryError):
            continue  # it was removed during the scan
        except OSError as error:
            unread[path] = error.strerror or str(error)
            marks |= {known: before[known] for known in before if path in (known, known.parent)}
            continue
        for bundle in bundles:
            try:
                if is_bundle(bundle):
                    marks[bundle] = _mark(bundle)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                unread[bundle] = error.strerror or str(error)
                marks |= {bundle: before[bundle]} if bundle in before else {}
    return marks


def _folders(folder: Path) -> list[Path]:
    """Returns the subfolders that are not hidden, and entries that may be subfolders.

    Hidden ones are ignored so that a bundle can be written to `.name` and then renamed.

    Raises:
        OSError: the folder cannot be listed, or access to its entries is denied.
    """
    os.stat(f"{folder}/.")  # noqa: PTH116 -- a Path drops the dot, which checks access to entries
    return sorted(
        path for path in folder.iterdir() if not path.name.startswith(".") and _may_be_folder(path)
    )


def _may_be_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # affects this entry alone: a link to too long a name, or to a lost volume
        return True


def _mark(bundle: Path) -> Mark:
    status: list[tuple[str, os.stat_result]] = []
    for path in sorted(bundle.iterdir()):
        with suppress(FileNotFoundError):  # an editor's temporary file
            status.append((path.name, path.lstat()))
    # st_ctime_ns also changes with permissions, which may make a file readable.
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in status)
