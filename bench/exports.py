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
from likely_export import (
    autoregressive,
    cvae,
    drawing,
    graphs,
    heads,
    hygiene,
    logistic,
    mixture,
    pixelcnn,
    raster,
    roles,
    sampler,
    trunks,
    winograd,
)

MODULES = (
    *(autoregressive, cvae, drawing, graphs, heads, hygiene, logistic, mixture),
    *(models, pixelcnn, raster, roles, sampler, trunks, winograd),
)


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
    def of(cls, cache: Path, report: Callable[[str], None]) -> Exports:
        """The graphs of the present sources; exports them if the cache lacks them."""
        folder = cache / _digest()
        record = folder / "seconds.json"
        if not record.exists():
            shutil.rmtree(cache, ignore_errors=True)
            folder.mkdir(parents=True)
            record.write_text(json.dumps(_export(folder, report)))
        return cls(folder, json.loads(record.read_text()))

    def path(self, name: str) -> Path:
        """The ONNX file of that name."""
        return self.folder / f"{name}.onnx"

    def session(self, name: str) -> Session:
        """The graph of that name, opened with one thread on the CPU."""
        spec = Graph.model_validate_json(self.path(name).with_suffix(".json").read_text())
        return Session(self.path(name), spec, Device("cpu"))


def _digest() -> str:
    digest = hashlib.sha256(f"{torch.__version__} {onnx.__version__}".encode())
    for module in MODULES:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]


def _export(folder: Path, report: Callable[[str], None]) -> dict[str, float]:
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
        _describe(path, spec)
        report(f"exported {name} in {seconds[name]:.0f} s")
    model, spec = models.matmul()
    (folder / spec.file).write_bytes(model.SerializeToString())
    _describe(folder / spec.file, spec)
    return seconds


def _describe(path: Path, spec: Graph) -> None:
    path.with_suffix(".json").write_text(spec.model_dump_json())
