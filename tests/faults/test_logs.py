"""Faults of the log: its disk is full, or who read it is gone."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from likely import logs
from likely.v1.images_pb2 import Images
from likely.v1.models_pb2 import ListModelsRequest
from likely.v1.models_pb2_grpc import ModelServiceStub
from likely.v1.scoring_pb2 import ScoreRequest
from likely.v1.scoring_pb2_grpc import ScoringServiceStub
from tests.faults.served import ALONE, COMMAND, QUIET, wait_until

if TYPE_CHECKING:
    from tests.conftest import Running, Toy

FULL = "/dev/full"
WRONG = ScoreRequest(model_name="toy", images=Images(data=b"\xff" * 9, shape=(1, 1, 3, 3)))
IDLE = {'likely_requests_in_flight{method="Score"} 0.0'}


class Hindered(io.StringIO):
    """A stream that fails."""

    def __init__(self, hindrance: Exception) -> None:
        super().__init__()
        self._hindrance = hindrance

    def flush(self) -> None:
        """Fails."""
        raise self._hindrance


@pytest.mark.parametrize(
    "hindrance", [OSError(28, "No space left on device"), BrokenPipeError(), ValueError("closed")]
)
def test_events_that_cannot_be_written_are_lost(hindrance: Exception) -> None:
    log = logs.logger("debug", "json", Hindered(hindrance))
    for name in ("debug", "info", "warning", "error", "critical"):
        getattr(log.bind(worker=1), name)("told", exc_info=hindrance)


def test_a_request_is_counted_though_its_end_cannot_be_told(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def info(self, *_: object, **__: object) -> None:
            raise RuntimeError("nothing can be told")

    with running() as live, grpc.insecure_channel(live.address) as channel:
        monkeypatch.setattr(live.server._guard, "_log", Broken())
        with pytest.raises(grpc.RpcError):
            ScoringServiceStub(channel).Score(WRONG, timeout=30)
        assert set(in_flight(live.metrics_url)) == IDLE


@contextmanager
def begun(stderr: int, port: int, *flags: object) -> Iterator[subprocess.Popen[bytes]]:
    """`likely serve` on that port, with that standard error."""
    command = [*COMMAND, *QUIET, "--port", port, *flags]
    # Or the end would find nothing that is held back.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        list(map(str, command)), stderr=stderr, stdout=subprocess.DEVNULL, env=environment
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def unread(writing: str) -> Iterator[int]:
    """What cannot be written to: a full disk, or a pipe that nobody reads any more."""
    if writing == "full":
        file = os.open(FULL, os.O_WRONLY)
    else:
        reading, file = os.pipe()
        os.close(reading)
    try:
        yield file
    finally:
        os.close(file)


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def in_flight(url: str) -> list[str]:
    """What metrics tell of the Score requests that have not ended."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return [n for n in lines if n.startswith("likely_requests_in_flight{") and '"Score"' in n]


def refused(channel: grpc.Channel) -> None:
    """A request that is wrong is told so, ten times."""
    for _ in range(10):
        with pytest.raises(grpc.RpcError) as caught:
            ScoringServiceStub(channel).Score(WRONG, timeout=30, wait_for_ready=True)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()


@pytest.mark.parametrize("writing", ["full", "pipe"])
def test_a_server_serves_and_ends_well_though_its_log_cannot_be_written(
    writing: str, toy: Toy
) -> None:
    port, metrics = free_ports(2)
    flags = ("--bundle", toy.path, "--metrics-port", metrics)
    address = f"127.0.0.1:{port}"
    with (
        unread(writing) as stderr,
        begun(stderr, port, *flags) as process,
        grpc.insecure_channel(address, ALONE) as channel,
    ):
        wait_until(partial(answers_or_ended, process, channel), 60)
        refused(channel)
        assert set(in_flight(f"http://127.0.0.1:{metrics}/metrics")) == IDLE
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def answers_or_ended(process: subprocess.Popen[bytes], channel: grpc.Channel) -> bool:
    """Whether the server serves; fails if it has ended."""
    assert process.poll() is None
    with suppress(grpc.RpcError):
        listed = ModelServiceStub(channel).ListModels(ListModelsRequest(), timeout=1)
        return len(listed.models) == 1
    return False


def children(process: subprocess.Popen[bytes]) -> set[int]:
    """The processes that it began."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return set(map(int, path.read_text().split()))


def test_workers_are_begun_anew_though_it_cannot_be_told(toy: Toy) -> None:
    reading, writing = os.pipe()
    (port,) = free_ports(1)
    with (
        begun(writing, port, "--bundle", toy.path, "--workers", 2) as process,
        grpc.insecure_channel(f"127.0.0.1:{port}", ALONE) as channel,
    ):
        os.close(writing)
        with os.fdopen(reading) as log:
            events = (json.loads(line) for line in log if line.startswith("{"))
            assert any(event["event"] == "serving" and "workers" in event for event in events)
        before = children(process)
        assert len(before) == 2
        os.kill(min(before), signal.SIGKILL)
        wait_until(lambda: len(children(process) - before) == 1, 60)
        wait_until(partial(answers_or_ended, process, channel), 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_an_error_keeps_its_exit_code_though_it_cannot_be_told(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    for writing in ("full", "pipe"):
        with unread(writing) as stderr, begun(stderr, port, "--bundle", tmp_path) as process:
            assert process.wait(60) == 1
