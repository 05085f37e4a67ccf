"""Every alert is fired by a fault and resolved by its end, through a real Prometheus."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import yaml

from likely import codec
from likely.ranking import RANKED
from likely.v1.admin_pb2 import LoadModelRequest, ResetDriftRequest, UnloadModelRequest
from likely.v1.admin_pb2_grpc import AdminServiceStub
from likely.v1.scoring_pb2 import ScoreRequest
from tests.faults.alive import calling
from tests.faults.served import served
from tests.faults.test_batching import rig
from tests.monitoring.conftest import RULES, Watch

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy

pytestmark = pytest.mark.timeout(400)


class Fault:
    """Sees to it that an alert fires, and that it is resolved."""

    def __init__(self, watch: Watch, name: str) -> None:
        self._watch = watch
        self._name = name

    def fires(
        self, during: Callable[[], object] | None = None, about: str | None = None
    ) -> dict[str, Any]:
        """What it says, once it fires about that instance; `during` is done all the while."""
        alert: dict[str, Any] = self._watch.wait_for(self._name, "firing", during, about)
        return alert

    def is_resolved(
        self, during: Callable[[], object] | None = None, about: str | None = None
    ) -> None:
        """Returns once it does not fire any more."""
        self._watch.wait_for(self._name, "resolved", during, about)


@pytest.fixture
def alert(watch: Watch) -> Callable[[str], Fault]:
    """Follows an alert."""
    return lambda name: Fault(watch, name)


def score(live: Live, x: Any) -> None:
    with calling(live.address) as caller:
        caller.ask(ScoreRequest(model_name="toy", images=codec.images(x)))


def asked(live: Live, x: Any) -> Callable[[], None]:
    """Asks the same pictures again, whatever comes of it."""
    request = ScoreRequest(model_name="toy", images=codec.images(x))

    def ask() -> None:
        with calling(live.address) as caller:
            try:
                caller.ask(request)
            except grpc.RpcError as error:
                assert error.code() is not grpc.StatusCode.INVALID_ARGUMENT

    return ask


def admin(live: Live, request: Any) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{live.server.admin_port}") as channel:
        method = type(request).__name__.removesuffix("Request")
        getattr(AdminServiceStub(channel), method)(request, timeout=30)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextmanager
def flood(live: Live, x: Any, clients: int) -> Iterator[None]:
    """So many clients ask without pause."""
    end = threading.Event()

    def run() -> None:
        ask = asked(live, x)
        while not end.is_set():
            ask()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


def test_down(running: Running, watch: Watch, alert: Callable[[str], Fault]) -> None:
    port = free_port()
    with watch.of(port):
        alert("LikelyDown").fires(about=f"127.0.0.1:{port}")
        with running(metrics_port=port):
            alert("LikelyDown").is_resolved(about=f"127.0.0.1:{port}")
    with watch.of():
        alert("LikelyDown").fires(about="")
    with watch.of(port):
        alert("LikelyDown").is_resolved(about="")


def test_not_ready(running: Running, watch: Watch, alert: Callable[[str], Fault]) -> None:
    with running(load=False) as live, watch.of(live.server.metrics_port):
        alert("LikelyNotReady").fires()
        live.run(live.server.load())
        alert("LikelyNotReady").is_resolved()


def test_an_unhealthy_version(
    running: Running, watch: Watch, toy: Toy, alert: Callable[[str], Fault]
) -> None:
    x = toy.draw(np.random.default_rng(1), 2)
    with running(admin_port=0, withheld_answers=3) as live, watch.of(live.server.metrics_port):

        def spoil(_: Any, found: dict[str, Any]) -> None:
            found[RANKED] = found[RANKED] * np.nan

        rig(live).change = spoil
        alert("LikelyVersionUnhealthy").fires(asked(live, x))
        admin(live, UnloadModelRequest(model_name="toy", model_version="1.0"))
        alert("LikelyVersionUnhealthy").is_resolved()


def test_a_refused_bundle(
    running: Running, watch: Watch, toy: Toy, tmp_path: Path, alert: Callable[[str], Fault]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(toy.path, folder)
    whole = (folder / "density.onnx").read_bytes()
    (folder / "density.onnx").write_bytes(whole[:-10])
    with running(admin_port=0) as live, watch.of(live.server.metrics_port):
        with pytest.raises(grpc.RpcError):
            admin(live, LoadModelRequest(folder=str(folder)))
        said = alert("LikelyBundleRefused").fires()["annotations"]["summary"]
        assert said.endswith("refuses 1 bundles")
        (folder / "density.onnx").write_bytes(whole)
        admin(live, LoadModelRequest(folder=str(folder)))
        alert("LikelyBundleRefused").is_resolved()


def test_a_lost_folder(
    running: Running, watch: Watch, toy: Toy, tmp_path: Path, alert: Callable[[str], Fault]
) -> None:
    shutil.copytree(toy.path, tmp_path / "bundle")
    with (
        running(bundles=(), watch=tmp_path, watch_seconds=0.1) as live,
        watch.of(live.server.metrics_port),
    ):
        (tmp_path / "bundle").rename(tmp_path / ".bundle")
        alert("LikelyWatchLost").fires()
        (tmp_path / ".bundle").rename(tmp_path / "bundle")
        alert("LikelyWatchLost").is_resolved()


def test_a_lost_worker(
    watch: Watch, toy: Toy, tmp_path: Path, alert: Callable[[str], Fault]
) -> None:
    flags = ("--bundle", toy.path, "--port", 0, "--workers", 2, "--metrics-port", 0)
    with served(tmp_path, *flags) as server:
        event = server.wait_for("serving", workers=2)
        with watch.of(event["metrics"]):
            # Of what happened before the first scrape, nobody sees an increase.
            watch.knows("likely_worker_restarts_total", event["metrics"])
            children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
            _, *others = children.read_text().split()

            def kill() -> None:  # those, too, that are begun in its place: one comes back too soon
                for worker in set(children.read_text().split()) - {*others}:
                    with suppress(ProcessLookupError):
                        os.kill(int(worker), signal.SIGKILL)

            alert("LikelyWorkersMissing").fires(kill)
            alert("LikelyWorkersMissing").is_resolved()
            alert("LikelyWorkerLost").fires()
            alert("LikelyWorkerLost").is_resolved()


def test_errors(running: Running, watch: Watch, toy: Toy, alert: Callable[[str], Fault]) -> None:
    x = toy.draw(np.random.default_rng(2), 2)
    with running() as live, watch.of(live.server.metrics_port):
        rigged = rig(live)

        def fail(_: Any) -> None:
            raise RuntimeError("injected")

        rigged.fails = fail
        said = alert("LikelyErrors").fires(asked(live, x))
        assert said["labels"]["method"] == "Score"
        rigged.fails = lambda _: None
        alert("LikelyErrors").is_resolved(asked(live, x))


def test_more_than_it_can_take(
    running: Running, watch: Watch, toy: Toy, alert: Callable[[str], Fault]
) -> None:
    x = toy.draw(np.random.default_rng(3), 4)
    with running(max_batch=4, queued_images=8) as live, watch.of(live.server.metrics_port):
        rig(live).pause = 0.05
        with flood(live, x, 8):
            said = alert("LikelyOverloaded").fires()
        assert said["labels"]["model"] == "toy"
        alert("LikelyOverloaded").is_resolved(asked(live, x))


def test_a_slow_queue(
    running: Running, watch: Watch, toy: Toy, alert: Callable[[str], Fault]
) -> None:
    x = toy.draw(np.random.default_rng(4), 4)
    with running(max_batch=4, queued_images=400) as live, watch.of(live.server.metrics_port):
        rigged = rig(live)
        rigged.pause = 0.4
        with flood(live, x, 8):
            alert("LikelyQueueSlow").fires()
        rigged.pause = 0
        alert("LikelyQueueSlow").is_resolved(asked(live, x))


def test_outliers(running: Running, watch: Watch, toy: Toy, alert: Callable[[str], Fault]) -> None:
    rng = np.random.default_rng(5)
    unlike = np.repeat(toy.log_q.argmin(-1).astype(np.uint8)[None], 50, 0)
    with running() as live, watch.of(live.server.metrics_port):
        said = alert("LikelyOutliers").fires(asked(live, unlike))
        assert said["labels"]["model"] == "toy"
        alert("LikelyOutliers").is_resolved(lambda: score(live, toy.draw(rng, 50)))


def test_drift(running: Running, watch: Watch, toy: Toy, alert: Callable[[str], Fault]) -> None:
    rng = np.random.default_rng(6)
    x = toy.draw(rng, 90)
    x[rng.random(90) < 0.3] = toy.log_q.argmin(-1)
    with running(admin_port=0) as live, watch.of(live.server.metrics_port):
        said = alert("LikelyDrift").fires(asked(live, x))
        assert said["labels"]["version"] == "1.0"
        admin(live, ResetDriftRequest(model_name="toy"))
        alert("LikelyDrift").is_resolved()


def test_no_alert_is_left_out() -> None:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    # Quarters of an hour and shares of traffic: told by made-up series in alerts_test.yaml.
    by_rules_alone = {"LikelyLate", "LikelyFaults"}
    named = {rule["alert"] for group in groups for rule in group["rules"]} - by_rules_alone
    text = Path(__file__).read_text()
    for wait in ("fires", "is_resolved"):
        assert set(re.findall(rf'alert\("(\w+)"\)\.{wait}\(', text)) == named
