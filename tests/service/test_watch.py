"""What is served follows a folder: looked at step by step, with bundles of one line."""

from __future__ import annotations

import asyncio
import errno
import io
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from likely import logs
from likely.answers import ModelVersion, VersionState
from likely.bundle import MANIFEST
from likely.errors import BundleError, DeviceError, DeviceLost, OutOfMemory, Unavailable
from likely.telemetry.metrics import Metrics
from likely.versions import watch
from likely.versions.lifecycle import Lifecycle
from likely.versions.registry import Registry
from likely.versions.watch import Watcher, scan


class Engine:
    """Serves nothing, but can be served."""

    providers = ("none",)
    arrangement: dict[str, Any] = {}  # noqa: RUF012
    healthy = True

    def __init__(self, bundle: Any) -> None:
        self.manifest = bundle.manifest
        self.digest = bundle.digest

    def when_unhealthy(self, callback: Any) -> None:
        pass

    def answers(self, method: str) -> bool:
        return False

    def close(self) -> None:
        pass


class Loader:
    """Reads manifests that are a version and a digest, and raises what it is told to."""

    def __init__(self) -> None:
        self.raises: dict[Path, Exception] = {}
        self.loaded: list[str] = []

    def read_identity(self, folder: Path) -> tuple[str, str]:
        text = (folder / MANIFEST).read_text()
        if not text:
            raise BundleError("it says nothing", "manifest")
        return "toy", text.split()[0]

    def verify(self, folder: Path) -> Any:
        if error := self.raises.get(folder):
            raise error
        version, digest = (folder / MANIFEST).read_text().split()
        manifest = SimpleNamespace(name="toy", version=version)
        return SimpleNamespace(manifest=manifest, digest=digest, path=folder)

    def load(self, bundle: Any) -> Engine:
        self.loaded.append(bundle.manifest.version)
        return Engine(bundle)


class Watched:
    """A folder that is followed."""

    def __init__(self, folder: Path, *unloaded: tuple[str, str]) -> None:
        self.folder = folder
        self.loader = Loader()
        self.metrics = Metrics()
        log = logs.logger("error")
        loader: Any = self.loader
        self.lifecycle = Lifecycle(Registry(), loader, self.metrics, log, self._changed)
        self.lost: list[DeviceLost] = []
        self.watcher = Watcher(
            folder, 1.0, self.lifecycle, self.metrics, log, self.lost.append, unloaded
        )

    async def look(self, times: int = 1) -> dict[str, str]:
        """The folders' names of the versions that are served after so many looks."""
        for _ in range(times):
            await self.watcher._poll()
        return self.served()

    def served(self) -> dict[str, str]:
        return {version.version: version.folder.name for version in self._serving()}

    def counted(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    def labels(self) -> dict[str, tuple[str, ...]]:
        return {version.version: version.labels for version in self._serving()}

    def _serving(self) -> list[ModelVersion]:
        return [v for v in self.lifecycle.versions() if v.state is VersionState.SERVING]

    async def _changed(self) -> None:
        pass


@asynccontextmanager
async def watched(folder: Path, **bundles: str) -> AsyncIterator[Watched]:
    """Bundles by folder, each with that version, that are served."""
    for name, version in bundles.items():
        put(folder / name, version)
    found = Watched(folder)
    await found.lifecycle.begin(())
    await found.watcher.begin()
    yield found
    await found.lifecycle.close()


def put(folder: Path, version: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "new"  # not in place, which within a tick of the clock nobody sees
    new.write_text(f"{version} digest-of-{version}")
    new.rename(folder / MANIFEST)


def test_a_bundle_that_is_renamed_is_served_on(tmp_path: Path) -> None:
    async def work() -> None:
        async with watched(tmp_path, old="1") as follower:
            await follower.lifecycle.set_label("toy", "stable", "1")
            (tmp_path / "old").rename(tmp_path / "new")
            for _ in range(4):
                assert list(await follower.look()) == ["1"]
            assert follower.served() == {"1": "new"}
            put(tmp_path / "other", "2")
            await follower.lifecycle.set_label("toy", "stable", "")
            shutil.rmtree(tmp_path / "new")
            assert await follower.look(2) == {"2": "other"}

    asyncio.run(work())


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_that_is_lost_unloads_nothing(whole: bool, tmp_path: Path) -> None:
    async def work() -> None:
        folder, away = tmp_path / "watched", tmp_path / "away"
        async with watched(folder, one="1", two="2") as follower:
            both = {"1": "one", "2": "two"}
            assert await follower.look(2) == both
            folder.rename(away)
            if not whole:  # as the place where a volume was mounted
                (folder / "lost+found").mkdir(parents=True)
            for _ in range(4):
                assert await follower.look() == both
                assert follower.counted("likely_watch_lost") == 1
            shutil.rmtree(folder, ignore_errors=True)
            away.rename(folder)
            assert await follower.look(2) == both
            assert follower.counted("likely_watch_lost") == 0
            shutil.rmtree(folder / "two")  # and what goes now goes for good
            assert await follower.look(2) == {"1": "one"}
            shutil.rmtree(folder / "one")
            put(folder / "three", "3")
            assert await follower.look(2) == {"3": "three"}

    asyncio.run(work())


@pytest.mark.parametrize("half", [True, False])
def test_what_is_refused_does_not_stand_for_what_is_served(half: bool, tmp_path: Path) -> None:
    async def work() -> None:
        async with watched(tmp_path, one="1") as follower:
            for copied in range(6):
                if copied == 2:
                    shutil.rmtree(tmp_path / "one")
                if half or not copied:  # it is being copied all the time, or is altered
                    put(tmp_path / "two", "2")
                    (tmp_path / "two" / f"file-{copied}").touch()
                    error = BundleError("it is altered", "digest")
                    follower.loader.raises[tmp_path / "two"] = error
                assert await follower.look() == {"1": "one"}
                assert follower.counted("likely_watch_lost") == (copied > 2)
            put(tmp_path / "three", "3")  # a sound one takes its place
            assert await follower.look(2) == {"3": "three"}
            assert follower.counted("likely_watch_lost") == 0
            shutil.rmtree(tmp_path / "three")
            assert await follower.look(3) == {"3": "three"}
            assert follower.counted("likely_watch_lost") == 1

    asyncio.run(work())


def test_what_was_unloaded_is_not_even_opened(tmp_path: Path) -> None:
    async def work() -> None:
        for version in ("1", "2"):
            put(tmp_path / version, version)
        (tmp_path / "3").mkdir()
        (tmp_path / "3" / MANIFEST).touch()
        follower = Watched(tmp_path, ("toy", "2"), ("other", "1"))
        follower.loader.raises[tmp_path / "3"] = BundleError("it says nothing", "manifest")
        await follower.lifecycle.begin(())
        await follower.watcher.begin()
        assert await follower.look(2) == {"1": "1"}
        assert follower.loader.loaded == ["1"]
        shutil.rmtree(tmp_path / "2")
        await follower.look(2)
        put(tmp_path / "2", "2")  # put there anew, it is wanted
        assert await follower.look(2) == {"1": "1", "2": "2"}

    asyncio.run(work())


def test_a_folder_is_not_lost_of_which_nothing_is_served(tmp_path: Path) -> None:
    async def work() -> None:
        async with watched(tmp_path) as follower:
            assert await follower.look(2) == {}
            put(tmp_path / "one", "1")
            put(tmp_path / "two", "2")
            follower.loader.raises[tmp_path / "two"] = BundleError("it is altered", "digest")
            assert await follower.look(2) == {"1": "one"}
            await follower.lifecycle.unload("toy", "1")
            for name in ("one", "two"):
                shutil.rmtree(tmp_path / name)
            assert await follower.look(2) == {}
            assert follower.counted("likely_watch_lost") == 0
            assert follower.counted("likely_refused_bundles") == 0

    asyncio.run(work())


def test_a_version_is_served_as_long_as_one_folder_holds_it(tmp_path: Path) -> None:
    async def work() -> None:
        async with watched(tmp_path, one="1") as follower:
            for copy in ("two", "three"):
                shutil.copytree(tmp_path / "one", tmp_path / copy)
                assert await follower.look(2) == {"1": copy}
            shutil.rmtree(tmp_path / "three")
            assert await follower.look(2) == {"1": "two"}
            put(tmp_path / "one", "1.1")
            assert await follower.look(2) == {"1": "two", "1.1": "one"}
            shutil.rmtree(tmp_path / "two")
            assert await follower.look(2) == {"1.1": "one"}

    asyncio.run(work())


def test_a_folder_that_comes_to_hold_what_another_does_holds_nothing_else(tmp_path: Path) -> None:
    async def work() -> None:
        async with watched(tmp_path, one="1", two="2") as follower:
            await follower.lifecycle.set_label("toy", "stable", "1")
            put(tmp_path / "one", "2")
            assert await follower.look(2) == {"2": "one"}
            assert follower.labels() == {"2": ("stable",)}
            await follower.lifecycle.set_label("toy", "stable", "")
            shutil.rmtree(tmp_path / "one")
            assert await follower.look(2) == {"2": "two"}

    asyncio.run(work())


def test_labels_stay_on_a_version_that_stays(tmp_path: Path) -> None:
    async def work() -> None:
        async with watched(tmp_path, one="1") as follower:
            await follower.lifecycle.set_label("toy", "stable", "1")
            shutil.copytree(tmp_path / "one", tmp_path / "copy")
            await follower.look(2)
            put(tmp_path / "copy", "2")
            assert await follower.look(2) == {"1": "one", "2": "copy"}
            assert follower.labels() == {"1": ("stable",), "2": ()}

    asyncio.run(work())


def test_a_link_that_leads_nowhere_hides_nothing(tmp_path: Path) -> None:
    put(tmp_path / "toy" / "1", "1")
    put(tmp_path / "toy" / "2", "2")
    before = scan(tmp_path)
    (tmp_path / "toy" / "1" / f".#{MANIFEST}").symlink_to("nowhere")  # as Emacs makes
    (tmp_path / "toy" / "1" / "itself").symlink_to("itself")
    after = scan(tmp_path, before)
    assert set(after) == set(before) == {tmp_path / "toy" / "1", tmp_path / "toy" / "2"}
    assert {path for path in before if before[path] != after[path]} == {tmp_path / "toy" / "1"}


@pytest.mark.parametrize("under", [".", "toy"])
def test_an_entry_that_cannot_be_looked_at_hides_no_other(under: str, tmp_path: Path) -> None:
    async def work() -> None:
        put(tmp_path / "toy" / "1", "1")
        odd = tmp_path / under / "odd"
        odd.symlink_to("x" * 300)  # longer than a name can be
        follower = Watched(tmp_path)
        out = io.StringIO()
        follower.watcher._log = logs.logger("warning", "json", out)
        await follower.lifecycle.begin(())
        await follower.watcher.begin()
        assert follower.served() == {"1": "1"}
        put(tmp_path / "toy" / "2", "2")
        assert await follower.look(2) == {"1": "1", "2": "2"}
        assert follower.counted("likely_watch_lost") == 0
        (line,) = map(json.loads, out.getvalue().splitlines())
        assert line["event"] == "passed over"
        assert (line["folder"], line["reason"]) == (str(odd), os.strerror(errno.ENAMETOOLONG))
        await follower.lifecycle.close()

    asyncio.run(work())


@pytest.mark.parametrize("lost", ["toy", "toy/1"])
def test_what_was_in_an_entry_that_cannot_be_looked_at_is_served_on(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        put(tmp_path / "toy" / "1", "1")
        async with watched(tmp_path, other="2") as follower:
            stat = Path.stat

            def failing(path: Path, **options: Any) -> os.stat_result:
                if path.is_relative_to(tmp_path / lost):
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
                return stat(path, **options)

            with monkeypatch.context() as patched:
                patched.setattr(Path, "stat", failing)
                put(tmp_path / "new", "3")
                shutil.rmtree(tmp_path / "other")
                assert await follower.look(3) == {"1": "1", "3": "new"}
                assert follower.counted("likely_watch_lost") == 0
            shutil.rmtree(tmp_path / "toy")
            assert await follower.look(3) == {"3": "new"}

    asyncio.run(work())


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_what_fails_in_one_bundle_hides_no_other(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "toy" / "1", tmp_path / "toy" / "2"
    put(first, "1")
    put(second, "2")
    before = scan(tmp_path)
    put(second, "2.1")
    mark = watch._mark

    def failing(bundle: Path) -> watch.Mark:
        if bundle == first:
            raise OSError(number, os.strerror(number))
        return mark(bundle)

    monkeypatch.setattr(watch, "_mark", failing)
    after = scan(tmp_path, before)
    assert after.get(first) == (before[first] if number == errno.EIO else None)
    assert after[second] != before[second]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "unreadable"),
        (BundleError("a file cannot be read", "unreadable"), "unreadable"),
        (DeviceError("it is not there"), "device"),
        (DeviceLost("it was"), "device"),
    ],
)
def test_what_passes_is_tried_again(error: Exception, reason: str, tmp_path: Path) -> None:
    async def work() -> None:
        put(tmp_path / "one", "1")
        put(tmp_path / "two", "2")
        follower = Watched(tmp_path)
        follower.loader.raises[tmp_path / "one"] = error
        await follower.lifecycle.begin(())
        await follower.watcher.begin()
        assert follower.served() == {"2": "two"}
        assert [v.reason for v in follower.lifecycle.versions()] == ["", reason]
        assert follower.lost == [error] * isinstance(error, DeviceLost)
        assert await follower.look(2) == {"2": "two"}
        del follower.loader.raises[tmp_path / "one"]
        assert await follower.look() == {"1": "one", "2": "two"}
        assert [v.reason for v in follower.lifecycle.versions()] == ["", ""]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BundleError("it is altered", "digest"), "digest"),
        (MemoryError(), "memory"),  # which is soon: to try again and again might end the server
        (OutOfMemory("no memory for the run"), "memory"),
    ],
)
def test_what_would_be_refused_again_is_tried_once(
    error: Exception, reason: str, tmp_path: Path
) -> None:
    async def work() -> None:
        async with watched(tmp_path) as follower:
            put(tmp_path / "one", "1")
            follower.loader.raises[tmp_path / "one"] = error
            await follower.look(4)
            assert follower.counted("likely_load_failures_total", reason=reason) == 1

    asyncio.run(work())


def test_what_had_no_memory_is_tried_again_once_some_is_freed(tmp_path: Path) -> None:
    async def work() -> None:
        async with watched(tmp_path, one="1", two="2") as follower:
            put(tmp_path / "large", "3")
            follower.loader.raises[tmp_path / "large"] = MemoryError()
            await follower.look(4)
            await follower.lifecycle.unload("toy", "1")
            await follower.look(4)
            assert follower.counted("likely_load_failures_total", reason="memory") == 2
            del follower.loader.raises[tmp_path / "large"]
            assert await follower.look(4) == {"2": "two"}
            await follower.lifecycle.unload("toy", "2")
            assert await follower.look() == {"3": "large"}
            assert follower.counted("likely_refused_bundles") == 0

    asyncio.run(work())


def test_what_had_no_memory_is_tried_again_more_and_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now))

    async def work() -> None:
        nonlocal now
        async with watched(tmp_path) as follower:
            put(tmp_path / "large", "1")
            follower.loader.raises[tmp_path / "large"] = MemoryError()
            tried = []
            while now < 5 * watch.MAX_DELAY:
                before = follower.counted("likely_load_failures_total", reason="memory")
                await follower.look()
                if follower.counted("likely_load_failures_total", reason="memory") != before:
                    tried.append(now)
                now += 10
            pauses = [after - before for before, after in itertools.pairwise(tried)]
            assert pauses[:3] == [watch.MIN_DELAY, 2 * watch.MIN_DELAY, 4 * watch.MIN_DELAY]
            assert pauses == sorted(pauses) and pauses[-1] == watch.MAX_DELAY
            put(tmp_path / "large", "1.1")  # another one
            await follower.look(2)
            del follower.loader.raises[tmp_path / "large"]
            now += watch.MIN_DELAY
            assert await follower.look() == {"1.1": "large"}

    asyncio.run(work())


def test_what_was_tried_as_memory_was_freed_is_not_tried_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now))

    async def work() -> None:
        nonlocal now
        async with watched(tmp_path, kept="1") as follower:

            def tried() -> float | None:
                return follower.counted("likely_load_failures_total", reason="memory")

            put(tmp_path / "large", "2")
            follower.loader.raises[tmp_path / "large"] = MemoryError()
            await follower.look(2)
            for version in ("3", "4", "5"):
                put(tmp_path / version, version)
                await follower.look(2)
                await follower.lifecycle.unload("toy", version)
                await follower.look()
            assert tried() == 4
            now += watch.MIN_DELAY
            await follower.look()
            assert tried() == 5

    asyncio.run(work())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, os.strerror(errno.EIO)),
        BundleError("a file cannot be read", "unreadable"),
        DeviceError("it is not there"),
        BundleError("it is altered", "digest"),
    ],
)
def test_what_is_refused_is_not_once_its_folder_is_gone(error: Exception, tmp_path: Path) -> None:
    async def work() -> None:
        async with watched(tmp_path, one="1") as follower:
            put(tmp_path / "two", "2")
            follower.loader.raises[tmp_path / "two"] = error
            await follower.look(2)
            assert follower.counted("likely_refused_bundles") == 1
            shutil.rmtree(tmp_path / "two")
            assert await follower.look(3) == {"1": "one"}
            assert len(follower.lifecycle.versions()) == 1
            assert follower.counted("likely_refused_bundles") == 0
            put(tmp_path / "two", "2")
            assert len(follower.lifecycle.versions()) == 1  # it is another one

    asyncio.run(work())


def test_what_is_refused_is_so_again_once_its_volume_is_back(tmp_path: Path) -> None:
    async def work() -> None:
        volume = tmp_path / "volume"
        async with watched(volume, one="1") as follower:
            put(volume / "two", "2")
            follower.loader.raises[volume / "two"] = BundleError("it is altered", "digest")
            await follower.look(2)
            volume.rename(tmp_path / "elsewhere")
            await follower.look(3)
            assert follower.counted("likely_refused_bundles") == 0
            (tmp_path / "elsewhere").rename(volume)
            await follower.look(2)
            assert follower.counted("likely_refused_bundles") == 1

    asyncio.run(work())


def test_a_path_that_is_no_bundle_is_not_counted_as_refused(tmp_path: Path) -> None:
    async def work() -> None:
        async with watched(tmp_path) as follower:
            (tmp_path / "file").write_text("no folder")
            for name in ("mistyped", "file"):
                with pytest.raises(BundleError):
                    await follower.lifecycle.load(tmp_path / name)
            assert follower.lifecycle.versions() == []
            assert follower.counted("likely_refused_bundles") == 0

    asyncio.run(work())


def test_what_comes_too_early_is_not_refused(tmp_path: Path) -> None:
    async def work() -> None:
        put(tmp_path / "one", "1")
        follower = Watched(tmp_path)
        with pytest.raises(Unavailable):
            await follower.lifecycle.load(tmp_path / "one")
        await follower.lifecycle.begin(())
        assert follower.lifecycle.versions() == []
        assert not follower.metrics.registry.get_sample_value("likely_refused_bundles")
        await follower.lifecycle.load(tmp_path / "one")
        assert follower.served() == {"1": "one"}

    asyncio.run(work())
