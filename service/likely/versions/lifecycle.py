"""Changes what is served, one change at a time: load, replace, unload, label, roll back."""

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
from likely.versions.registry import LeasedEngine, Registry, check_name

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from likely.engine import Engine

T = TypeVar("T")
Key: TypeAlias = "tuple[str, str]"  # name and version
MAX_REMEMBERED = 100  # most refused folders, and most former versions per model, that are kept


class Lifecycle:
    """Changes a registry while it serves.

    Changes run one at a time. Once started, a change completes whether its caller waits or not.
    Replaced versions drain in the background.

    Attributes:
        freed: number of versions unloaded and freed so far.
    """

    def __init__(
        self,
        registry: Registry,
        loader: Loader,
        metrics: Metrics,
        log: FilteringBoundLogger,
        on_change: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """Creates the lifecycle of a registry; an event loop must be running.

        Args:
            registry: the registry to change.
            loader: opens engines from folders.
            metrics: count failures and show which models are served.
            log: receives an event for every change.
            on_change: awaited after each change.
        """
        self._registry = registry
        self._loader = loader
        self._metrics = metrics
        self._log = log
        self._on_change = on_change
        self.freed = 0
        self._change_lock = asyncio.Lock()
        self._ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._folders: dict[Key, list[Path]] = {}  # folders that hold each version, newest last
        self._loading: Path | None = None
        self._draining: dict[LeasedEngine, ModelVersion] = {}
        self._failed: dict[Path, ModelVersion] = {}
        self._gone: set[Path] = set()  # folders of `_failed` that are no longer bundles
        self._former: dict[str, list[ModelVersion]] = {}  # earlier default versions, latest last

    async def begin(self, folders: Sequence[Path]) -> None:
        """Serves the bundles in these folders, all or none.

        Raises:
            BundleError: a bundle is refused.
            DeviceError: the requested device is not available.
            SettingsError: a bundle's calibration is too small for the default alpha.
        """
        folders = [absolute(folder) for folder in folders]
        engines = await asyncio.to_thread(self._open_all, folders)
        self._registry.fill(engines)
        for engine, folder in zip(engines, folders, strict=True):
            self._folders[_key(engine)] = [folder]
            self._watch_and_log("model", engine)
        await self._notify()

    def set_labels(self, labels: Mapping[tuple[str, str], str]) -> None:
        """Sets the labels that the settings define.

        Args:
            labels: versions, by the model's name and the label.

        Raises:
            SettingsError: a label does not exist, or its version is not served.
        """
        for (name, label), version in labels.items():
            try:
                self._registry.set_label(name, label, version)
            except LikelyError as error:
                raise SettingsError(f"labels names {name}:{label}={version}; {error}") from error

    async def load(self, folder: Path) -> ModelVersion:
        """Serves the bundle in a folder, once its checks have succeeded.

        The version that came from this folder before is served until then. Unless another folder
        holds it too, it is then unloaded, and its labels move to the new version if that has the
        same name. If the bundle is already served, nothing is opened, unless the version is
        unhealthy: then it is opened again. A version is served as long as one of its folders
        holds it.

        Raises:
            Unavailable: the server's first bundles are still being loaded, or it shuts down.
            BundleError: the bundle is refused; whatever was served is still served.
            DeviceError: the requested device is not available.
        """
        return await self._run_change(self._load(absolute(folder)))

    async def unload(self, name: str, version: str) -> None:
        """Unloads a version; returns once its requests have ended and it is freed.

        Raises:
            ModelNotFound: it is not served.
            Refused: a label points at it.
        """
        drained = await self._run_change(self._unload(name, version))
        await asyncio.shield(drained)

    async def folder_emptied(self, folder: Path) -> None:
        """Unloads the version that came from a folder which no longer holds a bundle.

        If another folder holds the version too, it stays served.

        Raises:
            Refused: a label points at it.
        """
        await self._run_change(self._folder_emptied(absolute(folder)))

    async def set_label(self, name: str, label: str, version: str) -> None:
        """Points a label at a version; an empty version removes the label.

        Raises:
            InvalidInput: there is no such label.
            ModelNotFound: no such version is served.
        """
        await self._run_change(self._set_label(name, label, version))

    async def rollback(self, name: str) -> ModelVersion:
        """Makes the version that was the default before the last change `stable`; returns it.

        Raises:
            ModelNotFound: no such model is served.
            Refused: there was none, or its folder no longer holds it.
            BundleError: it has to be loaded again and is refused.
        """
        return await self._run_change(self._rollback(name))

    async def reset_drift(self, name: str, version: str = "") -> str:
        """Restarts the drift test of a version and returns the version.

        Args:
            name: name of the model.
            version: version or label; empty for the default version.

        Raises:
            InvalidInput: no bundle can have that name or version.
            ModelNotFound: no such version is served.
        """
        engine = self._registry.find(name, version)
        self._metrics.monitor.reset(engine)
        self._log.info("drift reset", name=name, version=engine.manifest.version)
        return engine.manifest.version

    def versions(self) -> list[ModelVersion]:
        """Lists the served versions, then the one loading, those draining, and those refused."""
        served = [self._described(engine) for engine in self._registry.engines()]
        loading = [ModelVersion(VersionState.LOADING, self._loading)] if self._loading else []
        failed = [version for folder, version in self._failed.items() if folder not in self._gone]
        return [*served, *loading, *self._draining.values(), *failed]

    async def check_refused(self) -> None:
        """Checks which refused folders are no longer bundles; these are not counted or listed."""
        self._gone = await asyncio.to_thread(set, filter(_is_no_bundle, tuple(self._failed)))
        self._count_refused()

    def serves_folder(self, folder: Path) -> bool:
        """Whether a served version came from that folder."""
        return self._key_of(absolute(folder)) is not None

    async def read_identity(self, folder: Path) -> Key | None:
        """Returns the name and version in a folder's manifest; None if it cannot be read."""
        try:
            return await asyncio.to_thread(self._loader.read_identity, folder)
        except (LikelyError, OSError):
            return None

    def end(self) -> None:
        """Starts no more changes; callers that wait for one get `Unavailable`."""
        if not self._ending.done():
            self._ending.set_result(None)

    async def close(self, seconds: float | None = None) -> bool:
        """Closes all engines, for when no request runs; returns whether it did.

        Args:
            seconds: time for running changes to complete; None for as long as they take. If they
                take longer, nothing is closed, as the process will end.
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
            bundles = [self._loader.verify(folder) for folder in folders]
            engines.extend(self._loader.load(bundle) for bundle in bundles)
        except BaseException:
            for engine in engines:
                engine.close()
            raise
        return engines

    async def _load(self, folder: Path) -> ModelVersion:
        self._registry.engines()  # raises Unavailable while the first bundles are being loaded
        self._loading = folder
        try:
            bundle = await asyncio.to_thread(self._loader.verify, folder)
            if self._is_served(bundle):
                engine = self._registry.find(bundle.manifest.name, bundle.manifest.version)
                if not engine.healthy:
                    engine = await asyncio.to_thread(self._loader.load, bundle)
                    await self._replace_engine(engine, folder)
                await self._add_folder(engine, folder)
            else:
                engine = await asyncio.to_thread(self._loader.load, bundle)
                await self._add_engine(engine, folder)
        except (LikelyError, OSError, MemoryError) as error:
            raise await self._record_refusal(folder, error) from error
        finally:
            self._loading = None
        self._forget_refusal(folder)
        return self._described(engine)

    def _is_served(self, bundle: Bundle) -> bool:
        """Whether this bundle is already served.

        Raises:
            BundleError: another bundle is served under the same name and version.
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

    async def _add_engine(self, engine: Engine, folder: Path) -> None:
        former_default = self._default_version(engine.manifest.name)
        try:
            self._registry.add(engine)
        except BaseException:
            await asyncio.to_thread(engine.close)
            raise
        self._watch_and_log("loaded", engine)
        await self._assign_folder(engine, folder, former_default)

    async def _replace_engine(self, engine: Engine, folder: Path) -> None:
        """Replaces the engine of the same bundle; the old engine drains and is closed."""
        self._close_unused(self._registry.replace(engine), folder)
        self._watch_and_log("loaded", engine)
        await self._notify()

    async def _add_folder(self, engine: Engine, folder: Path) -> None:
        """Notes that a version which is already served also came from this folder."""
        if folder not in self._folders[_key(engine)]:
            await self._assign_folder(engine, folder, self._default_version(engine.manifest.name))

    async def _assign_folder(
        self, engine: Engine, folder: Path, former_default: ModelVersion | None
    ) -> None:
        """Assigns a folder to a version, and retires the version that the folder held before."""
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
        self._remember_default(name, former_default)
        await self._notify()

    async def _folder_emptied(self, folder: Path) -> None:
        if key := self._key_of(folder):
            if self._folders[key] == [folder]:
                await self._unload(*key)
            else:
                self._folders[key].remove(folder)
        self._forget_refusal(folder)

    async def _unload(self, name: str, version: str) -> asyncio.Task[None]:
        check_name("model_name", name)
        if (name, version) not in self._folders:
            self._registry.find(name)
            raise ModelNotFound(f"{name}@{version}", f"no {name}@{version} is served")
        if labels := self._registry.labels(name, version):
            raise Refused(f"{name}@{version} is {' and '.join(labels)}; move the label first")
        former_default = self._default_version(name)
        drained = self._retire(name, version, self._folders[name, version][-1])
        self._remember_default(name, former_default)
        await self._notify()
        return drained

    async def _set_label(self, name: str, label: str, version: str) -> None:
        self._registry.find(name)
        former_default = self._default_version(name)
        self._registry.set_label(name, label, version or None)
        self._remember_default(name, former_default)
        self._log.info("label", name=name, label=label, version=version)
        await self._notify()

    async def _rollback(self, name: str) -> ModelVersion:
        self._registry.find(name)
        former = self._former.get(name)
        if not former:
            raise Refused(f"no earlier version of {name} has answered by default")
        target = former[-1]
        serves = (name, target.version) in self._folders
        if serves:
            digest = self._registry.find(name, target.version).digest
        else:
            try:
                digest = (await asyncio.to_thread(self._loader.verify, target.folder)).digest
            except (LikelyError, OSError, MemoryError) as error:
                raise await self._record_refusal(target.folder, error) from error
        if digest != target.digest:
            raise Refused(
                f"{name}@{target.version} is no longer the bundle that answered before, "
                f"from {target.folder}"
            )
        if not serves:
            await self._load(target.folder)
        self._registry.set_label(name, "stable", target.version)
        # Also drops what `_load` may have remembered: a rollback cannot be rolled back.
        self._former[name] = former[:-1]
        self._log.info("rolled back", name=name, version=target.version)
        await self._notify()
        return self._described(self._registry.find(name, target.version))

    def _retire(self, name: str, version: str, folder: Path) -> asyncio.Task[None]:
        """Removes a version from the registry, and closes it when its requests have ended."""
        held = self._registry.remove(name, version)
        del self._folders[name, version]
        return self._close_unused(held, folder)

    def _close_unused(self, held: LeasedEngine, folder: Path) -> asyncio.Task[None]:
        """Closes an engine that is no longer registered, when its requests have ended."""
        name, version = _key(held.engine)
        self._draining[held] = ModelVersion(
            VersionState.DRAINING, folder, name, version, held.engine.digest
        )
        return self._start_task(self._drain(held))

    async def _drain(self, held: LeasedEngine) -> None:
        await held.wait_until_unused()
        await asyncio.to_thread(held.engine.close)
        self.freed += 1
        del self._draining[held]
        name, version = _key(held.engine)
        self._log.info("unloaded", name=name, version=version)

    async def _record_refusal(
        self, folder: Path, error: LikelyError | OSError | MemoryError
    ) -> LikelyError:
        """Counts, logs and remembers why a folder was refused; returns the error to raise."""
        is_no_bundle = await asyncio.to_thread(_is_no_bundle, folder)
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
        self._metrics.count_load_failure(reason)
        self._log.error("refused", folder=str(folder), reason=reason, message=str(error))
        self._failed.pop(folder, None)
        if not is_no_bundle:  # a mistyped path is not remembered
            self._failed[folder] = ModelVersion(  # the newest last
                VersionState.FAILED, folder, reason=reason, message=error.public_message
            )
        while len(self._failed) > MAX_REMEMBERED:
            del self._failed[next(iter(self._failed))]
        self._gone.discard(folder)
        self._count_refused()
        return error

    def _forget_refusal(self, folder: Path) -> None:
        """Forgets that a bundle in this folder was refused."""
        self._failed.pop(folder, None)
        self._count_refused()

    def _count_refused(self) -> None:
        self._metrics.set_refused(len(self._failed.keys() - self._gone))

    def _default_version(self, name: str) -> ModelVersion | None:
        version = self._registry.default(name)
        return self._described(self._registry.find(name, version)) if version else None

    def _remember_default(self, name: str, former_default: ModelVersion | None) -> None:
        if former_default and former_default.version != self._registry.default(name):
            self._former[name] = [*self._former.get(name, ()), former_default][-MAX_REMEMBERED:]

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

    def _watch_and_log(self, event: str, engine: Engine) -> None:
        name, version = _key(engine)
        engine.when_unhealthy(partial(self._report_unhealthy, engine))
        self._log.info(
            event,
            name=name,
            version=version,
            digest=engine.digest,
            providers=list(engine.providers),
            **engine.arrangement,
        )

    def _report_unhealthy(self, engine: Engine) -> None:
        name, version = _key(engine)
        self._log.error("unhealthy", name=name, version=version)
        self._start_task(self._notify())

    async def _notify(self) -> None:
        self._metrics.set_served(self._registry.engines())
        await self._on_change()

    async def _run_change(self, change: Coroutine[Any, Any, T]) -> T:
        async def run() -> T:
            async with self._change_lock:
                if self._ending.done():
                    change.close()
                    raise Unavailable("the server is shutting down")
                return await change

        task = self._start_task(run())
        # The change has its own task, so it completes even if its caller is cancelled.
        await asyncio.wait((task, self._ending), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Unavailable("the server is shutting down")
        return task.result()

    def _start_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop keeps only weak references to tasks
        task.add_done_callback(self._discard_task)
        return task

    def _discard_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # marks it retrieved, in case nobody awaits the task


def absolute(folder: Path) -> Path:
    """Makes a folder's path absolute without resolving links, by which clusters switch volumes."""
    return Path(os.path.abspath(folder))  # noqa: PTH100 -- resolve() follows links


def is_bundle(folder: Path) -> bool:
    """Whether a folder contains a manifest; it may not be complete yet."""
    return (folder / MANIFEST).exists()


def _is_no_bundle(folder: Path) -> bool:
    """Whether a folder is certainly not a bundle; False if it cannot be inspected."""
    try:
        return not is_bundle(folder)
    except OSError:
        return False


def _key(engine: Engine) -> Key:
    return engine.manifest.name, engine.manifest.version
