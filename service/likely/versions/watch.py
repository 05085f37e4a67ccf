"""A folder of bundles that is looked at now and then: what comes, changes or goes is followed.

Looking, not being notified: notifications do not come from network file systems, nor
through the links by which a cluster's volumes are switched.
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
SOONEST, LATEST = 60.0, 3600.0  # seconds before what had no memory is tried again


@dataclass(frozen=True, slots=True)
class _Short:
    """A bundle that there was no memory for.

    Attributes:
        freed: how many versions had been freed by then.
        pause: seconds to wait.
        until: when they are over.
    """

    freed: int
    pause: float
    until: float


class Watcher:
    """Follows a folder whose subfolders, or theirs, are bundles.

    A folder without a manifest is no bundle yet. One with a manifest is loaded once it has
    been the same for two looks in a row: whoever copies a bundle may write its manifest first.
    A folder that cannot be read, or where no bundle is left of those that are served from it, is
    taken for an unmounted volume or a copy that failed: nothing is unloaded until one that is
    served is there.
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
        """A watcher.

        Args:
            folder: holds `<bundle>` or `<model>/<version>` folders.
            seconds: between two looks.
            lifecycle: loads and unloads.
            metrics: are told whether the folder is lost.
            log: where is told the same.
            device_lost: is told where a load finds that the device is gone.
            unloaded: names and versions of bundles that are left alone until their files change.
        """
        self._folder = folder
        self._seconds = seconds
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._log = log
        self._device_lost = device_lost
        self._unloaded = unloaded
        self._seen: dict[Path, Mark] = {}
        self._done: dict[Path, Mark | None] = {}  # None for what is tried again at every look
        self._short: dict[Path, _Short] = {}
        self._kept: set[Path] = set()
        self._unread: dict[Path, str] = {}
        self._lost = ""

    async def begin(self) -> None:
        """Loads what is there now; what is refused is counted and told, and tried again later."""
        self._seen = await self._scan()
        for path, mark in self._seen.items() if self._unloaded else ():
            if await self._lifecycle.claimed(path) in self._unloaded:
                self._done[path] = mark
        await self._follow(self._seen)

    async def run(self) -> None:
        """Follows the folder until it is cancelled."""
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self._look()
            except Exception as error:  # one look that fails is not the last
                self._log.error("fault", folder=str(self._folder), exc_info=error)

    async def _look(self) -> None:
        await self._lifecycle.look()
        try:
            found = await self._scan()
        except OSError as error:
            self._lose(error.strerror or str(error))
            return
        if not found and self._serves(self._done):
            self._lose("no bundle is left in it")
            return
        before, self._seen = self._seen, found
        await self._follow(
            {path: mark for path, mark in self._seen.items() if before.get(path) == mark}
        )
        gone = set(self._done) - set(before) - set(found)
        if self._serves(gone) and not self._serves(found):
            self._lose("no bundle that is served is left in it")
            return
        self._lose("")
        await self._leave(gone)

    def _serves(self, folders: Iterable[Path]) -> bool:
        """Whether a version is served that lies, or lay, in one of them."""
        return any(map(self._lifecycle.holds, folders))

    def _lose(self, reason: str) -> None:
        """Tells that the folder is lost, for this reason; for none, that it is not."""
        self._metrics.watch_lost(bool(reason))
        if reason and reason != self._lost:
            self._log.error("watched folder lost", folder=str(self._folder), reason=reason)
        elif self._lost and not reason:
            self._log.info("watched folder found", folder=str(self._folder))
        self._lost = reason

    async def _scan(self) -> dict[Path, Mark]:
        unread: dict[Path, str] = {}
        found = await asyncio.to_thread(scan, self._folder, self._seen, unread)
        for path in unread.keys() - self._unread.keys():
            self._log.warning("passed over", folder=str(path), reason=unread[path])
        self._unread = unread
        return found

    async def _follow(self, settled: dict[Path, Mark]) -> None:
        for path, mark in settled.items():
            if self._done.get(path) == mark and not self._has_memory(path):
                continue
            try:
                await self._lifecycle.load(path)
            except BundleError as error:
                if error.reason == "memory":
                    self._wait(path, self._done.get(path) == mark)
                else:
                    self._short.pop(path, None)
                # Refused for what it is, once is enough; that it cannot be read may pass.
                self._done[path] = mark if error.reason != "unreadable" else None
            except LikelyError as error:
                self._done[path] = None
                if isinstance(error, DeviceLost):
                    self._device_lost(error)
            else:
                self._done[path] = mark
                self._short.pop(path, None)

    def _has_memory(self, path: Path) -> bool:
        """Whether there may be memory now for a bundle that there was none for."""
        short = self._short.get(path)
        if short is None:
            return False
        return self._lifecycle.freed > short.freed or time.monotonic() >= short.until

    def _wait(self, path: Path, again: bool) -> None:
        # Seldom: what takes all the memory there is may end the server, and not only fail.
        short, pause = self._short.get(path) if again else None, SOONEST
        if short:
            pause = short.pause
            if self._lifecycle.freed == short.freed:  # it was tried as its time was up
                pause = min(2 * pause, LATEST)
        self._short[path] = _Short(self._lifecycle.freed, pause, time.monotonic() + pause)

    async def _leave(self, gone: set[Path]) -> None:
        for path in gone:
            try:
                await self._lifecycle.vacated(path)
            except LikelyError as error:  # tried again at every look
                if path not in self._kept:
                    self._log.warning("kept", folder=str(path), message=str(error))
                self._kept.add(path)
            else:
                del self._done[path]
                self._short.pop(path, None)
                self._kept.discard(path)


def scan(
    folder: Path,
    before: Mapping[Path, Mark] = MappingProxyType({}),
    unread: dict[Path, str] | None = None,
) -> dict[Path, Mark]:
    """The bundles in a folder and in its subfolders, each with what changes when it does.

    Args:
        folder: holds them.
        before: what was found last time, which stands for what cannot be read now.
        unread: takes what cannot be read now, and why.

    Raises:
        OSError: the folder cannot be read.
    """
    found: dict[Path, Mark] = {}
    unread = {} if unread is None else unread
    for path in _folders(folder):
        try:
            bundles = [path] if is_bundle(path) else _folders(path)
        except (FileNotFoundError, NotADirectoryError):
            continue  # it went while it was looked at
        except OSError as error:
            unread[path] = error.strerror or str(error)
            found |= {known: before[known] for known in before if path in (known, known.parent)}
            continue
        for bundle in bundles:
            try:
                if is_bundle(bundle):
                    found[bundle] = _mark(bundle)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                unread[bundle] = error.strerror or str(error)
                found |= {bundle: before[bundle]} if bundle in before else {}
    return found


def _folders(folder: Path) -> list[Path]:
    """The subfolders that are not hidden: a bundle may be made in `.name` and then renamed.

    With them, what cannot be told to be one or not.

    Raises:
        OSError: the folder cannot be read, or nothing in it can be looked at.
    """
    os.stat(f"{folder}/.")  # noqa: PTH116 -- a Path drops the dot, which asks leave to look inside
    return sorted(
        path for path in folder.iterdir() if not path.name.startswith(".") and _may_be_folder(path)
    )


def _may_be_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # of this one alone: a link to too long a name, or one to a volume that is lost
        return True


def _mark(bundle: Path) -> Mark:
    status: list[tuple[str, os.stat_result]] = []
    for path in sorted(bundle.iterdir()):
        with suppress(FileNotFoundError):  # an editor's file, gone again
            status.append((path.name, path.lstat()))
    # The last tells of permissions too: what could not be read may be readable now.
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in status)
