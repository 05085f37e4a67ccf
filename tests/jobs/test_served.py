"""Jobs on a server whose versions and tokens change while they run."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from click.testing import CliRunner, Result

from likely.answers import Draws
from likely.cli import main
from likely.errors import DeadlineExceeded, JobError, LikelyError, ModelNotFound, Unauthenticated
from likely.jobs import backends, ray_workers
from likely.jobs.backends import Bundled, Served
from likely.jobs.making import Maker
from likely.jobs.requests import Format, Generation, Request
from tests.jobs.conftest import contents, table

if TYPE_CHECKING:
    from tests.conftest import Live, Running, Toy

OLD, NEW = "correct-horse-battery", "staple-of-the-house"


@pytest.fixture(scope="module")
def toys(make_toy: Callable[..., Toy]) -> dict[str, Toy]:
    return {version: make_toy(version=version, seed=int(version)) for version in ("1", "2")}


@pytest.fixture
def first(running: Running, toys: dict[str, Toy]) -> Iterator[Live]:
    """A server of version 1."""
    with running(bundles=(toys["1"].path,)) as live:
        yield live


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(backends, "LONGEST_PAUSE", 0.05)


def load(live: Live, toy: Toy) -> None:
    live.run(live.server.lifecycle.load(toy.path))


def unload(live: Live, version: str) -> None:
    live.run(live.server.lifecycle.unload("toy", version))


def label(live: Live, **versions: str) -> None:
    for name, version in versions.items():
        live.run(live.server.lifecycle.set_label("toy", name, version))


def drawing(live: Live, out: Path, *words: str) -> Result:
    asked = ["batch", "generate", "--each=20", "--shard=20", f"--address={live.address}"]
    return CliRunner().invoke(main, [*asked, f"--out={out}", "--patience=0.3", *words])


@pytest.mark.parametrize("patience", ["nan", "inf", "-1"])
def test_patience_ends(patience: str, tmp_path: Path) -> None:
    asked = ["batch", "generate", "--each=1", "--address=127.0.0.1:1", f"--out={tmp_path / 'out'}"]
    failed = CliRunner().invoke(main, [*asked, f"--patience={patience}"])
    assert failed.exit_code == 1 and "patience" in failed.stderr


def ended(out: Path, *shards: int) -> None:
    """Makes the folder one of a job that was ended when it had these shards yet to make."""
    manifest = json.loads((out / "manifest.json").read_bytes())
    del manifest["summary"]
    for shard in shards:
        (out / f"part-{shard:05d}.parquet").unlink()
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_a_job_is_resumed_with_the_version_that_it_began_with(
    first: Live, toys: dict[str, Toy], tmp_path: Path
) -> None:
    assert drawing(first, tmp_path).exit_code == 0
    whole = contents(tmp_path)
    load(first, toys["2"])  # which is the default from now on
    for words in ((), ("--model=toy",), ("--model-version=1",)):
        ended(tmp_path, 1)
        result = drawing(first, tmp_path, *words)
        assert result.exit_code == 0, result.output
        assert contents(tmp_path) == whole
    assert len(table(tmp_path)) == 60
    other = drawing(first, tmp_path, "--model-version=2")
    assert other.exit_code == 1
    assert 'its version is "1", and "2" is asked' in other.stderr


def test_a_label_means_the_version_that_it_named_at_first(
    first: Live, toys: dict[str, Toy], tmp_path: Path
) -> None:
    load(first, toys["2"])
    label(first, stable="1", canary="2")
    assert drawing(first, tmp_path, "--model-version=stable").exit_code == 0
    whole = contents(tmp_path)
    label(first, stable="2", canary="1")
    for version in ("=stable", "=1", "=canary", None):
        words = [f"--model-version{version}"] if version else []
        ended(tmp_path, 1)
        result = drawing(first, tmp_path, *words)
        assert result.exit_code == 0, result.output
        assert contents(tmp_path) == whole
    label(first, stable="1", canary="2")  # and another label what it names now
    for done in (True, False):
        if not done:
            ended(tmp_path, 1)
        other = drawing(first, tmp_path, "--model-version=canary")
        assert other.exit_code == 1
        assert 'its version is "1", and "2" is asked' in other.stderr


def test_a_job_that_is_done_says_so_without_its_version(
    first: Live, toys: dict[str, Toy], tmp_path: Path
) -> None:
    np.save(tmp_path / "in.npy", toys["1"].draw(np.random.default_rng(0), 30))
    drawn, scored = tmp_path / "drawn", tmp_path / "scored"
    asked = ["batch", "score", str(tmp_path / "in.npy"), "--fdr=0.2", "--json"]

    def scoring(address: str, *words: str) -> Result:
        where = [f"--address={address}", f"--out={scored}", "--patience=0.3"]
        return CliRunner().invoke(main, [*asked, *where, *words])

    before = [drawing(first, drawn, "--json"), scoring(first.address)]
    assert [result.exit_code for result in before] == [0, 0]
    whole = contents(tmp_path)
    load(first, toys["2"])
    unload(first, "1")
    assert drawing(first, drawn, "--json").stdout == before[0].stdout
    for address in (first.address, "127.0.0.1:1"):  # where nobody answers
        assert scoring(address).stdout == before[1].stdout
    for other in (drawing(first, drawn, "--seed=1"), scoring(first.address, "--fdr=0.1")):
        assert other.exit_code == 1
        assert "the folder holds another job" in other.stderr
    assert contents(tmp_path) == whole
    (drawn / "part-00001.parquet").unlink()
    lacking = drawing(first, drawn)
    assert lacking.exit_code == 1
    assert "no longer has toy@1" in lacking.stderr


def test_a_version_that_is_gone_for_good_is_named(
    first: Live, toys: dict[str, Toy], tmp_path: Path
) -> None:
    assert drawing(first, tmp_path).exit_code == 0
    ended(tmp_path, 1)
    before = contents(tmp_path)
    load(first, toys["2"])
    unload(first, "1")
    result = drawing(first, tmp_path)
    assert result.exit_code == 1
    assert f"{first.address} no longer has toy@1, with which this job began" in result.stderr
    assert contents(tmp_path) == before


def test_a_version_that_is_missing_for_a_while_is_waited_for(
    first: Live, toys: dict[str, Toy]
) -> None:
    load(first, toys["2"])
    remote = Served(first.address, version="1", patience=30).open()
    unload(first, "1")
    threading.Timer(0.3, load, (first, toys["1"])).start()
    began = time.monotonic()
    assert remote.generate(0, 0, 3, Generation(((0, 3),))).model_version == "1"
    assert time.monotonic() - began > 0.2
    remote.close()
    with pytest.raises(ModelNotFound):  # no job has begun with what was never there
        Served(first.address, version="3", patience=30).open()


def test_draws_go_on_where_their_stream_broke(first: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Served(first.address, patience=0.2).open()
    task, asked = Generation(((0, 200),)), list[tuple[int, int]]()
    whole = remote.generate(0, 5, 200, task)
    stream = remote._client.generate_stream

    def breaking(count: int, *, first_index: int, **more: Any) -> Iterator[Draws]:
        asked.append((first_index, count))
        chunks = iter(stream(count, first_index=first_index, **more))
        if len(asked) > 3:
            yield from chunks
            return
        if len(asked) != 2:  # the second attempt receives nothing
            yield next(chunks)
        raise DeadlineExceeded("the timeout ended")

    monkeypatch.setattr(remote._client, "generate_stream", breaking)
    drawn = remote.generate(0, 5, 200, task)
    remote.close()
    assert np.array_equal(drawn.images, whole.images) and drawn.first_index == 5
    starts = [at for at, _ in asked]
    assert len(starts) == 4 and 5 == starts[0] < starts[1] == starts[2] < starts[3]
    assert all(at + count == 205 for at, count in asked)


def test_what_a_job_waits_for_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "QUIET_SECONDS", 0.0)
    asked = ["batch", "generate", "--each=1", "--address=127.0.0.1:1", f"--out={tmp_path / 'out'}"]
    failed = CliRunner().invoke(main, [*asked, "--patience=3"])
    assert failed.exit_code == 1
    assert caplog.text.count("retrying for up to 3 s: no likely server answers") == 1


def test_other_processes_ask_for_the_version_of_the_job(
    first: Live, toys: dict[str, Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def actors(plan: Any, *_: object) -> Any:
        load(first, toys["2"])

        def made(missing: list[int], advance: Callable[[int], object]) -> Iterator[Any]:
            maker = Maker.open(plan)
            for shard in missing:
                yield shard, maker.make(shard, advance)

        return made

    monkeypatch.setattr(ray_workers, "ray_workers", actors)
    result = drawing(first, tmp_path / "ray", "--engine=ray")
    assert result.exit_code == 0, result.output
    assert drawing(first, tmp_path / "threads", "--model-version=1").exit_code == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "threads")


def test_a_worker_with_another_version_makes_nothing(
    first: Live, toys: dict[str, Toy], tmp_path: Path
) -> None:
    from likely.jobs.making import Plan

    opener = Served(first.address)
    backend = opener.open()
    request = Request.of(Generation(((0, 9),)), backend.info, Format.PARQUET, 20)
    backend.close()
    load(first, toys["2"])
    with pytest.raises(JobError, match=r"a worker has toy@2 .*began with toy@1"):
        Maker.open(Plan(request, tmp_path, opener))


def test_a_token_that_expires_is_read_again(
    running: Running, toys: dict[str, Toy], tmp_path: Path
) -> None:
    tokens, token = tmp_path / "tokens.toml", tmp_path / "token"

    def allow(secret: str) -> None:
        tokens.write_text(f'[[token]]\nname = "a"\nscopes = ["generate"]\nsecret = "{secret}"\n')

    allow(OLD)
    token.write_text(OLD)
    with running(bundles=(toys["1"].path,), tokens=tokens) as live:
        task = Generation(((0, 3),))
        remote = Served(live.address, patience=30, token_file=token).open()
        unwarned = Served(live.address, patience=30, token=OLD).open()
        allow(NEW)
        time.sleep(1.1)
        with pytest.raises(Unauthenticated):
            unwarned.generate(0, 0, 3, task)
        threading.Timer(0.5, token.write_text, (NEW + "\n",)).start()  # later than it should be
        assert remote.generate(0, 0, 3, task).model_version == "1"
        remote.close()
        unwarned.close()
        token.write_text("wrong")
        threading.Timer(0.5, token.write_text, (NEW,)).start()  # as an actor on Ray begins late
        Served(live.address, patience=30, token_file=token).pinned("toy", "1").open().close()
        token.write_text("wrong")
        with pytest.raises(Unauthenticated):  # at once: it was never good
            Served(live.address, patience=30, token_file=token).open()


def test_who_is_told_to_stop_waits_no_more(first: Live, toys: dict[str, Toy]) -> None:
    load(first, toys["2"])
    remote = Served(first.address, version="1", patience=60).open()
    unload(first, "1")
    task, failed = Generation(((0, 3),)), threading.Event()

    def ask() -> None:
        with pytest.raises(LikelyError):
            remote.generate(0, 0, 3, task)
        failed.set()

    asking = threading.Thread(target=ask)
    asking.start()
    assert not failed.wait(0.3)
    remote.stop()
    assert failed.wait(10)
    asking.join()
    remote.close()


def test_a_run_is_broken_off(toy: Toy) -> None:
    local = Bundled(toy.path, "cpu", 1, max_batch=16).open()
    failed = threading.Event()

    def ask() -> None:
        with pytest.raises(CancelledError):
            local._run(asyncio.sleep(60))
        failed.set()

    asking = threading.Thread(target=ask)
    asking.start()
    assert not failed.wait(0.3)
    local.stop()
    assert failed.wait(10)
    asking.join()
    with pytest.raises(CancelledError):  # nor is a batch that follows run
        local.generate(0, 0, 3, Generation(((0, 3),)))
    local.close()


def test_a_run_that_begins_as_all_ends_is_broken_off(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Bundled(toy.path, "cpu", 1, max_batch=16).open()
    begin = asyncio.run_coroutine_threadsafe

    def begun(*work: Any) -> Any:
        asked = begin(*work)
        local.stop()
        return asked

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "run_coroutine_threadsafe", begun)
        with pytest.raises(CancelledError):
            local._run(asyncio.sleep(60))
    local.close()


def test_the_handler_of_sigterm_outlives_a_ray_that_does_not_begin() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with pytest.raises(ConnectionError), ray_workers._keeping_sigterm():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            raise ConnectionError
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    ("count", "cards", "there", "actors"),
    [
        (0, 1, {"CPU": 16.0, "GPU": 2.0}, 2),
        (3, 1, {"CPU": 16.0, "GPU": 2.0}, 2),
        (1, 1, {"CPU": 16.0, "GPU": 2.0}, 1),
        (0, 1, {"CPU": 1.0, "GPU": 4.0}, 1),
        (0, 1, {"CPU": 16.0}, 0),
        (0, 0, {"CPU": 16.0}, 9),
        (3, 0, {"CPU": 1.0}, 3),
    ],
)
def test_ray_has_no_more_actors_than_cards(
    monkeypatch: pytest.MonkeyPatch, count: int, cards: int, there: dict[str, float], actors: int
) -> None:
    asked: dict[str, Any] = {}

    def mapped(*_: object, **more: Any) -> Any:
        asked.update(more)
        return SimpleNamespace(iter_rows=list)

    ray = SimpleNamespace(
        is_initialized=lambda: True,
        cluster_resources=lambda: there,
        nodes=lambda: [{"Alive": True, "Resources": there}, {"Alive": False, "Resources": {}}],
        exceptions=SimpleNamespace(RayError=ConnectionError),
        data=SimpleNamespace(
            DataContext=SimpleNamespace(get_current=SimpleNamespace),
            ActorPoolStrategy=lambda size: size,
            from_items=lambda *_, **__: SimpleNamespace(map_batches=mapped),
        ),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    workers = ray_workers.ray_workers(cast("Any", None), count, 1, cards)
    if actors:
        assert list(workers(list(range(9)), lambda _: None)) == []
        assert (asked["compute"], asked["num_gpus"]) == (actors, cards)
    else:
        with pytest.raises(JobError, match="Ray has no GPU"):
            list(workers(list(range(9)), lambda _: None))


def test_cores_that_no_node_of_ray_has_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 8.0}},
    ]
    ray = SimpleNamespace(
        is_initialized=lambda: True,
        cluster_resources=lambda: {"CPU": 40.0},
        nodes=lambda: nodes,
        exceptions=SimpleNamespace(RayError=ConnectionError),
        data=SimpleNamespace(DataContext=SimpleNamespace(get_current=SimpleNamespace)),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(JobError, match="no node of Ray has 8 cores: ask for --threads 4"):
        list(ray_workers.ray_workers(cast("Any", None), 1, 8)([0], lambda _: None))


def test_a_job_on_ray_that_asks_a_server_reserves_no_card(
    first: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[int] = []

    def actors(*given: Any) -> Any:
        reserved.append(given[-1])
        return lambda *_: iter(())

    monkeypatch.setattr(ray_workers, "ray_workers", actors)
    drawing(first, tmp_path / "out", "--engine=ray", "--device=cuda")
    assert reserved == [0]
