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
    "labels that p(y|x) does not have": (lambda f: change_manifest(f, labels=[]), "log_pyx"),
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


def test_a_sound_bundle_opens(toy: Toy) -> None:
    bundle = Bundle.open(toy.path)
    assert set(bundle.manifest.graphs) == set(Role)
    assert len(bundle.digest) == 64
