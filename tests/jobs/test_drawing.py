"""Jobs that draw: the right pictures, whatever they are divided into."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from likely.bundle import Bundle
from likely.engine import Engine
from likely.errors import InvalidInput
from likely.graphs import Device
from likely.jobs.backends import Served
from likely.jobs.requests import parse_runs
from tests.jobs.conftest import contents, images, table

if TYPE_CHECKING:
    from tests.conftest import Live, Toy
    from tests.jobs.conftest import Job

RUNS = ((2, 30), (0, 55), (None, 36))


def test_pictures_are_those_that_the_engine_draws(toy: Toy, draw: Job, tmp_path: Path) -> None:
    draw(tmp_path / "out", *RUNS, seed=11)
    found = table(tmp_path / "out")
    engine = Engine.load(Bundle.open(toy.path), device=Device("cpu"), threads=1)

    async def read(label: int | None, first: int, count: int) -> Any:
        stream = engine.generate(label, count, 11, first_index=first, chunk=count)
        return await anext(stream)

    expected = [asyncio.run(read(*run)) for run in ((2, 0, 30), (0, 30, 55), (None, 85, 36))]
    engine.close()
    assert np.array_equal(images(found), np.concatenate([each.images for each in expected]))
    assert found["label"].to_pylist() == [y for each in expected for y in each.label.tolist()]
    assert found["index"].to_pylist() == list(range(121))


@pytest.mark.parametrize(
    "more", [{"batch": 1, "workers": 1}, {"batch": 7}, {"batch": 1000, "workers": 5}], ids=str
)
def test_the_folder_does_not_depend_on_batches_and_workers(
    draw: Job, tmp_path: Path, more: dict[str, int]
) -> None:
    whole = draw(tmp_path / "whole", *RUNS, seed=3, alpha=0.2)
    assert draw(tmp_path / "other", *RUNS, seed=3, alpha=0.2, **more) == whole
    assert contents(tmp_path / "other") == contents(tmp_path / "whole")


def test_a_server_draws_the_same(draw: Job, live: Live, tmp_path: Path) -> None:
    remote = Served(live.address, patience=10).open()
    try:
        draw(tmp_path / "remote", *RUNS, seed=3, alpha=0.2, by=remote)
    finally:
        remote.close()
    draw(tmp_path / "local", *RUNS, seed=3, alpha=0.2)
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")


def test_pictures_do_not_depend_on_the_shards(draw: Job, tmp_path: Path) -> None:
    draw(tmp_path / "few", *RUNS, rows=1000)
    draw(tmp_path / "many", *RUNS, rows=9)
    assert table(tmp_path / "few").equals(table(tmp_path / "many"))


def test_self_checked_draws_pass(draw: Job, tmp_path: Path) -> None:
    found = draw(tmp_path / "out", (1, 80), alpha=0.3, max_draws=50)
    assert found == {"pictures": 80, "accepted": 80, "draws": found["draws"]}
    assert found["draws"] > 80
    assert sum(table(tmp_path / "out")["draws"].to_pylist()) == found["draws"]


def test_other_forms_hold_the_same(draw: Job, tmp_path: Path) -> None:
    for form in ("parquet", "npz", "webdataset"):
        draw(tmp_path / form, *RUNS, seed=4, form=form)
        draw(tmp_path / "again" / form, *RUNS, seed=4, form=form, workers=3)
        assert contents(tmp_path / form) == contents(tmp_path / "again" / form)
    rows = table(tmp_path / "parquet")
    x, labels = images(rows), rows["label"].to_pylist()
    with np.load(tmp_path / "npz" / "part-00001.npz") as arrays:
        assert np.array_equal(arrays["image"], x[40:80])
        assert arrays["label"].tolist() == labels[40:80]
        assert arrays["likely_seed"] == "4"
    with tarfile.open(tmp_path / "webdataset" / "part-00002.tar") as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    assert len(files) == 3 * 40
    assert int(files["000000000093.cls"]) == labels[93]
    assert json.loads(files["000000000093.json"])["index"] == 93
    with Image.open(io.BytesIO(files["000000000093.png"])) as picture:
        assert np.array_equal(np.asarray(picture) // 85, x[93, 0])


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("labels", {"label": 3}),
        ("labels", {"count": 0}),
        ("seed", {"seed": 2**63}),
        ("alpha", {"alpha": 0.001}),
        ("max_draws", {"max_draws": 101}),
        ("shard", {"rows": 0}),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_folder_is_made(
    draw: Job, tmp_path: Path, field: str, given: dict[str, Any]
) -> None:
    run = (given.pop("label", 0), given.pop("count", 5))
    with pytest.raises(InvalidInput) as caught:
        draw(tmp_path / "out", run, **given)
    assert caught.value.field == field
    assert not (tmp_path / "out").exists()


def test_counts_are_read_by_name_and_by_index() -> None:
    assert parse_runs("3=100, boot=2", ("a", "boot", "c", "7")) == ((3, 100), (1, 2))
    assert parse_runs("7=1", ("7", "b")) == ((0, 1),)
    for text in ("4=1", "3", "3=", "=4", "x=1", "1=-1", "", "9" * 5000 + "=1", "1=" + "9" * 5000):
        with pytest.raises(InvalidInput, match="LABEL=COUNT"):
            parse_runs(text, ("a", "b", "c", "d"))
