"""What several workers share: a folder, and metrics as of one server."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from likely import graphs, logs, machine
from likely.errors import LikelyError, SettingsError
from likely.processes import fanout, process, supervisor, worker
from likely.processes.worker_metrics import FILE_BYTES, MEBIBYTES, WorkerMetrics
from likely.serving import ports
from likely.telemetry.metrics import METHODS, SECONDS
from tests.faults import http2

if TYPE_CHECKING:
    from likely.settings import Settings
    from tests.conftest import Running

REQUESTS = "likely_requests_total"
KINDS = (http2.PING, http2.GOAWAY)
WORKER = """
import sys
from likely.processes import worker_metrics
worker_metrics.write_metrics_as(int(sys.argv[1]))
from likely.telemetry.metrics import Metrics
Metrics().set_ready(True)
"""
BUSY = """
import sys
from types import SimpleNamespace
import numpy as np
from likely.processes import worker_metrics
worker_metrics.write_metrics_as(int(sys.argv[1]))
from likely.bundle import Role
from likely.inference import inference_pb2
from likely.telemetry.metrics import CODES, METHODS, STREAMS, Metrics

class Engine(SimpleNamespace):
    __hash__ = object.__hash__

metrics = Metrics(1e-3, 2)
(protocol,) = inference_pb2.DESCRIPTOR.services_by_name.values()
for name in ("", "unknown", *(f"a_model_of_some_pictures_{n}" for n in range(8))):
    engine = Engine(
        manifest=SimpleNamespace(name=name, version="1.10.0", dimensions=784),
        detector=SimpleNamespace(scores=np.arange(100.0)),
        digest="0" * 64,
        providers=("CUDAExecutionProvider",),
        answers=lambda method: True,
    )
    if name.startswith("a_model"):
        metrics._models.labels(name, "1.10.0", engine.digest, *engine.providers).set(1)
        metrics._loads.labels(name).inc()
        metrics._create_series(engine)
        metrics.monitor.set_served([engine])
        for role in Role:
            for family in ("waiting", "running"):
                getattr(metrics.traffic, family).labels(name, role).set(1)
            for family in ("batches", "waits"):
                getattr(metrics.traffic, family).labels(name, role).observe(1)
    for method in (*METHODS, "ListModels", "GetModel", *(each.name for each in protocol.methods)):
        metrics.began(method)
        metrics.count_answer(method, name, 1, [1])
        for code in (*CODES, "CANCELLED", "INVALID_ARGUMENT", "NOT_FOUND"):
            metrics.ended(method, name, code, 0.1)
            if method in STREAMS:
                metrics.count_stream_message(method, name, code)
"""
HUNG = """
import asyncio, time
from likely.processes import worker
async def hang():
    worker._end_when_input_closes(asyncio.get_running_loop().create_future(), 0.2)
    time.sleep(60)
asyncio.run(hang())
"""


def work(shared: WorkerMetrics, index: int, doing: str = WORKER) -> None:
    """A worker that is ready, or what else it is doing, and then dies."""
    code = [sys.executable, "-c", doing, str(index)]
    subprocess.run(code, env={"PYTHONPATH": ":".join(sys.path), **shared.environment}, check=True)


def samples_of(registry: CollectorRegistry) -> dict[str, str]:
    """The samples of a scrape, by name and labels."""
    lines = generate_latest(registry).decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_a_server_without_a_worker_is_not_ready_and_wants_some(tmp_path: Path) -> None:
    shared = WorkerMetrics(tmp_path, 2)
    assert samples_of(shared.registry)["likely_workers_wanted"] == "2.0"
    for live in (True, False):
        if live:
            work(shared, 1)
        else:
            shared.clear_live_gauges(1)
        assert samples_of(shared.registry)["likely_ready"] == f"{live:.1f}"


def test_metrics_have_their_room_before_a_worker_writes_them(tmp_path: Path) -> None:
    shared = WorkerMetrics(tmp_path, 2)
    for _ in range(2):
        for index in (0, 1):
            work(shared, index)
        assert sizes(tmp_path) == {
            f"{kind}_{index}.db": room for kind, room in FILE_BYTES.items() for index in (0, 1)
        }
        for path in tmp_path.iterdir():
            assert path.stat().st_blocks * 512 >= path.stat().st_size
        shared.clear_live_gauges(0)


def test_eight_models_that_are_asked_everything_need_no_more_room(tmp_path: Path) -> None:
    shared = WorkerMetrics(tmp_path, 1)
    before = sizes(tmp_path)
    work(shared, 0, BUSY)
    assert sizes(tmp_path) == before
    buckets = [
        name for name in samples_of(shared.registry) if name.startswith("likely_request_seconds_b")
    ]
    assert len(buckets) > 8 * len(METHODS) * len(SECONDS)
    assert sum(before.values()) == MEBIBYTES << 20


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files of a folder, by their name."""
    return {path.name: path.stat().st_size for path in folder.iterdir()}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The temporary folder and shared memory, which are not there yet."""
    usual, memory = tmp_path / "usual", tmp_path / "memory"
    monkeypatch.setattr(tempfile, "tempdir", str(usual))
    monkeypatch.setattr(supervisor, "SHARED_MEMORY", memory)
    return usual, memory


@pytest.mark.parametrize(("there", "taken"), [((0, 1), 0), ((0,), 0), ((1,), 1)])
def test_the_folder_is_the_temporary_one_or_else_in_shared_memory(
    places: tuple[Path, Path], there: tuple[int, ...], taken: int
) -> None:
    for place in there:
        places[place].mkdir()
    with supervisor.private_folder(2) as (folder, _):
        assert folder.parent == places[taken]
    assert not list(places[taken].iterdir())


def test_workers_without_a_folder_are_refused_in_a_sentence(places: tuple[Path, Path]) -> None:
    with pytest.raises(SettingsError, match=r"workers = 2 needs a folder .* 4 MiB"):
        supervisor.private_folder(2).__enter__()


def test_a_folder_without_room_is_left(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, data: bytes) -> int:
        if places[0] in path.parents:
            raise OSError(28, "No space left on device")
        return len(data)

    for place in places:
        place.mkdir()
    monkeypatch.setattr(Path, "write_bytes", write)
    with supervisor.private_folder(2) as (folder, _):
        assert folder.parent == places[1]
    assert not list(places[0].iterdir())


def supervised(settings: Settings, folder: Path, out: io.StringIO) -> supervisor.Supervisor:
    """A supervisor that runs nothing yet; to be made where the event loop runs."""
    log = logs.logger("info", "json", out)
    return supervisor.Supervisor(settings, log, folder, WorkerMetrics(folder, settings.workers))


def test_a_long_change_by_rpc_outlasts_its_clients_pings(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "MIN_PING_SECONDS", 0.1)
    out = io.StringIO()

    def pinged(port: int) -> list[int]:
        with http2.connected(f"127.0.0.1:{port}") as there:
            for _ in range(6):
                time.sleep(0.2)
                there.sendall(http2.frame(http2.PING, payload=bytes(8)))
            answers = (kind for kind, *_ in http2.frames(there) if kind in KINDS)
            return list(islice(answers, 6))

    async def asked() -> list[int]:
        admin = supervised(settings(admin_port=0, workers=2), tmp_path, out)._create_admin_server()
        assert admin
        await admin.start()
        try:
            return await asyncio.to_thread(pinged, json.loads(out.getvalue())["port"])
        finally:
            await admin.stop(0)

    assert asyncio.run(asked()) == [http2.PING] * 6


@pytest.mark.parametrize("workers", [False, True])
def test_the_port_of_a_server_that_has_ended_is_free_again(
    settings: Callable[..., Settings], workers: bool
) -> None:
    with socket.socket() as former:
        former.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if workers:
            former.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        former.bind(("127.0.0.1", 0))
        former.listen()
        port = former.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            former.accept()[0].close()  # it closes first, and its end is remembered
            assert client.recv(1) == b""
    with supervisor.reserved_port(settings(port=port)) as held:
        assert held == port


def test_a_port_is_held_by_one_server_alone(settings: Callable[..., Settings]) -> None:
    with supervisor.reserved_port(settings()) as port:
        with (
            pytest.raises(SettingsError, match="Address already in use"),
            supervisor.reserved_port(settings(port=port)),
        ):
            pass
        with socket.socket() as worker:
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                worker.setsockopt(socket.SOL_SOCKET, option, 1)
            worker.bind(("127.0.0.1", port))


@pytest.mark.parametrize("begun", [True, False])
def test_a_worker_that_cannot_be_made_anew_is_tried_again(
    settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    begun: bool,
) -> None:
    out, tries = io.StringIO(), 0

    async def kept() -> None:
        keeper = supervised(settings(workers=2), tmp_path, out)
        if begun:
            keeper._all_ready.set()

        async def made(*_: object, **__: object) -> None:
            nonlocal tries
            tries += 1
            keeper._ending = tries == 3
            raise BlockingIOError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(asyncio, "create_subprocess_exec", made)
        monkeypatch.setattr(supervisor, "MIN_DELAY", 0.01)
        await keeper._keep_running(0)

    if begun:
        asyncio.run(kept())
        assert tries == 3
        assert out.getvalue().count("Resource temporarily unavailable") == 2
    else:
        with pytest.raises(LikelyError, match="worker 0 could not start: Resource temporarily"):
            asyncio.run(kept())


def test_a_worker_that_hangs_is_killed(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(supervisor, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(fanout, "ANSWER_SECONDS", 0.2)

    async def outlived() -> int:
        keeper = supervised(settings(workers=2), tmp_path, out)
        worker = await asyncio.create_subprocess_exec("sleep", "600")
        with socket.socket(socket.AF_UNIX) as hung:
            hung.bind(str(keeper._socket(0)))
            hung.listen()
            keeping = asyncio.create_task(keeper._wait_for_exit(0, worker))
            await asyncio.sleep(0.5)
            assert not out.getvalue()  # it may load for long
            keeper._ready.add(0)
            return await keeping

    assert asyncio.run(outlived()) == -signal.SIGKILL
    assert "worker hangs" in out.getvalue()


@pytest.mark.parametrize("hangs", [True, False])
def test_a_worker_that_missed_a_change_and_does_not_end_is_killed(
    settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hangs: bool,
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(supervisor, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(process, "MARGIN", 0.2)

    async def outlived() -> int:
        keeper = supervised(settings(workers=2, drain_seconds=0), tmp_path, out)
        worker = keeper._running[0] = await asyncio.create_subprocess_exec("sleep", "60")
        try:
            if hangs:
                worker.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, worker.pid, os.WSTOPPED)  # or SIGTERM would overtake it
            keeper._ready.add(0)
            keeping = asyncio.create_task(keeper._wait_for_exit(0, worker))
            keeper._restart_worker(0)
            return await asyncio.wait_for(keeping, 20)
        finally:
            if worker.returncode is None:
                worker.kill()
                await worker.wait()
            await asyncio.sleep(0.3)  # one that has ended is not killed

    assert asyncio.run(outlived()) == -(signal.SIGKILL if hangs else signal.SIGTERM)
    assert ("worker hangs" in out.getvalue()) is hangs


TRAPS = """
trap 'echo told; told=$((told + 1)); [ $told = 2 ] && exit 9' TERM
echo ready
while [ ! -e "$0" ]; do sleep 0.05; done
"""


@pytest.mark.parametrize("first", ["change", "end"])
def test_a_worker_that_missed_a_change_drains_on_when_the_server_ends(
    settings: Callable[..., Settings], tmp_path: Path, first: str
) -> None:
    drained = tmp_path / "drained"

    async def ended() -> int:
        keeper = supervised(settings(workers=2), tmp_path, io.StringIO())
        worker = keeper._running[0] = await asyncio.create_subprocess_exec(
            "sh", "-c", TRAPS, str(drained), stdout=subprocess.PIPE
        )
        assert worker.stdout and await worker.stdout.readline() == b"ready\n"
        waiting: Any = asyncio.create_task(worker.wait())
        if first == "change":
            keeper._restart_worker(0)
            assert await worker.stdout.readline() == b"told\n"
        ending = asyncio.create_task(keeper._stop_workers(signal.SIGTERM, [waiting]))
        if first == "end":
            assert await worker.stdout.readline() == b"told\n"
            keeper._restart_worker(0)
        await asyncio.sleep(0.3)
        drained.touch()
        await ending
        return await worker.wait()

    assert asyncio.run(ended()) == 0


def test_a_worker_that_ends_does_not_hang(tmp_path: Path) -> None:
    assert not asyncio.run(fanout.is_silent(tmp_path / "0.sock"))


def test_another_call_that_is_given_up_does_not_hide_that_a_worker_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout, "ANSWER_SECONDS", 1.0)
    path = tmp_path / "0.sock"

    async def silent() -> bool:
        with socket.socket(socket.AF_UNIX) as hung:
            hung.bind(str(path))
            hung.listen()
            hung.setblocking(False)
            other = asyncio.create_task(fanout.list_served([path]))
            accepting = asyncio.get_running_loop().sock_accept(hung)
            there, _ = await asyncio.wait_for(accepting, 20)
            with there:
                asking = asyncio.create_task(fanout.is_silent(path))
                await asyncio.sleep(0.3)
            assert await other is None
            return await asking

    assert asyncio.run(silent())


def test_only_what_others_ask_a_worker_is_counted(running: Running, tmp_path: Path) -> None:
    path = tmp_path / "0.sock"
    with running(made={"admin_socket": path}) as live:
        registry = live.server._metrics.registry

        def counted() -> list[str]:
            samples = samples_of(registry).items()
            return [name for name, n in samples if name.startswith(REQUESTS) and n != "0.0"]

        assert not live.run(fanout.is_silent(path))
        assert not counted()
        assert live.run(fanout.list_served([path]))
        assert counted() == [f'{REQUESTS}{{code="OK",method="ListVersions",model=""}}']
    calls = [json.loads(line) for line in live.log.getvalue().splitlines()]
    assert [(c["method"], c["code"]) for c in calls if c["event"] == "rpc"] == [
        ("Check", "OK"),
        ("ListVersions", "OK"),
    ]


def test_a_worker_that_hangs_does_not_outlive_its_supervisor() -> None:
    code = [sys.executable, "-c", HUNG]
    env = {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run(code, input=b"", env=env, timeout=30).returncode == worker.REFUSED


@pytest.mark.parametrize(
    ("device", "reported", "count"),
    [("cuda", 2, 1), ("cuda:1", 2, 1), ("auto", 2, 1), ("auto", 0, 64), ("cpu", 2, 64)],
)
def test_as_many_workers_as_cores_but_one_on_a_card(
    settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    reported: int,
    count: int,
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 64)
    monkeypatch.setattr(graphs, "cuda_devices", lambda: reported)
    runtime = SimpleNamespace(get_available_providers=lambda: [graphs.CUDA, graphs.CPU])
    monkeypatch.setattr(graphs, "runtime", lambda: runtime)
    begun: list[int] = []

    def several(workers: int) -> NoReturn:
        begun.append(workers)
        raise SettingsError("no folder")

    monkeypatch.setattr(process, "serve", lambda given: begun.append(given.workers))
    monkeypatch.setattr(supervisor, "private_folder", several)
    with suppress(SettingsError):
        supervisor.serve(settings(workers=0, device=device))
    assert begun == [count]
