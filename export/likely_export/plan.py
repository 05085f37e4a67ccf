"""What bundle a recipe describes, and whether it can be built, before any model is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from likely.bundle import Graph, Manifest, Role
from likely.errors import InvalidInput
from likely_export import roles
from likely_export.data import Dataset
from likely_export.recipes import Recipe, first_error, from_table
from likely_export.roles import GraphSource

GOLDEN = "golden.npz"
CALIBRATION = "calibration.npz"


def fields(recipe: Recipe, data: Dataset, graphs: Mapping[Role, Graph]) -> dict[str, object]:
    """Returns the manifest's fields, except for what is fitted or measured.

    Args:
        recipe: recipe of the bundle.
        data: its data set.
        graphs: the bundle's graphs.
    """
    return {
        "name": recipe.name,
        "version": recipe.version,
        "description": recipe.description,
        "shape": data.shape,
        "levels": data.levels,
        "labels": _labels(data) if _knows_labels(graphs) else [],
        "graphs": {role: graph.model_dump() for role, graph in graphs.items()},
        "golden": GOLDEN,
        "recipe": recipe.published(),
        "data_digest": data.digest,
    }


def check(recipe: Recipe, data: Dataset, models: Mapping[str, nn.Module]) -> None:
    """Raises unless a bundle can be built from these models, as far as is known before training.

    Args:
        recipe: recipe of the bundle.
        data: its data set.
        models: the recipe's models by name, untrained.

    Raises:
        InvalidInput: a model has no role, or models cannot play their roles, alone or together; or
            the manifest cannot describe the bundle, or its recipe would confuse two data sets.
    """
    for role in (Role.CONDITIONAL, Role.DISCRIMINATE):
        if role in recipe.roles and not data.labels:
            raise InvalidInput(f"roles.{role}", f"needs labels, and {data.name} has none")
    statistics = recipe.calibration.statistics
    made = {
        role: roles.graph_source(
            role, [models[name] for name in recipe.models_of(role)], statistics
        )
        for role in recipe.roles
    }
    manifest = _manifest(recipe, data, made)
    _check_places(from_table(manifest.model_dump(mode="json")["recipe"]))  # as evaluations read it
    features, taken = (manifest.latent_dimensions(role) for role in (Role.ENCODE, Role.DECODE))
    if features and taken and features != taken:
        raise InvalidInput(
            f"roles.{Role.DECODE}", f"takes {taken} features where {Role.ENCODE} gives {features}"
        )
    playing = {name for role in recipe.roles for name in recipe.models_of(role)}
    playing |= {recipe.models[name].start_from for name in playing}
    for name in models:
        if name not in playing:
            raise InvalidInput(f"models.{name}", "has no role, so no bundle would contain it")


def _check_places(published: Recipe) -> None:
    """Raises if two data sets would be looked for in one place once folders are removed."""
    known = {Path(published.data.source): "the data"}
    for name, path in published.other_paths().items():
        if (same := known.setdefault(path, name)) != name:
            raise InvalidInput(
                f"evaluation.others.{name}",
                f"a manifest names no folders, so this would be looked for in {path} beside the "
                f"data, as {same} would: rename the file, or give a path relative to the data",
            )


def _manifest(recipe: Recipe, data: Dataset, made: Mapping[Role, GraphSource]) -> Manifest:
    """Returns the manifest of a bundle of these graphs, with nothing fitted yet.

    Raises:
        InvalidInput: the manifest would be invalid; names the first error.
    """
    graphs = {role: source.graph(f"{role}.onnx") for role, source in made.items()}
    names = [GOLDEN, *(graph.file for graph in graphs.values())]
    content = fields(recipe, data, graphs) | {"parity_nats": 0.0}
    if Role.DENSITY in made:
        names.append(CALIBRATION)
        content["calibration"] = {
            "file": CALIBRATION,
            "size": len(data.calibrate),
            "weights": _weights(graphs.get(Role.CONDITIONAL)),
            "statistics": made[Role.DENSITY].widths,
        }
    empty = {"size": 0, "sha256": "0" * 64}
    try:
        return Manifest.model_validate({**content, "files": dict.fromkeys(names, empty)})
    except ValidationError as error:
        raise first_error(error, "roles") from error


def _weights(conditional: Graph | None) -> tuple[float, ...]:
    """Equal weights of the experts of p(x|y); none if there are not several."""
    evidence = conditional.output("evidence") if conditional else None
    experts = int(evidence.shape[1]) if evidence else 0
    return (1 / experts,) * experts if experts else ()


def _knows_labels(graphs: Mapping[Role, Graph]) -> bool:
    """Whether a graph takes a label, or there is a density, with which labels can be judged."""
    return Role.DENSITY in graphs or any(graph.input("y") is not None for graph in graphs.values())


def _labels(data: Dataset) -> list[dict[str, object]]:
    return [
        {"name": name, "prior": prior}
        for name, prior in zip(data.labels, data.priors.tolist(), strict=True)
    ]
