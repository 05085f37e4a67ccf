"""Fits what a bundle decides by, from its graphs, and compares its decisions with torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from likely import bayes
from likely.answers import Doubles, Labels, Pixels
from likely.bundle import Graph, Role
from likely.graphs import Array, Session
from likely.outliers import Detector
from likely_export import calibrate, corruptions, passes
from likely_export.calibrate import Seen
from likely_export.data import Dataset
from likely_export.graphs import Exported
from likely_export.plan import CALIBRATION
from likely_export.recipes import Recipe

COMPARED = 10_000


def judged(
    recipe: Recipe,
    exported: Mapping[Role, Exported],
    data: Dataset,
    folder: Path,
    report: Callable[[str], None],
) -> dict[str, object]:
    """Returns the manifest's fields about the calibration and the comparison of decisions.

    Writes the arrays of the calibration to the folder.

    Args:
        recipe: recipe of the training.
        exported: the exported graphs, among them that of p(x).
        data: data set, split as in training.
        folder: folder of the graphs.
        report: called with each step as it begins.
    """
    report("calibrate")
    arrays, weights, temperature = _calibrate(recipe, exported, data, folder, report)
    np.savez_compressed(folder / CALIBRATION, **arrays)  # type: ignore[arg-type]
    report("compare decisions")
    compared, changed, apart = _decisions(
        recipe, exported, data, folder, arrays, weights, temperature
    )
    return {
        "calibration": {
            "file": CALIBRATION,
            "size": len(data.calibrate),
            "temperature": temperature,
            "weights": weights,
            "statistics": exported[Role.DENSITY].source.widths,
        },
        "decisions_compared": compared,
        "decisions_changed": changed,
        "test_parity_nats": apart,
    }


def _calibrate(
    recipe: Recipe,
    exported: Mapping[Role, Exported],
    data: Dataset,
    folder: Path,
    report: Callable[[str], None],
) -> tuple[dict[str, Array], tuple[float, ...], float]:
    """Fits the detector's arrays, the experts' weights and the posterior's temperature."""
    density = passes.session(folder, exported[Role.DENSITY])
    parts = recipe.calibration.parts
    corrupted, made_of = None, np.empty(0, np.int64)
    if any(part.kind == "contrast" for part in parts):
        names = recipe.calibration.contrast
        pictures, made_of, left_out = corruptions.contrasting(names, data.fit.x, data.levels)
        for name in left_out:
            report(f"contrast leaves out {name}: most pictures stay as they are, or turn blank")
        corrupted = _seen(density, pictures)
    columns = calibrate.places(exported[Role.DENSITY].source.widths)
    labels = len(data.labels) if density.spec.output("label") else 1
    fit = _seen(density, data.fit.x)
    learnt = calibrate.combination(fit, parts, columns, corrupted, labels, made_of)
    ranked = _seen(density, data.calibrate.x)
    if Role.CONDITIONAL not in exported:
        return calibrate.detector(learnt, ranked), (), 1.0
    conditional = exported[Role.CONDITIONAL].graph
    session = passes.session(folder, exported[Role.CONDITIONAL])
    rows = partial(passes.rows, session, batch=passes.FEW)
    priors = data.priors
    evidence = _evidence(conditional, rows, data.fit.x)
    weights: tuple[float, ...] = ()
    if evidence.shape[1] > 1:
        weights, temperature = calibrate.expert_weights(evidence, data.fit.y, priors)
    else:
        temperature = calibrate.temperature(evidence[:, 0], data.fit.y, priors)
    evidence = _evidence(conditional, rows, data.calibrate.x)
    pooled = bayes.pooled(evidence, np.array(weights or (1.0,)))
    posterior = bayes.posterior(pooled, priors, temperature)
    arrays = calibrate.detector(learnt, ranked, posterior, data.calibrate.y)
    return arrays, weights, temperature


def _decisions(
    recipe: Recipe,
    exported: Mapping[Role, Exported],
    data: Dataset,
    folder: Path,
    arrays: Mapping[str, Array],
    weights: tuple[float, ...],
    temperature: float,
) -> tuple[int, int, float]:
    """Compares the decisions of torch and of ONNX Runtime on the test part.

    Returns:
        Number of pictures compared, number of different decisions, and the largest difference of
        log p(x) in nats.
    """
    detector = Detector(arrays)
    x = data.test.some(COMPARED).x
    density = passes.session(folder, exported[Role.DENSITY])
    names = [name for name in ("log_px", "statistics", "label") if density.spec.output(name)]
    log_px, *found = passes.rows(density, {"x": x}, names)
    source = exported[Role.DENSITY].source
    expected, *torch_found = passes.torch_rows(source, {"x": x}, names)
    apart = float(np.abs(log_px - expected).max())
    ours, torchs = (detector.p_value(detector.score(*each)) for each in (found, torch_found))
    changed = np.zeros(len(x), bool)
    for alpha in recipe.calibration.alphas:
        changed |= (ours <= alpha) != (torchs <= alpha)
    if (conditional := exported.get(Role.CONDITIONAL)) is not None:
        both = (
            partial(passes.rows, passes.session(folder, conditional), batch=passes.FEW),
            partial(passes.torch_rows, conditional.source, batch=passes.FEW),
        )
        ours_label, torchs_label = (
            _taken(_evidence(conditional.graph, rows, x), weights, data.priors, temperature)
            for rows in both
        )
        changed |= torchs_label != ours_label
    if Role.DISCRIMINATE in exported:
        changed |= _relabelled(exported[Role.DISCRIMINATE], folder, x)
    return len(x), int(changed.sum()), apart


def _taken(
    evidence: Array, weights: tuple[float, ...], priors: Doubles, temperature: float
) -> Labels:
    """The labels, int64 (n,), that a server would assign for log p_e(x|y) (n, experts, labels)."""
    pooled = bayes.pooled(evidence, np.array(weights or (1.0,)))
    return bayes.posterior(pooled, priors, temperature).argmax(1)


def _relabelled(exported: Exported, folder: Path, x: Pixels) -> npt.NDArray[np.bool_]:
    """Whether torch and ONNX Runtime assign different labels by p(y|x), (n,)."""
    (found,) = passes.rows(passes.session(folder, exported), {"x": x}, ["log_pyx"])
    (expected,) = passes.torch_rows(exported.source, {"x": x}, ["log_pyx"])
    changed: npt.NDArray[np.bool_] = expected.argmax(1) != found.argmax(1)
    return changed


def _seen(density: Session, x: Pixels) -> Seen:
    """The density graph's outputs for pictures."""
    if density.spec.output("label") is None:
        (statistics,) = passes.rows(density, {"x": x}, ["statistics"])
        return Seen(statistics, np.zeros(len(x), np.int64))
    statistics, label = passes.rows(density, {"x": x}, ["statistics", "label"])
    return Seen(statistics, label)


def _evidence(
    conditional: Graph, rows: Callable[[Mapping[str, Array], Sequence[str]], list[Array]], x: Pixels
) -> Array:
    """log p_e(x|y) of pictures, (n, experts, labels); `rows` runs the graph or its module."""
    feeds = passes.feeds(conditional, x)
    if conditional.output("evidence") is None:
        return rows(feeds, ["log_pxy"])[0][:, None]
    return rows(feeds, ["evidence"])[0]
