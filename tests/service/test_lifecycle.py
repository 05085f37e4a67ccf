"""What is served changes while it is served: labels, versions, folders, ports."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from likely import Client
from likely.bundle import MANIFEST, Bundle
from likely.engine import Engine
from likely.errors import ModelNotFound, SettingsError, Unavailable
from likely.v1 import admin_pb2
from likely.v1.admin_pb2_grpc import AdminServiceStub
from likely.versions import loading, watch
from likely.versions.loading import Loader
from likely.versions.watch import scan

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy

SERVING = admin_pb2.VERSION_STATE_SERVING


@pytest.fixture(scope="module")
def toys(make_toy: Callable[..., Toy]) -> dict[str, Toy]:
    return {version: make_toy(version=version, seed=int(version)) for version in ("1", "2")}


class Admin:
    """The admin RPCs of a server, and its client."""

    def __init__(self, live: Live, channel: grpc.Channel, client: Client) -> None:
        self.live = live
        self.client = client
        self._stub: Any = AdminServiceStub(channel)

    def listed(self) -> list[Any]:
        answer = self._stub.ListVersions(admin_pb2.ListVersionsRequest(), timeout=30)
        return list(answer.versions)

    def versions(self) -> dict[str, Any]:
        return {version.model_version: version for version in self.listed()}

    def load(self, folder: Path | str) -> Any:
        request = admin_pb2.LoadModelRequest(folder=str(folder))
        return self._stub.LoadModel(request, timeout=60).version

    def unload(self, version: str, name: str = "toy") -> None:
        request = admin_pb2.UnloadModelRequest(model_name=name, model_version=version)
        self._stub.UnloadModel(request, timeout=30)

    def label(self, label: str, version: str) -> None:
        request = admin_pb2.SetLabelRequest(model_name="toy", label=label, model_version=version)
        self._stub.SetLabel(request, timeout=30)

    def rollback(self) -> Any:
        return self._stub.Rollback(admin_pb2.RollbackRequest(model_name="toy"), timeout=60).version

    def answers(self, version: str | None = None) -> str:
        """The version that answers a request for that one; None is the default."""
        return self.client.score([[[0] * 3] * 3], model="toy", version=version).model_version


@contextmanager
def administered(running: Running, **settings: Any) -> Iterator[Admin]:
    with (
        running(admin_port=0, **settings) as live,
        grpc.insecure_channel(f"127.0.0.1:{live.server.admin_port}") as channel,
        Client(live.address) as client,
    ):
        yield Admin(live, channel, client)


def refusal(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    code: grpc.StatusCode = caught.value.code()
    return code


def eventually(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def both(toys: dict[str, Toy]) -> tuple[Path, ...]:
    return tuple(toy.path for toy in toys.values())


def test_the_log_tells_how_a_version_runs(running: Running, toys: dict[str, Toy]) -> None:
    with administered(running, bundles=(toys["1"].path,), max_batch=8, lanes=1) as admin:
        admin.load(toys["2"].path)
        lines = [json.loads(line) for line in admin.live.log.getvalue().splitlines()]
        for event in ("model", "loaded"):
            (entry,) = [line for line in lines if line["event"] == event]
            assert entry["lanes"] == 1
            assert entry["graphs"]["density"]["rows"] == 8
            assert entry["graphs"]["density"]["alone_on_all_cores"] is False


def test_labels_name_versions(running: Running, toys: dict[str, Toy]) -> None:
    with administered(running, bundles=both(toys), labels=("toy:stable=1",)) as admin:
        assert admin.answers() == "1"
        admin.label("canary", "2")
        assert [admin.answers(v) for v in ("stable", "canary", "1", "2")] == ["1", "2", "1", "2"]
        models = {model.version: model.version_labels for model in admin.client.models()}
        assert models == {"1": ("stable",), "2": ("canary",)}
        listed = {v: (list(m.labels), m.is_default) for v, m in admin.versions().items()}
        assert listed == {"1": (["stable"], True), "2": (["canary"], False)}
        admin.label("stable", "")
        assert admin.answers() == "2"
        with pytest.raises(ModelNotFound, match="toy@stable"):
            admin.answers("stable")


def test_a_label_on_what_is_not_there_is_refused(running: Running, toys: dict[str, Toy]) -> None:
    with administered(running, bundles=both(toys)) as admin:
        assert refusal(partial(admin.label, "stable", "3")) is grpc.StatusCode.NOT_FOUND
        assert refusal(partial(admin.label, "best", "1")) is grpc.StatusCode.INVALID_ARGUMENT
    sentence = "labels names toy:stable=3; no toy@3"
    with (
        pytest.raises(SettingsError, match=sentence),
        running(bundles=both(toys), labels=("toy:stable=3",)),
    ):
        pass


def test_a_version_is_loaded_and_unloaded(running: Running, toys: dict[str, Toy]) -> None:
    with administered(running, bundles=(toys["1"].path,)) as admin:
        assert admin.load(toys["2"].path).model_version == "2"
        assert admin.load(toys["2"].path).is_default  # again, which changes nothing
        assert (admin.answers(), admin.answers("1")) == ("2", "1")
        admin.label("canary", "2")
        assert refusal(partial(admin.unload, "2")) is grpc.StatusCode.FAILED_PRECONDITION
        assert refusal(partial(admin.unload, "canary")) is grpc.StatusCode.NOT_FOUND
        admin.label("canary", "")
        admin.unload("2")
        assert set(admin.versions()) == {"1"}
        assert refusal(partial(admin.unload, "2")) is grpc.StatusCode.NOT_FOUND
        assert admin.answers() == "1"


def test_a_version_that_is_called_as_a_label_is_refused_and_freed(
    running: Running,
    make_toy: Callable[..., Toy],
    toys: dict[str, Toy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed, close = list[str](), Engine.close

    def noted(engine: Engine) -> None:
        closed.append(engine.manifest.version)
        close(engine)

    monkeypatch.setattr(Engine, "close", noted)
    with administered(running, bundles=(toys["1"].path,)) as admin:
        odd = make_toy(version="stable")
        code = refusal(partial(admin.load, odd.path))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert closed == ["stable"]
        assert admin.answers() == "1"


def test_a_rollback_goes_one_change_back(
    running: Running, toys: dict[str, Toy], tmp_path: Path
) -> None:
    second = tmp_path / "second"
    shutil.copytree(toys["2"].path, second)
    with administered(running, bundles=(toys["1"].path,)) as admin:
        assert refusal(admin.rollback) is grpc.StatusCode.FAILED_PRECONDITION
        admin.load(second)
        assert admin.rollback().labels == ["stable"]
        assert admin.answers() == "1"
        assert refusal(admin.rollback) is grpc.StatusCode.FAILED_PRECONDITION
        admin.label("stable", "2")
        admin.unload("1")
        assert admin.rollback().model_version == "1"  # loaded again from its folder
        assert admin.answers() == "1"
        admin.label("stable", "2")
        admin.label("stable", "1")
        admin.unload("2")
        shutil.rmtree(second)
        assert refusal(admin.rollback) is grpc.StatusCode.FAILED_PRECONDITION
        assert admin.answers() == "1"


def test_a_rollback_to_what_cannot_be_read_is_refused_as_loading_it_is(
    running: Running, toys: dict[str, Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with administered(running, bundles=(toys["1"].path,)) as admin:
        admin.load(toys["2"].path)
        admin.label("stable", "2")
        admin.unload("1")
        refusals = set()
        monkeypatch.setattr("likely.bundle.folder.hashlib.file_digest", failing)
        for change in (partial(admin.load, toys["1"].path), admin.rollback):
            with pytest.raises(grpc.RpcError) as caught:
                change()
            refusals.add((caught.value.code(), caught.value.details()))
        sentence = f"{toys['1'].path} cannot be read"
        assert refusals == {(grpc.StatusCode.FAILED_PRECONDITION, sentence)}
        monkeypatch.undo()
        assert admin.rollback().model_version == "1"


def test_a_rollback_leads_to_the_very_bundle_that_answered(
    running: Running, make_toy: Callable[..., Toy], toys: dict[str, Toy]
) -> None:
    other = make_toy("toy", "1", seed=9)
    with administered(running, bundles=(toys["1"].path,)) as admin:
        admin.load(toys["2"].path)
        admin.unload("1")
        admin.load(other.path)
        assert refusal(admin.rollback) is grpc.StatusCode.FAILED_PRECONDITION
        assert admin.answers() == "2"


@pytest.mark.parametrize("folder", ["", "bundles/toy", "/no/such/folder", "/\0"])
def test_no_folder_no_bundle(running: Running, toys: dict[str, Toy], folder: str) -> None:
    with administered(running, bundles=(toys["1"].path,)) as admin:
        code = refusal(partial(admin.load, folder))
        absolute = folder == "/no/such/folder"
        wanted = "FAILED_PRECONDITION" if absolute else "INVALID_ARGUMENT"
        assert code is grpc.StatusCode[wanted]


def test_a_long_text_is_refused_and_the_caller_told_so(
    running: Running, toys: dict[str, Toy]
) -> None:
    with administered(running, bundles=(toys["1"].path,)) as admin:
        for change, code in (
            (partial(admin.label, "é" * 10_000, "1"), "INVALID_ARGUMENT"),
            (partial(admin.label, "stable", "é" * 10_000), "NOT_FOUND"),
            (partial(admin.load, "/" + "é" * 2000), "FAILED_PRECONDITION"),
            (partial(admin.load, "/" + "é" * 2048), "INVALID_ARGUMENT"),
        ):
            assert refusal(change) is grpc.StatusCode[code]


def test_a_watched_folder_is_followed(
    running: Running, toys: dict[str, Toy], tmp_path: Path
) -> None:
    versions = tmp_path / "toy"
    shutil.copytree(toys["1"].path, versions / "1")
    (tmp_path / "empty").mkdir()
    shutil.copytree(toys["2"].path, tmp_path / ".hidden")
    with administered(running, bundles=(), watch=tmp_path, watch_seconds=0.02) as admin:
        assert set(admin.versions()) == {"1"}
        (tmp_path / ".hidden").rename(versions / "2")
        eventually(lambda: set(admin.versions()) == {"1", "2"})
        admin.label("stable", "1")
        shutil.rmtree(versions / "1")
        time.sleep(0.3)
        assert admin.answers() == "1"  # kept, for its label
        admin.label("stable", "")
        eventually(lambda: set(admin.versions()) == {"2"})
        # The folder itself goes, as when a volume is unmounted: nothing is unloaded.
        tmp_path.rename(tmp_path.with_name("away"))
        time.sleep(0.3)
        assert admin.answers() == "2"
        tmp_path.with_name("away").rename(tmp_path)


def test_the_watch_outlives_a_bundle_that_makes_a_library_raise(
    running: Running, toys: dict[str, Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Loader.load

    def odd(self: Loader, bundle: Bundle) -> Engine:
        with loading.refusing(bundle.path):
            if bundle.path.name == "odd":
                raise KeyError("what no error of ours foresees")
        if bundle.path.name == "odder":
            raise KeyError("what nothing foresees")
        return load(self, bundle)

    monkeypatch.setattr(Loader, "load", odd)
    with administered(running, bundles=(), watch=tmp_path, watch_seconds=0.02) as admin:
        for name, event in (("odd", "refused"), ("odder", "fault")):
            shutil.copytree(toys["1"].path, tmp_path / f".{name}")
            (tmp_path / f".{name}").rename(tmp_path / name)
            eventually(partial(is_told, admin.live, event))
        shutil.copytree(toys["2"].path, tmp_path / ".sound")
        (tmp_path / ".sound").rename(tmp_path / "a sound one")
        eventually(lambda: admin.live.server.registry.default("toy") == "2")
        refused = admin.versions()[""]
        assert refused.reason == "graph"
        assert refused.message == f"{tmp_path / 'odd'} cannot be loaded"  # the rest is in the log
        assert "what no error of ours foresees" in admin.live.log.getvalue()


def test_what_cannot_be_read_now_has_not_gone(
    toys: dict[str, Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(toys["1"].path, tmp_path / "model" / "1")
    shutil.copytree(toys["2"].path, tmp_path / "other")
    before = scan(tmp_path)
    assert set(before) == {tmp_path / "model" / "1", tmp_path / "other"}
    (tmp_path / "other" / MANIFEST).chmod(0o600)
    after = scan(tmp_path, before)
    assert {path for path in before if before[path] != after[path]} == {tmp_path / "other"}
    folders = watch._folders

    def failing(folder: Path) -> list[Path]:
        if folder.name == "model":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return folders(folder)

    monkeypatch.setattr(watch, "_folders", failing)
    assert scan(tmp_path, after) == after
    assert set(scan(tmp_path)) == {tmp_path / "other"}


def test_a_bundle_that_is_moved_or_copied_is_served_on(
    running: Running, toys: dict[str, Toy], tmp_path: Path
) -> None:
    shutil.copytree(toys["1"].path, tmp_path / "a")

    def folders() -> dict[str, str]:
        return {version: Path(v.folder).name for version, v in admin.versions().items()}

    with administered(running, bundles=(), watch=tmp_path, watch_seconds=0.05) as admin:
        admin.label("stable", "1")  # or a version that is loaded later would answer
        (tmp_path / "a").rename(tmp_path / "b")
        eventually(lambda: folders() == {"1": "b"})
        shutil.copytree(tmp_path / "b", tmp_path / ".c")
        (tmp_path / ".c").rename(tmp_path / "c")
        time.sleep(0.5)
        shutil.rmtree(tmp_path / "b")
        eventually(lambda: folders() == {"1": "c"})
        shutil.copytree(toys["2"].path, tmp_path / ".d")
        (tmp_path / ".d").rename(tmp_path / "d")
        eventually(lambda: folders() == {"1": "c", "2": "d"})
        (tmp_path / "c").rename(tmp_path / ".c")
        shutil.copytree(tmp_path / "d", tmp_path / "c")  # what it held is nowhere any more
        eventually(lambda: set(folders()) == {"2"})
        assert admin.versions()["2"].labels == ["stable"]
        assert admin.answers() == "2"


def test_what_is_asked_for_too_early_is_no_bundle_refused(
    running: Running, toys: dict[str, Toy]
) -> None:
    with administered(running, load=False) as admin:
        with pytest.raises(grpc.RpcError) as caught:
            admin.load(toys["1"].path)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        admin.live.run(admin.live.server.load())
        assert "" not in admin.versions()


def test_nothing_is_what_is_served_after_all_was_unloaded(running: Running) -> None:
    with running(bundles=(), made={"settled": True}) as live:
        assert live.server.registry.engines() == []


def test_one_folder_has_one_name(
    running: Running, toys: dict[str, Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toys["1"].path, "model")
    with administered(running, bundles=(Path("model"),), labels=("toy:stable=1",)) as admin:
        shutil.rmtree("model")
        shutil.copytree(toys["2"].path, "model")
        assert admin.load(tmp_path / "away" / ".." / "model").labels == ["stable"]
        assert {v: m.folder for v, m in admin.versions().items()} == {"2": str(tmp_path / "model")}


def test_labels_do_not_pass_to_another_model_of_the_same_folder(
    running: Running, toys: dict[str, Toy], make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    shutil.copytree(toys["1"].path, tmp_path / "model")
    with administered(running, bundles=(tmp_path / "model",), labels=("toy:stable=1",)) as admin:
        shutil.rmtree(tmp_path / "model")
        shutil.copytree(make_toy("other", version="1").path, tmp_path / "model")
        assert admin.load(tmp_path / "model").labels == []
        (listed,) = admin.client.models()
        assert (listed.name, listed.version_labels) == ("other", ())


def test_a_version_is_freed_though_nobody_waits_for_it_any_more(
    running: Running, toys: dict[str, Toy]
) -> None:
    with administered(running, bundles=both(toys)) as admin:
        server = admin.live.server
        engine = server.registry.find("toy", "1")
        leased = server.registry.lease("toy", "1")
        admin.live.run(_entered(leased))
        request = admin_pb2.UnloadModelRequest(model_name="toy", model_version="1")
        with pytest.raises(grpc.RpcError) as caught:
            admin._stub.UnloadModel(request, timeout=3)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert admin.versions()["1"].state == admin_pb2.VERSION_STATE_DRAINING
        admin.live.run(_left(leased))
        eventually(lambda: set(admin.versions()) == {"2"})
        with pytest.raises(Unavailable):
            admin.live.run(engine.score(np.zeros((1, 1, 3, 3), np.uint8), 0.1))


def ready(channel: grpc.Channel) -> bool:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def is_told(live: Live, event: str) -> bool:
    return f'"{event}"' in live.log.getvalue()


async def _entered(context: AbstractContextManager[object]) -> None:
    context.__enter__()


async def _left(context: AbstractContextManager[object]) -> None:
    context.__exit__(None, None, None)


def test_a_server_without_a_model_is_not_ready(
    running: Running, toys: dict[str, Toy], tmp_path: Path
) -> None:
    with (
        administered(running, bundles=(), watch=tmp_path, watch_seconds=0.02) as admin,
        grpc.insecure_channel(admin.live.address) as channel,
    ):
        assert not ready(channel)
        shutil.copytree(toys["1"].path, tmp_path / "toy")
        eventually(lambda: ready(channel))
        admin.unload("1")
        assert not ready(channel)


def test_an_unhealthy_version_is_healed_by_loading_it(
    running: Running, toys: dict[str, Toy]
) -> None:
    with administered(running, bundles=both(toys), labels=("toy:stable=1",)) as admin:
        ill = admin.live.server.registry.find("toy", "1")
        ill._trust.healthy = False
        ill._trust._unhealthy.inc()
        assert admin.load(toys["2"].path).model_version == "2"
        assert admin.live.server.registry.find("toy", "1") is ill
        assert list(admin.load(toys["1"].path).labels) == ["stable"]
        assert admin.live.server.registry.find("toy", "1").healthy
        assert admin.answers() == "1"
        eventually(lambda: [v.state for v in admin.listed()] == [SERVING] * 2)
        with urllib.request.urlopen(admin.live.metrics_url) as answer:
            assert 'likely_unhealthy_versions{model="toy"} 0.0' in answer.read().decode()


def test_an_unhealthy_version_is_reported_at_once(running: Running, toys: dict[str, Toy]) -> None:
    with (
        administered(running, bundles=(toys["1"].path,)) as admin,
        grpc.insecure_channel(admin.live.address) as channel,
    ):
        trust = admin.live.server.registry.find("toy", "1")._trust
        trust.healthy = False
        assert ready(channel)
        admin.live.loop.call_soon_threadsafe(trust.on_unhealthy)
        eventually(lambda: not ready(channel))
        assert is_told(admin.live, "unhealthy")


def test_the_admin_port_is_off_by_default(live: Live) -> None:
    assert live.server.admin_port is None
    with grpc.insecure_channel(live.address) as channel:
        request = admin_pb2.ListVersionsRequest()
        code = refusal(lambda: AdminServiceStub(channel).ListVersions(request, timeout=10))
    assert code is grpc.StatusCode.UNIMPLEMENTED
