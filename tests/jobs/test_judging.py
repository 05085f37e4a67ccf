"""Jobs that look at pictures: the same answers in whatever file, form and batch they come."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bench.jobs import measure_throughput
from likely import bayes
from likely.answers import Guarantee, LabelRule, Pixels
from likely.bundle import Bundle
from likely.engine import Engine
from likely.errors import InvalidInput, JobError, NotAnswered
from likely.graphs import Device, Session
from likely.jobs import backends
from likely.jobs.backends import Backend, Bundled, Served
from likely.jobs.steadiness import batch_invariant
from likely.jobs.tables import to_array
from likely.outliers import benjamini_hochberg
from tests.conftest import PRIORS
from tests.jobs.conftest import contents, table

if TYPE_CHECKING:
    from tests.conftest import Running, Toy
    from tests.jobs.conftest import Job

KINDS = ("score", "classify")
DIGITS = Path("bundles/digits")


def png(picture: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture[0] * 85).save(out, "png")
    return out.getvalue()


def parquet(path: Path, x: Pixels, kind: str) -> Path:
    flat = x.reshape(len(x), -1)
    columns: dict[str, Any] = {
        "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(x) if kind == "tensor" else None,
        "list": pa.array(flat.tolist(), pa.list_(pa.int64())),
        "nested": pa.array(x.tolist()),
        "fixed": pa.array(flat.tolist(), pa.list_(pa.uint8(), 9)),
        "bytes": pa.array([row.tobytes() for row in x], pa.binary()),
        "fixed bytes": pa.array([row.tobytes() for row in x], pa.binary(9)),
        "png": pa.array([png(row) for row in x], pa.large_binary()),
        "struct": pa.array([{"bytes": png(row), "path": "a.png"} for row in x]),
    }
    names = pa.array([f"name {i}" for i in range(len(x))])
    whole = pa.table({"image": columns[kind], "key": names})
    pq.write_table(whole, path, row_group_size=17)
    return path


def webdataset(path: Path, x: Pixels) -> Path:
    with tarfile.open(path, "w") as archive:
        for i, picture in enumerate(x):
            for ending, data in (("cls", b"1"), ("png", png(picture)), ("json", b"{}")):
                member = tarfile.TarInfo(f"some/name {i}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "kind", ["tensor", "list", "nested", "fixed", "bytes", "fixed bytes", "png", "struct"]
)
def test_columns_of_parquet(judge: Job, pictures: Path, tmp_path: Path, kind: str) -> None:
    judge(tmp_path / "array", "score", pictures)
    path = parquet(tmp_path / "in.parquet", np.load(pictures), kind)
    judge(tmp_path / "out", "score", path)
    found, expected = table(tmp_path / "out"), table(tmp_path / "array")
    assert found.drop_columns("key").equals(expected.drop_columns("key"))
    assert found["key"].to_pylist() == [f"name {i}" for i in range(100)]


def test_files_and_folders_are_read_in_order_of_their_names(
    judge: Job, pictures: Path, tmp_path: Path
) -> None:
    x = np.load(pictures)
    folder = tmp_path / "in"
    (folder / "b" / "deep").mkdir(parents=True)
    np.save(folder / "a.npy", x[:10, 0])
    for i, picture in enumerate(x[10:20]):
        (folder / "b" / "deep" / f"{i}.png").write_bytes(png(picture))
    webdataset(folder / "c.tar", x[20:60])
    parquet(folder / "d.parquet", x[60:90], "tensor")
    np.savez(folder / "e.npz", x=x[90:], y=np.zeros(10))
    (folder / "labels.csv").write_text("not looked at")
    (folder / ".hidden.npy").write_text("nor this")
    judge(tmp_path / "out", "score", folder)
    judge(tmp_path / "array", "score", pictures)
    found = table(tmp_path / "out")
    columns = ["index", "log_likelihood", "p_value", "verdict"]
    assert found.select(columns).equals(table(tmp_path / "array").select(columns))
    keys = found["key"].to_pylist()
    assert [keys[i] for i in (3, 10, 20, 60, 95)] == [
        "a.npy[3]", "b/deep/0.png", "some/name 0", "name 0", "e.npz[5]",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{"batch": 1, "workers": 1}, {"batch": 1000}], ids=str)
def test_the_folder_does_not_depend_on_batches_and_workers(
    judge: Job, pictures: Path, tmp_path: Path, kind: str, more: dict[str, int]
) -> None:
    judge(tmp_path / "whole", kind, pictures)
    judge(tmp_path / "other", kind, pictures, **more)
    assert contents(tmp_path / "other") == contents(tmp_path / "whole")


@pytest.mark.parametrize("bundle", [DIGITS, Path("bundles/fashion_mnist")], ids=str)
def test_shipped_bundles_give_the_same_bits_in_whatever_batch(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    engine = Engine.load(opened, device=Device("cpu"), threads=2)
    assert batch_invariant(engine, opened.golden()["density/x"])
    engine.close()


def test_a_job_from_parquet_to_parquet_keeps_the_engines_throughput(tmp_path: Path) -> None:
    golden = Bundle.open(DIGITS).golden()["density/x"]
    x = np.resize(golden, (4000, *golden.shape[1:]))

    def share(folder: Path) -> float:
        folder.mkdir()
        return measure_throughput(DIGITS, x, folder, 1)["kept, by threads in one run"]

    # The best of three: other work on the machine takes from a round, and gives to none.
    assert any(share(tmp_path / f"{n}") >= 0.8 for n in range(3))


class Rounding:
    """Runs of graphs that round as those on a card may, and what was asked of them.

    Attributes:
        sizes: rows of each run.
        engines: rows of a run, and whether it is filled up to these, of each engine opened.
        by_place: whether rows differ by their place in a run, and not by its size.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.engines: list[tuple[int, bool]] = []
        self.by_place = False
        run, engine = Session.run, Bundled._load_engine
        rows: dict[tuple[object, ...], list[Any]] = {}

        def row(session: Session, feeds: dict[str, Any], outputs: Any) -> list[Any]:
            # Alone, for the toy rounds by places itself on some processors.
            key = (*outputs, *(feed.tobytes() for feed in feeds.values()))
            return rows.get(key) or rows.setdefault(key, run(session, feeds, outputs))

        def rounded(session: Session, feeds: Any, outputs: Any, _: Any = None) -> list[Any]:
            size = len(next(iter(feeds.values())))
            each = [
                row(session, {name: feed[i : i + 1] for name, feed in feeds.items()}, outputs)
                for i in range(size)
            ]
            found = [np.concatenate(arrays) for arrays in zip(*each, strict=True)]
            self.sizes.append(size)
            moved = np.arange(size) % 2 if self.by_place else np.full(size, size.bit_length() % 2)
            for array in found if size >= 4 else ():
                if array.dtype == np.float32:
                    array[moved == 1] = np.nextafter(array[moved == 1], np.float32(np.inf))
            return found

        def opened(bundled: Bundled, bundle: Bundle, size: int, *, filled: bool = False) -> Engine:
            self.engines.append((size, filled))
            return engine(replace(bundled, device="cpu"), bundle, size, filled=filled)

        monkeypatch.setattr(Session, "run", rounded)
        monkeypatch.setattr(Bundled, "_load_engine", opened)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> Rounding:
    return Rounding(monkeypatch)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_graphs_that_round_by_the_batch_are_run_in_batches_of_one_size(
    toy: Toy, judge: Job, pictures: Path, tmp_path: Path, rounding: Rounding, device: str
) -> None:
    local = Bundled(toy.path, device, 2).open()
    # On a card a few sizes that agree would tell nothing of others: none is tried.
    assert rounding.engines == [(0, False)] * (device == "cpu") + [(backends.PADDED_ROWS, True)]
    rounding.sizes.clear()
    for kind in KINDS:
        ways = [{"batch": 1, "workers": 1}, {"batch": 11, "workers": 3}, {"batch": 1000}]
        for way, more in enumerate(ways):
            judge(tmp_path / f"{kind}{way}", kind, pictures, by=local, **more)
        folders = [contents(tmp_path / f"{kind}{way}") for way in range(len(ways))]
        assert folders[0] == folders[1] == folders[2]
    assert set(rounding.sizes) == {backends.PADDED_ROWS}
    local.close()


def test_graphs_that_round_by_the_place_in_a_batch_are_run_one_by_one(
    toy: Toy, caplog: pytest.LogCaptureFixture, rounding: Rounding
) -> None:
    rounding.by_place = True
    Bundled(toy.path, "cpu", 1, max_batch=16).open().close()
    assert rounding.engines == [(16, False), (16, True), (1, False)]
    assert "each picture is run alone" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_and_an_engine_of_any_batch_answer_the_same(
    judge: Job, running: Running, tmp_path: Path, kind: str
) -> None:
    golden = Bundle.open(DIGITS).golden()["density/x"]
    np.save(tmp_path / "in.npy", np.resize(golden, (90, *golden.shape[1:])))
    with running(bundles=(DIGITS,)) as live:
        backends: list[Backend] = [
            Served(live.address, patience=10).open(),
            Bundled(DIGITS, "cpu", 1, max_batch=1).open(),
            Bundled(DIGITS, "cpu", 2, max_batch=64).open(),
        ]
        for i, backend in enumerate(backends):
            judge(tmp_path / str(i), kind, tmp_path / "in.npy", by=backend, batch=11 + 30 * i)
            backend.close()
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


def test_answers_are_the_models(judge: Job, pictures: Path, toy: Toy, tmp_path: Path) -> None:
    x = np.load(pictures)
    summary = judge(tmp_path / "score", "score", pictures)
    found = table(tmp_path / "score")
    assert np.allclose(to_array(found["log_likelihood"]), toy.log_px(x), atol=1e-4)
    outlier = to_array(found["p_value"]) <= 0.1
    assert found["verdict"].to_pylist() == ["outlier" if out else "accepted" for out in outlier]
    assert summary == {
        "pictures": 100, "accepted": 100 - outlier.sum(), "ambiguous": 0, "outlier": outlier.sum(),
    }  # fmt: skip
    judge(tmp_path / "labels", "classify", pictures)
    found = table(tmp_path / "labels")
    expected = bayes.posterior(toy.log_pxy(x), np.array(PRIORS))
    assert np.allclose(to_array(found["posterior"]), expected, atol=1e-4)
    assert found["label"].to_pylist() == expected.argmax(1).tolist()
    sets, p_values = to_array(found["label_set"]), to_array(found["label_p_values"])
    assert np.array_equal(sets, p_values > 0.1)


def test_labels_by_the_discriminative_rule(
    judge: Job, pictures: Path, toy: Toy, backend: Backend, running: Running, tmp_path: Path
) -> None:
    expected = np.exp(toy.log_pyx(np.load(pictures)))
    with running() as live:
        served = Served(live.address, patience=10).open()
        for name, by in (("engine", backend), ("server", served)):
            judge(tmp_path / name, "classify", pictures, by=by, rule=LabelRule.DISCRIMINATIVE)
        served.close()
    for name in ("server", "engine"):
        found = table(tmp_path / name)
        assert np.allclose(to_array(found["posterior"]), expected, atol=1e-5)
        assert found["label"].to_pylist() == expected.argmax(1).tolist()
        composed = np.log(expected / PRIORS) + toy.log_px(np.load(pictures))[:, None]
        assert np.allclose(to_array(found["composed_log_likelihoods"]), composed, atol=1e-4)
        assert not {"log_likelihoods", "label_set", "label_p_values"} & set(found.column_names)
    judge(tmp_path / "plain", "classify", pictures)
    for column in ("p_value", "verdict"):  # p(x) rejects, by whatever rule
        assert found[column].equals(table(tmp_path / "plain")[column])


def test_the_discriminative_rule_needs_no_model_of_p_x_y(
    judge: Job, pictures: Path, running: Running, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    bundle = make_toy("apart", roles=("density", "discriminate")).path
    with running(bundles=(bundle,)) as live:
        engine: Backend = Bundled(bundle, "cpu", 1, max_batch=16).open()
        for i, by in enumerate((Served(live.address).open(), engine)):
            rule = {"by": by, "rule": LabelRule.DISCRIMINATIVE}
            judge(tmp_path / str(i), "classify", pictures, **rule)
            with pytest.raises(JobError, match="model apart does not answer Classify"):
                judge(tmp_path / "out", "classify", pictures, by=by)
            by.close()
    assert table(tmp_path / "0")["label"].equals(table(tmp_path / "1")["label"])


def test_a_rule_that_the_model_does_not_have_is_refused(judge: Job, tmp_path: Path) -> None:
    digits = Bundled(DIGITS, "cpu", 1, max_batch=1).open()
    np.save(tmp_path / "in.npy", Bundle.open(DIGITS).golden()["density/x"])
    more = {"by": digits, "rule": LabelRule.DISCRIMINATIVE}
    with pytest.raises(NotAnswered, match="model digits has no"):
        judge(tmp_path / "out", "classify", tmp_path / "in.npy", **more)
    digits.close()


def test_shards_say_how_they_came_to_be(
    judge: Job, pictures: Path, backend: Backend, tmp_path: Path
) -> None:
    judge(tmp_path / "out", "score", pictures)
    metadata = pq.read_metadata(tmp_path / "out" / "part-00002.parquet").metadata
    assert metadata[b"likely.model"] == b"toy"
    assert metadata[b"likely.version"] == b"1.0"
    assert metadata[b"likely.digest"].decode() == backend.info.digest
    assert metadata[b"likely.alpha"] == b"0.1"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert json.loads(metadata[b"likely.request"]) == manifest["request"]


@pytest.mark.parametrize("form", ["npz", "webdataset"])
def test_answers_come_in_other_forms(judge: Job, pictures: Path, tmp_path: Path, form: str) -> None:
    judge(tmp_path / "parquet", "classify", pictures)
    judge(tmp_path / form, "classify", pictures, form=form)
    posterior = to_array(table(tmp_path / "parquet")["posterior"])
    if form == "npz":
        with np.load(tmp_path / form / "part-00000.npz") as arrays:
            assert np.array_equal(arrays["posterior"], posterior[:40])
            assert arrays["key"][7] == "hundred.npy[7]"
    else:
        with tarfile.open(tmp_path / form / "part-00000.tar") as archive:
            member = archive.extractfile("000000000007.json")
            assert member is not None
            assert json.load(member)["posterior"] == posterior[7].tolist()


def test_rejections_of_the_whole_job(judge: Job, toy: Toy, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    x = toy.draw(rng, 100)
    x[rng.permutation(100)[:30]] = toy.log_q.argmin(-1)  # the least probable picture of all
    np.save(tmp_path / "in.npy", x)
    summary = judge(tmp_path / "out", "score", tmp_path / "in.npy", fdr=0.1, rows=9)
    found = table(tmp_path / "out")
    rejected = benjamini_hochberg(to_array(found["p_value"]), 0.1)
    assert found["rejected"].to_pylist() == rejected.tolist()
    assert summary["rejected"] == rejected.sum() >= 30
    assert summary["fdr"]["largest_p_value"] == to_array(found["p_value"])[rejected].max()
    judge(tmp_path / "plain", "score", tmp_path / "in.npy", rows=9)
    assert found.drop_columns("rejected").equals(table(tmp_path / "plain"))
    assert not (tmp_path / "out" / ".measured").exists()


@pytest.mark.parametrize("rule", LabelRule)
def test_estimated_priors_weigh_the_posteriors(
    judge: Job, toy: Toy, tmp_path: Path, rule: LabelRule
) -> None:
    rng = np.random.default_rng(9)
    y = rng.choice(3, size=3000, p=(0.1, 0.1, 0.8))
    noise = rng.gumbel(size=(3000, *toy.log_q.shape))
    x = (toy.log_theta[y] + noise).argmax(-1).astype(np.uint8)
    np.save(tmp_path / "in.npy", x)
    source = tmp_path / "in.npy"
    more = {"rows": 700, "batch": 700, "alpha": 0.05, "min_posterior": 0.9, "rule": rule}
    judge(tmp_path / "plain", "classify", source, **more)
    summary = judge(tmp_path / "out", "classify", source, estimate_priors=True, fdr=0.2, **more)
    plain, found = table(tmp_path / "plain"), table(tmp_path / "out")
    good = np.array(plain["verdict"].to_pylist()) != "outlier"
    posterior, model = to_array(plain["posterior"]), np.array(PRIORS)
    priors = bayes.estimated_priors(posterior[good], model)
    assert list(summary["priors"].values()) == priors.tolist()
    weighed = bayes.reweighted(posterior, model, priors)
    assert np.array_equal(to_array(found["posterior"]), weighed)
    assert found["label"].to_pylist() == weighed.argmax(1).tolist()
    unsure = np.where(weighed.max(1) < 0.9, "ambiguous", "accepted")
    assert found["verdict"].to_pylist() == np.where(good, unsure, "outlier").tolist()
    if rule is LabelRule.GENERATIVE:  # the toy's p(y|x) knows nothing of these pictures' labels
        assert (weighed.argmax(1) == y).mean() > (posterior.argmax(1) == y).mean()


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("alpha", {"alpha": 0.001}),
        ("alpha", {"alpha": float("nan")}),
        ("alpha", {"alpha": 0.02, "guarantee": Guarantee.PAC}),
        ("fdr", {"fdr": 0.0}),
        ("fdr", {"fdr": 0.1, "guarantee": Guarantee.PAC}),
        ("min_posterior", {"min_posterior": 1.0}),
        ("priors", {"priors": (0.5, 0.5)}),
        ("priors", {"priors": (0.5, 0.3, 0.2), "estimate_priors": True}),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_folder_is_made(
    judge: Job, pictures: Path, tmp_path: Path, field: str, given: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        judge(tmp_path / "out", "classify", pictures, **given)
    assert caught.value.field == field
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_none_are_named(judge: Job, tmp_path: Path, pictures: Path) -> None:
    x = np.load(pictures)
    x[57, 0, 1, 1] = 4
    bad: dict[str, Any] = {}
    np.save(tmp_path / "level.npy", x)
    bad["level.npy"] = r"level.npy\[57\]: level 4 at channel 0, row 1, column 1 is not in \[0, 4\)"
    np.save(tmp_path / "shape.npy", x[:, :, :2])
    bad["shape.npy"] = r"1 x 2 x 3 .* takes 1 x 3 x 3"
    np.save(tmp_path / "float.npy", x.astype(float))
    bad["float.npy"] = "float64; expected integers"
    (tmp_path / "none.parquet").write_bytes(b"PAR1 and no more")
    bad["none.parquet"] = "no Parquet file"
    pq.write_table(pa.table({"y": [1]}), tmp_path / "other.parquet")
    bad["other.parquet"] = "no column image or images .* there are y"
    pq.write_table(pa.table({"x": [[1, 2]]}), tmp_path / "few.parquet")
    bad["few.parquet"] = "expected 9 levels"
    pq.write_table(pa.table({"x": [None, b"123456789"]}), tmp_path / "null.parquet")
    bad["null.parquet"] = "1 rows of the pictures' column are empty"
    (tmp_path / "none.tar").write_bytes(b"no archive" * 100)
    bad["none.tar"] = "no tar archive"
    (tmp_path / "broken.png").write_bytes(png(x[0])[:-30])
    bad["broken.png"] = "broken.png: a broken image"
    for name, sentence in bad.items():
        with pytest.raises(InvalidInput, match=sentence):
            judge(tmp_path / f"out {name}", "score", tmp_path / name)
    (tmp_path / "empty").mkdir()
    for path in ("empty", "word.txt"):
        with pytest.raises(JobError, match=path):
            judge(tmp_path / "out", "score", tmp_path / path)


def test_no_pictures_are_no_job(judge: Job, toy: Toy, tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", toy.draw(np.random.default_rng(0), 0))
    with pytest.raises(JobError, match="no pictures"):
        judge(tmp_path / "out", "score", tmp_path / "in.npy")
