"""A folder of bundles that is looked at now and then: what comes, changes or goes is followed.

Looking, not being notified: notifications do not come from network file systems, nor
through the links by which a cluster's volumes are switched.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from likely.errors import BundleError, LikelyError
from likely.versions.lifecycle import Lifecycle, is_bundle

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

Mark = tuple[tuple[str, int, int, int, int], ...]


class Watcher:
    """Follows a folder whose subfolders, or theirs, are bundles.

    A folder without a manifest is no bundle yet. One with a manifest is loaded once it has
    been the same for two looks in a row: whoever copies a bundle may write its manifest first.
    """

    def __init__(
        self, folder: Path, seconds: float, lifecycle: Lifecycle, log: FilteringBoundLogger
    ) -> None:
        """A watcher.

        Args:
            folder: holds `<bundle>` or `<model>/<version>` folders.
            seconds: between two looks.
            lifecycle: loads and unloads.
            log: where is told that the folder cannot be read.
        """
        self._folder = folder
        self._seconds = seconds
        self._lifecycle = lifecycle
        self._log = log
        self._seen: dict[Path, Mark] = {}
        self._done: dict[Path, Mark] = {}
        self._kept: set[Path] = set()
        self._blind = False

    async def begin(self) -> None:
        """Loads what is there now; what is refused is counted and told, and tried again later."""
        self._seen = await self._scan()
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
        try:
            before, self._seen = self._seen, await self._scan()
        except OSError as error:
            # An unmounted volume is no wish to unload everything.
            if not self._blind:
                self._log.error("unreadable", folder=str(self._folder), error=error.strerror)
            self._blind = True
            return
        self._blind = False
        await self._follow(
            {path: mark for path, mark in self._seen.items() if before.get(path) == mark}
        )
        await self._leave(set(self._done) - set(before) - set(self._seen))

    async def _scan(self) -> dict[Path, Mark]:
        return await asyncio.to_thread(scan, self._folder, self._seen)

    async def _follow(self, settled: dict[Path, Mark]) -> None:
        for path, mark in settled.items():
            if self._done.get(path) == mark:
                continue
            try:
                await self._lifecycle.load(path)
            except BundleError as error:
                if error.reason != "unreadable":  # which may pass
                    self._done[path] = mark  # refused for what it is, or takes: once is enough
            except LikelyError:
                continue
            else:
                self._done[path] = mark

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
                self._kept.discard(path)


def scan(folder: Path, before: Mapping[Path, Mark] = MappingProxyType({})) -> dict[Path, Mark]:
    """The bundles in a folder and in its subfolders, each with what changes when it does.

    Args:
        folder: holds them.
        before: what was found last time, which stands for what cannot be read now.

    Raises:
        OSError: the folder cannot be read.
    """
    found: dict[Path, Mark] = {}
    for path in _folders(folder):
        try:
            bundles = [path] if is_bundle(path) else _folders(path)
        except (FileNotFoundError, NotADirectoryError):
            continue  # it went while it was looked at
        except OSError:
            found |= {known: before[known] for known in before if path in (known, known.parent)}
            continue
        for bundle in bundles:
            try:
                if is_bundle(bundle):
                    found[bundle] = _mark(bundle)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError:
                found |= {bundle: before[bundle]} if bundle in before else {}
    return found


def _folders(folder: Path) -> list[Path]:
    """The subfolders that are not hidden: a bundle may be made in `.name` and then renamed."""
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _mark(bundle: Path) -> Mark:
    status: list[tuple[str, os.stat_result]] = []
    for path in sorted(bundle.iterdir()):
        with suppress(FileNotFoundError):  # an editor's file, gone again
            status.append((path.name, path.lstat()))
    # The last tells of permissions too: what could not be read may be readable now.
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in status)
