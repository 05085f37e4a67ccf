"""Evil bundles: each is refused before ONNX Runtime opens a file of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from likely import graphs
from likely.bundle import MANIFEST, Bundle, write_manifest
from likely.engine import Engine
from likely.errors import BundleError
from likely.graphs import Device
from tests.faults.alive import flat_memory

if TYPE_CHECKING:
    from tests.conftest import Toy

onnx = pytest.importorskip("onnx")
WEIGHTS = bytes(range(256)) * 4


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    """A copy of the toy bundle, to be made evil; a secret lies beside it."""
    (tmp_path / "secret").write_bytes(WEIGHTS)
    return Path(shutil.copytree(toy.path, tmp_path / "bundles" / "evil"))


def rewrite(folder: Path) -> None:
    """Writes the manifest anew: sizes and digests fit, as a thorough attacker would see to."""
    text = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    write_manifest(folder, {key: value for key, value in text.items() if key != "files"})


def outside(folder: Path, location: str) -> None:
    """Lets a weight of the density graph lie elsewhere."""
    path = folder / "density.onnx"
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "log_q")
    size = len(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(size)}.items():
        weight.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def linked(folder: Path, make: Callable[[Path, Path], object]) -> None:
    outside(folder, "weights.data")
    make(folder.parent.parent / "secret", folder / "weights.data")
    rewrite(folder)


def elsewhere(folder: Path, location: str) -> None:
    outside(folder, location)
    rewrite(folder)


def unnamed(folder: Path) -> None:
    """The file lies in the folder, and the manifest does not name it."""
    elsewhere(folder, "weights.data")
    (folder / "weights.data").write_bytes(WEIGHTS)


def archive(folder: Path, **members: bytes) -> None:
    with zipfile.ZipFile(folder / "calibration.npz", "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(name.replace("__", "../").replace("_DOT_", "."), data)
    rewrite(folder)


def npy(array: Any, **options: Any) -> bytes:
    data = io.BytesIO()
    np.save(data, array, **options)
    return data.getvalue()


# What a pickle that is read would make; of this run alone.
BOMBED = Path(tempfile.gettempdir()) / f"likely-was-here-{os.getpid()}"


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(BOMBED),)


def claimed(shape: str) -> bytes:
    """An array whose header claims more than is there."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(64)


def sparse(folder: Path, size: int) -> None:
    """A hole of so many bytes, which the manifest names with its true size."""
    with (folder / "weights.data").open("wb") as file:
        file.truncate(size)
    text = json.loads((folder / MANIFEST).read_text())
    text["files"]["weights.data"] = {"size": size, "sha256": "0" * 64}
    (folder / MANIFEST).write_text(json.dumps(text))


def deep(folder: Path) -> None:
    from onnx import helper

    model = onnx.load(folder / "density.onnx")
    body = helper.make_graph([], "innermost", [], [])
    for _ in range(20):
        scan = helper.make_node("Scan", ["x"], ["deep"], body=body, num_scan_inputs=1)
        body = helper.make_graph([scan], "body", [], [])
    model.graph.node.extend(body.node)
    (folder / "density.onnx").write_bytes(model.SerializeToString())
    rewrite(folder)


def renamed(folder: Path) -> None:
    """A graph whose ending makes ONNX Runtime take it for its own format."""
    (folder / "density.onnx").rename(folder / "density.ort")
    text = json.loads((folder / MANIFEST).read_text())
    text["graphs"]["density"]["file"] = "density.ort"
    text["files"]["density.ort"] = text["files"].pop("density.onnx")
    (folder / MANIFEST).write_text(json.dumps(text))


def piped(folder: Path) -> None:
    (folder / "density.onnx").unlink()
    os.mkfifo(folder / "density.onnx")


def manifest_linked(folder: Path) -> None:
    (folder / MANIFEST).rename(folder.parent / MANIFEST)
    (folder / MANIFEST).symlink_to(folder.parent / MANIFEST)


EVIL: dict[str, tuple[Callable[[Path], object], str]] = {
    "parent": (lambda f: elsewhere(f, "../../secret"), "no file that the manifest names"),
    "absolute": (lambda f: elsewhere(f, "/etc/passwd"), "no file that the manifest names"),
    "memory": (lambda f: elsewhere(f, "*/_ORT_MEM_ADDR_/*"), "no file that the manifest names"),
    "unnamed": (unnamed, "no file that the manifest names"),
    "symlink": (lambda f: linked(f, lambda s, t: t.symlink_to(s)), "a link or no plain file"),
    "hard link": (lambda f: linked(f, lambda s, t: t.hardlink_to(s)), "is a hard link"),
    "manifest linked": (manifest_linked, "a link or no plain file"),
    "pipe": (piped, "a link or no plain file"),
    "zip-slip": (lambda f: archive(f, __slipped_DOT_npy=npy(np.zeros(3))), "is no array"),
    "pickle": (
        lambda f: archive(f, scores_DOT_npy=npy(np.array([Bomb()]), allow_pickle=True)),
        "holds object, not numbers",
    ),
    "bare pickle": (lambda f: archive(f, scores_DOT_npy=pickle.dumps(Bomb())), "no archive"),
    "another entry": (lambda f: archive(f, evil_DOT_py=b"import os"), "is no array"),
    "claim": (lambda f: archive(f, scores_DOT_npy=claimed("(10000000000,)")), "claims"),
    "claim below 0": (lambda f: archive(f, scores_DOT_npy=claimed("(-8,)")), "negative"),
    "bomb": (lambda f: archive(f, scores_DOT_npy=bytes(1 << 30) + b"x"), "at most 1073741824"),
    "sparse 10 GB": (lambda f: sparse(f, 10 * 10**9), "at most 8589934592 are read"),
    "too deep": (deep, "nested deeper than 4"),
    "another format": (renamed, r"does not end in \.onnx"),
}


@pytest.mark.fault(35)
@pytest.mark.parametrize("evil", EVIL)
def test_an_evil_bundle_is_refused_before_the_runtime_opens_it(
    folder: Path, evil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("ONNX Runtime was to open a file")

    monkeypatch.setattr(graphs, "_open", opened)
    apply, sentence = EVIL[evil]
    apply(folder)
    began = time.process_time()
    with flat_memory(128), pytest.raises(BundleError, match=sentence) as caught:
        load(folder)
    assert time.process_time() - began < 10
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "slipped.npy").exists()
    assert not BOMBED.exists()


def load(folder: Path) -> Engine:
    bundle = Bundle.open(folder)
    bundle.calibration()
    return Engine.load(bundle, device=Device("cpu"), threads=1, max_batch=16)


@pytest.mark.fault(35)
def test_weights_beside_the_graph_are_read_if_all_is_as_it_should_be(folder: Path) -> None:
    weight = next(
        t for t in onnx.load(folder / "density.onnx").graph.initializer if t.name == "log_q"
    )
    (folder / "weights.data").write_bytes(weight.raw_data)
    elsewhere(folder, "weights.data")
    load(folder).close()
    bundle = Bundle.open(folder)
    (folder.parent / "another name").hardlink_to(folder / "weights.data")
    with pytest.raises(BundleError, match="is a hard link"):
        bundle.check_again()


@pytest.mark.fault(40)
def test_a_manifest_that_could_not_be_written_is_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        rewrite(folder)
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        Bundle.open(folder)
    assert not list(folder.glob(".*"))


BUNDLES = Path(__file__).parents[2] / "bundles"


@pytest.mark.fault(33)
@pytest.mark.parametrize("name", ["digits", "mnist_binary"])
def test_a_bundle_that_is_written_over_while_it_is_served_answers_as_before(
    tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(BUNDLES / name, tmp_path / name))
    bundle = Bundle.open(folder)
    golden, weights = bundle.golden(), bundle.weights()
    sessions = {
        role: graphs.Session(bundle.graph(role), graph, Device("cpu"), 1, weights)
        for role, graph in bundle.manifest.graphs.items()
    }
    for file in folder.iterdir():
        with file.open("r+b") as handle:  # the same length, then none: in place, as cp writes
            handle.write(b"\x37" * file.stat().st_size)
    _agree(sessions, golden)
    for file in folder.iterdir():
        os.truncate(file, 0)
    _agree(sessions, golden)


def _agree(sessions: dict[Any, graphs.Session], golden: dict[str, Any]) -> None:
    for role, session in sessions.items():
        outputs = [spec.name for spec in session.spec.outputs]
        feeds = {spec.name: golden[f"{role}/{spec.name}"] for spec in session.spec.inputs}
        for output, got in zip(outputs, session.run(feeds, outputs), strict=True):
            assert graphs.agrees(got, golden[f"{role}/{output}"]), (role, output)


@pytest.mark.fault(33)
def test_weights_that_changed_before_they_were_read_are_refused(folder: Path) -> None:
    outside(folder, "weights.data")
    (folder / "weights.data").write_bytes(WEIGHTS)
    rewrite(folder)
    bundle = Bundle.open(folder)
    (folder / "weights.data").write_bytes(WEIGHTS[::-1])
    with pytest.raises(BundleError, match="changed while it was opened"):
        Engine.load(bundle, device=Device("cpu"), threads=1)


@pytest.mark.fault(35)
@pytest.mark.parametrize("make", [Path.symlink_to, lambda path, _: os.mkfifo(path)])
def test_weights_that_became_a_link_or_a_pipe_are_refused(
    folder: Path, make: Callable[[Path, Path], object]
) -> None:
    outside(folder, "weights.data")
    (folder / "weights.data").write_bytes(WEIGHTS)
    rewrite(folder)
    bundle = Bundle.open(folder)
    (folder / "weights.data").unlink()
    make(folder / "weights.data", folder.parent.parent / "secret")  # the same bytes, elsewhere
    with pytest.raises(BundleError, match="a link or no plain file"):
        bundle.weights()
