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


def calibrate_and_compare(
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
    compared, changed, parity = _compare_decisions(
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
        "test_parity_nats": parity,
    }


def _calibrate(
    recipe: Recipe,
    exported: Mapping[Role, Exported],
    data: Dataset,
    folder: Path,
    report: Callable[[str], None],
) -> tuple[dict[str, Array], tuple[float, ...], float]:
    """Fits the detector's arrays, the experts' weights and the posterior's temperature."""
    density = passes.open_exported(folder, exported[Role.DENSITY])
    parts = recipe.calibration.parts
    corrupted, original_rows = None, np.empty(0, np.int64)
    if any(part.kind == "contrast" for part in parts):
        names = recipe.calibration.contrast
        pictures, original_rows, left_out = corruptions.corrupt_for_contrast(
            names, data.fit.x, data.levels
        )
        for name in left_out:
            report(f"contrast leaves out {name}: most pictures stay as they are, or turn blank")
        corrupted = _density_outputs(density, pictures)
    columns = calibrate.places(exported[Role.DENSITY].source.widths)
    labels = len(data.labels) if density.spec.output("label") else 1
    fit = _density_outputs(density, data.fit.x)
    learnt = calibrate.combination(fit, parts, columns, corrupted, labels, original_rows)
    ranked = _density_outputs(density, data.calibrate.x)
    if Role.CONDITIONAL not in exported:
        return calibrate.detector(learnt, ranked), (), 1.0
    conditional = exported[Role.CONDITIONAL].graph
    session = passes.open_exported(folder, exported[Role.CONDITIONAL])
    run = partial(passes.run_graph, session, batch=passes.SMALL_BATCH)
    priors = data.priors
    evidence = _evidence(conditional, run, data.fit.x)
    weights: tuple[float, ...] = ()
    if evidence.shape[1] > 1:
        weights, temperature = calibrate.fit_expert_weights(evidence, data.fit.y, priors)
    else:
        temperature = calibrate.fit_temperature(evidence[:, 0], data.fit.y, priors)
    evidence = _evidence(conditional, run, data.calibrate.x)
    pooled = bayes.pooled(evidence, np.array(weights or (1.0,)))
    posterior = bayes.posterior(pooled, priors, temperature)
    arrays = calibrate.detector(learnt, ranked, posterior, data.calibrate.y)
    return arrays, weights, temperature


def _compare_decisions(
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
    x = data.test.subsample(COMPARED).x
    density = passes.open_exported(folder, exported[Role.DENSITY])
    names = [name for name in ("log_px", "statistics", "label") if density.spec.output(name)]
    log_px, *score_inputs = passes.run_graph(density, {"x": x}, names)
    source = exported[Role.DENSITY].source
    expected, *torch_score_inputs = passes.run_module(source, {"x": x}, names)
    parity = float(np.abs(log_px - expected).max())
    ours, torchs = (
        detector.p_value(detector.score(*inputs)) for inputs in (score_inputs, torch_score_inputs)
    )
    changed = np.zeros(len(x), bool)
    for alpha in recipe.calibration.alphas:
        changed |= (ours <= alpha) != (torchs <= alpha)
    if (conditional := exported.get(Role.CONDITIONAL)) is not None:
        both = (
            partial(
                passes.run_graph,
                passes.open_exported(folder, conditional),
                batch=passes.SMALL_BATCH,
            ),
            partial(passes.run_module, conditional.source, batch=passes.SMALL_BATCH),
        )
        ours_label, torchs_label = (
            _assigned_labels(
                _evidence(conditional.graph, run, x), weights, data.priors, temperature
            )
            for run in both
        )
        changed |= torchs_label != ours_label
    if Role.DISCRIMINATE in exported:
        changed |= _labels_changed(exported[Role.DISCRIMINATE], folder, x)
    return len(x), int(changed.sum()), parity


def _assigned_labels(
    evidence: Array, weights: tuple[float, ...], priors: Doubles, temperature: float
) -> Labels:
    """The labels, int64 (n,), that a server would assign for log p_e(x|y) (n, experts, labels)."""
    pooled = bayes.pooled(evidence, np.array(weights or (1.0,)))
    return bayes.posterior(pooled, priors, temperature).argmax(1)


def _labels_changed(exported: Exported, folder: Path, x: Pixels) -> npt.NDArray[np.bool_]:
    """Whether torch and ONNX Runtime assign different labels by p(y|x), (n,)."""
    (log_pyx,) = passes.run_graph(passes.open_exported(folder, exported), {"x": x}, ["log_pyx"])
    (expected,) = passes.run_module(exported.source, {"x": x}, ["log_pyx"])
    changed: npt.NDArray[np.bool_] = expected.argmax(1) != log_pyx.argmax(1)
    return changed


def _density_outputs(density: Session, x: Pixels) -> Seen:
    """The density graph's outputs for pictures."""
    if density.spec.output("label") is None:
        (statistics,) = passes.run_graph(density, {"x": x}, ["statistics"])
        return Seen(statistics, np.zeros(len(x), np.int64))
    statistics, label = passes.run_graph(density, {"x": x}, ["statistics", "label"])
    return Seen(statistics, label)


def _evidence(
    conditional: Graph, run: Callable[[Mapping[str, Array], Sequence[str]], list[Array]], x: Pixels
) -> Array:
    """log p_e(x|y) of pictures, (n, experts, labels); `run` runs the graph or its module."""
    feeds = passes.picture_feeds(conditional, x)
    if conditional.output("evidence") is None:
        return run(feeds, ["log_pxy"])[0][:, None]
    return run(feeds, ["evidence"])[0]
