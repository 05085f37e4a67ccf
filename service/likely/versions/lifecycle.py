"""What is served changes here: load, replace, unload, label, roll back; one change at a time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from likely.answers import ModelVersion, VersionState
from likely.bundle import MANIFEST, Bundle
from likely.errors import (
    BundleError,
    DeviceError,
    DeviceLost,
    LikelyError,
    ModelNotFound,
    Refused,
    SettingsError,
    Unavailable,
)
from likely.telemetry.metrics import Metrics
from likely.versions.loading import Loader
from likely.versions.registry import Held, Registry, check_name

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from likely.engine import Engine

T = TypeVar("T")
Key: TypeAlias = "tuple[str, str]"  # name and version
REMEMBERED = 100  # refused folders, and former versions of a model


class Lifecycle:
    """Changes a registry while it serves.

    A change once begun is carried through, whether its caller waits or not. Changes follow one
    another; what they replace drains beside them.

    Attributes:
        freed: versions that have been unloaded and freed so far.
    """

    def __init__(
        self,
        registry: Registry,
        loader: Loader,
        metrics: Metrics,
        log: FilteringBoundLogger,
        changed: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """The lifecycle of a registry's models.

        Args:
            registry: what is changed.
            loader: makes engines of folders.
            metrics: where failures are counted, and told which models are served.
            log: where every change is told.
            changed: awaited after each change.
        """
        self._registry = registry
        self._loader = loader
        self._metrics = metrics
        self._log = log
        self._changed = changed
        self.freed = 0
        self._turn = asyncio.Lock()
        self._ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._folders: dict[Key, list[Path]] = {}  # that hold each version, the newest last
        self._loading: Path | None = None
        self._draining: dict[Held, ModelVersion] = {}
        self._failed: dict[Path, ModelVersion] = {}
        self._gone: set[Path] = set()  # of those, the folders that were no bundle any more
        self._former: dict[str, list[ModelVersion]] = {}

    async def begin(self, folders: Sequence[Path]) -> None:
        """Serves the bundles of these folders, all or none.

        Raises:
            BundleError: a bundle is refused.
            DeviceError: the device asked for is not really there.
            SettingsError: a bundle cannot promise the default alpha.
        """
        folders = [absolute(folder) for folder in folders]
        engines = await asyncio.to_thread(self._open_all, folders)
        self._registry.fill(engines)
        for engine, folder in zip(engines, folders, strict=True):
            self._folders[_key(engine)] = [folder]
            self._told("model", engine)
        await self._tell()

    def pin(self, labels: Mapping[tuple[str, str], str]) -> None:
        """Sets the labels that the settings name: versions by name and label.

        Raises:
            SettingsError: one of them is not served.
        """
        for (name, label), version in labels.items():
            try:
                self._registry.set_label(name, label, version)
            except LikelyError as error:
                raise SettingsError(f"labels names {name}:{label}={version}; {error}") from error

    async def load(self, folder: Path) -> ModelVersion:
        """Serves the bundle in that folder, once it has proved itself.

        What the folder held before is served until then, and afterwards no more, unless another
        folder holds it too; its labels go over. A bundle that is served already is left as it
        is, unless it is unhealthy: then it is opened anew. It is served as long as one of its
        folders holds it.

        Raises:
            Unavailable: the server's first bundles are still being loaded.
            BundleError: it is refused; what was served is served still.
            DeviceError: the device asked for is not really there.
        """
        return await self._in_turn(self._load(absolute(folder)))

    async def unload(self, name: str, version: str) -> None:
        """Serves that version no more; returns once its requests have ended and it is freed.

        Raises:
            ModelNotFound: it is not served.
            Refused: a label names it.
        """
        drained = await self._in_turn(self._unload(name, version))
        await asyncio.shield(drained)

    async def vacated(self, folder: Path) -> None:
        """Serves no more what came from a folder that holds no bundle any more.

        Raises:
            Refused: a label names it.
        """
        await self._in_turn(self._vacated(absolute(folder)))

    async def set_label(self, name: str, label: str, version: str) -> None:
        """Lets a label name a version; none if that is empty.

        Raises:
            InvalidInput: there is no such label.
            ModelNotFound: no such version is served.
        """
        await self._in_turn(self._set_label(name, label, version))

    async def rollback(self, name: str) -> ModelVersion:
        """The version that answered by default before the last change, which is stable now.

        Raises:
            ModelNotFound: no such model is served.
            Refused: there was none, or its folder does not hold it any more.
            BundleError: it has to be loaded again and is refused.
        """
        return await self._in_turn(self._rollback(name))

    async def reset_drift(self, name: str, version: str = "") -> str:
        """The version, of that number or label, whose test for drift has begun anew.

        Raises:
            InvalidInput: the name or the version is none that a bundle can have.
            ModelNotFound: no such version is served.
        """
        engine = self._registry.find(name, version)
        self._metrics.monitor.reset(engine)
        self._log.info("drift reset", name=name, version=engine.manifest.version)
        return engine.manifest.version

    def versions(self) -> list[ModelVersion]:
        """Those that are served, then those on their way in or out, then those refused."""
        served = [self._described(engine) for engine in self._registry.engines()]
        loading = [ModelVersion(VersionState.LOADING, self._loading)] if self._loading else []
        failed = [version for folder, version in self._failed.items() if folder not in self._gone]
        return [*served, *loading, *self._draining.values(), *failed]

    async def look(self) -> None:
        """Counts no refused folder while it is no bundle any more."""
        self._gone = await asyncio.to_thread(set, filter(_is_none, tuple(self._failed)))
        self._count_refused()

    def holds(self, folder: Path) -> bool:
        """Whether a version is served that lies, or lay, in that folder."""
        return self._key_of(absolute(folder)) is not None

    async def claimed(self, folder: Path) -> Key | None:
        """Name and version that a folder's manifest tells, served or not; None if it tells none."""
        try:
            return await asyncio.to_thread(self._loader.claimed, folder)
        except (LikelyError, OSError):
            return None

    def end(self) -> None:
        """Makes no changes from now on; who waits for one, or for its turn, waits no more."""
        if not self._ending.done():
            self._ending.set_result(None)

    async def close(self, seconds: float | None = None) -> bool:
        """Ends all engines, for when no request runs; true if it did.

        Args:
            seconds: that changes may take to end which run yet; None for as long as they take.
                After that everything is left as it is, for the end of the process.
        """
        self.end()
        until = None if seconds is None else time.monotonic() + seconds
        while self._tasks:
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return False
            await asyncio.wait(self._tasks, timeout=left)
        await asyncio.to_thread(self._registry.close)
        return True

    def _open_all(self, folders: Sequence[Path]) -> list[Engine]:
        engines: list[Engine] = []
        try:
            bundles = [self._loader.verified(folder) for folder in folders]
            engines.extend(self._loader.proved(bundle) for bundle in bundles)
        except BaseException:
            for engine in engines:
                engine.close()
            raise
        return engines

    async def _load(self, folder: Path) -> ModelVersion:
        self._registry.engines()  # there are some already, or the bundle is not to blame
        self._loading = folder
        try:
            bundle = await asyncio.to_thread(self._loader.verified, folder)
            if self._serves(bundle):
                engine = self._registry.find(bundle.manifest.name, bundle.manifest.version)
                if not engine.healthy:
                    engine = await asyncio.to_thread(self._loader.proved, bundle)
                    await self._renew(engine, folder)
                await self._found(engine, folder)
            else:
                engine = await asyncio.to_thread(self._loader.proved, bundle)
                await self._admit(engine, folder)
        except (LikelyError, OSError, MemoryError) as error:
            raise await self._refused(folder, error) from error
        finally:
            self._loading = None
        self._forget(folder)
        return self._described(engine)

    def _serves(self, bundle: Bundle) -> bool:
        """Whether that very bundle is served.

        Raises:
            BundleError: another one is, under the same name and version.
        """
        name, version = bundle.manifest.name, bundle.manifest.version
        served = [engine for engine in self._registry.engines() if _key(engine) == (name, version)]
        if served and served[0].digest != bundle.digest:
            raise BundleError(
                f"{bundle.path} holds other content than the {name}@{version} that is served: "
                "a version never changes; give the new bundle a version of its own",
                "version",
            )
        return bool(served)

    async def _admit(self, engine: Engine, folder: Path) -> None:
        before = self._default(engine.manifest.name)
        try:
            self._registry.add(engine)
        except BaseException:
            await asyncio.to_thread(engine.close)
            raise
        self._told("loaded", engine)
        await self._settle(engine, folder, before)

    async def _renew(self, engine: Engine, folder: Path) -> None:
        """Puts an engine in the place of one of the same bundle, whose requests end."""
        self._close_unused(self._registry.replace(engine), folder)
        self._told("loaded", engine)
        await self._tell()

    async def _found(self, engine: Engine, folder: Path) -> None:
        """What is served already lies in that folder too, or there now."""
        if folder not in self._folders[_key(engine)]:
            await self._settle(engine, folder, self._default(engine.manifest.name))

    async def _settle(self, engine: Engine, folder: Path, before: ModelVersion | None) -> None:
        """Puts a version in the place of what its folder held."""
        name, version = _key(engine)
        replaced = self._key_of(folder)
        self._folders.setdefault((name, version), []).append(folder)
        if replaced:
            self._folders[replaced].remove(folder)
            if not self._folders[replaced]:
                if replaced[0] == name:
                    for label in self._registry.labels(*replaced):
                        self._registry.set_label(name, label, version)
                self._retire(*replaced, folder)
        self._remember(name, before)
        await self._tell()

    async def _vacated(self, folder: Path) -> None:
        if key := self._key_of(folder):
            if self._folders[key] == [folder]:
                await self._unload(*key)
            else:
                self._folders[key].remove(folder)
        self._forget(folder)

    async def _unload(self, name: str, version: str) -> asyncio.Task[None]:
        check_name("model_name", name)
        if (name, version) not in self._folders:
            self._registry.find(name)
            raise ModelNotFound(f"{name}@{version}", f"no {name}@{version} is served")
        if labels := self._registry.labels(name, version):
            raise Refused(f"{name}@{version} is {' and '.join(labels)}; move the label first")
        before = self._default(name)
        drained = self._retire(name, version, self._folders[name, version][-1])
        self._remember(name, before)
        await self._tell()
        return drained

    async def _set_label(self, name: str, label: str, version: str) -> None:
        self._registry.find(name)
        before = self._default(name)
        self._registry.set_label(name, label, version or None)
        self._remember(name, before)
        self._log.info("label", name=name, label=label, version=version)
        await self._tell()

    async def _rollback(self, name: str) -> ModelVersion:
        self._registry.find(name)
        former = self._former.get(name)
        if not former:
            raise Refused(f"no earlier version of {name} has answered by default")
        target = former[-1]
        serves = (name, target.version) in self._folders
        if serves:
            found = self._registry.find(name, target.version).digest
        else:
            try:
                found = (await asyncio.to_thread(self._loader.verified, target.folder)).digest
            except (LikelyError, OSError, MemoryError) as error:
                raise await self._refused(target.folder, error) from error
        if found != target.digest:
            raise Refused(
                f"{name}@{target.version} is another bundle by now than that which answered, "
                f"in {target.folder}"
            )
        if not serves:
            await self._load(target.folder)
        self._registry.set_label(name, "stable", target.version)
        # Loading it may itself have been a change worth undoing; this one is its undoing.
        self._former[name] = former[:-1]
        self._log.info("rolled back", name=name, version=target.version)
        await self._tell()
        return self._described(self._registry.find(name, target.version))

    def _retire(self, name: str, version: str, folder: Path) -> asyncio.Task[None]:
        """Takes a version from the registry, and closes it when its requests have ended."""
        held = self._registry.remove(name, version)
        del self._folders[name, version]
        return self._close_unused(held, folder)

    def _close_unused(self, held: Held, folder: Path) -> asyncio.Task[None]:
        """Closes an engine that no request finds any more, when its requests have ended."""
        name, version = _key(held.engine)
        self._draining[held] = ModelVersion(
            VersionState.DRAINING, folder, name, version, held.engine.digest
        )
        return self._task(self._drain(held))

    async def _drain(self, held: Held) -> None:
        await held.unused()
        await asyncio.to_thread(held.engine.close)
        self.freed += 1
        del self._draining[held]
        name, version = _key(held.engine)
        self._log.info("unloaded", name=name, version=version)

    async def _refused(
        self, folder: Path, error: LikelyError | OSError | MemoryError
    ) -> LikelyError:
        """Counts and tells what a folder is refused for, which is returned to be raised."""
        is_none = await asyncio.to_thread(_is_none, folder)
        match error:
            case BundleError():
                reason = error.reason
            case DeviceError() | DeviceLost():
                reason = "device"
            case SettingsError():
                reason, error = "settings", BundleError(str(error), "settings")
            case MemoryError():
                reason = "memory"
                error = BundleError(f"there was no memory to load {folder}", reason, str(error))
            case LikelyError():
                reason = "refused"
            case _:
                reason, error = "unreadable", BundleError(f"{folder} cannot be read", "unreadable")
        self._metrics.load_failed(reason)
        self._log.error("refused", folder=str(folder), reason=reason, message=str(error))
        self._failed.pop(folder, None)
        if not is_none:  # as a path mistyped is
            self._failed[folder] = ModelVersion(  # the newest last
                VersionState.FAILED, folder, reason=reason, message=error.told
            )
        while len(self._failed) > REMEMBERED:
            del self._failed[next(iter(self._failed))]
        self._gone.discard(folder)
        self._count_refused()
        return error

    def _forget(self, folder: Path) -> None:
        """What was refused there is not any more."""
        self._failed.pop(folder, None)
        self._count_refused()

    def _count_refused(self) -> None:
        self._metrics.refused(len(self._failed.keys() - self._gone))

    def _default(self, name: str) -> ModelVersion | None:
        version = self._registry.default(name)
        return self._described(self._registry.find(name, version)) if version else None

    def _remember(self, name: str, before: ModelVersion | None) -> None:
        if before and before.version != self._registry.default(name):
            self._former[name] = [*self._former.get(name, ()), before][-REMEMBERED:]

    def _described(self, engine: Engine) -> ModelVersion:
        name, version = _key(engine)
        return ModelVersion(
            VersionState.SERVING,
            self._folders[name, version][-1],
            name,
            version,
            engine.digest,
            self._registry.labels(name, version),
            version == self._registry.default(name),
        )

    def _key_of(self, folder: Path) -> Key | None:
        return next((key for key, folders in self._folders.items() if folder in folders), None)

    def _told(self, event: str, engine: Engine) -> None:
        name, version = _key(engine)
        engine.when_unhealthy(partial(self._sickened, engine))
        self._log.info(
            event,
            name=name,
            version=version,
            digest=engine.digest,
            providers=list(engine.providers),
            **engine.arrangement,
        )

    def _sickened(self, engine: Engine) -> None:
        name, version = _key(engine)
        self._log.error("unhealthy", name=name, version=version)
        self._task(self._tell())

    async def _tell(self) -> None:
        self._metrics.serving(self._registry.engines())
        await self._changed()

    async def _in_turn(self, change: Coroutine[Any, Any, T]) -> T:
        async def turn() -> T:
            async with self._turn:
                if self._ending.done():
                    change.close()
                    raise Unavailable("the server ends")
                return await change

        made = self._task(turn())
        # Whoever waits is not what carries the change through, and may go.
        await asyncio.wait((made, self._ending), return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            raise Unavailable("the server ends")
        return made.result()

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps tasks by weak references only
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, should nobody wait for it any more


def absolute(folder: Path) -> Path:
    """One name for a folder; links stay as they are: by them, volumes are switched."""
    return Path(os.path.abspath(folder))  # noqa: PTH100 -- resolve() follows links


def is_bundle(folder: Path) -> bool:
    """Whether there is a manifest, so far."""
    return (folder / MANIFEST).exists()


def _is_none(folder: Path) -> bool:
    """Whether there surely is no bundle; a folder that cannot be looked at may be one."""
    try:
        return not is_bundle(folder)
    except OSError:
        return False


def _key(engine: Engine) -> Key:
    return engine.manifest.name, engine.manifest.version
