"""The two scorers that servers are measured with: bundles of untrained PixelCNNs.

The weights of a model do not affect its speed, so the models are not trained. The detector is
calibrated on random pictures, so that the server does the same work as for a real bundle.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.exports import digest
from bench.serving.pictures import random_pictures
from likely.answers import Pixels
from likely.bundle import MANIFEST, Role, write_manifest
from likely.graphs import Device, Session
from likely_export import calibrate, graphs, roles
from likely_export.calibrate import PartConfig, Seen
from likely_export.pixelcnn import PixelCNN, PixelCNNConfig

# About 5 ms and 0.1 ms per picture on one thread of a server's core.
SCORERS = {
    "heavy": PixelCNNConfig((1, 28, 28), 256, channels=64, layers=3, head=32),
    "light": PixelCNNConfig((1, 8, 8), 17, channels=20, layers=2, head=16),
}
STATISTICS = ("surprise", "entropy", "excess", "surprise_shares")
CALIBRATION_SIZE = 300
SEED = 0


def find_or_export(name: str, cache: Path, report: Callable[[str], None]) -> Path:
    """The folder of a scorer's bundle; exports it if the present sources have not made it yet."""
    sources_digest = digest(str(SCORERS[name]), Path(__file__).read_text())
    folder = cache / f"{name}-{sources_digest}"
    if not (folder / MANIFEST).exists():
        report(f"exporting the {name} scorer")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(name, SCORERS[name], folder)
    return folder


def _write(name: str, config: PixelCNNConfig, folder: Path) -> None:
    torch.manual_seed(SEED)
    model = PixelCNN(config)
    nn.init.normal_(model.head.weight, std=0.3)  # zero before training
    source = roles.density(model.eval(), STATISTICS)
    exported = graphs.export(source, folder / "density.onnx", config.levels, 0)
    session = Session(folder / "density.onnx", exported.graph, Device("cpu"))
    fit, held = (_run_statistics(session, part) for part in np.split(_calibration(config), 2))
    learnt = calibrate.combination(fit, [PartConfig()], calibrate.places(source.widths))
    np.savez(folder / "calibration.npz", **calibrate.detector(learnt, held))  # type: ignore[arg-type]
    np.savez(
        folder / "golden.npz",
        **{f"density/{tensor_name}": array for tensor_name, array in exported.golden.items()},  # type: ignore[arg-type]
    )
    write_manifest(
        folder,
        {
            "name": name,
            "version": "1",
            "description": "Untrained, to measure servers with.",
            "shape": config.shape,
            "levels": config.levels,
            "graphs": {Role.DENSITY: exported.graph.model_dump()},
            "calibration": {
                "file": "calibration.npz",
                "size": len(held),
                "statistics": dict(source.widths),
            },
            "golden": "golden.npz",
            "parity_nats": exported.parity,
            "data_digest": "0" * 64,
        },
    )


def _calibration(config: PixelCNNConfig) -> Pixels:
    return random_pictures((2 * CALIBRATION_SIZE, *config.shape), config.levels)


def _run_statistics(session: Session, x: Pixels) -> Seen:
    parts = [session.run({"x": part}, ["statistics"])[0] for part in np.array_split(x, 20)]
    return Seen(np.concatenate(parts), np.zeros(len(x), np.int64))
