"""From a training run to a bundle: export, calibrate, record golden outputs, evaluate."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from likely import noise
from likely.answers import Doubles
from likely.bundle import MANIFEST, Manifest, Role, write_manifest
from likely.errors import BundleError
from likely.graphs import Array, Device, Session
from likely_export import calibrate, evaluate, graphs, roles
from likely_export.data import Dataset
from likely_export.graphs import Exported
from likely_export.runs import Run

BATCH = 64
CALIBRATION = "calibration.npz"
GOLDEN = "golden.npz"

Report = Callable[[str], None]


def build(run: Path, out: Path, report: Report = print) -> Manifest:
    """The manifest of the bundle that a trained run becomes.

    Args:
        run: a folder that `likely-export train` filled.
        out: where the bundle shall lie; an older bundle there is replaced.
        report: told what is being done.

    Raises:
        InvalidInput: the run is not complete.
        BundleError: a graph differs from its model, or `out` holds something else.
    """
    opened = Run.open(run)
    data = opened.recipe.data.load()
    with _replacing(out) as folder:
        exported = dict(_export(opened, data, folder, report))
        report("calibrate")
        arrays, temperature = _calibrate(exported, data, folder)
        np.savez_compressed(folder / CALIBRATION, **arrays)  # type: ignore[arg-type]
        golden = {
            f"{role}/{name}": array
            for role, each in exported.items()
            for name, array in each.golden.items()
        }
        np.savez_compressed(folder / GOLDEN, **golden)  # type: ignore[arg-type]
        fields = {
            "name": opened.recipe.name,
            "version": opened.recipe.version,
            "description": opened.recipe.description,
            "shape": data.shape,
            "levels": data.levels,
            "labels": _labels(data),
            "graphs": {role: each.graph.model_dump() for role, each in exported.items()},
            "calibration": {
                "file": CALIBRATION,
                "size": len(data.calibrate),
                "temperature": temperature,
            },
            "golden": GOLDEN,
            "parity_nats": max(each.parity for each in exported.values()),
            "recipe": opened.recipe.published(),
            "data_digest": data.digest,
        }
        write_manifest(folder, fields)
        report("evaluate")
        evaluate.write(folder, data, opened.recipe.calibration.alphas)
        return write_manifest(folder, fields)


def _export(
    run: Run, data: Dataset, folder: Path, report: Report
) -> Iterator[tuple[Role, Exported]]:
    for role, name in run.recipe.roles.items():
        report(f"export {role}")
        model = graphs.halved(run.model(name))
        source = roles.source(role, model, run.recipe.calibration.statistics)
        yield role, graphs.export(source, folder / f"{role}.onnx", data.levels, len(data.labels))


def _calibrate(
    exported: Mapping[Role, Exported], data: Dataset, folder: Path
) -> tuple[dict[str, Doubles], float]:
    """The detector's arrays and the posterior's temperature."""
    density = exported[Role.DENSITY].graph
    session = Session(folder / density.file, density, Device("cpu"))
    fit, ranked = (
        _rows(session, {"x": part.x}, "statistics") for part in (data.fit, data.calibrate)
    )
    temperature = 1.0
    if Role.CONDITIONAL in exported:
        conditional = exported[Role.CONDITIONAL].graph
        session = Session(folder / conditional.file, conditional, Device("cpu"))
        feeds: dict[str, Array] = {"x": data.fit.x}
        if (eps := conditional.input("eps")) is not None:
            feeds["eps"] = noise.common(eps.array_shape(len(data.fit)))
        log_pxy = _rows(session, feeds, "log_pxy")
        temperature = calibrate.temperature(log_pxy, data.fit.y, _priors(data))
    return calibrate.detector(fit, ranked), temperature


def _rows(session: Session, feeds: Mapping[str, Array], output: str) -> Array:
    n = len(feeds["x"])
    parts = [
        session.run(
            {name: np.ascontiguousarray(feed[at : at + BATCH]) for name, feed in feeds.items()},
            [output],
        )[0]
        for at in range(0, n, BATCH)
    ]
    return np.concatenate(parts)


def _labels(data: Dataset) -> list[dict[str, object]]:
    return [
        {"name": name, "prior": prior}
        for name, prior in zip(data.labels, _priors(data).tolist(), strict=True)
    ]


def _priors(data: Dataset) -> Doubles:
    """How often each label stands in the training part."""
    counts = np.bincount(data.train.y, minlength=len(data.labels))
    priors: Doubles = counts / counts.sum()
    return priors


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` once all has gone well."""
    if out.exists() and not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise BundleError(f"{out} exists and is no bundle; it is not replaced")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    staging.chmod(0o755)
    try:
        yield staging
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
