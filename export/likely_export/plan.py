"""What a recipe's bundle is to be, and whether it can be: known before its models are trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
from pydantic import ValidationError
from torch import nn

from likely.bundle import Graph, Manifest, Role
from likely.errors import InvalidInput
from likely_export import calibrate, roles
from likely_export.calibrate import Seen
from likely_export.data import Dataset
from likely_export.recipes import Recipe, refusal
from likely_export.roles import GraphSource

GOLDEN = "golden.npz"
CALIBRATION = "calibration.npz"
FEW = 256  # fit pictures; with more, no combination fails for their number


def fields(recipe: Recipe, data: Dataset, graphs: Mapping[Role, Graph]) -> dict[str, object]:
    """What the manifest says of the bundle, but for what is learnt and measured.

    Args:
        recipe: of the bundle.
        data: divided as it says.
        graphs: the bundle's.
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
    """Returns if a bundle can be built of these models, as far as it is known before they learn.

    Args:
        recipe: of the bundle.
        data: divided as it says.
        models: those of the recipe by name, untrained.

    Raises:
        InvalidInput: models cannot play their roles, or not together; a manifest cannot say what
            the bundle would be; the fit split is too small to combine statistics on.
    """
    statistics = recipe.calibration.statistics
    made = {
        role: roles.source(role, [models[name] for name in recipe.models_of(role)], statistics)
        for role in recipe.roles
    }
    manifest = _manifest(recipe, data, made)
    features, taken = (manifest.latent_dimensions(role) for role in (Role.ENCODE, Role.DECODE))
    if features and taken and features != taken:
        raise InvalidInput(
            f"roles.{Role.DECODE}", f"takes {taken} features where {Role.ENCODE} gives {features}"
        )
    if Role.DENSITY in made and len(data.fit) <= FEW:
        _check_combination(recipe, data, made[Role.DENSITY])


def _manifest(recipe: Recipe, data: Dataset, made: Mapping[Role, GraphSource]) -> Manifest:
    """The manifest of a bundle of these graphs, with nothing learnt yet.

    Raises:
        InvalidInput: no manifest can be so; names what it refuses first.
    """
    graphs = {role: source.graph(f"{role}.onnx") for role, source in made.items()}
    names = [GOLDEN, *(graph.file for graph in graphs.values())]
    told = fields(recipe, data, graphs) | {"parity_nats": 0.0}
    if Role.DENSITY in made:
        names.append(CALIBRATION)
        told["calibration"] = {
            "file": CALIBRATION,
            "size": len(data.calibrate),
            "weights": _weights(graphs.get(Role.CONDITIONAL)),
            "statistics": made[Role.DENSITY].widths,
        }
    empty = {"size": 0, "sha256": "0" * 64}
    try:
        return Manifest.model_validate({**told, "files": dict.fromkeys(names, empty)})
    except ValidationError as error:
        raise refusal(error, "roles") from error


def _weights(conditional: Graph | None) -> tuple[float, ...]:
    """Even weights of the experts of p(x|y); none where there are not several."""
    evidence = conditional.output("evidence") if conditional else None
    experts = int(evidence.shape[1]) if evidence else 0
    return (1 / experts,) * experts if experts else ()


def _check_combination(recipe: Recipe, data: Dataset, density: GraphSource) -> None:
    """Returns if random statistics of the fit split can be combined as the recipe says.

    Raises:
        InvalidInput: they cannot; there are too few of them.
    """
    n, widths = len(data.fit), density.widths
    told = any(output.name == "label" for output in density.outputs)
    generator = np.random.Generator(np.random.Philox(key=[0, n]))

    def seen() -> Seen:
        label = data.fit.y if told else np.zeros(n, np.int64)
        return Seen(generator.standard_normal((n, sum(widths.values()))), label)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # noise fits no mixture well
            calibrate.combination(
                seen(),
                recipe.calibration.parts,
                calibrate.places(widths),
                seen(),
                len(data.labels) if told else 1,
            )
    except ValueError as error:  # numpy's LinAlgError is one, too
        raise InvalidInput(
            "splits.fit", f"{n} pictures are too few to combine statistics on: {error}"
        ) from error


def _knows_labels(graphs: Mapping[Role, Graph]) -> bool:
    """Whether a graph takes a label, or stands where labels may be judged."""
    return Role.DENSITY in graphs or any(graph.input("y") is not None for graph in graphs.values())


def _labels(data: Dataset) -> list[dict[str, object]]:
    return [
        {"name": name, "prior": prior}
        for name, prior in zip(data.labels, data.priors.tolist(), strict=True)
    ]
