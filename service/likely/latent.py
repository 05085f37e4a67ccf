"""Decodes latent features into pictures, and defines directions in the space of features.

A direction moves features z to z + t * step at a point t. The position of features along it
is `probe . z + offset`, with probe . step = 1, so that a point t moves the position by exactly
t. Over q(z|x), the mean of the position is the position of the features' mean, and its variance
is probe^2 . variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from likely import noise
from likely.answers import Doubles, Features, Floats, Labels, Redrawings
from likely.batching.lanes import Ask, Lanes
from likely.bundle import Latent, Manifest, Role
from likely.errors import BundleError, InvalidInput, NotAnswered

_PROBE_TOLERANCE = 1e-3  # most by which probe . step may differ from 1


@dataclass(frozen=True, slots=True)
class Direction:
    """A direction in the space of latent features.

    Attributes:
        step: float64 (z,), the change of features for a point of 1.
        probe: float64 (z,), the weights of the features in their position.
        offset: constant that is added to a position.
    """

    step: Doubles
    probe: Doubles
    offset: float

    def position_of(self, features: Features) -> tuple[Doubles, Doubles | None]:
        """The positions of features: mean and standard deviation, each float64 (n,).

        The deviation is None if the features have no variance.
        """
        mean: Doubles = features.mean @ self.probe + self.offset
        if features.log_variance is None:
            return mean, None
        variance = np.exp(features.log_variance.astype(np.float64)) @ np.square(self.probe)
        return mean, np.sqrt(variance)


def directions(
    latent: Latent | None, arrays: Mapping[str, npt.NDArray[Any]], z: int
) -> dict[str, Direction]:
    """The directions by name, checked against the manifest.

    Args:
        latent: the manifest's entry; None if the bundle has no directions.
        arrays: `steps` and `probes`, both (k, z), and `offsets`, (k,), of k directions.
        z: number of latent features.

    Raises:
        BundleError: an array is missing, has another shape or is not finite; a name occurs
            twice; or a probe does not belong to its step.
    """
    if latent is None:
        return {}
    names = [direction.name for direction in latent.directions]
    shapes = {"steps": (len(names), z), "probes": (len(names), z), "offsets": (len(names),)}
    checked: list[Doubles] = []
    for name, shape in shapes.items():
        array = arrays.get(name)
        if array is None or array.shape != shape or not np.isfinite(array).all():
            raise BundleError(f"{latent.file} has no finite array {name} of {shape}", "latent")
        checked.append(array.astype(np.float64))
    steps, probes, offsets = checked
    if len(set(names)) < len(names) or np.any(abs((steps * probes).sum(1) - 1) > _PROBE_TOLERANCE):
        raise BundleError(
            f"{latent.file} has two directions of one name, or a probe that does not fit its step",
            "latent",
        )
    return {
        name: Direction(step, probe, float(offset))
        for name, step, probe, offset in zip(names, steps, probes, offsets, strict=True)
    }


@dataclass(frozen=True, slots=True)
class Drawing:
    """How pictures are drawn from decoded features.

    Attributes:
        count: number of draws for each row of features; 0 gives only means and deviations.
        seed: seed of the random numbers.
        first_index: index of the first picture.
        temperature: factor of the noise that levels are drawn with.
    """

    count: int = 0
    seed: int = 0
    first_index: int = 0
    temperature: float = 1.0


class Redrawer:
    """Decodes the latent features of one model."""

    def __init__(self, manifest: Manifest, lanes: Lanes) -> None:
        self._manifest = manifest
        self._lanes = lanes

    async def redraw(self, z: Floats, label: Labels | None, drawing: Drawing) -> Redrawings:
        """Decodes features; the draws of one picture use the same noise at all points.

        Args:
            z: features, float32 (n, points, z).
            label: int64 (n, points), the labels; None if the model decodes without labels.
            drawing: how many pictures are drawn at each point, and how.

        Raises:
            NotAnswered: draws are requested from a model that gives no distribution.
            InvalidInput: labels are missing, or the model decodes without labels.
        """
        graph = self._lanes.graph(Role.DECODE)
        shape, gumbel = z.shape[:2], graph.input("gumbel")
        label = self._decoder_labels(label, shape)
        if drawing.count and gumbel is None:
            raise NotAnswered(
                f"model {self._manifest.name} gives pictures, not a distribution of them: "
                "nothing can be drawn"
            )
        repeats = max(1, drawing.count)
        rows = z.reshape(-1, z.shape[-1])
        labels = None if label is None else label.reshape(-1)

        def feed(start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
            at, number = np.divmod(np.arange(start, stop), repeats)
            feeds: dict[str, npt.NDArray[Any]] = {"z": rows[at]}
            if labels is not None:
                feeds["y"] = labels[at]
            if gumbel is not None:
                feeds["gumbel"] = _noise(drawing, at // shape[1], number, gumbel.array_shape(1)[1:])
            return feeds

        outputs = tuple(spec.name for spec in graph.outputs)
        (arrays,) = await self._lanes.run_all(Ask(Role.DECODE, len(rows) * repeats, feed, outputs))
        picture = self._manifest.shape
        several = {name: array.reshape(*shape, repeats, *picture) for name, array in arrays.items()}
        deviation = several.get("deviation")
        drawn = several.get("x", np.empty((*shape, 0, *picture), np.uint8))
        return Redrawings(
            mean=several["mean"][:, :, 0],
            deviation=None if deviation is None else deviation[:, :, 0],
            drawn=drawn[:, :, : drawing.count],
            seed=drawing.seed,
            model_version=self._manifest.version,
        )

    def _decoder_labels(self, label: Labels | None, shape: tuple[int, ...]) -> Labels | None:
        """The labels as the graph takes them, for rows of the given shape."""
        takes = self._lanes.graph(Role.DECODE).input("y") is not None
        if label is not None and not takes:
            raise InvalidInput("labels", "the model decodes under no label")
        if takes and label is None:
            if math.prod(shape):
                raise InvalidInput("labels", "the model decodes under labels: each row needs one")
            return np.empty(shape, np.int64)
        return label


def _noise(
    drawing: Drawing,
    pictures: npt.NDArray[np.integer],
    numbers: npt.NDArray[np.integer],
    shape: tuple[int, ...],
) -> Floats:
    """Gumbel noise, float32 (n, *shape), for draws of pictures; zeros if nothing is drawn."""
    if not drawing.count:
        return np.zeros((len(pictures), *shape), np.float32)
    # Python's integers: an index may exceed 2**63 - 1, where numpy's int64 would overflow.
    indices = [drawing.first_index + picture for picture in pictures.tolist()]
    gumbel = noise.gumbel(drawing.seed, indices, shape, numbers.tolist())
    if drawing.temperature != 1:
        gumbel *= np.float32(drawing.temperature)
    return gumbel
