"""Turns a training run into a bundle: exports, calibrates, compares, records golden outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from likely.bundle import Bundle, Manifest, Role, write_manifest
from likely.errors import InvalidInput
from likely.graphs import Array
from likely_export import (
    attributes,
    decisions,
    directions,
    graphs,
    measures,
    passes,
    plan,
    roles,
)
from likely_export.classifier import Classifier, fit_temperature
from likely_export.data import Dataset
from likely_export.graphs import Exported
from likely_export.material import BOUND, EVALUATION, REPORT
from likely_export.recipes import Recipe, model_names
from likely_export.replacing import replacing
from likely_export.runs import Run
from likely_export.vae import VAE

LATENT = "latent.npz"
WEIGHTS = "weights.bin"

Report = Callable[[str], None]


def build(run: Path, out: Path, report: Report = print, *, source: str | None = None) -> Manifest:
    """Builds the bundle of a trained run, and returns its manifest.

    Args:
        run: folder that `likely-export train` filled.
        out: folder of the new bundle; an older bundle there is replaced.
        report: called with each step as it begins.
        source: where the run's data are now, if they have moved since training.

    Raises:
        InvalidInput: the run is not complete, or a model was not trained as its recipe says, or on
            other data.
        BundleError: a graph differs from its model, or `out` contains something else.
    """
    opened = Run.open(run, source)
    data = opened.recipe.data.load()
    with replacing(out) as folder:
        exported = dict(_export_all(opened, data, folder, report))
        graphs.share_weights(
            [folder / export.graph.file for export in exported.values()], folder / WEIGHTS
        )
        made: dict[str, object] = {}
        if Role.DENSITY in exported:
            made |= decisions.calibrate_and_compare(opened.recipe, exported, data, folder, report)
        if {Role.ENCODE, Role.DECODE} <= set(exported):
            report("find directions")
            made |= _directions(opened.recipe, exported, data, folder)
        golden = {
            f"{role}/{name}": array
            for role, export in exported.items()
            for name, array in export.golden.items()
        }
        np.savez_compressed(folder / plan.GOLDEN, **golden)  # type: ignore[arg-type]
        if (bound := _bound(opened, data)) is not None:
            (folder / EVALUATION).write_text(
                json.dumps({BOUND: bound}, indent=1, allow_nan=False) + "\n"
            )
        fields = plan.fields(
            opened.recipe, data, {role: export.graph for role, export in exported.items()}
        )
        parity = max(export.parity for export in exported.values())
        return write_manifest(folder, {**fields, **made, "parity_nats": parity})


def _bound(run: Run, data: Dataset) -> dict[str, float | int] | None:
    """The bound on -log p(x) of the test part, for a bundle with a VAE and no density.

    No graph of such a bundle computes the bound, so torch does. Returned with the number of
    pictures and of importance samples.
    """
    if Role.DENSITY in run.recipe.roles or Role.ENCODE not in run.recipe.roles:
        return None
    (name,) = run.recipe.models_of(Role.ENCODE)
    model = graphs.round_to_half(run.model(name, data))
    if not isinstance(model, VAE):
        return None
    part = data.test.subsample(decisions.COMPARED)
    with torch.no_grad():
        pairs = zip(
            *(torch.from_numpy(array).split(passes.BATCH) for array in (part.x, part.y)),
            strict=True,
        )
        nats = torch.cat([model.evaluate(x, y) for x, y in pairs])
    counts = {"importance_samples": model.config.importance_samples, "test_size": len(part)}
    return measures.mean(nats.double().numpy()) | counts


def extend(
    bundle: Path,
    run: Path,
    out: Path,
    report: Report = print,
    version: str | None = None,
    *,
    source: str | None = None,
) -> Manifest:
    """Builds a bundle with a run's discriminative model added, and returns its manifest.

    All other files stay the same to the byte, and so do all other answers. Figures and report are
    left out if the version changes, which they name, or if a discriminative model is replaced,
    which they describe. The comparison of decisions with torch's was made when the bundle was
    built, and does not include the new labels.

    Args:
        bundle: bundle of the same data, split alike.
        run: folder in which at least the recipe's discriminative model was trained.
        out: folder of the new bundle; an older bundle there is replaced.
        report: called with each step as it begins.
        version: version of the new bundle; None for the old one's.
        source: where the run's data are now, if they have moved since training.

    Raises:
        InvalidInput: the run is of other data, has no discriminative model, or its weights are of
            another training; or the bundle has no labels.
        BundleError: the graph differs from its model, or `out` contains something else.
    """
    opened, base = Run.open(run, source), Bundle.open(bundle)
    if Role.DISCRIMINATE not in opened.recipe.roles:
        raise InvalidInput(str(run), "its recipe has no model of the role discriminate")
    data = opened.recipe.data.load()
    if data.identity != (base.manifest.data_digest, base.manifest.levels):
        raise InvalidInput(
            opened.recipe.data.source, "is not the data that the bundle was made with"
        )
    if not base.manifest.labels:
        raise InvalidInput(str(bundle), "has no labels, so there are none to tell apart")
    version = version or base.manifest.version
    is_replaced = Role.DISCRIMINATE in base.manifest.graphs
    is_described = version == base.manifest.version and not is_replaced
    stale = () if is_described else (EVALUATION, REPORT)
    with replacing(out) as folder:
        for name in base.manifest.files:
            if name not in stale:
                shutil.copyfile(bundle / name, folder / name)
        report(f"export {Role.DISCRIMINATE}")
        exported = _export_role(opened, Role.DISCRIMINATE, data, folder)
        golden = base.golden()
        golden |= {f"{Role.DISCRIMINATE}/{name}": a for name, a in exported.golden.items()}
        np.savez_compressed(folder / base.manifest.golden, **golden)  # type: ignore[arg-type]
        fields = _extended(base.manifest, opened.recipe, exported)
        return write_manifest(folder, fields | {"version": version})


def _extended(manifest: Manifest, recipe: Recipe, exported: Exported) -> dict[str, Any]:
    """The manifest's fields with the discriminative graph and its part of the recipe."""
    fields = manifest.model_dump(exclude={"files"})
    fields["graphs"][Role.DISCRIMINATE] = exported.graph.model_dump()
    fields["parity_nats"] = max(manifest.parity_nats, exported.parity)
    table = recipe.published()
    models = _with_starts(table["models"], recipe.models_of(Role.DISCRIMINATE))
    named = {Role.DISCRIMINATE.value: table["roles"][Role.DISCRIMINATE]}
    existing = fields["recipe"]
    existing_roles = existing.get("roles", {}) | named
    in_use = [name for role in existing_roles.values() for name in model_names(role)]
    kept = _with_starts(existing.get("models", {}), in_use)
    fields["recipe"] = {**existing, "models": {**kept, **models}, "roles": existing_roles}
    return fields


def _with_starts(models: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The tables of the models of these names that there are, and of those that they start from."""
    chosen = {name for name in names if name in models}
    chosen |= {models[name].get("start_from") for name in chosen}
    return {name: model for name, model in models.items() if name in chosen}


def _directions(
    recipe: Recipe, exported: Mapping[Role, Exported], data: Dataset, folder: Path
) -> dict[str, object]:
    """Finds directions on the fit split; returns their manifest field, or nothing without any."""
    session = passes.open_exported(folder, exported[Role.ENCODE])
    feeds: dict[str, Array] = {"x": data.fit.x}
    if session.spec.input("y") is not None:
        feeds["y"] = data.fit.y
    (features,) = passes.run_graph(session, feeds, ["mean"])
    measured = {
        name: attributes.measured(name, data.fit.x, data.levels)
        for name in recipe.latent.attributes
    }
    entries, arrays = directions.find_directions(features, data.fit.y, data.labels, measured)
    if not entries:
        return {}
    np.savez_compressed(folder / LATENT, **arrays)  # type: ignore[arg-type]
    return {"latent": {"file": LATENT, "directions": entries}}


def _export_all(
    run: Run, data: Dataset, folder: Path, report: Report
) -> Iterator[tuple[Role, Exported]]:
    for role in run.recipe.roles:
        report(f"export {role}")
        yield role, _export_role(run, role, data, folder)


def _export_role(run: Run, role: Role, data: Dataset, folder: Path) -> Exported:
    models = [graphs.round_to_half(run.model(name, data)) for name in run.recipe.models_of(role)]
    for model in models:
        if isinstance(model, Classifier):
            fit_temperature(model, data.fit)
    source = roles.graph_source(role, models, run.recipe.calibration.statistics)
    return graphs.export(source, folder / f"{role}.onnx", data.levels, len(data.labels))
