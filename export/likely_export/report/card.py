"""The model card: what the model is, what it is for, what it guarantees, and how to rebuild it."""

from __future__ import annotations

from typing import Any

import tomli_w

from likely.bundle import Graph, Kind, Role
from likely_export import corruptions
from likely_export.report.outliers import hard
from likely_export.report.subject import Subject, View
from likely_export.report.text import PER_CENT, format_figure

ABOUT = (".html", ".json")  # files that describe the bundle and are not served
ANSWERS = {
    Role.DENSITY: "log p(x) and the outlier statistics",
    Role.CONDITIONAL: "log p(x|y) for every label",
    Role.GENERATE: "a picture with a given label, in one pass",
    Role.SAMPLE: "pictures, pixel by pixel",
    Role.ENCODE: "latent features",
    Role.DECODE: "a picture from its latent features",
    Role.DISCRIMINATE: "p(y|x) itself, without p(x)",
}


def card(subject: Subject) -> View:
    """The model card."""
    manifest = subject.manifest
    c, h, w = manifest.shape
    recipe = manifest.recipe
    data = recipe.get("data", {})
    splits: dict[str, Any] = data.get("splits", {})
    size = sum(record.size for name, record in manifest.files.items() if not name.endswith(ABOUT))
    calibration = manifest.calibrated
    return {
        "manifest": manifest,
        "shape": f"{h} × {w} pixels" + (f", {c} channels" if c > 1 else ""),
        "size": f"{size / 1e6:.1f} MB" if size else "",
        "labels": [(label.name, f"{100 * label.prior:.3g}{PER_CENT}") for label in manifest.labels],
        "graphs": [
            (role.value, ANSWERS[role], _kind(graph)) for role, graph in manifest.graphs.items()
        ],
        "source": data.get("source", ""),
        "splits": [
            (n, format_figure(size)) for n, size in splits.items() if size and size is not True
        ],
        "copies": _copies(subject.figure("copies_of_training")),
        "seen": _copies(_seen(subject)),
        "test_size": format_figure(subject.figures["test_size"])
        if "test_size" in subject.figures
        else "",
        "binarised": bool(data.get("binarise")),
        "models": [
            (name, model.get("family", ""), _training(model))
            for name, model in recipe.get("models", {}).items()
        ],
        "statistics": recipe.get("calibration", {}).get("statistics", ()),
        "choosing": list(corruptions.CHOOSING),
        "contrast": _contrast(recipe.get("calibration", {})),
        "finest": f"{calibration.finest_alpha:.2g}",
        "calibration": calibration,
        "hard": hard(subject),
        "classifies": Role.CONDITIONAL in manifest.graphs,
        "draws": Role.SAMPLE in manifest.graphs or Role.GENERATE in manifest.graphs,
    }


def reproduction(subject: Subject) -> View:
    """The commands that rebuild the bundle, and its recipe."""
    recipe = subject.manifest.recipe
    return {
        "name": subject.manifest.name,
        "source": recipe.get("data", {}).get("source", ""),
        "digest": subject.manifest.data_digest,
        "recipe": tomli_w.dumps(_without_none(recipe)) if recipe else "",
    }


def _kind(graph: Graph) -> str:
    if graph.kind is None:
        return ""
    bounds = {
        Kind.EXACT: "exact",
        Kind.ELBO: "a lower bound (ELBO)",
        Kind.IWAE: f"a lower bound (IWAE-{graph.importance_samples})",
    }
    return bounds[graph.kind]


def _contrast(calibration: dict[str, Any]) -> list[str]:
    """The corruptions that a part of the detector was fitted to."""
    fitted = any(part.get("kind") == "contrast" for part in calibration.get("parts", ()))
    return list(calibration.get("contrast", ())) if fitted else []


def _copies(counts: dict[str, int] | None) -> str | None:
    """How many pictures of each part are training pictures too; None if they were not counted."""
    return None if counts is None else format_figure({part: n for part, n in counts.items() if n})


def _seen(subject: Subject) -> dict[str, int]:
    """How many test pictures also occur in each of the other parts."""
    learnt = (subject.figure("copies_of_training") or {}).get("test", 0)
    return {"train": learnt, **(subject.figure("test_copies_of") or {})}


def _training(model: dict[str, Any]) -> str:
    names = ("epochs", "steps", "batch", "optimiser", "learning_rate", "precision")
    training = model.get("training", {})
    earlier = [f"starts from “{model['start_from']}”"] if model.get("start_from") else []
    settings = [
        f"{name.replace('_', ' ')} {format_figure(training[name])}"
        for name in names
        if training.get(name)
    ]
    return ", ".join(earlier + settings)


def _without_none(values: Any) -> Any:
    """The values without None, which TOML cannot express."""
    if isinstance(values, dict):
        return {name: _without_none(item) for name, item in values.items() if item is not None}
    return [_without_none(item) for item in values] if isinstance(values, list | tuple) else values
