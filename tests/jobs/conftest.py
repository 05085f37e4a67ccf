"""Jobs on the toy bundle, by one engine that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from likely.answers import Pixels
from likely.jobs.backends import Backend, Bundled
from likely.jobs.columns import Geometry
from likely.jobs.making import Maker, Plan
from likely.jobs.requests import Format, Generation, Judgement, Request
from likely.jobs.running import run, threads, unseen
from likely.jobs.sources import Input, Pictures

if TYPE_CHECKING:
    from tests.conftest import Toy

Job = Callable[..., dict[str, Any]]
COLOUR, GREY = Geometry((3, 4, 5), 256), Geometry((1, 4, 5), 256)


@pytest.fixture(scope="session")
def opener(toy: Toy) -> Bundled:
    """How to come by the toy's engine."""
    return Bundled(toy.path, "cpu", 1, max_batch=16)


@pytest.fixture(scope="session")
def backend(opener: Bundled) -> Iterator[Backend]:
    """The toy's engine."""
    made: Backend = opener.open()
    made.stop = lambda: None  # type: ignore[method-assign]  # other jobs go on asking it
    yield made
    made.close()


@pytest.fixture(scope="session")
def draw(opener: Bundled, backend: Backend) -> Job:
    """Does a job of generation."""

    def do(out: Path, *runs: tuple[int | None, int], by: Backend = backend, **more: Any) -> Any:
        own = {name: more.pop(name) for name in ("seed", "alpha", "max_draws") if name in more}
        return done(opener, by, Generation(runs, **own), out, **more)

    return do


@pytest.fixture(scope="session")
def judge(opener: Bundled, backend: Backend) -> Job:
    """Does a job of scoring, or of classification."""

    def do(
        out: Path, kind: Any, *paths: Path, by: Backend = backend, alpha: float = 0.1, **more: Any
    ) -> Any:
        given = Input(paths, more.pop("column", None), more.pop("key", None))
        pictures = Pictures(given, Geometry(by.info.shape, by.info.levels))
        names = ("fdr", "estimate_priors", "min_posterior", "priors", "guarantee", "rule")
        own = {name: more.pop(name) for name in names if name in more}
        task = Judgement(kind, len(pictures), pictures.digest, alpha, **own)
        return done(opener, by, task, out, given=given, pictures=pictures, **more)

    return do


def done(
    opener: Bundled,
    backend: Backend,
    task: Generation | Judgement,
    out: Path,
    *,
    form: str = "parquet",
    rows: int = 40,
    batch: int = 16,
    workers: int = 2,
    given: Input | None = None,
    pictures: Pictures | None = None,
) -> dict[str, Any]:
    request = Request.of(task, backend.info, Format(form), rows)
    backend.require(task)
    plan = Plan(request, out, opener, given, batch)
    maker = Maker(plan, backend, pictures)
    return run(plan, maker, threads(maker, workers), unseen)


@pytest.fixture(scope="session")
def pictures(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred pictures as an array."""
    path = tmp_path_factory.mktemp("pictures") / "hundred.npy"
    np.save(path, toy.draw(np.random.default_rng(5), 100))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def table(folder: Path) -> pa.Table:
    """The rows of all Parquet shards."""
    shards = sorted(folder.glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(shard, partitioning=None) for shard in shards])


def images(found: pa.Table) -> Pixels:
    """The pictures of a table, (n, c, h, w)."""
    array: Pixels = found["image"].combine_chunks().to_numpy_ndarray()
    return array


def opened(path: Path, geometry: Geometry = GREY) -> Pictures:
    """The pictures of a file or folder."""
    return Pictures(Input((path,)), geometry)


def drawn(n: int, geometry: Geometry = GREY) -> Pixels:
    """Noise."""
    rng = np.random.default_rng(n)
    return rng.integers(0, geometry.levels, (n, *geometry.shape), dtype=np.uint8)


def encoded(picture: Pixels) -> bytes:
    """A grey picture (h, w) as PNG."""
    out = BytesIO()
    Image.fromarray(picture).save(out, "png")
    return out.getvalue()
