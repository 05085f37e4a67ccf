"""Several workers on one port: begun, watched, begun anew, told to end; their metrics as one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio

from likely import graphs, logs, machine
from likely.errors import DeviceLost, LikelyError, SettingsError
from likely.processes import process
from likely.processes.fanout import Fanout, Version, is_silent, served_by
from likely.processes.together import MEBIBYTES, Together
from likely.processes.worker import LOST, READY, Order
from likely.serving import access, ports
from likely.serving.guard import Guard, Guarded
from likely.settings import PREFIX, Settings
from likely.telemetry.metrics import Exporter, Metrics
from likely.v1 import admin_pb2, admin_pb2_grpc
from likely.versions.lifecycle import absolute, is_bundle
from likely.versions.registry import Registry
from likely.versions.watch import scan

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

SOONEST, LATEST = 0.1, 30.0  # seconds before a worker is begun anew
STEADY = 60.0  # seconds that a worker has lived when its next death counts as its first
LOOK = 5.0  # seconds between two questions whether a worker answers yet
SILENCES = 6  # questions in a row without an answer, until it is taken to hang
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it is private


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, in as many processes as the settings want.

    Raises:
        LikelyError: why nothing can be served.
        DeviceLost: why it was given up; a new process may do better.
    """
    count = settings.workers or automatic(settings)
    if count == 1:
        process.serve(settings.model_copy(update={"workers": 1}))
        return
    graphs.require_runtime()
    log = logs.logger(settings.log_level, settings.log_format)
    logs.adopt_stdlib(settings.log_format)
    with private(count) as (folder, together), reserved(settings) as port:
        fixed = settings.model_copy(update={"port": port, "workers": count})
        asyncio.run(Supervisor(fixed, log, folder, together).run())


def automatic(settings: Settings) -> int:
    """How many workers there are where the settings leave it open: one a core, or one on a card.

    Each worker would have a context, and the models, in the same card's memory; and the card runs
    one graph at a time whoever asks.
    """
    device = graphs.Device.parse(settings.device)
    # The driver is asked first: the runtime is much to load where there is no card.
    if device.kind == "auto" and graphs.cuda_devices() == 0:
        return machine.cores()
    return 1 if device.resolve().kind == "cuda" else machine.cores()


@contextmanager
def private(workers: int) -> Iterator[tuple[Path, Together]]:
    """A folder for sockets and metrics, and these: the usual temporary one, or in shared memory.

    Raises:
        SettingsError: neither can be written, or has room.
    """
    reason = ""
    for place in (None, SHARED_MEMORY):
        with ExitStack() as stack:
            try:
                made = tempfile.TemporaryDirectory(prefix="likely-", dir=place)
                folder = Path(stack.enter_context(made))
                found = folder, Together(folder, workers)
            except OSError as error:
                reason = error.strerror or str(error)
                continue
            yield found
            return
    raise SettingsError(
        f"workers = {workers} needs a folder that can be written, with {workers * MEBIBYTES} MiB "
        f"free: neither the temporary one (TMPDIR) nor {SHARED_MEMORY} is such ({reason})"
    )


@contextmanager
def reserved(settings: Settings) -> Iterator[int]:
    """Holds the port for the workers, as a socket that hears nothing itself; gives its number.

    Raises:
        SettingsError: the port is taken, or the address is not this machine's.
    """
    with ExitStack() as stack:
        try:
            family, *_, address = socket.getaddrinfo(
                settings.host, settings.port, type=socket.SOCK_STREAM
            )[0]
            if settings.port:  # alone, which workers of another server would not allow
                with socket.socket(family, socket.SOCK_STREAM) as alone:
                    alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    alone.bind(address)
            held = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # The port is free though a former server's connections are remembered for a minute;
            # but until the workers hear, no other server shall find it free.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(address)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError as error:
            raise SettingsError(
                f"gRPC cannot listen on {settings.host}:{settings.port}: {error.strerror or error}"
            ) from error
        yield int(held.getsockname()[1])


class Supervisor:
    """Keeps the workers of one server alive."""

    def __init__(
        self, settings: Settings, log: FilteringBoundLogger, folder: Path, together: Together
    ) -> None:
        """A supervisor.

        Args:
            settings: with the port and the number of workers decided.
            log: where it tells of workers that end.
            folder: private to this server, for sockets.
            together: the workers' metrics.
        """
        self._settings = settings
        self._log = log
        self._folder = folder
        self._together = together
        self._running: dict[int, Process] = {}
        self._ready: set[int] = set()
        self._leaving: set[Process] = set()  # missed a change, and drain
        self._begun = asyncio.Event()
        self._ending = False
        self._serving: frozenset[int] = frozenset()
        self._changes = 0
        self._folders: dict[str, Path] = {}
        self._unloaded: set[Version] = set()  # by RPC, though the watched folder may hold them

    async def run(self) -> None:
        """Serves until it is told to end.

        Raises:
            LikelyError: a worker could not begin, or the device is gone.
        """
        settings = self._settings
        ending = process.signalled()
        exporter, admin = self._export(), self._administer()
        keepers = [asyncio.create_task(self._keep(index)) for index in range(settings.workers)]
        begun = asyncio.create_task(self._begun.wait())
        number = signal.SIGTERM
        try:
            if admin:
                await admin.start()
            await process.first(ending, begun, *keepers)
            if self._begun.is_set():
                self._log.info(
                    "serving",
                    host=settings.host,
                    port=settings.port,
                    metrics=exporter.port if exporter else None,
                    workers=settings.workers,
                )
                await process.first(ending, *keepers)
            if ending.done():
                number = ending.result()
        finally:
            begun.cancel()
            await self._end(number, keepers)
            if admin:
                await admin.stop(0)
            if exporter:
                await asyncio.to_thread(exporter.close)
        for keeper in keepers:
            if not keeper.cancelled():
                keeper.result()
        # One that had not begun yet when all were told to end had no request to lose.
        if codes := {self._running[index].returncode for index in self._serving} - {0}:
            raise LikelyError(f"a worker did not end well (exit {codes})")
        self._log.info("ended")

    async def _keep(self, index: int) -> None:
        """Begins a worker, and begins it anew when it dies, until all shall end."""
        wait = SOONEST
        while not self._ending:
            began = time.monotonic()
            try:
                worker = await self._begin(index)
            except OSError as error:  # no process more, or no memory for one
                code: int | str = error.strerror or str(error)
                if not self._begun.is_set():
                    raise LikelyError(f"worker {index} could not begin: {code}") from error
            else:
                code = await self._outlived(index, worker)
            was_ready = index in self._ready
            self._ready.discard(index)
            self._together.ended(index)
            self._together.ready(len(self._ready))
            if self._ending:
                return
            if code == LOST:
                raise DeviceLost("a worker lost its device; all end, to be begun anew")
            if not was_ready and not self._begun.is_set():
                raise LikelyError(
                    f"worker {index} could not begin (exit {code}); it says above why"
                )
            if time.monotonic() - began > STEADY:
                wait = SOONEST
            self._log.error("worker ended", worker=index, code=code, again_in=wait)
            self._together.restarted()
            await asyncio.sleep(wait)
            wait = min(2 * wait, LATEST)
            await self._until_found(index)

    async def _outlived(self, index: int, worker: Process) -> int:
        """The exit code of a worker in the end; one that hangs is killed."""
        ended = asyncio.create_task(worker.wait())
        silences = 0
        try:
            while not (await asyncio.wait({ended}, timeout=LOOK))[0]:
                is_watched = index in self._ready and not self._ending  # others may be slow to end
                silent = is_watched and await is_silent(self._socket(index))
                silences = silences + 1 if silent else 0
                if silences >= SILENCES and not self._ending and not ended.done():
                    self._log.error("worker hangs", worker=index)
                    worker.kill()
            return ended.result()
        finally:
            ended.cancel()

    async def _until_found(self, index: int) -> None:
        """Returns when the watched folder is not lost, which a new worker would know nothing of."""
        told = False
        while not self._ending and await self._is_lost():
            if not told:
                self._log.error("worker waits for the watched folder", worker=index)
            told = True
            await asyncio.sleep(self._settings.watch_seconds)

    async def _is_lost(self) -> bool:
        """Whether some worker serves what lay in the watched folder, and nothing of it is there."""
        watched = self._settings.watch and absolute(self._settings.watch)
        if not watched:
            return False
        folders = [Path(version.folder) for version in await self._serving_now()]
        served = {folder for folder in folders if folder.is_relative_to(watched)}
        if not served:
            return False
        try:
            return served.isdisjoint(await asyncio.to_thread(scan, watched))
        except OSError:
            return True

    async def _serving_now(self) -> list[admin_pb2.ModelVersion]:
        """What the workers serve, as one of them says; nothing where none is ready."""
        served = await served_by([path for _, path in self._sockets()])
        return _serving(served) if served else []

    async def _begin(self, index: int) -> Process:
        surroundings = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "likely.processes.worker"),
            stdin=PIPE,
            stdout=PIPE,
            env={**surroundings, **self._together.environment},
            start_new_session=True,  # or Ctrl-C would reach it twice
        )
        assert worker.stdin
        assert worker.stdout
        self._running[index] = worker
        if self._ending:
            worker.terminate()
        if self._unloaded:  # what has come to the folder anew since then is served
            serving = await self._serving_now()
            self._unloaded -= _versions(serving)
        socket_path, changes = self._socket(index), self._changes
        socket_path.unlink(missing_ok=True)
        order = Order(index, str(socket_path), self._alone(), changes > 0, sorted(self._unloaded))
        worker.stdin.write(order.line())
        if await worker.stdout.readline() == READY:
            if changes != self._changes:  # while it loaded, others were asked to change
                self._strayed(index)
                return worker
            self._ready.add(index)
            self._together.ready(len(self._ready))
            if len(self._ready) == self._settings.workers:
                self._begun.set()
        return worker

    def _alone(self) -> dict[str, Any]:
        """What a worker serves with, on the one port of all; no file is read again."""
        kept = [label for label in self._settings.labels if self._is_there(label)]
        mine = {"metrics_port": "off", "admin_port": "off", "config": None, "labels": tuple(kept)}
        return self._settings.model_copy(update=mine).model_dump(mode="json")

    def _is_there(self, label: str) -> bool:
        """Whether a worker finds what a label names; others may serve what has left its folder."""
        folder = self._folders.get(label)
        if folder is None or is_bundle(folder):
            return True
        self._log.warning("label without a bundle", label=label, folder=str(folder))
        return False

    async def _end(self, number: signal.Signals, keepers: Sequence[asyncio.Task[None]]) -> None:
        self._ending = True
        self._serving = frozenset(self._ready)
        living = [worker for worker in self._running.values() if worker.returncode is None]
        for worker in living:
            if worker not in self._leaving:  # a second signal would cut its drain short
                worker.send_signal(number)
        if living:
            _, late = await asyncio.wait(
                [asyncio.create_task(worker.wait()) for worker in living],
                timeout=process.patience(self._settings),
            )
            for worker in living if late else ():
                if worker.returncode is None:
                    worker.kill()
        for keeper in keepers:
            if not keeper.done():
                keeper.cancel()
        await asyncio.wait(keepers)

    def _socket(self, index: int) -> Path:
        return self._folder / f"{index}.sock"

    def _export(self) -> Exporter | None:
        settings = self._settings
        if settings.metrics_port == "off":
            return None
        return Exporter(self._together.registry, settings.metrics_host, settings.metrics_port)

    def _administer(self) -> grpc.aio.Server | None:
        settings = self._settings
        if settings.admin_port == "off":
            return None
        # The workers count and limit what they are handed on; here callers are let in.
        guard = Guard(Registry(), Metrics(), self._log, access.gate(settings, self._log))
        server = grpc.aio.server(options=ports.options(settings, shared=False))
        served: Any = Guarded(guard, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            Fanout(self._sockets, self._settled, self._strayed, self._log), served
        )
        port = ports.listen(server, settings, settings.admin_host, settings.admin_port, self._log)
        self._log.info("admin", host=settings.admin_host, port=port)
        return server

    def _sockets(self) -> list[tuple[int, Path]]:
        if not self._begun.is_set():  # those that load yet would not hear of a change
            return []
        return [(index, self._socket(index)) for index in sorted(self._ready)]

    def _settled(
        self,
        served: admin_pb2.ListVersionsResponse,
        asked: Collection[int],
        unloaded: Version | None,
    ) -> None:
        """Remembers what is served, and what is not any more, for workers that are begun anew."""
        serving = _serving(served)
        watched = self._settings.watch and absolute(self._settings.watch)
        self._folders = {
            f"{v.model_name}:{label}={v.model_version}": Path(v.folder)
            for v in serving
            for label in v.labels
        }
        settled = self._settings.model_copy(
            update={
                "bundles": tuple(
                    folder
                    for folder in (Path(v.folder) for v in serving)
                    if not (watched and folder.is_relative_to(watched))
                ),
                "labels": tuple(self._folders),
            }
        )
        left = (self._unloaded | ({unloaded} if unloaded else set())) - _versions(serving)
        if (settled, left) != (self._settings, self._unloaded):
            self._settings, self._unloaded = settled, left
            self._changes += 1
            for index in self._ready - set(asked):  # became ready meanwhile
                self._strayed(index)

    def _strayed(self, index: int) -> None:
        """Begins a worker anew that did not make a change; it drains meanwhile."""
        if self._ending:  # all are told already, and refuse changes; told again, it would drop all
            return
        self._log.error("worker could not follow a change", worker=index)
        self._ready.discard(index)
        self._together.ready(len(self._ready))
        worker = self._running[index]
        if worker.returncode is None:
            worker.terminate()
            self._leaving.add(worker)
            seconds = process.patience(self._settings)
            asyncio.get_running_loop().call_later(seconds, self._overdue, index, worker)

    def _overdue(self, index: int, worker: Process) -> None:
        """Kills a worker that was told to end, if it lives yet; nobody else watches it."""
        self._leaving.discard(worker)
        if worker.returncode is None:
            self._log.error("worker hangs", worker=index)
            worker.kill()


def _serving(served: admin_pb2.ListVersionsResponse) -> list[admin_pb2.ModelVersion]:
    return [each for each in served.versions if each.state == admin_pb2.VERSION_STATE_SERVING]


def _versions(serving: Collection[admin_pb2.ModelVersion]) -> set[Version]:
    return {(each.model_name, each.model_version) for each in serving}
