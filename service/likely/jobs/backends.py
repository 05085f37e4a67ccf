"""What answers a job: an engine in this process, or a server."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from likely.answers import (
    Classifications,
    Draws,
    Limits,
    ModelInfo,
    Pixels,
    Scores,
    SelfCheck,
    joined,
)
from likely.client import TIMEOUT, Client, TokenFile
from likely.client.channels import File
from likely.errors import (
    DeadlineExceeded,
    InvalidInput,
    JobError,
    LikelyError,
    ModelNotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from likely.jobs.requests import ALPHA, Generation, Judgement, Task
from likely.jobs.steadiness import steady

if TYPE_CHECKING:
    from likely.bundle import Bundle
    from likely.engine import Engine

CHUNK = 256  # pictures that are drawn at once
FILLED = 64  # rows of every run where its size could matter: as many as are best at most
UNLIMITED = Limits(1 << 40, 1 << 40, CHUNK, 1 << 60)  # a job is its engine's only caller
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
_PASSING = (Overloaded, Unavailable, DeadlineExceeded)
T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class Backend(Protocol):
    """What answers, from several threads at once.

    Attributes:
        info: what its model takes, gives and promises.
    """

    info: ModelInfo

    def require(self, task: Task) -> None:
        """Returns if the model answers such a task, and can promise its alpha."""

    def score(self, x: Pixels, task: Judgement) -> Scores:
        """The scores of pictures (n, c, h, w)."""

    def classify(self, x: Pixels, task: Judgement) -> Classifications:
        """The classifications of pictures (n, c, h, w)."""

    def generate(self, label: int | None, first: int, count: int, task: Generation) -> Draws:
        """Pictures first to first + count - 1."""

    def stop(self) -> None:
        """Lets what other threads ask of it now or later end soon, in an error."""

    def close(self) -> None:
        """Frees it."""


class Opener(Protocol):
    """How to come by a backend, in this process or in another.

    Attributes:
        elsewhere: whether others decide which versions there are.
    """

    elsewhere: ClassVar[bool]

    def open(self) -> Backend:
        """The backend."""

    def pinned(self, model: str, version: str) -> Opener:
        """The same of that very version, which a job has begun with."""


@dataclass(frozen=True, slots=True)
class Bundled:
    """An engine of this process's own.

    Attributes:
        bundle: its folder; None for the only one that the package ships.
        device: where it runs.
        threads: cores that it uses; 0 for all.
        keys: PEM files of public keys, one of which must have signed it, if there are any.
        max_batch: pictures of one run; 0 for what is best, or `FILLED` where all have one size.
    """

    bundle: Path | None = None
    device: str = "auto"
    threads: int = 0
    keys: tuple[Path, ...] = ()
    max_batch: int = 0
    elsewhere: ClassVar[bool] = False

    def open(self) -> Local:
        """The engine, verified and warm; its answers do not depend on what is asked beside them.

        Raises:
            BundleError: the bundle is refused.
            JobError: none is named, and the package ships several.
            DeviceError: the device is not really there.
        """
        from likely.bundle import Bundle
        from likely.versions.loading import shipped

        folders = [self.bundle] if self.bundle else list(shipped())
        if len(folders) != 1:
            raise JobError(f"name one of {', '.join(map(str, folders))} by --bundle")
        bundle = Bundle.open(folders[0], self.keys)
        engine = self._steady(bundle)
        try:
            bundle.check_again()
        except BaseException:
            engine.close()
            raise
        return Local(engine)

    def pinned(self, model: str, version: str) -> Bundled:  # noqa: ARG002
        """The same: its bundle's folder is of one version, whichever that is."""
        return self

    def _steady(self, bundle: Bundle) -> Engine:
        """An engine whose answers do not depend on what is run beside a picture.

        Its runs have any size, where a few sizes give equal bits. On a card equal bits at some
        sizes tell nothing of others, for kernels are chosen by them: there, and where bits do
        differ, all runs have one size. Where a picture's place matters even so, that is one row.
        """
        from likely.bundle import Role
        from likely.graphs import Device

        golden, size = bundle.golden().get(f"{Role.DENSITY}/x"), self.max_batch or FILLED
        if Device.parse(self.device).resolve().kind != "cuda":
            engine = self._engine(bundle, self.max_batch)
            if golden is None or steady(engine, golden):
                return engine
            engine.close()
            _LOG.warning(
                "the graphs of %s round differently in batches of different sizes: "
                "every run is filled up to %d rows",
                bundle.path,
                size,
            )
        engine = self._engine(bundle, size, filled=True)
        if golden is None or steady(engine, golden, size):
            return engine
        engine.close()
        _LOG.warning(
            "the graphs of %s round differently in different places of a batch: "
            "each picture is run alone",
            bundle.path,
        )
        return self._engine(bundle, 1)

    def _engine(self, bundle: Bundle, max_batch: int, *, filled: bool = False) -> Engine:
        from likely import machine
        from likely.batching.admission import Bounds
        from likely.engine import Engine, Terms
        from likely.graphs import Device
        from likely.versions.loading import refusing

        with refusing(bundle.path):
            return Engine.load(
                bundle,
                device=Device.parse(self.device),
                threads=self.threads or machine.cores(),
                max_batch=max_batch,
                filled=filled,
                terms=Terms(bounds=Bounds(1 << 40, 1 << 60)),  # all that waits is this job's
            )


class Local:
    """An engine on an event loop of its own."""

    def __init__(self, engine: Engine) -> None:
        from likely.versions.registry import describe

        self.info = describe(engine, UNLIMITED, ALPHA)
        self._engine = engine
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._asked: set[Future[Any]] = set()
        self._stopped = threading.Event()

    def require(self, task: Task) -> None:
        """As `Backend.require`."""
        method = task.kind.capitalize()
        if not self._engine.answers(method):
            raise JobError(f"model {self.info.name} does not answer {method}")
        if isinstance(task, Judgement):
            self._engine.detector.check_alpha(task.alpha, task.guarantee)

    def score(self, x: Pixels, task: Judgement) -> Scores:
        """As `Backend.score`."""
        return self._run(self._engine.score(x, task.alpha, guarantee=task.guarantee)).scores()

    def classify(self, x: Pixels, task: Judgement) -> Classifications:
        """As `Backend.classify`."""
        return self._run(
            self._engine.classify(
                x,
                task.alpha,
                priors=None if task.priors is None else np.array(task.priors),
                min_posterior=task.min_posterior,
                guarantee=task.guarantee,
                rule=task.rule,
            )
        )

    def generate(self, label: int | None, first: int, count: int, task: Generation) -> Draws:
        """As `Backend.generate`."""
        check = None if task.alpha is None else SelfCheck(task.alpha, task.max_draws)
        stream = self._engine.generate(
            label,
            count,
            task.seed,
            first_index=first,
            temperature=task.temperature,
            chunk=CHUNK,
            check=check,
        )
        return joined(self._run(_all(stream)))

    def stop(self) -> None:
        """As `Backend.stop`: what nobody waits for is not run on."""
        self._stopped.set()
        for asked in tuple(self._asked):
            asked.cancel()

    def close(self) -> None:
        """As `Backend.close`."""
        asyncio.run_coroutine_threadsafe(_ended(), self._loop).result()
        self._engine.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        asked = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._asked.add(asked)
        if self._stopped.is_set():  # looked at only now, so that `stop` or this cancels it
            asked.cancel()
        try:
            return asked.result()
        finally:
            self._asked.discard(asked)


@dataclass(frozen=True, slots=True)
class Served:
    """A server.

    Attributes:
        address: host:port, or any name that gRPC resolves.
        model: its name; None for the server's only one.
        version: its version; None for the default one.
        timeout: seconds that one request may take.
        patience: seconds to go on asking a server that refuses or does not answer.
        token, plaintext_token, tls, ca, certificate, key, server_name: as `Client` takes them.
        token_file: holds the token in place of `token`, and is read again when it changes.
        begun: whether a job has begun with that version, so that it is waited for where it is
            not found, and so is a good token where the file's has expired.
    """

    address: str
    model: str | None = None
    version: str | None = None
    timeout: float = TIMEOUT
    patience: float = 300.0
    token: str | None = None
    plaintext_token: bool = False
    tls: bool = False
    ca: File | None = None
    certificate: File | None = None
    key: File | None = None
    server_name: str | None = None
    token_file: File | None = None
    begun: bool = False
    elsewhere: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.patience < math.inf:
            raise InvalidInput("patience", f"{self.patience:g} is not in [0, inf)")

    def open(self) -> Remote:
        """A client of it.

        Raises:
            LikelyError: the server does not answer, or has no such model.
            JobError: it has the version no more that the job began with.
        """
        client = Client(
            self.address,
            timeout=self.timeout,
            retries=False,  # a job has more patience than gRPC, and asks again itself
            token=self.token if self.token_file is None else TokenFile(self.token_file),
            plaintext_token=self.plaintext_token,
            tls=self.tls,
            ca=self.ca,
            certificate=self.certificate,
            key=self.key,
            server_name=self.server_name,
        )
        return Remote(client, self)

    @property
    def passing(self) -> tuple[type[LikelyError], ...]:
        """What is asked again after: it may pass."""
        if not self.begun:
            return _PASSING
        token = () if self.token_file is None else (Unauthenticated,)
        return (*_PASSING, ModelNotFound, *token)

    def pinned(self, model: str, version: str) -> Served:
        """The same server, held to that version."""
        return replace(self, model=model, version=version, begun=True)


class Remote:
    """A server's model, of the one version that it had at the beginning."""

    def __init__(self, client: Client, served: Served) -> None:
        self._client = client
        self._served = served
        self._stopped = threading.Event()
        try:
            self.info = self._patient(lambda: client.model(served.model, served.version))
        except BaseException:
            client.close()
            raise
        self._served = served.pinned(self.info.name, self.info.version)

    def require(self, task: Task) -> None:
        """As `Backend.require`."""
        method = task.kind.capitalize()
        if not any(name.endswith(f"/{method}") for name in self.info.methods):
            raise JobError(f"model {self.info.name} does not answer {method}")
        if isinstance(task, Judgement):  # the server says what it can promise
            self.score(np.empty((0, *self.info.shape), np.uint8), task)

    def score(self, x: Pixels, task: Judgement) -> Scores:
        """As `Backend.score`."""
        return self._patient(
            lambda: self._client.score(
                x,
                alpha=task.alpha,
                guarantee=task.guarantee,
                model=self.info.name,
                version=self.info.version,
            )
        )

    def classify(self, x: Pixels, task: Judgement) -> Classifications:
        """As `Backend.classify`."""
        return self._patient(
            lambda: self._client.classify(
                x,
                alpha=task.alpha,
                priors=task.priors,
                min_posterior=task.min_posterior,
                guarantee=task.guarantee,
                rule=task.rule,
                model=self.info.name,
                version=self.info.version,
            )
        )

    def generate(self, label: int | None, first: int, count: int, task: Generation) -> Draws:
        """As `Backend.generate`."""
        return self._patient(
            lambda: self._client.generate(
                count,
                label=label,
                seed=task.seed,
                first_index=first,
                temperature=task.temperature,
                self_check=task.alpha is not None,
                alpha=task.alpha,
                max_draws=None if task.alpha is None else task.max_draws,
                model=self.info.name,
                version=self.info.version,
            )
        )

    def stop(self) -> None:
        """As `Backend.stop`."""
        self._stopped.set()
        self._client.close()

    def close(self) -> None:
        """As `Backend.close`."""
        self._client.close()

    def _patient(self, ask: Callable[[], T]) -> T:
        """What asking gives, however often a server that is busy or restarts has to be asked.

        A version that the job began with may be missing for a while too: of replicas that are
        replaced, those that have it may be gone already, and others load it yet.
        """
        patience, waits = self._served.patience, False
        end, pause = time.monotonic() + patience, FIRST_PAUSE
        while True:
            try:
                return ask()
            except self._served.passing as error:
                wished = error.retry_after if isinstance(error, Overloaded | Unavailable) else None
                pause = max(pause, wished or 0.0)
                if self._stopped.is_set() or time.monotonic() + pause > end:
                    if isinstance(error, ModelNotFound):
                        raise self._gone() from error
                    raise
                if not waits and isinstance(error, ModelNotFound | Unauthenticated):
                    _LOG.warning("asked again for up to %g s: %s", patience, error)
                    waits = True
            self._stopped.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _gone(self) -> JobError:
        served = self._served
        return JobError(
            f"{served.address} has {served.model}@{served.version} no more, which this job began "
            "with; have it served again and ask for the job once more, or begin another in "
            "another folder"
        )


async def _ended() -> None:
    """Ends all else that its loop has been told to do."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _all(stream: AsyncIterator[Draws]) -> list[Draws]:
    return [chunk async for chunk in stream]
