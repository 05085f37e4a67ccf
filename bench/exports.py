"""A cache of exported graphs in a folder: an export takes longer than a measurement."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from bench import models
from likely.bundle import Graph
from likely.graphs import Device, Session
from likely_export import graphs

SOURCES = Path(str(graphs.__file__)).parent  # the folder of likely_export


@dataclass(frozen=True)
class Exports:
    """A folder of ONNX files.

    Attributes:
        folder: the folder, named by a digest of the sources that the files depend on.
        seconds: duration of each export when it was made, in seconds of wall-clock time, without
            the parity gate.
    """

    folder: Path
    seconds: dict[str, float]

    @classmethod
    def load_or_export(cls, cache: Path, report: Callable[[str], None]) -> Exports:
        """The graphs of the present sources; exports them if the cache lacks them."""
        folder = cache / digest(Path(str(models.__file__)).read_text())
        record = folder / "seconds.json"
        if not record.exists():
            shutil.rmtree(cache, ignore_errors=True)
            folder.mkdir(parents=True)
            record.write_text(json.dumps(_export_all(folder, report)))
        return cls(folder, json.loads(record.read_text()))

    def path(self, name: str) -> Path:
        """The ONNX file of that name."""
        return self.folder / f"{name}.onnx"

    def session(self, name: str) -> Session:
        """The graph of that name, opened with one thread on the CPU."""
        spec = Graph.model_validate_json(self.path(name).with_suffix(".json").read_text())
        return Session(self.path(name), spec, Device("cpu"))


def digest(*parts: str) -> str:
    """The digest of all sources of likely_export, of the libraries' versions and of these parts.

    An export depends on more modules than those that it is called from.
    """
    hasher = hashlib.sha256()
    sources = (path.read_text() for path in sorted(SOURCES.rglob("*.py")))
    for part in (torch.__version__, onnx.__version__, *parts, *sources):
        hasher.update(hashlib.sha256(part.encode()).digest())
    return hasher.hexdigest()[:16]


def _export_all(folder: Path, report: Callable[[str], None]) -> dict[str, float]:
    seconds = {}
    for name, (source, levels, labels) in models.sources().items():
        path = folder / f"{name}.onnx"
        start = time.perf_counter()
        graphs.write(source, path, levels, labels)
        seconds[name] = time.perf_counter() - start
        spec = Graph(
            file=path.name,
            inputs=source.inputs,
            outputs=source.outputs,
            importance_samples=source.importance_samples,
        )
        _write_spec(path, spec)
        report(f"exported {name} in {seconds[name]:.0f} s")
    model, spec = models.matmul()
    (folder / spec.file).write_bytes(model.SerializeToString())
    _write_spec(folder / spec.file, spec)
    return seconds


def _write_spec(path: Path, spec: Graph) -> None:
    path.with_suffix(".json").write_text(spec.model_dump_json())
