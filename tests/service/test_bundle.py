"""Each way in which a bundle can be wrong is refused with one clear sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from likely.bundle import MANIFEST, Bundle, Role, write_manifest
from likely.engine import Engine
from likely.errors import BundleError
from likely.graphs import Device

if TYPE_CHECKING:
    from tests.conftest import Toy


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    """A copy of the toy bundle, to be harmed."""
    return Path(shutil.copytree(toy.path, tmp_path / "harmed"))


def change_manifest(folder: Path, **fields: Any) -> None:
    text = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**text, **fields}))


def rewrite(folder: Path) -> None:
    """Writes the manifest anew, so that sizes and digests fit again."""
    text = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    write_manifest(folder, {key: value for key, value in text.items() if key != "files"})


def truncate(folder: Path) -> None:
    os.truncate(folder / "density.onnx", 100)


def alter(folder: Path) -> None:
    data = bytearray((folder / "density.onnx").read_bytes())
    data[50] ^= 1
    (folder / "density.onnx").write_bytes(data)


def link(folder: Path) -> None:
    (folder / "density.onnx").rename(folder.parent / "elsewhere")
    (folder / "density.onnx").symlink_to(folder.parent / "elsewhere")


def escape(folder: Path) -> None:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    change_manifest(folder, files={**files, "../secret": files["density.onnx"]})


def one_more(folder: Path) -> list[dict[str, Any]]:
    labels = json.loads((folder / MANIFEST).read_text())["labels"]
    return [*labels, {"name": "more", "prior": 0.0}]


def change_graph(folder: Path, role: str, name: str) -> None:
    """Says that an output of that name has one axis, and that there are weights for two experts."""
    graphs = json.loads((folder / MANIFEST).read_text())["graphs"]
    graphs[role]["outputs"].append({"name": name, "dtype": "float32", "shape": ["batch"]})
    change_manifest(folder, graphs=graphs)
    change_calibration(folder, weights=[0.5, 0.5])


def rename(folder: Path, role: str, kind: str) -> None:
    """Says that the first input or output of that role's graph is called otherwise."""
    graphs = json.loads((folder / MANIFEST).read_text())["graphs"]
    graphs[role][kind][0]["name"] = "other"
    change_manifest(folder, graphs=graphs)


def change_samples(folder: Path, samples: int) -> None:
    graphs = json.loads((folder / MANIFEST).read_text())["graphs"]
    graphs["conditional"]["importance_samples"] = samples
    change_manifest(folder, graphs=graphs)


def change_calibration(folder: Path, **fields: Any) -> None:
    calibration = json.loads((folder / MANIFEST).read_text())["calibration"]
    change_manifest(folder, calibration={**calibration, **fields})


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "no manifest.json"),
    "no graph": (lambda folder: (folder / "density.onnx").unlink(), "is missing"),
    "truncated": (truncate, "100 bytes where the manifest says .*: truncated"),
    "altered": (alter, "SHA-256 .* altered"),
    "link": (link, "a link or no plain file"),
    "foreign": (lambda f: (f / MANIFEST).write_text('{"model": "v"}'), "not a bundle"),
    "no JSON": (lambda f: (f / MANIFEST).write_bytes(b"\x00\x01"), "not a bundle"),
    "huge manifest": (lambda f: (f / MANIFEST).write_bytes(b" " * (2 << 20)), "at most"),
    "later format": (lambda f: change_manifest(f, format=2), "format"),
    "unknown field": (lambda f: change_manifest(f, plugin="x"), "plugin"),
    "name is a path": (lambda f: change_manifest(f, name="../toy"), "name"),
    "no density": (lambda f: change_manifest(f, graphs={}), "density"),
    "path outside": (escape, r"files"),
    "priors": (lambda f: change_manifest(f, labels=[{"name": "a", "prior": 0.5}]), "sum to 1"),
    "another shape": (lambda f: change_manifest(f, shape=[1, 3, 4]), r"x of the \w+ graph is"),
    "no log p(x|y)": (lambda f: rename(f, "conditional", "outputs"), "must give log_pxy"),
    "no drawing": (lambda f: rename(f, "sample", "outputs"), "sample graph must give x"),
    "a strange input": (lambda f: rename(f, "encode", "inputs"), "encode graph cannot take other"),
    "a label more": (lambda f: change_manifest(f, labels=one_more(f)), "for every label"),
    "a flat evidence": (lambda f: change_graph(f, "conditional", "evidence"), "weights for 0 exp"),
    "endless samples": (lambda f: change_samples(f, 2**40), "importance_samples"),
    "no temperature": (lambda f: change_calibration(f, temperature=1e-320), "temperature"),
    "labels that p(y|x) does not have": (
        lambda f: change_manifest(f, labels=[]),
        "for every label",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_bundle_is_refused_before_it_is_opened(folder: Path, harm: str) -> None:
    apply, sentence = HARMS[harm]
    apply(folder)
    with pytest.raises(BundleError, match=sentence) as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another manifest": (lambda f: change_manifest(f, version="2"), "changed while it was opened"),
    "a graph": (alter, "SHA-256 .* altered"),
    "the manifest gone": (lambda f: (f / MANIFEST).unlink(), "no manifest.json"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_it_was_verified_is_refused(folder: Path, change: str) -> None:
    bundle = Bundle.open(folder)
    bundle.check_again()
    apply, sentence = CHANGES[change]
    apply(folder)
    with pytest.raises(BundleError, match=sentence):
        bundle.check_again()


def load(folder: Path) -> Engine:
    return Engine.load(Bundle.open(folder), device=Device("cpu"), threads=1, max_batch=16)


def test_a_file_that_is_no_graph_is_refused(folder: Path) -> None:
    (folder / "density.onnx").write_bytes(b"no graph at all")
    rewrite(folder)
    with pytest.raises(BundleError, match="not a graph that is allowed"):
        load(folder)


def test_another_signature_is_refused(folder: Path) -> None:
    shutil.copy(folder / "encode.onnx", folder / "density.onnx")
    rewrite(folder)
    with pytest.raises(BundleError, match="where the manifest says"):
        load(folder)


def test_other_answers_than_the_recorded_ones_are_refused(folder: Path) -> None:
    with np.load(folder / "golden.npz") as arrays:
        golden: dict[str, Any] = dict(arrays)
    golden["density/log_px"] = golden["density/log_px"] + 0.1
    np.savez(folder / "golden.npz", **golden)
    rewrite(folder)
    with pytest.raises(BundleError, match=r"toy@1\.0 .* golden log_px"):
        load(folder)


FLAWS: dict[str, tuple[dict[str, Any], str]] = {
    "scores": ({"scores": lambda a: a[::-1]}, "scores do not ascend"),
    "scores of none": ({"scores": lambda a: np.where(a == a[3], np.nan, a)}, "do not ascend"),
    "endless scores": ({"scores": lambda a: np.append(a[:-1], np.inf)}, "do not ascend"),
    "few scores": (
        {"scores": lambda a: a[1:], "confident": lambda a: a[1:]},
        "198 scores; the manifest says 2 and 199",
    ),
    "confident": ({"confident": lambda a: a[:-1]}, "p-values that ascend"),
    "confident of 0": ({"confident": lambda a: np.append(0, a[1:])}, r"within \(0, 1\]"),
    "confident of none": ({"confident": lambda a: np.full_like(a, np.nan)}, "that ascend"),
    "confident above 1": ({"confident": lambda a: a + 1}, r"within \(0, 1\]"),
    "few counts": ({"label_counts": lambda a: a[:1]}, "is not of"),
    "other counts": ({"label_counts": lambda a: a + 1}, "does not divide"),
    "counts below 0": ({"label_counts": lambda a: a * 0 + [-1, *a[1:-1], a[0] + a[-1] + 1]}, "div"),
    "label scores": ({"label_scores": lambda a: a[::-1]}, "within a label"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_calibration_arrays_that_no_p_value_can_be_made_of_are_refused(
    folder: Path, flaw: str
) -> None:
    changes, sentence = FLAWS[flaw]
    with np.load(folder / "calibration.npz") as arrays:
        held: dict[str, Any] = dict(arrays)
    np.savez(folder / "calibration.npz", **held | {k: f(held[k]) for k, f in changes.items()})
    rewrite(folder)
    with pytest.raises(BundleError, match=sentence):
        load(folder)


@pytest.mark.parametrize("roles", [[], {"sample": []}, {"sample": [1]}, None])
def test_who_draws_is_not_told_where_the_recipe_does_not(folder: Path, roles: Any) -> None:
    change_manifest(folder, recipe={"roles": roles})
    assert Bundle.open(folder).manifest.samples_density


@pytest.mark.parametrize(
    ("density", "sample", "expected"),
    [
        ("a", "a", True),
        ("a", "b", False),
        (["a", "local"], "a", True),
        (["sketch", "detail", "local"], ["sketch", "detail"], True),
        (["sketch", "other"], ["sketch", "detail"], False),
        (["local", "a"], "a", False),
        ([], "a", False),
    ],
)
def test_the_density_is_of_the_model_that_samples_if_its_role_begins_with_it(
    folder: Path, density: Any, sample: Any, expected: bool
) -> None:
    change_manifest(folder, recipe={"roles": {"density": density, "sample": sample}})
    assert Bundle.open(folder).manifest.samples_density == expected


def test_a_sound_bundle_opens(toy: Toy) -> None:
    bundle = Bundle.open(toy.path)
    assert set(bundle.manifest.graphs) == set(Role)
    assert len(bundle.digest) == 64


@pytest.mark.parametrize("name", [".nfs000123", "sub", "sub.d", "no extension"])
def test_what_does_not_belong_into_a_bundle_is_named(folder: Path, name: str) -> None:
    before = (folder / MANIFEST).read_bytes()
    if name.startswith("sub"):
        (folder / name).mkdir()
    else:
        (folder / name).touch()
    fields = {key: value for key, value in json.loads(before).items() if key != "files"}
    with pytest.raises(BundleError) as caught:
        write_manifest(folder, fields)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert (folder / MANIFEST).read_bytes() == before


def test_a_manifest_left_half_written_is_written_over(folder: Path) -> None:
    (folder / f".{MANIFEST}").write_text("half")
    rewrite(folder)
    assert Bundle.open(folder)
    assert not (folder / f".{MANIFEST}").exists()
