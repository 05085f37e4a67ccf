"""Jobs that are asked for again: what is there is kept, what is not is made."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from likely.errors import JobError, LikelyError
from likely.jobs import files
from likely.jobs.ledger import MANIFEST, MEASURED_FOLDER, Ledger, Record
from likely.jobs.making import Maker, Plan
from likely.jobs.requests import Format, Generation, Request
from likely.jobs.sources import Input
from tests.jobs.conftest import contents

if TYPE_CHECKING:
    from likely.jobs.backends import Backend
    from tests.jobs.conftest import Job

RUNS = ((0, 60), (2, 60))


class Counted:
    """Counts the shards that are made, and fails after so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 1000) -> None:
        self.shards: list[int] = []
        make = Maker.make

        def counted(maker: Maker, shard: int, advance: Callable[[int], object]) -> Any:
            if len(self.shards) >= most:
                raise LikelyError("enough")
            self.shards.append(shard)
            return make(maker, shard, advance)

        monkeypatch.setattr(Maker, "make", counted)


@pytest.fixture
def whole(draw: Job, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed job leaves: six shards and a manifest."""
    draw(tmp_path / "whole", *RUNS, rows=20)
    return contents(tmp_path / "whole")


def test_a_job_that_failed_is_resumed(
    draw: Job, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Counted(patch, most=3)
        with pytest.raises(LikelyError, match="enough"):
            draw(out, *RUNS, rows=20, workers=1)
    assert [each["file"] for each in json.loads((out / MANIFEST).read_bytes())["shards"]] == [
        f"part-0000{i}.parquet" for i in range(3)
    ]
    counted = Counted(monkeypatch)
    draw(out, *RUNS, rows=20, workers=1)
    assert counted.shards == [3, 4, 5]
    assert contents(out) == whole


def test_a_job_that_is_done_makes_nothing(
    draw: Job, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    before = (tmp_path / "whole" / MANIFEST).stat()
    summary = draw(tmp_path / "whole", *RUNS, rows=20)
    assert summary == json.loads(whole[MANIFEST])["summary"]
    assert counted.shards == []
    assert contents(tmp_path / "whole") == whole
    assert (tmp_path / "whole" / MANIFEST).stat() == before


def test_shards_that_are_not_as_recorded_are_made_again(
    draw: Job, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "whole"
    (out / "part-00001.parquet").unlink()
    cut = out / "part-00003.parquet"
    cut.write_bytes(cut.read_bytes()[:-1])
    flipped = out / "part-00004.parquet"
    flipped.write_bytes(flipped.read_bytes().replace(b"toy", b"boy", 1))
    counted = Counted(monkeypatch)
    draw(out, *RUNS, rows=20, workers=1)
    assert counted.shards == [1, 3, 4]
    assert contents(out) == whole


def test_what_killed_writers_left_is_cleared(
    draw: Job, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    out = tmp_path / "whole"
    manifest = json.loads((out / MANIFEST).read_bytes())
    del manifest["summary"], manifest["shards"][2]
    (out / MANIFEST).write_text(json.dumps(manifest))
    (out / ".part-00002.parquet.0123abcd.part").write_bytes(b"half")
    (out / "part-00002.parquet").write_bytes(b"whole, but in nobody's record")
    draw(out, *RUNS, rows=20)
    assert contents(out) == whole


def test_a_job_that_fails_clears_what_its_killed_writers_left(
    backend: Backend, tmp_path: Path
) -> None:
    request = Request.of(Generation(RUNS), backend.info, Format.PARQUET, 20)
    with pytest.raises(LikelyError, match="enough"), Ledger(tmp_path, request):
        (tmp_path / MEASURED_FOLDER).mkdir()
        for folder in (tmp_path, tmp_path / MEASURED_FOLDER):
            (folder / ".part-00002.parquet.0123abcd.part").write_bytes(b"half")
        raise LikelyError("enough")
    assert not list(tmp_path.rglob("*.part"))


def test_a_job_is_resumed_while_it_is_finished(
    judge: Job, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(tmp_path / "whole", "score", pictures, fdr=0.2, rows=15)
    add, left = Ledger.add, []

    def failing(ledger: Ledger, shard: int, record: Any, measured: bool = False) -> None:
        add(ledger, shard, record, measured)
        if not measured and shard == 2:
            left.append(contents(tmp_path / "out" / MEASURED_FOLDER))
            raise LikelyError("enough")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "add", failing)
        with pytest.raises(LikelyError, match="enough"):
            judge(tmp_path / "out", "score", pictures, fdr=0.2, rows=15)
    assert len(left[0]) == 7
    # What was measured and is lost meanwhile is measured again.
    (tmp_path / "out" / MEASURED_FOLDER / "part-00001.parquet").unlink()
    counted = Counted(monkeypatch)
    judge(tmp_path / "out", "score", pictures, fdr=0.2, rows=15)
    assert counted.shards == [1]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "its seed is 0, and 1 is asked"),
        ({"alpha": 0.3}, "its alpha is null, and 0.3 is asked"),
        ({"rows": 21}, "its rows is 20, and 21 is asked"),
        ({"form": "npz"}, 'its format is "parquet", and "npz" is asked'),
        ({"runs": ((0, 61),)}, "its runs is"),
    ],
)
def test_another_request_is_refused(
    draw: Job, tmp_path: Path, whole: dict[str, bytes], change: dict[str, Any], sentence: str
) -> None:
    runs = change.pop("runs", RUNS)
    with pytest.raises(JobError, match=sentence):
        draw(tmp_path / "whole", *runs, **{"rows": 20, **change})
    draw(tmp_path / "whole", *RUNS, rows=20)  # the folder is nobody's meanwhile
    assert contents(tmp_path / "whole") == whole


def test_other_pictures_are_another_request(judge: Job, pictures: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / pictures.name
    copy.parent.mkdir()
    shutil.copy(pictures, copy)
    judge(tmp_path / "out", "score", pictures)
    before = contents(tmp_path / "out")
    judge(tmp_path / "out", "score", copy)  # where they lie does not matter
    assert contents(tmp_path / "out") == before
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    with pytest.raises(JobError, match="its pictures is"):
        judge(tmp_path / "out", "score", copy)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"{", "no manifest"), (b"[]", "no manifest"), (b'{"format": 2, "request": {}}', "format 1")],
)
def test_a_manifest_that_is_none_is_refused(
    draw: Job, tmp_path: Path, content: bytes, sentence: str
) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(JobError, match=sentence):
        draw(tmp_path, *RUNS)


def test_a_folder_of_something_else_is_refused(draw: Job, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(JobError, match=r"thesis.tex and no manifest.json"):
        draw(tmp_path, *RUNS)
    assert contents(tmp_path) == {"thesis.tex": b"all of it"}


def test_one_process_works_on_a_folder(draw: Job, backend: Backend, tmp_path: Path) -> None:
    request = Request.of(Generation(RUNS), backend.info, Format.PARQUET, 20)
    with (
        Ledger(tmp_path / "out", request),
        pytest.raises(JobError, match="another process works on"),
    ):
        draw(tmp_path / "out", *RUNS, rows=20)
    draw(tmp_path / "out", *RUNS, rows=20)


def test_a_folder_that_another_works_on_is_not_held_open(backend: Backend, tmp_path: Path) -> None:
    request = Request.of(Generation(RUNS), backend.info, Format.PARQUET, 20)
    with Ledger(tmp_path, request):
        before = sum(1 for _ in Path("/dev/fd").iterdir())
        for _ in range(3):
            with pytest.raises(JobError, match="another process works on"):
                Ledger(tmp_path, request)
        assert sum(1 for _ in Path("/dev/fd").iterdir()) == before


def test_a_file_system_without_locks_holds_jobs_too(
    draw: Job, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("likely.jobs.ledger.fcntl.flock", failing)
    draw(tmp_path / "out", *RUNS, rows=20)
    assert contents(tmp_path / "out") == whole


def test_what_a_writer_left_that_was_killed_at_once_is_no_job(
    draw: Job, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{MANIFEST}.0123abcd.part").write_bytes(b"half")
    draw(tmp_path / "out", *RUNS, rows=20)
    assert contents(tmp_path / "out") == whole


def test_a_shard_that_a_worker_wrote_elsewhere_is_not_done(
    backend: Backend, tmp_path: Path
) -> None:
    request = Request.of(Generation(RUNS), backend.info, Format.PARQUET, 20)
    with Ledger(tmp_path, request) as ledger:
        for content in (None, b"half"):
            if content:
                ledger.path(0).write_bytes(content)
            with pytest.raises(JobError, match="must see the job's folder under the same path"):
                ledger.add(0, Record(ledger.path(0).name, 20, 9, ""))
        assert 0 in ledger.missing()


def test_a_worker_frees_its_backend_if_the_pictures_cannot_be_read(
    backend: Backend, tmp_path: Path
) -> None:
    closed: list[bool] = []
    opener: Any = SimpleNamespace(
        open=lambda: SimpleNamespace(info=backend.info, close=lambda: closed.append(True))
    )
    request = Request.of(Generation(RUNS), backend.info, Format.PARQUET, 20)
    with pytest.raises(JobError):
        Maker.open(Plan(request, tmp_path, opener, Input((tmp_path / "a.txt",))))
    assert closed == [True]


def test_the_root_of_a_new_file_system_is_an_empty_folder(
    draw: Job, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    draw(tmp_path / "out", *RUNS, rows=20)
    (tmp_path / "out" / "lost+found").rmdir()
    assert contents(tmp_path / "out") == whole


def test_a_manifest_that_is_slow_to_write_names_several_shards_at_once(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = files.write, list[Path]()

    def slow(path: Path, data: bytes) -> None:
        written.append(path)
        time.sleep(0.1)
        write(path, data)

    request = Request.of(Generation(RUNS), backend.info, Format.PARQUET, 4)
    monkeypatch.setattr(files, "write", slow)
    with pytest.raises(LikelyError, match="enough"), Ledger(tmp_path, request) as ledger:
        for shard in range(request.shards):
            ledger.path(shard).touch()
            ledger.add(shard, Record(ledger.path(shard).name, 4, 0, ""))
        raise LikelyError("enough")
    assert len(written) < request.shards / 2
    named = json.loads((tmp_path / MANIFEST).read_bytes())["shards"]
    assert len(named) == request.shards
