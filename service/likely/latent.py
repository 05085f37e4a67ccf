"""What features stand for: pictures redrawn where they are, along a direction, between two.

A direction moves features z by `step` for each unit of a point. Where features lie along it
is `probe . z + offset`, and probe . step = 1: so a point t moves that place by exactly t, and
over q(z|x) the place has the mean of the features' mean and the variance probe^2 . variance.
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

_CONSISTENT = 1e-3  # of probe . step, which is 1


@dataclass(frozen=True, slots=True)
class Direction:
    """A way through the features.

    Attributes:
        step: float64 (z,), how a point of 1 moves them.
        probe: float64 (z,), of the place along the way.
        offset: of that place.
    """

    step: Doubles
    probe: Doubles
    offset: float

    def place(self, features: Features) -> tuple[Doubles, Doubles | None]:
        """Mean and standard deviation (n,) of where features lie; None without a variance."""
        mean: Doubles = features.mean @ self.probe + self.offset
        if features.log_variance is None:
            return mean, None
        variance = np.exp(features.log_variance.astype(np.float64)) @ np.square(self.probe)
        return mean, np.sqrt(variance)


def directions(
    latent: Latent | None, arrays: Mapping[str, npt.NDArray[Any]], z: int
) -> dict[str, Direction]:
    """The directions by name, held to what the manifest says.

    Args:
        latent: the manifest's entry.
        arrays: `steps` and `probes` (k, z) and `offsets` (k,).
        z: size of the features.

    Raises:
        BundleError: an array is missing, of another shape, not finite or not consistent.
    """
    if latent is None:
        return {}
    names = [direction.name for direction in latent.directions]
    shapes = {"steps": (len(names), z), "probes": (len(names), z), "offsets": (len(names),)}
    found: list[Doubles] = []
    for name, shape in shapes.items():
        array = arrays.get(name)
        if array is None or array.shape != shape or not np.isfinite(array).all():
            raise BundleError(f"{latent.file} has no finite array {name} of {shape}", "latent")
        found.append(array.astype(np.float64))
    steps, probes, offsets = found
    if len(set(names)) < len(names) or np.any(abs((steps * probes).sum(1) - 1) > _CONSISTENT):
        raise BundleError(
            f"{latent.file} has two directions of one name, or one whose probe is not of its step",
            "latent",
        )
    return {
        name: Direction(step, probe, float(offset))
        for name, step, probe, offset in zip(names, steps, probes, offsets, strict=True)
    }


@dataclass(frozen=True, slots=True)
class Drawing:
    """How pictures are drawn from what features stand for.

    Attributes:
        count: of each row of features; 0 for means and deviations alone.
        seed: where the random numbers come from.
        first_index: of the first picture.
        temperature: multiplies the noise that levels are drawn with.
    """

    count: int = 0
    seed: int = 0
    first_index: int = 0
    temperature: float = 1.0


class Redrawer:
    """Decodes features of one model."""

    def __init__(self, manifest: Manifest, lanes: Lanes) -> None:
        self._manifest = manifest
        self._lanes = lanes

    async def redraw(self, z: Floats, label: Labels | None, drawing: Drawing) -> Redrawings:
        """What features stand for, draws of all points of a picture with the same noise.

        Args:
            z: float32 (n, points, z).
            label: int64 (n, points); None where the model decodes under none.
            drawing: how many are drawn of each point, and how.

        Raises:
            NotAnswered: draws are asked of a model that gives no distribution.
            InvalidInput: labels are missing, or there is nothing that they could change.
        """
        graph = self._lanes.graph(Role.DECODE)
        shape, gumbel = z.shape[:2], graph.input("gumbel")
        label = self._labelled(label, shape)
        if drawing.count and gumbel is None:
            raise NotAnswered(
                f"model {self._manifest.name} gives pictures, not a distribution of them: "
                "nothing can be drawn"
            )
        each = max(1, drawing.count)
        rows = z.reshape(-1, z.shape[-1])
        labels = None if label is None else label.reshape(-1)

        def feed(start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
            at, number = np.divmod(np.arange(start, stop), each)
            feeds: dict[str, npt.NDArray[Any]] = {"z": rows[at]}
            if labels is not None:
                feeds["y"] = labels[at]
            if gumbel is not None:
                feeds["gumbel"] = _noise(drawing, at // shape[1], number, gumbel.array_shape(1)[1:])
            return feeds

        outputs = tuple(spec.name for spec in graph.outputs)
        (found,) = await self._lanes.run_all(Ask(Role.DECODE, len(rows) * each, feed, outputs))
        picture = self._manifest.shape
        several = {name: array.reshape(*shape, each, *picture) for name, array in found.items()}
        deviation = several.get("deviation")
        drawn = several.get("x", np.empty((*shape, 0, *picture), np.uint8))
        return Redrawings(
            mean=several["mean"][:, :, 0],
            deviation=None if deviation is None else deviation[:, :, 0],
            drawn=drawn[:, :, : drawing.count],
            seed=drawing.seed,
            model_version=self._manifest.version,
        )

    def _labelled(self, label: Labels | None, shape: tuple[int, ...]) -> Labels | None:
        """The labels as the graph takes them, for rows of that shape."""
        takes = self._lanes.graph(Role.DECODE).input("y") is not None
        if label is not None and not takes:
            raise InvalidInput("labels", "the model decodes under no label")
        if takes and label is None:
            if math.prod(shape):
                raise InvalidInput("labels", "the model decodes under labels: one a row is asked")
            return np.empty(shape, np.int64)
        return label


def _noise(
    drawing: Drawing,
    pictures: npt.NDArray[np.integer],
    numbers: npt.NDArray[np.integer],
    shape: tuple[int, ...],
) -> Floats:
    """Gumbel noise (n, *shape) of these draws of these pictures; none where none is drawn."""
    if not drawing.count:
        return np.zeros((len(pictures), *shape), np.float32)
    # Plain integers: an index may lie beyond 2**63 less a little, where numpy's would wrap.
    indices = [drawing.first_index + picture for picture in pictures.tolist()]
    gumbel = noise.gumbel(drawing.seed, indices, shape, numbers.tolist())
    if drawing.temperature != 1:
        gumbel *= np.float32(drawing.temperature)
    return gumbel
