"""Faults of what comes and goes: versions, bundles, signals, processes, devices."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from likely import statuses
from likely.bundle import MANIFEST, write_manifest
from likely.errors import DeviceLost
from likely.graphs import Session
from likely.serving import server as serving
from likely.v1 import admin_pb2
from likely.v1.admin_pb2_grpc import AdminServiceStub
from likely.v1.images_pb2 import Images
from likely.v1.scoring_pb2 import ScoreRequest
from likely.v1.scoring_pb2_grpc import ScoringServiceStub
from tests.faults.alive import told_to_come_again
from tests.faults.history import History, Outcome, events, violations
from tests.faults.served import (
    ALONE,
    COMMAND,
    Load,
    Questions,
    Served,
    draw,
    first_process,
    served,
    wait_until,
)

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def toys(make_toy: Callable[..., Toy]) -> dict[str, Toy]:
    """Two versions of the toy that answer differently."""
    return {version: make_toy(version=version, seed=int(version)) for version in ("1", "2")}


@pytest.fixture(scope="module")
def questions(toys: dict[str, Toy], running: Running) -> Questions:
    """Questions whose right answers an undisturbed server gave."""
    bundles = tuple(toy.path for toy in toys.values())
    with running(bundles=bundles) as live, grpc.insecure_channel(live.address) as channel:
        drawn = {(v, seed): draw(channel, seed, v).answer for v in toys for seed in range(4)}
    assert len(set(drawn.values())) == len(drawn)
    return Questions(toys, drawn)  # type: ignore[arg-type]


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    folder = tmp_path / "watched"
    folder.mkdir()
    return folder


def put(bundle: Path, at: Path) -> None:
    """Replaces what lies there by a copy of the bundle, as an operator should: by a rename."""
    new = at.with_name(f".{at.name}.new")
    shutil.copytree(bundle, new)
    if at.exists():
        old = at.with_name(f".{at.name}.old")
        at.rename(old)
        new.rename(at)
        shutil.rmtree(old)
    else:
        new.rename(at)


def is_default(live: Live, version: str) -> bool:
    return default(live) == version


def more(history: History, than: int, version: str = "") -> bool:
    """Whether there are more answers, of that version if one is named."""
    return (history.versions()[version] if version else history.codes()["OK"]) > than


def default(live: Live) -> str | None:
    return live.server.registry.default("toy")


def alive(live: Live, history: History) -> None:
    """The server is as it was: ready, idle, nothing in flight."""
    with grpc.insecure_channel(live.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    with urllib.request.urlopen(live.metrics_url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    busy = ("likely_requests_in_flight", "likely_queue_rows", "likely_batches_running")
    found = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith(busy)}
    assert found
    assert set(found.values()) == {0.0}
    assert history.codes()["OK"] > 0


@pytest.mark.fault(32)
def test_fifty_swaps_under_load(
    toys: dict[str, Toy], questions: Questions, running: Running, watched: Path
) -> None:
    put(toys["1"].path, watched / "toy")
    # What is best under a load is not searched for fifty times.
    # A process that stands still within `put` must not leave the folder empty for two looks.
    with running(bundles=(), watch=watched, watch_seconds=0.1, lanes=1, max_batch=8) as live:
        engines: list[weakref.ref[Any]] = []
        with Load(live.address, questions, 32, 4) as history:
            for swap in range(50):
                version = "21"[swap % 2]
                put(toys[version].path, watched / "toy")
                before = history.versions()[version]
                wait_until(partial(is_default, live, version))
                wait_until(partial(more, history, before, version))
                engines.append(weakref.ref(live.server.registry.find("toy")))
        assert violations(history, questions.right, retryable=frozenset()) == []
        assert min(history.versions()[version] for version in toys) > 50
        wait_until(lambda: len(live.server.lifecycle.versions()) == 1)
        wait_until(lambda: gc.collect() >= 0 and sum(ref() is not None for ref in engines) == 1)
        alive(live, history)


@pytest.mark.fault(32)
def test_an_unloaded_version_is_really_freed(
    toys: dict[str, Toy], running: Running, questions: Questions
) -> None:
    with (
        running(bundles=(toys["1"].path,), admin_port=0) as live,
        grpc.insecure_channel(f"127.0.0.1:{live.server.admin_port}") as channel,
    ):
        admin = AdminServiceStub(channel)
        with Load(live.address, questions, 1, 2) as history:
            admin.LoadModel(admin_pb2.LoadModelRequest(folder=str(toys["2"].path)))
            engine: Any = live.server.registry.find("toy", "2")
            wait_until(lambda: history.versions()["2"] > 5)
            gone = [weakref.ref(engine), *sessions_of(engine)]
            del engine
            admin.UnloadModel(
                admin_pb2.UnloadModelRequest(model_name="toy", model_version="2"), timeout=30
            )

        def freed() -> bool:  # a thread that closed it may hold it for a moment yet
            gc.collect()
            return not any(ref() for ref in gone)

        wait_until(freed)
        assert violations(history, questions.right, retryable=frozenset()) == []


def sessions_of(engine: Any) -> list[weakref.ref[Any]]:
    """Every session of the runtime that can be reached from an engine."""
    import onnxruntime

    found: list[weakref.ref[Any]] = []
    seen: set[int] = set()
    queue = [engine]
    while queue:
        one = queue.pop()
        if id(one) in seen or isinstance(one, (type, str, bytes, np.ndarray)):
            continue
        seen.add(id(one))
        if isinstance(one, onnxruntime.InferenceSession):
            found.append(weakref.ref(one))
        elif type(one).__module__.startswith("likely") or isinstance(one, (dict, list, tuple)):
            queue += gc.get_referents(one)
    assert len(found) == len(engine.manifest.graphs)
    return found


def truncated(folder: Path) -> None:
    path = folder / "density.onnx"
    path.write_bytes(path.read_bytes()[:-7])


def altered(folder: Path) -> None:
    path = folder / "density.onnx"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def resealed(folder: Path, **more: Any) -> None:
    """Makes the manifest true again of what the files now are."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]
    write_manifest(folder, {**manifest, **more})


def foreign_signature(folder: Path) -> None:
    shutil.copy(folder / "conditional.onnx", folder / "density.onnx")
    resealed(folder)


def other_answers(folder: Path) -> None:
    with np.load(folder / "golden.npz") as arrays:
        golden = dict(arrays)
    golden["density/log_px"] = golden["density/log_px"] + 1
    np.savez(folder / "golden.npz", **golden)
    resealed(folder)


def misshapen_questions(folder: Path) -> None:
    with np.load(folder / "golden.npz") as arrays:
        golden = dict(arrays)
    golden["density/x"] = golden["density/x"][..., :2]
    np.savez(folder / "golden.npz", **golden)
    resealed(folder)


def same_version(folder: Path) -> None:
    resealed(folder, version="1", description="Other content under a version that is served.")


def emptied(folder: Path) -> None:
    (folder / "density.onnx").unlink()


@pytest.mark.fault(33)
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncated, "truncated"),
        (altered, "digest"),
        (foreign_signature, "graph"),
        (other_answers, "golden"),
        (misshapen_questions, "graph"),
        (same_version, "version"),
        (emptied, "incomplete"),
    ],
)
def test_a_bad_bundle_leaves_the_old_version(
    harm: Callable[[Path], None],
    reason: str,
    toys: dict[str, Toy],
    running: Running,
    tmp_path: Path,
    questions: Questions,
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(toys["2"].path, bad)
    harm(bad)
    with (
        running(bundles=(toys["1"].path,), admin_port=0) as live,
        grpc.insecure_channel(f"127.0.0.1:{live.server.admin_port}") as channel,
    ):
        admin = AdminServiceStub(channel)
        with Load(live.address, questions, 33, 2) as history:
            with pytest.raises(grpc.RpcError) as caught:
                admin.LoadModel(admin_pb2.LoadModelRequest(folder=str(bad)), timeout=60)
            seen = history.codes()["OK"]
            wait_until(lambda: history.codes()["OK"] > seen)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        metadata: Any = dict(caught.value.trailing_metadata())  # type: ignore[arg-type]
        rich = status_pb2.Status.FromString(metadata[statuses.DETAILS_KEY])
        info = error_details_pb2.ErrorInfo()
        assert any(packed.Unpack(info) for packed in rich.details)
        assert info.reason == "BUNDLE_REFUSED"
        versions = admin.ListVersions(admin_pb2.ListVersionsRequest()).versions
        listed = [(v.model_version, v.state, v.reason) for v in versions]
        assert listed == [
            ("1", admin_pb2.VERSION_STATE_SERVING, ""),
            ("", admin_pb2.VERSION_STATE_FAILED, reason),
        ]
        with urllib.request.urlopen(live.metrics_url, timeout=10) as answer:
            counted = f'likely_load_failures_total{{reason="{reason}"}} 1.0'
            assert counted in answer.read().decode()
        assert violations(history, questions.right, retryable=frozenset()) == []
        assert set(history.versions()) == {"1"}
        alive(live, history)


@pytest.mark.fault(34)
def test_a_half_written_bundle_is_none(
    toys: dict[str, Toy], running: Running, watched: Path
) -> None:
    put(toys["1"].path, watched / "first")
    with running(bundles=(), watch=watched, watch_seconds=0.02) as live:
        slow = watched / "second"
        slow.mkdir()
        names = sorted(path.name for path in toys["2"].path.iterdir())
        for name in [MANIFEST, *(n for n in names if n != MANIFEST)]:
            # The worst order: the manifest comes first, and every file grows byte by byte.
            whole = (toys["2"].path / name).read_bytes()
            with (slow / name).open("wb") as file:
                for start in range(0, len(whole), max(1, len(whole) // 3)):
                    file.write(whole[start : start + max(1, len(whole) // 3)])
                    file.flush()
                    assert default(live) == "1"
                    time.sleep(0.004)
        wait_until(lambda: default(live) == "2")
        assert len(live.server.registry.engines()) == 2


@pytest.mark.fault(34)
def test_loads_and_unloads_at_once_are_one_after_the_other(
    toys: dict[str, Toy], running: Running, questions: Questions
) -> None:
    with (
        running(bundles=(toys["1"].path,), admin_port=0, lanes=1, max_batch=8) as live,
        grpc.insecure_channel(f"127.0.0.1:{live.server.admin_port}") as channel,
    ):
        admin: Any = AdminServiceStub(channel)
        load = admin_pb2.LoadModelRequest(folder=str(toys["2"].path))
        unload = admin_pb2.UnloadModelRequest(model_name="toy", model_version="2")
        with Load(live.address, questions, 34, 2) as history:
            calls = [
                (admin.LoadModel if n % 2 else admin.UnloadModel).future(
                    load if n % 2 else unload, timeout=60
                )
                for n in range(24)
            ]
            codes = {call.code() for call in calls}
        assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}
        admin.LoadModel(load, timeout=60)
        assert [e.manifest.version for e in live.server.registry.engines()] == ["1", "2"]
        assert violations(history, questions.right, retryable=frozenset()) == []
        alive(live, history)


@pytest.mark.fault(30)
def test_a_lost_device_ends_the_server_in_error(
    running: Running, monkeypatch: pytest.MonkeyPatch, toys: dict[str, Toy], questions: Questions
) -> None:
    """The fault is what ONNX Runtime raises, so that all that decides of it is ours."""
    import onnxruntime

    def lost(*_: Any) -> None:
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0")

    with (
        running(bundles=(toys["1"].path,)) as live,
        grpc.insecure_channel(live.address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=30
        )
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        monkeypatch.setattr(onnxruntime.InferenceSession, "run", lost)
        outcome = questions.ask(channel, ("score", (0,)), "lost")
        assert outcome.code == "UNAVAILABLE"
        told_to_come_again(outcome.trailing)
        wait_until(live.server.device_lost.done)
        assert isinstance(live.server.device_lost.result(), DeviceLost)
        assert "CUDA" in str(live.server.device_lost.result())
        assert next(watch).status == NOT_SERVING


LOSE = """
import os
import onnxruntime
run = onnxruntime.InferenceSession.run
def lost(*asked):
    if os.path.exists(os.environ["CARD_LOST"]):
        raise RuntimeError("CUDA failure 719: unspecified launch failure ; GPU=0")
    return run(*asked)
onnxruntime.InferenceSession.run = lost
"""


@pytest.mark.fault(30)
@pytest.mark.parametrize("workers", [1, 2])
def test_and_its_process_says_so(
    workers: int, toys: dict[str, Toy], questions: Questions, tmp_path: Path
) -> None:
    # A worker imports its own runtime, so the fault is put into all by a module of the path.
    (tmp_path / "sitecustomize.py").write_text(LOSE)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    there = {"PYTHONPATH": path, "CARD_LOST": str(tmp_path / "lost")}
    flags = ("--bundle", toys["1"].path, "--port", 0, "--workers", workers)
    with served(tmp_path, *flags, environment=there) as server:
        address = server.address(workers)
        (tmp_path / "lost").touch()
        with grpc.insecure_channel(address) as channel:
            assert questions.ask(channel, ("score", (0,)), "lost").code == "UNAVAILABLE"
        assert server.process.wait(30) == 1
        last = server.path.read_text().splitlines()[-1]
        assert last.startswith("Error: ") and "lost" in last


@pytest.mark.fault(31)
def test_a_device_that_is_not_there_fails_loudly(toys: dict[str, Toy], tmp_path: Path) -> None:
    flags = ["--bundle", toys["1"].path, "--port", 0, "--device", "cuda:99"]
    ran = subprocess.run(
        [*COMMAND, *map(str, flags), "--metrics-port", "off"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("Error: device cuda:99 was asked for, but")


FALL_BACK = """
import onnxruntime
from likely import graphs
opened = onnxruntime.InferenceSession
def fallen(path, options, providers, **_):
    return opened(path, options, providers=[graphs.CPU])
onnxruntime.InferenceSession = fallen
onnxruntime.get_available_providers = lambda: [graphs.CUDA, graphs.CPU]
onnxruntime.preload_dlls = lambda: None
graphs.cuda_devices = lambda: 1
from likely.cli import main
main()
"""


@pytest.mark.fault(31)
def test_a_silent_fall_back_to_the_cpu_fails_loudly(toys: dict[str, Toy]) -> None:
    flags = ["serve", "--bundle", toys["1"].path, "--port", 0, "--device", "cuda"]
    ran = subprocess.run(
        [sys.executable, "-c", FALL_BACK, *map(str, flags), "--metrics-port", "off"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 1, ran.stderr
    said = ran.stderr.splitlines()[-1]
    assert said.startswith("Error: device cuda:0 was asked for, but the session runs on CPU")


def told_to_end(seed: int, toys: dict[str, Toy], questions: Questions, folder: Path) -> None:
    """SIGTERM at a random moment of full load: none that was accepted is lost."""
    rng = random.Random(seed)
    heedful = bool(seed % 2)
    # Long enough for every client to be told, also where none of them gets the processor at once.
    delay = rng.choice((2.5, 3)) if heedful else rng.choice((0, 0, 0.1))
    flags = ("--bundle", toys["1"].path, "--port", 0, "--drain-delay", delay)
    with served(folder, *flags) as server:
        address = server.address()
        with Load(address, questions, seed, rng.randint(3, 10), heedful=heedful) as history:
            wait_until(lambda: history.codes()["OK"] > 3)
            time.sleep(rng.uniform(0, 0.15))
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(40) == 0
        # Who heeds health loses nothing at all; others are told to come again.
        # gRPC itself cancels what comes after it stopped: nobody had accepted that.
        retryable = frozenset(() if heedful else {"UNAVAILABLE", "CANCELLED"})
        assert violations(history, questions.right, server.log(), retryable) == []
        order = [e["event"] for e in server.log() if e["event"] != "rpc"]
        assert order[-2:] == ["draining", "ended"]


def killed(seed: int, toys: dict[str, Toy], questions: Questions, folder: Path) -> None:
    """SIGKILL and restart under load: clients see only what invites another try."""
    rng = random.Random(seed)
    port = free_port()
    flags = ("--bundle", toys["1"].path, "--port", port)
    with served(folder, *flags) as server:
        address = server.address()
        with Load(address, questions, seed, rng.randint(3, 8)) as history:
            wait_until(lambda: history.codes()["OK"] > 3)
            time.sleep(rng.uniform(0, 0.15))
            server.process.kill()
            server.process.wait()
            with served(folder, *flags) as again:
                again.address()
                before = history.codes()["OK"]
                wait_until(lambda: history.codes()["OK"] > before + 5)
    assert violations(history, questions.right) == []


def changed(seed: int, toys: dict[str, Toy], questions: Questions, admin: Any, at: str) -> None:
    """Versions come and go under load: nobody notices but by the version that answers."""
    rng = random.Random(seed)
    with Load(at, questions, seed, rng.randint(2, 6)) as history:
        for _ in range(rng.randint(2, 5)):
            version = rng.choice("12")
            served_now = admin.ListVersions(admin_pb2.ListVersionsRequest()).versions
            names = [v.model_version for v in served_now if v.state == 2]
            match rng.choice(("load", "label", "rollback", "unload")):
                case "load":
                    folder = str(toys[version].path)
                    admin.LoadModel(admin_pb2.LoadModelRequest(folder=folder), timeout=60)
                case "label" if version in names:
                    admin.SetLabel(label("stable", rng.choice((version, ""))), timeout=60)
                case "rollback":
                    attempt(admin.Rollback, admin_pb2.RollbackRequest(model_name="toy"))
                case "unload" if len(names) == 2:
                    attempt(
                        admin.UnloadModel,
                        admin_pb2.UnloadModelRequest(model_name="toy", model_version=version),
                    )
            before = history.codes()["OK"]
            wait_until(partial(more, history, before + 3))
    assert violations(history, questions.right, retryable=frozenset()) == []


def label(name: str, version: str) -> admin_pb2.SetLabelRequest:
    return admin_pb2.SetLabelRequest(model_name="toy", label=name, model_version=version)


def attempt(call: Any, request: Any) -> None:
    """Makes a change that may be refused."""
    try:
        call(request, timeout=60)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.fault(36)
@pytest.mark.parametrize("seed", range(34))
def test_seeded_drains(
    seed: int, toys: dict[str, Toy], questions: Questions, tmp_path: Path
) -> None:
    told_to_end(seed, toys, questions, tmp_path)


@pytest.mark.slow
@pytest.mark.fault(37)
@pytest.mark.parametrize("seed", range(100, 133))
def test_seeded_kills(
    seed: int, toys: dict[str, Toy], questions: Questions, tmp_path: Path
) -> None:
    killed(seed, toys, questions, tmp_path)


@pytest.fixture(scope="module")
def changing(toys: dict[str, Toy], running: Running) -> Iterator[tuple[Any, str]]:
    """A server whose versions are changed; its admin and its address."""
    with (
        running(bundles=(toys["1"].path,), admin_port=0, lanes=1, max_batch=8) as live,
        grpc.insecure_channel(f"127.0.0.1:{live.server.admin_port}") as channel,
    ):
        yield AdminServiceStub(channel), live.address


@pytest.mark.fault(32)
@pytest.mark.parametrize("seed", range(200, 233))
def test_seeded_changes(
    seed: int, toys: dict[str, Toy], questions: Questions, changing: tuple[Any, str]
) -> None:
    changed(seed, toys, questions, *changing)


@pytest.mark.fault(36)
def test_a_second_signal_ends_now(toys: dict[str, Toy], tmp_path: Path) -> None:
    flags = ("--bundle", toys["1"].path, "--port", 0, "--drain-delay", 60)
    for workers in (1, 2):
        with served(tmp_path, *flags, "--workers", workers) as server:
            server.address(workers)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == -signal.SIGTERM
            assert time.monotonic() - began < 20
            where = server.address(workers)
            wait_until(partial(refused, where))


SLOW = """
import os
import time
import onnxruntime
opened = onnxruntime.InferenceSession.__init__
def slowly(self, *given, **more):
    if os.path.exists(os.environ["SLOW"]):
        open(os.environ["SLOW"] + ".begun", "w").close()
        time.sleep(120)
    opened(self, *given, **more)
onnxruntime.InferenceSession.__init__ = slowly
"""


@pytest.mark.fault(36)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_a_load_does_not_hold_up_the_end(
    first: bool, workers: int, toys: dict[str, Toy], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    slow, begun = tmp_path / "slow", tmp_path / "slow.begun"
    there = {"PYTHONPATH": path, "SLOW": str(slow)}
    flags = ("--bundle", toys["1"].path, "--port", 0, "--workers", workers, "--admin-port", 0)
    with (
        served(tmp_path, *flags, environment=there) as server,
        ThreadPoolExecutor() as pool,
        ExitStack() as stack,
    ):
        if first:
            slow.touch()
        else:
            server.address(workers)
            slow.touch()
            event = "admin" if workers > 1 else "listening"
            port = server.wait_for(event)["port" if workers > 1 else "admin"]
            channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
            load = admin_pb2.LoadModelRequest(folder=str(toys["2"].path))
            asked = pool.submit(AdminServiceStub(channel).LoadModel, load, timeout=60)
        wait_until(begun.exists)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 15
        assert server.log()[-1]["event"] == "ended"
        if not first:
            with pytest.raises(grpc.RpcError) as caught:
                asked.result()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@contextmanager
def loading(
    toys: dict[str, Toy], watched: Path, folder: Path, workers: int, *flags: object
) -> Iterator[tuple[Served, str]]:
    """A server all of whose workers are at a load that takes long, and its address."""
    (folder / "sitecustomize.py").write_text(SLOW + LOSE)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    slow, lost = str(folder / "slow"), str(folder / "lost")
    there = {"PYTHONPATH": path, "SLOW": slow, "CARD_LOST": lost}
    put(toys["1"].path, watched / "1")
    flags = ("--watch", watched, "--watch-seconds", 0.1, "--port", 0, "--workers", workers, *flags)
    with served(folder, *flags, environment=there) as server:
        address = server.address(workers)
        Path(slow).touch()
        put(toys["2"].path, watched / "2")
        wait_until(Path(f"{slow}.begun").exists)
        time.sleep(1)  # for the other workers, too
        yield server, address


@pytest.mark.fault(36)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_load_does_not_hold_up_a_second_signal(
    number: signal.Signals, toys: dict[str, Toy], watched: Path, tmp_path: Path
) -> None:
    with loading(toys, watched, tmp_path, 1, "--drain-delay", 60) as (server, _):
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        server.process.send_signal(number)
        assert server.process.wait(20) == -number


@pytest.mark.fault(30)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_load_does_not_hold_up_who_lost_the_device(
    workers: int,
    toys: dict[str, Toy],
    watched: Path,
    questions: Questions,
    tmp_path: Path,
) -> None:
    with loading(toys, watched, tmp_path, workers) as (server, address):
        (tmp_path / "lost").touch()
        with grpc.insecure_channel(address) as channel:
            assert questions.ask(channel, ("score", (0,)), "lost").code == "UNAVAILABLE"
        assert server.process.wait(20) == 1
        assert "lost" in server.path.read_text().splitlines()[-1]


@pytest.mark.fault(36)
def test_so_it_does_as_the_first_process_of_a_container(
    toys: dict[str, Toy], tmp_path: Path
) -> None:
    flags = ("--bundle", toys["1"].path, "--port", 0, "--drain-delay", 60)
    with served(tmp_path, *flags, before=first_process()) as server:
        server.address()
        (first,) = children(server)
        os.kill(first, signal.SIGTERM)
        server.wait_for("draining")
        os.kill(first, signal.SIGTERM)
        assert server.process.wait(20) == 128 + signal.SIGTERM


@pytest.mark.fault(36)
def test_a_worker_that_hears_of_both_signals_at_once_ends_now(
    toys: dict[str, Toy], tmp_path: Path
) -> None:
    flags = ("--bundle", toys["1"].path, "--port", 0, "--drain-delay", 60, "--workers", 2)
    with served(tmp_path, *flags) as server:
        where = server.address(2)
        slow, _ = children(server)
        os.kill(slow, signal.SIGSTOP)
        try:
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == -signal.SIGTERM
        finally:
            os.kill(slow, signal.SIGCONT)
        wait_until(partial(refused, where))


def refused(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


@pytest.mark.fault(36)
def test_queued_requests_are_finished_too(
    toys: dict[str, Toy], running: Running, questions: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Session.run
    arrived, release = threading.Event(), threading.Event()

    def slow(*args: Any, **more: Any) -> Any:
        arrived.set()
        release.wait(30)
        return run(*args, **more)

    with running(bundles=(toys["1"].path,), lanes=1, max_batch=1) as live:
        monkeypatch.setattr(Session, "run", slow)
        outcomes: list[str] = []

        def ask() -> None:
            with grpc.insecure_channel(live.address) as channel:
                outcomes.append(questions.ask(channel, ("score", (0, 1, 2)), "queued").code)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        assert arrived.wait(30)
        wait_until(lambda: inside(live) == 8)
        stopping = asyncio.run_coroutine_threadsafe(live.server.stop(20), live.loop)
        time.sleep(0.3)
        assert not stopping.done()
        release.set()
        for thread in threads:
            thread.join()
        stopping.result(30)
        assert outcomes == ["OK"] * 8


def inside(live: Live) -> int:
    with urllib.request.urlopen(live.metrics_url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    name = 'likely_requests_in_flight{method="Score"}'
    return int(float(next((x.split()[1] for x in lines if x.startswith(name)), "0")))


@pytest.mark.fault(36)
def test_what_does_not_end_in_time_is_told_to_come_again(
    toys: dict[str, Toy], running: Running, questions: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is who comes when the end has begun."""

    async def stuck(*_: Any, **__: Any) -> None:
        await asyncio.sleep(60)

    # What is told may come late, but it comes.
    monkeypatch.setattr(serving, "CUT_OFF_SECONDS", 30.0)
    with running(bundles=(toys["1"].path,)) as live:
        monkeypatch.setattr(live.server.registry.find("toy"), "score", stuck)
        outcomes: list[Outcome] = []

        def ask() -> None:
            with grpc.insecure_channel(live.address, options=ALONE) as channel:
                outcomes.append(questions.ask(channel, ("score", (0,)), "stuck"))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        wait_until(lambda: inside(live) == 1)
        live.loop.call_soon_threadsafe(live.server._guard.door.close)
        threads[1].start()
        wait_until(lambda: inside(live) == 2)
        live.run(live.server.stop(0.1))
        for thread in threads:
            thread.join()
        assert [outcome.code for outcome in outcomes] == ["UNAVAILABLE"] * 2
        for outcome in outcomes:
            told_to_come_again(outcome.trailing)
        ended = [e for e in events(live.log.getvalue()) if e.get("request_id") == "stuck"]
        assert sorted(bool(e.get("accepted", True)) for e in ended) == [False, True]


@pytest.mark.fault(37)
def test_one_killed_worker_costs_no_other_request(
    toys: dict[str, Toy], questions: Questions, tmp_path: Path
) -> None:
    flags = ("--bundle", toys["1"].path, "--port", 0, "--workers", 2)
    with served(tmp_path, *flags, "--metrics-port", 0) as server:
        address = server.address(2)
        metrics = f"http://127.0.0.1:{server.wait_for('serving', workers=2)['metrics']}/metrics"
        with Load(address, questions, 37, 10) as history:
            wait_until(lambda: history.codes()["OK"] > 50)
            first, _ = children(server)
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: len(children(server)) == 2 and all_ready(metrics))
            before = history.codes()["OK"]
            wait_until(lambda: history.codes()["OK"] > before + 50)
        assert violations(history, questions.right) == []
        # Each connection of the dead worker fails once, with the request that was on it.
        assert history.codes()["UNAVAILABLE"] <= 2 * 10
        with urllib.request.urlopen(metrics, timeout=10) as answer:
            text = answer.read().decode()
        assert "likely_worker_restarts_total 1.0" in text
        counted = sum(
            float(line.split()[1])
            for line in text.splitlines()
            if line.startswith("likely_requests_total") and 'code="OK"' in line
        )
        # Every answer that a client has was counted, the dead worker's too.
        assert counted >= history.codes()["OK"]
        in_flight = [x for x in text.splitlines() if x.startswith("likely_requests_in_flight{")]
        assert {line.split()[1] for line in in_flight} == {"0.0"}
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0


@pytest.mark.fault(37)
def test_a_worker_that_is_begun_anew_serves_what_all_others_do(
    toys: dict[str, Toy], tmp_path: Path
) -> None:
    config = tmp_path / "settings.toml"
    config.write_text(f'bundles = ["{toys["1"].path}"]')
    flags = ("--config", config, "--port", 0, "--workers", 2, "--admin-port", 0)
    with served(tmp_path, *flags, "--metrics-port", 0) as server:
        address = server.address(2)
        metrics = f"http://127.0.0.1:{server.wait_for('serving', workers=2)['metrics']}/metrics"
        config.unlink()  # what was read once is not read again
        os.kill(children(server)[0], signal.SIGKILL)
        server.wait_for("worker ended")
        with grpc.insecure_channel(f"127.0.0.1:{server.wait_for('admin')['port']}") as channel:
            load = admin_pb2.LoadModelRequest(folder=str(toys["2"].path))
            AdminServiceStub(channel).LoadModel(load, timeout=60)
        wait_until(lambda: "likely_workers 2.0" in read(metrics))
        versions = Counter(version_of(address) for _ in range(30))
        assert set(versions) == {"2"}


@pytest.mark.fault(37)
def test_a_worker_that_is_begun_anew_follows_the_watched_folder_as_the_others_do(
    toys: dict[str, Toy], watched: Path, tmp_path: Path
) -> None:
    for version, toy in toys.items():
        put(toy.path, watched / version)
    flags = ("--watch", watched, "--watch-seconds", 0.1, "--port", 0, "--workers", 2)
    with served(tmp_path, *flags, "--admin-port", 0, "--metrics-port", 0) as server:
        address = server.address(2)
        metrics = f"http://127.0.0.1:{server.wait_for('serving', workers=2)['metrics']}/metrics"

        def begun_anew() -> bool:
            return "likely_workers 2.0" in read(metrics)

        def kill() -> None:
            os.kill(children(server)[0], signal.SIGKILL)
            wait_until(lambda: not begun_anew())

        with grpc.insecure_channel(f"127.0.0.1:{server.wait_for('admin')['port']}") as channel:
            unload = admin_pb2.UnloadModelRequest(model_name="toy", model_version="2")
            AdminServiceStub(channel).UnloadModel(unload, timeout=60)
        opened = loads(server, "2")
        assert opened == 2
        kill()
        wait_until(begun_anew)
        assert loads(server, "2") == opened  # there might be no memory for both
        assert {version_of(address) for _ in range(30)} == {"1"}
        # The volume goes: a new worker would have nothing to serve.
        watched.rename(tmp_path / "away")
        (watched / "refused").mkdir(parents=True)
        (watched / "refused" / MANIFEST).touch()
        kill()
        server.wait_for("worker waits for the watched folder")
        assert {version_of(address) for _ in range(10)} == {"1"}
        shutil.rmtree(watched)
        (tmp_path / "away").rename(watched)
        wait_until(begun_anew)
        assert {version_of(address) for _ in range(30)} == {"1"}
        # Put there anew, it is served by all, those begun later too.
        shutil.rmtree(watched / "2")
        time.sleep(0.5)
        put(toys["2"].path, watched / "2")
        wait_until(lambda: {version_of(address) for _ in range(30)} == {"2"})
        kill()
        wait_until(begun_anew)
        assert {version_of(address) for _ in range(30)} == {"2"}


def loads(server: Served, version: str) -> int:
    """How often its workers have loaded that version."""
    return sum(e["event"] == "loaded" and e["version"] == version for e in server.log())


def version_of(address: str) -> str:
    """The version that answers on a connection of its own."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    with grpc.insecure_channel(address, options=options) as channel:
        images = Images(data=bytes(9), shape=(1, 1, 3, 3))
        request = ScoreRequest(model_name="toy", images=images)
        return str(ScoringServiceStub(channel).Score(request, timeout=30).model_version)


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.fault(36)
def test_a_worker_that_is_being_begun_does_not_spoil_the_end(
    toys: dict[str, Toy], tmp_path: Path
) -> None:
    with served(tmp_path, "--bundle", toys["1"].path, "--port", 0, "--workers", 2) as server:
        server.address(2)
        os.kill(children(server)[0], signal.SIGKILL)
        server.wait_for("worker ended")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0


def children(server: Served) -> list[int]:
    pid = server.process.pid
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(one) for one in path.read_text().split()]


def all_ready(metrics: str) -> bool:
    """Whether the worker that died has been begun anew."""
    with urllib.request.urlopen(metrics, timeout=10) as answer:
        text = answer.read().decode()
    return "likely_workers 2.0" in text and "likely_worker_restarts_total 1.0" in text
