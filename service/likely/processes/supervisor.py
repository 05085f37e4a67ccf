"""The supervisor: starts, watches, restarts and ends several workers that share one port."""

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
from likely.processes.fanout import Fanout, Version, is_silent, list_served
from likely.processes.worker import LOST, READY, Order
from likely.processes.worker_metrics import MEBIBYTES, WorkerMetrics
from likely.serving import access, ports
from likely.serving.guard import Guard, GuardedServices
from likely.settings import PREFIX, Settings
from likely.telemetry.metrics import Exporter, Metrics
from likely.v1 import admin_pb2, admin_pb2_grpc
from likely.versions.lifecycle import absolute, is_bundle
from likely.versions.registry import Registry
from likely.versions.watch import scan

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

MIN_DELAY, MAX_DELAY = 0.1, 30.0  # bounds of the backoff, in seconds, before a worker is restarted
STEADY_SECONDS = 60.0  # the backoff starts again after a worker has lived this many seconds
CHECK_SECONDS = 5.0  # seconds between two health checks of a worker
MAX_SILENCES = 6  # checks in a row without an answer after which a worker counts as hung
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it is private


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, in as many processes as the settings ask for.

    Raises:
        LikelyError: nothing can be served.
        DeviceLost: the device is gone; a new process may find one.
    """
    count = settings.workers or default_workers(settings)
    if count == 1:
        process.serve(settings.model_copy(update={"workers": 1}))
        return
    graphs.require_runtime()
    log = logs.logger(settings.log_level, settings.log_format)
    logs.adopt_stdlib(settings.log_format)
    with private_folder(count) as (folder, metrics), reserved_port(settings) as port:
        fixed = settings.model_copy(update={"port": port, "workers": count})
        asyncio.run(Supervisor(fixed, log, folder, metrics).run())


def default_workers(settings: Settings) -> int:
    """The default number of workers: one per core, or a single one on a card.

    Several workers would each have a context and the models in the same card's memory, and the
    card runs one graph at a time anyway.
    """
    device = graphs.Device.parse(settings.device)
    # The driver is asked first, as the runtime takes long to load, in vain if there is no card.
    if device.kind == "auto" and graphs.cuda_devices() == 0:
        return machine.cores()
    return 1 if device.resolve().kind == "cuda" else machine.cores()


@contextmanager
def private_folder(workers: int) -> Iterator[tuple[Path, WorkerMetrics]]:
    """Creates a private folder for sockets and metrics, and yields it with the metrics.

    The folder is in the temporary directory or, if that fails, in shared memory.

    Raises:
        SettingsError: neither place can be written and has enough space.
    """
    reason = ""
    for place in (None, SHARED_MEMORY):
        with ExitStack() as stack:
            try:
                made = tempfile.TemporaryDirectory(prefix="likely-", dir=place)
                folder = Path(stack.enter_context(made))
                prepared = folder, WorkerMetrics(folder, workers)
            except OSError as error:
                reason = error.strerror or str(error)
                continue
            yield prepared
            return
    raise SettingsError(
        f"workers = {workers} needs a folder with {workers * MEBIBYTES} MiB of free space: neither "
        f"the temporary one (TMPDIR) nor {SHARED_MEMORY} can be used ({reason})"
    )


@contextmanager
def reserved_port(settings: Settings) -> Iterator[int]:
    """Reserves the port for the workers by a socket that does not listen; yields its number.

    Raises:
        SettingsError: the port is taken, or the address is not one of this machine.
    """
    with ExitStack() as stack:
        try:
            family, *_, address = socket.getaddrinfo(
                settings.host, settings.port, type=socket.SOCK_STREAM
            )[0]
            if settings.port:  # fails without SO_REUSEPORT if another server's workers listen
                with socket.socket(family, socket.SOCK_STREAM) as alone:
                    alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    alone.bind(address)
            held = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # Allows binding while the kernel still remembers connections of a former server. It
            # is then switched off, so that no other server takes the port before workers listen.
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
        self, settings: Settings, log: FilteringBoundLogger, folder: Path, metrics: WorkerMetrics
    ) -> None:
        """Creates a supervisor; `run` does the work.

        Args:
            settings: settings in which the port and the number of workers are decided.
            log: receives events about workers.
            folder: folder for sockets, private to this server.
            metrics: the workers' metrics.
        """
        self._settings = settings
        self._log = log
        self._folder = folder
        self._metrics = metrics
        self._running: dict[int, Process] = {}
        self._ready: set[int] = set()
        self._draining: set[Process] = set()  # workers that missed a change, and drain
        self._all_ready = asyncio.Event()  # set once all workers have been ready
        self._ending = False
        # Workers that were ready when the end began.
        self._ready_at_end: frozenset[int] = frozenset()
        self._changes = 0  # changes by RPC so far
        self._folders: dict[str, Path] = {}  # folder of the version at which each label points
        # Versions unloaded by RPC, although the watched folder may hold them.
        self._unloaded: set[Version] = set()

    async def run(self) -> None:
        """Runs the workers until a signal to end comes.

        Raises:
            LikelyError: a worker could not start, or the device is gone.
        """
        settings = self._settings
        ending = process.end_signal()
        exporter, admin = self._start_exporter(), self._create_admin_server()
        keepers = [
            asyncio.create_task(self._keep_running(index)) for index in range(settings.workers)
        ]
        all_ready = asyncio.create_task(self._all_ready.wait())
        number = signal.SIGTERM
        try:
            if admin:
                await admin.start()
            await process.wait_for_first(ending, all_ready, *keepers)
            if self._all_ready.is_set():
                self._log.info(
                    "serving",
                    host=settings.host,
                    port=settings.port,
                    metrics=exporter.port if exporter else None,
                    workers=settings.workers,
                )
                await process.wait_for_first(ending, *keepers)
            if ending.done():
                number = ending.result()
        finally:
            all_ready.cancel()
            await self._stop_workers(number, keepers)
            if admin:
                await admin.stop(0)
            if exporter:
                await asyncio.to_thread(exporter.close)
        for keeper in keepers:
            if not keeper.cancelled():
                keeper.result()
        # A worker that was not ready when the end began had no request to lose.
        if codes := {self._running[index].returncode for index in self._ready_at_end} - {0}:
            raise LikelyError(f"a worker ended with an error (exit {codes})")
        self._log.info("ended")

    async def _keep_running(self, index: int) -> None:
        """Starts a worker, and restarts it when it dies, until the server ends."""
        wait = MIN_DELAY
        while not self._ending:
            began = time.monotonic()
            try:
                worker = await self._start_worker(index)
            except OSError as error:  # too many processes, or no memory for another
                code: int | str = error.strerror or str(error)
                if not self._all_ready.is_set():
                    raise LikelyError(f"worker {index} could not start: {code}") from error
            else:
                code = await self._wait_for_exit(index, worker)
            was_ready = index in self._ready
            self._ready.discard(index)
            self._metrics.clear_live_gauges(index)
            self._metrics.set_ready(len(self._ready))
            if self._ending:
                return
            if code == LOST:
                raise DeviceLost("a worker lost its device; all workers end, to be restarted")
            if not was_ready and not self._all_ready.is_set():
                raise LikelyError(
                    f"worker {index} could not start (exit {code}); see its error above"
                )
            if time.monotonic() - began > STEADY_SECONDS:
                wait = MIN_DELAY
            self._log.error("worker ended", worker=index, code=code, again_in=wait)
            self._metrics.count_restart()
            await asyncio.sleep(wait)
            wait = min(2 * wait, MAX_DELAY)
            await self._wait_for_watched_folder(index)

    async def _wait_for_exit(self, index: int, worker: Process) -> int:
        """Waits for a worker's end and returns its exit code; a worker that hangs is killed."""
        ended = asyncio.create_task(worker.wait())
        silences = 0
        try:
            while not (await asyncio.wait({ended}, timeout=CHECK_SECONDS))[0]:
                is_watched = index in self._ready and not self._ending  # draining may take long
                silent = is_watched and await is_silent(self._socket(index))
                silences = silences + 1 if silent else 0
                if silences >= MAX_SILENCES and not self._ending and not ended.done():
                    self._log.error("worker hangs", worker=index)
                    worker.kill()
            return ended.result()
        finally:
            ended.cancel()

    async def _wait_for_watched_folder(self, index: int) -> None:
        """Waits while the watched folder is lost, as a new worker would find no bundles in it."""
        logged = False
        while not self._ending and await self._is_watched_folder_lost():
            if not logged:
                self._log.error("worker waits for the watched folder", worker=index)
            logged = True
            await asyncio.sleep(self._settings.watch_seconds)

    async def _is_watched_folder_lost(self) -> bool:
        """Whether bundles from the watched folder are served, but none is left in it."""
        watched = self._settings.watch and absolute(self._settings.watch)
        if not watched:
            return False
        folders = [Path(version.folder) for version in await self._list_serving()]
        served = {folder for folder in folders if folder.is_relative_to(watched)}
        if not served:
            return False
        try:
            return served.isdisjoint(await asyncio.to_thread(scan, watched))
        except OSError:
            return True

    async def _list_serving(self) -> list[admin_pb2.ModelVersion]:
        """The versions that the workers serve, as one of them reports; none if no one is ready."""
        served = await list_served([path for _, path in self._sockets()])
        return _serving_versions(served) if served else []

    async def _start_worker(self, index: int) -> Process:
        surroundings = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "likely.processes.worker"),
            stdin=PIPE,
            stdout=PIPE,
            env={**surroundings, **self._metrics.environment},
            start_new_session=True,  # otherwise the worker would get Ctrl-C twice
        )
        assert worker.stdin
        assert worker.stdout
        self._running[index] = worker
        if self._ending:
            worker.terminate()
        if self._unloaded:  # a version that is served again need not be left out
            serving = await self._list_serving()
            self._unloaded -= _version_keys(serving)
        socket_path, changes = self._socket(index), self._changes
        socket_path.unlink(missing_ok=True)
        order = Order(
            index, str(socket_path), self._worker_settings(), changes > 0, sorted(self._unloaded)
        )
        worker.stdin.write(order.line())
        if await worker.stdout.readline() == READY:
            if changes != self._changes:  # it missed a change while it loaded
                self._restart_worker(index)
                return worker
            self._ready.add(index)
            self._metrics.set_ready(len(self._ready))
            if len(self._ready) == self._settings.workers:
                self._all_ready.set()
        return worker

    def _worker_settings(self) -> dict[str, Any]:
        """The settings of a worker: no ports of its own but the shared one, and no config file."""
        kept = [label for label in self._settings.labels if self._has_bundle(label)]
        mine = {"metrics_port": "off", "admin_port": "off", "config": None, "labels": tuple(kept)}
        return self._settings.model_copy(update=mine).model_dump(mode="json")

    def _has_bundle(self, label: str) -> bool:
        """Whether a label's version is still in its folder, where a new worker would find it."""
        folder = self._folders.get(label)
        if folder is None or is_bundle(folder):
            return True
        self._log.warning("label without a bundle", label=label, folder=str(folder))
        return False

    async def _stop_workers(
        self, number: signal.Signals, keepers: Sequence[asyncio.Task[None]]
    ) -> None:
        self._ending = True
        self._ready_at_end = frozenset(self._ready)
        living = [worker for worker in self._running.values() if worker.returncode is None]
        for worker in living:
            if worker not in self._draining:  # a second signal would end it without draining
                worker.send_signal(number)
        if living:
            _, late = await asyncio.wait(
                [asyncio.create_task(worker.wait()) for worker in living],
                timeout=process.end_timeout(self._settings),
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

    def _start_exporter(self) -> Exporter | None:
        settings = self._settings
        if settings.metrics_port == "off":
            return None
        return Exporter(self._metrics.registry, settings.metrics_host, settings.metrics_port)

    def _create_admin_server(self) -> grpc.aio.Server | None:
        settings = self._settings
        if settings.admin_port == "off":
            return None
        # Callers are authenticated here; the workers count and limit what is forwarded to them.
        guard = Guard(Registry(), Metrics(), self._log, access.gate(settings, self._log))
        server = grpc.aio.server(options=ports.options(settings, shared=False))
        served: Any = GuardedServices(guard, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            Fanout(self._sockets, self._remember_change, self._restart_worker, self._log), served
        )
        port = ports.listen(server, settings, settings.admin_host, settings.admin_port, self._log)
        self._log.info("admin", host=settings.admin_host, port=port)
        return server

    def _sockets(self) -> list[tuple[int, Path]]:
        if not self._all_ready.is_set():  # workers that are still loading would miss a change
            return []
        return [(index, self._socket(index)) for index in sorted(self._ready)]

    def _remember_change(
        self,
        served: admin_pb2.ListVersionsResponse,
        asked: Collection[int],
        unloaded: Version | None,
    ) -> None:
        """Remembers after a change what is served, and what was unloaded, for restarted workers.

        Args:
            served: the versions that a worker listed after the change.
            asked: numbers of the workers that were asked to change.
            unloaded: the version that was unloaded, if any.
        """
        serving = _serving_versions(served)
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
        left = (self._unloaded | ({unloaded} if unloaded else set())) - _version_keys(serving)
        if (settled, left) != (self._settings, self._unloaded):
            self._settings, self._unloaded = settled, left
            self._changes += 1
            for index in self._ready - set(asked):  # became ready in the meantime
                self._restart_worker(index)

    def _restart_worker(self, index: int) -> None:
        """Lets a worker that missed a change drain and end, so that `_keep_running` restarts it."""
        if self._ending:  # it has a signal already; a second one would end it without draining
            return
        self._log.error("worker could not follow a change", worker=index)
        self._ready.discard(index)
        self._metrics.set_ready(len(self._ready))
        worker = self._running[index]
        if worker.returncode is None:
            worker.terminate()
            self._draining.add(worker)
            seconds = process.end_timeout(self._settings)
            asyncio.get_running_loop().call_later(seconds, self._kill_overdue, index, worker)

    def _kill_overdue(self, index: int, worker: Process) -> None:
        """Kills a worker that should have ended by now, as it is no longer health checked."""
        self._draining.discard(worker)
        if worker.returncode is None:
            self._log.error("worker hangs", worker=index)
            worker.kill()


def _serving_versions(served: admin_pb2.ListVersionsResponse) -> list[admin_pb2.ModelVersion]:
    return [
        version for version in served.versions if version.state == admin_pb2.VERSION_STATE_SERVING
    ]


def _version_keys(serving: Collection[admin_pb2.ModelVersion]) -> set[Version]:
    return {(version.model_name, version.model_version) for version in serving}
