"""The backends of a job: an engine in this process, or a server."""

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
    LabelRule,
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
    NotAnswered,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from likely.jobs.requests import ALPHA, Generation, Judgement, Task
from likely.jobs.steadiness import batch_invariant

if TYPE_CHECKING:
    from likely.bundle import Bundle
    from likely.engine import Engine

CHUNK = 256  # pictures in one chunk of draws
PADDED_ROWS = 64  # rows of every run, if its size could matter: the largest batch of a warm-up
UNLIMITED = Limits(1 << 40, 1 << 40, CHUNK, 1 << 60)  # a job is its engine's only caller
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # backoff between attempts, in seconds
QUIET_SECONDS = 2.0  # a request that is retried for longer is worth a warning
_RETRYABLE = (Overloaded, Unavailable, DeadlineExceeded)
T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class Backend(Protocol):
    """Answers the requests of a job; safe to use from several threads.

    Attributes:
        info: description of the model.
    """

    info: ModelInfo

    def require(self, task: Task) -> None:
        """Checks that the model answers such a task and can guarantee its alpha."""

    def score(self, x: Pixels, task: Judgement) -> Scores:
        """The scores of pictures (n, c, h, w)."""

    def classify(self, x: Pixels, task: Judgement) -> Classifications:
        """The classifications of pictures (n, c, h, w)."""

    def generate(self, label: int | None, first: int, count: int, task: Generation) -> Draws:
        """Draws the pictures with indices first to first + count - 1."""

    def stop(self) -> None:
        """Makes current and later calls from other threads fail soon."""

    def close(self) -> None:
        """Frees the backend's resources."""


class Opener(Protocol):
    """Opens a backend; can be sent to another process.

    Attributes:
        is_remote: whether the backend is a server, whose versions can change during the job.
    """

    is_remote: ClassVar[bool]

    def open(self) -> Backend:
        """Opens the backend."""

    def pinned(self, model: str, version: str) -> Opener:
        """The same opener, pinned to the version that the job began with."""

    def info_without_opening(self, finished: ModelInfo) -> ModelInfo | None:
        """What a finished job's request is compared by; None if the model must be opened first."""


@dataclass(frozen=True, slots=True)
class Bundled:
    """Opens an engine in this process.

    Attributes:
        bundle: folder of the bundle; None for the only one that the package ships.
        device: auto, cpu, cuda or cuda:N.
        threads: number of cores to use; 0 for all.
        keys: PEM files of public keys. If there are any, one of them must have signed the bundle.
        max_batch: maximum number of pictures in one run; 0 lets the warm-up find the best one,
            or means `PADDED_ROWS` if all runs must have the same size.
    """

    bundle: Path | None = None
    device: str = "auto"
    threads: int = 0
    keys: tuple[Path, ...] = ()
    max_batch: int = 0
    is_remote: ClassVar[bool] = False

    def open(self) -> Local:
        """Verifies, opens and warms up the engine, whose answers do not depend on batching.

        Raises:
            BundleError: the bundle is refused.
            JobError: no bundle is named, and the package does not ship exactly one.
            DeviceError: the device is not available.
        """
        bundle = self._open_verified_bundle()
        engine = self._load_batch_invariant(bundle)
        try:
            bundle.check_again()
        except BaseException:
            engine.close()
            raise
        return Local(engine)

    def pinned(self, model: str, version: str) -> Bundled:  # noqa: ARG002
        """Returns itself: the bundle's folder contains a single version."""
        return self

    def info_without_opening(self, finished: ModelInfo) -> ModelInfo | None:
        """As `Opener.info_without_opening`: the bundle is verified, and no graph is opened."""
        bundle = self._open_verified_bundle()
        here = bundle.manifest.name, bundle.manifest.version, bundle.digest
        same = here == (finished.name, finished.version, finished.digest)
        return replace(finished, default_alpha=ALPHA) if same else None

    def _open_verified_bundle(self) -> Bundle:
        from likely.bundle import Bundle
        from likely.versions.loading import shipped

        folders = [self.bundle] if self.bundle else list(shipped())
        if len(folders) != 1:
            raise JobError(f"name one of {', '.join(map(str, folders))} by --bundle")
        return Bundle.open(folders[0], self.keys)

    def _load_batch_invariant(self, bundle: Bundle) -> Engine:
        """An engine whose answers do not depend on the other pictures of a run.

        On a processor, runs may have any size if a few sizes give equal bits. On a card, equal
        bits at some sizes say nothing about others, because the size selects the kernels: there,
        and if bits do differ, all runs are padded to the same size. If a picture's position in
        the run still matters, each run has one row (docs/decisions/0017).
        """
        from likely.bundle import Role
        from likely.graphs import Device

        golden, size = bundle.golden().get(f"{Role.DENSITY}/x"), self.max_batch or PADDED_ROWS
        if Device.parse(self.device).resolve().kind != "cuda":
            engine = self._load_engine(bundle, self.max_batch)
            if golden is None or batch_invariant(engine, golden):
                return engine
            engine.close()
            _LOG.warning(
                "the graphs of %s round differently in batches of different sizes: "
                "every run is padded to %d rows",
                bundle.path,
                size,
            )
        engine = self._load_engine(bundle, size, filled=True)
        if golden is None or batch_invariant(engine, golden, size):
            return engine
        engine.close()
        _LOG.warning(
            "the graphs of %s round differently in different places of a batch: "
            "each picture is run alone",
            bundle.path,
        )
        return self._load_engine(bundle, 1)

    def _load_engine(self, bundle: Bundle, max_batch: int, *, filled: bool = False) -> Engine:
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
                terms=Terms(bounds=Bounds(1 << 40, 1 << 60)),  # only this job fills the queue
            )


class Local:
    """An engine with its own event loop in a thread."""

    def __init__(self, engine: Engine) -> None:
        from likely.versions.registry import describe

        self.info = describe(engine, UNLIMITED, ALPHA)
        self._engine = engine
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._pending: set[Future[Any]] = set()
        self._stopped = threading.Event()

    def require(self, task: Task) -> None:
        """As `Backend.require`."""
        _require_answered(self.info, task)
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
        return joined(self._run(_collect(stream)))

    def stop(self) -> None:
        """As `Backend.stop`: cancels the pending calls, so that their runs stop."""
        self._stopped.set()
        for future in tuple(self._pending):
            future.cancel()

    def close(self) -> None:
        """As `Backend.close`."""
        asyncio.run_coroutine_threadsafe(_cancel_other_tasks(), self._loop).result()
        self._engine.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._pending.add(future)
        if self._stopped.is_set():  # checked after adding it: either `stop` or this cancels it
            future.cancel()
        try:
            return future.result()
        finally:
            self._pending.discard(future)


@dataclass(frozen=True, slots=True)
class Served:
    """Opens a client of a server.

    Attributes:
        address: host:port, or any name that gRPC resolves.
        model: name of the model; None for the server's only one.
        version: version of the model, or a label of one; None for the default one.
        timeout: maximum duration of one request, in seconds.
        patience: seconds to keep retrying a request that the server refuses for now or does not
            answer.
        token, plaintext_token, tls, ca, certificate, key, server_name: as for `Client`.
        token_file: file that contains the token, used instead of `token`; reread when it changes.
        begun: whether the job has begun with this version. If so, the job also waits, for
            `patience`, if the version is not found or the token in the file has expired.
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
    is_remote: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.patience < math.inf:
            raise InvalidInput("patience", f"{self.patience:g} is not in [0, inf)")

    def open(self) -> Remote:
        """Opens a client of the server.

        Raises:
            LikelyError: the server does not answer, or has no such model.
            JobError: the server no longer has the version that the job began with.
        """
        client = Client(
            self.address,
            timeout=self.timeout,
            retries=False,  # the job retries by itself, for longer than gRPC would
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
    def retryable_errors(self) -> tuple[type[LikelyError], ...]:
        """The errors after which a request is retried, because they may be temporary."""
        if not self.begun:
            return _RETRYABLE
        token = () if self.token_file is None else (Unauthenticated,)
        return (*_RETRYABLE, ModelNotFound, *token)

    def info_without_opening(self, finished: ModelInfo) -> ModelInfo | None:
        """As `Opener.info_without_opening`: the version may be gone."""
        return finished

    def pinned(self, model: str, version: str) -> Served:
        """The same server, pinned to that version."""
        return replace(self, model=model, version=version, begun=True)


class Remote:
    """A model on a server, pinned to the version that it had when the job began."""

    def __init__(self, client: Client, served: Served) -> None:
        self._client = client
        self._served = served
        self._stopped = threading.Event()
        try:
            self.info = self._ask_with_retries(lambda: client.model(served.model, served.version))
        except BaseException:
            client.close()
            raise
        self._served = served.pinned(self.info.name, self.info.version)

    def require(self, task: Task) -> None:
        """As `Backend.require`."""
        _require_answered(self.info, task)
        if isinstance(task, Judgement):  # the server refuses an alpha that it cannot guarantee
            self.score(np.empty((0, *self.info.shape), np.uint8), task)

    def score(self, x: Pixels, task: Judgement) -> Scores:
        """As `Backend.score`."""
        return self._ask_with_retries(
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
        return self._ask_with_retries(
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
        """As `Backend.generate`; a stream that breaks goes on where it broke."""
        chunks: list[Draws] = []
        drawn = 0

        def receive() -> None:
            """Receives further chunks; raises if the stream breaks before the first one."""
            nonlocal drawn
            before = drawn
            stream = self._client.generate_stream(
                count - drawn,
                label=label,
                seed=task.seed,
                first_index=first + drawn,
                temperature=task.temperature,
                self_check=task.alpha is not None,
                alpha=task.alpha,
                max_draws=None if task.alpha is None else task.max_draws,
                model=self.info.name,
                version=self.info.version,
            )
            try:
                for chunk in stream:
                    chunks.append(chunk)
                    drawn += len(chunk.images)
            except self._served.retryable_errors:
                if drawn == before or self._stopped.is_set():
                    raise
            else:
                if drawn == before:
                    raise JobError(f"{self._served.address} ended a stream of draws without one")

        while drawn < count:
            self._ask_with_retries(receive)
        return joined(chunks)

    def stop(self) -> None:
        """As `Backend.stop`."""
        self._stopped.set()
        self._client.close()

    def close(self) -> None:
        """As `Backend.close`."""
        self._client.close()

    def _ask_with_retries(self, ask: Callable[[], T]) -> T:
        """The result of `ask`, which is repeated while the server is busy or restarting.

        The version that the job began with may also be missing for a while: when replicas are
        replaced, the old ones may be gone while the new ones still load it.
        """
        patience, has_warned = self._served.patience, False
        began, pause = time.monotonic(), FIRST_PAUSE
        while True:
            try:
                return ask()
            except self._served.retryable_errors as error:
                requested = (
                    error.retry_after if isinstance(error, Overloaded | Unavailable) else None
                )
                pause = max(pause, requested or 0.0)
                spent = time.monotonic() - began + pause
                if self._stopped.is_set() or spent > patience:
                    if isinstance(error, ModelNotFound):
                        raise self._version_gone_error() from error
                    raise
                if not has_warned and spent > QUIET_SECONDS:
                    _LOG.warning("retrying for up to %g s: %s", patience, error)
                    has_warned = True
            self._stopped.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _version_gone_error(self) -> JobError:
        served = self._served
        return JobError(
            f"{served.address} no longer has {served.model}@{served.version}, with which this job "
            "began; serve that version again and repeat the command, or start another job in "
            "another folder"
        )


def _require_answered(info: ModelInfo, task: Task) -> None:
    method = task.kind.capitalize()
    if isinstance(task, Judgement) and task.rule == LabelRule.DISCRIMINATIVE:
        if not info.discriminative:
            raise NotAnswered(f"model {info.name} has no p(y|x), so it does not answer this rule")
        method = "Score"  # the methods list Classify only for a model of p(x|y)
    if not any(name.endswith(f"/{method}") for name in info.methods):
        raise JobError(f"model {info.name} does not answer {method}")


async def _cancel_other_tasks() -> None:
    """Cancels all other tasks of the event loop and waits for them."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _collect(stream: AsyncIterator[Draws]) -> list[Draws]:
    return [chunk async for chunk in stream]
