"""Judges latent features: by a linear probe, and by whether traversals do what they should.

The probe is multinomial logistic regression on a number of labelled pictures, with its penalty
chosen on a fifth of them. It is compared with the same on pixels, and on equally many principal
components. For a traversal, the figures are Spearman's rank correlation of point and measured
attribute, and how often an independent judge (`judge`) gives draws the label of their picture.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression

from likely.answers import Labels, Pixels
from likely.bundle import Bundle, Manifest, Role
from likely.engine import Engine
from likely.graphs import Device
from likely.latent import Drawing
from likely_export import judge, measures
from likely_export.attributes import measured
from likely_export.data import Dataset
from likely_export.judge import Judge

LABELLED = (1_000, 10_000)
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # inverse penalties from which a probe chooses
BATCH = 64
CHUNK = 8  # pictures per traversal request


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of pictures, draws and steps.

    Attributes:
        labelled: pictures that probes learn from, as far as there are so many.
        test: pictures that probes are tested on.
        traversed: pictures that are moved along each direction.
        draws: draws at each point.
        steps: training steps of the judge.
    """

    labelled: tuple[int, ...] = LABELLED
    test: int = 10_000
    traversed: int = 50
    draws: int = 4
    steps: int = 600


POINTS = (-2.0, -4 / 3, -2 / 3, 0.0, 2 / 3, 4 / 3, 2.0)


def probe(
    features: npt.NDArray[np.floating],
    y: Labels,
    test: npt.NDArray[np.floating],
    y_test: Labels,
    sizes: Sequence[int] = LABELLED,
) -> dict[int, float]:
    """Returns a probe's accuracy on the test part, by the number of labelled pictures learnt from.

    Args:
        features: (n, z), of pictures in random order.
        y: labels, int64 (n,).
        test: (m, z).
        y_test: labels, int64 (m,).
        sizes: numbers of pictures to learn from, counted from the first.
    """
    accuracies: dict[int, float] = {}
    for size in sizes:
        z, labels = features[:size], y[:size]
        middle, scale = z.mean(0), float(np.sqrt(z.var(0).mean())) or 1.0
        z = (z - middle) / scale
        held = len(z) // 5
        scores = [
            _fitted(z[held:], labels[held:], strength).score(z[:held], labels[:held])
            for strength in STRENGTHS
        ]
        best = _fitted(z, labels, STRENGTHS[int(np.argmax(scores))])
        accuracies[len(labels)] = float(best.score((test - middle) / scale, y_test))
    return accuracies


def traversal(
    engine: Engine,
    x: Pixels,
    attribute: str,
    label_judge: Judge,
    *,
    points: Sequence[float] = POINTS,
    draws: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """Returns how well draws follow the direction of an attribute.

    Args:
        engine: engine of a bundle with that direction.
        x: uint8 (n, c, h, w).
        attribute: name of one of `attributes`.
        label_judge: labels pictures.
        points: ascending points along the direction.
        draws: draws at each point; means replace them if the engine cannot draw.
        seed: seed of the draws.

    Returns:
        `spearman`: rank correlation of point and attribute, the latter averaged over the draws of a
        point, as a mean over pictures; `spearman_least`: that of the worst picture; `monotone`: the
        share of pictures with 0.9 or more; `label_kept`: the share of draws that keep the label of
        their picture; `slope`: change of the attribute per point, in the attribute's unit.
    """
    drawn = _traversed(engine, x, attribute, points, draws, seed)
    n, steps, per_point = drawn.shape[:3]
    flat = drawn.reshape(-1, *drawn.shape[3:])
    levels = engine.manifest.levels
    values = measured(attribute, flat, levels).reshape(n, steps, per_point).mean(2)
    ranks = np.array([measures.rank_correlation(points, row) for row in values])
    labels = label_judge.posterior(x).argmax(1)
    drawn_labels = label_judge.posterior(flat).argmax(1).reshape(n, steps * per_point)
    return {
        "spearman": float(ranks.mean()),
        "spearman_least": float(ranks.min()),
        "monotone": float((ranks >= 0.9).mean()),
        "label_kept": float((drawn_labels == labels[:, None]).mean()),
        "slope": float(np.polyfit(points, values.mean(0), 1)[0]),
    }


def evaluate(bundle: Path, data: Dataset, sizes: Sizes | None = None) -> dict[str, Any]:
    """Returns the figures of a bundle's features on the test part.

    Args:
        bundle: folder of a bundle that encodes.
        data: data set that it was made with.
        sizes: numbers of pictures, draws and steps.
    """
    sizes = sizes or Sizes()
    engine = Engine.load(Bundle.open(bundle), device=Device("cpu"), threads=1, max_batch=BATCH)
    try:
        return _evaluated(engine, data, sizes)
    finally:
        engine.close()


def _evaluated(engine: Engine, data: Dataset, sizes: Sizes) -> dict[str, Any]:
    most = max(sizes.labelled)
    x, y = data.train.x[:most], data.train.y[:most]
    part = data.test.subsample(sizes.test)
    test, y_test = part.x, part.y
    features, test_features = encode_pictures(engine, x), encode_pictures(engine, test)
    pixels, test_pixels = flat(x), flat(test)
    reduced = PCA(min(features.shape[1], *pixels.shape), svd_solver="full").fit(pixels)
    inputs: Mapping[str, tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]] = {
        "features": (features, test_features),
        "pixels": (pixels, test_pixels),
        "principal_components": (reduced.transform(pixels), reduced.transform(test_pixels)),
    }
    figures: dict[str, Any] = {
        "dimensions": features.shape[1],
        "probe": {
            name: {str(n): value for n, value in probe(z, y, far, y_test, sizes.labelled).items()}
            for name, (z, far) in inputs.items()
        },
    }
    latent = engine.manifest.latent
    names = [d.name for d in latent.directions if d.kind == "attribute"] if latent else []
    if names:
        label_judge = judge.train_judge(
            data.train.x, data.train.y, data.levels, len(data.labels), steps=sizes.steps
        )
        moved = data.test.subsample(sizes.traversed).x
        figures["judge_accuracy"] = float((label_judge.posterior(test).argmax(1) == y_test).mean())
        figures["traversal"] = {
            name: traversal(engine, moved, name, label_judge, draws=sizes.draws) for name in names
        }
    return figures


def can_encode_unlabelled(manifest: Manifest) -> bool:
    """Whether a bundle can encode pictures whose labels it is not given."""
    graphs = manifest.graphs
    if Role.ENCODE not in graphs:
        return False
    return graphs[Role.ENCODE].input("y") is None or Role.CONDITIONAL in graphs


def encode_pictures(engine: Engine, x: Pixels) -> npt.NDArray[np.float32]:
    """Returns the mean features of pictures, (n, z)."""

    async def encode_all() -> list[npt.NDArray[np.float32]]:
        parts = range(0, len(x), BATCH)
        return [(await engine.encode(x[at : at + BATCH])).mean for at in parts]

    return np.concatenate(asyncio.run(encode_all()))


def _traversed(
    engine: Engine, x: Pixels, direction: str, points: Sequence[float], draws: int, seed: int
) -> Pixels:
    """Draws (n, points, draws, c, h, w); or means as levels, if the engine cannot draw."""
    places, levels = np.array(points, np.float64), engine.manifest.levels
    count = 0 if engine.manifest.deterministic else draws

    async def traverse_all() -> list[Pixels]:
        parts: list[Pixels] = []
        for at in range(0, len(x), CHUNK):
            drawing = Drawing(count, seed, at)
            traversed = await engine.traverse(x[at : at + CHUNK], direction, places, drawing)
            means = np.rint(traversed.mean * (levels - 1)).astype(np.uint8)[:, :, None]
            parts.append(traversed.drawn if count else means)
        return parts

    return np.concatenate(asyncio.run(traverse_all()))


def _fitted(z: npt.NDArray[np.floating], y: Labels, strength: float) -> ClassifierMixin:
    one = len(np.unique(y)) == 1  # regression needs two labels
    model = DummyClassifier() if one else LogisticRegression(C=strength, max_iter=300, tol=1e-3)
    return model.fit(z, y)


def flat(x: Pixels) -> npt.NDArray[np.float32]:
    """Returns pictures (n, c, h, w) as vectors of their levels, (n, c * h * w)."""
    flat: npt.NDArray[np.float32] = x.reshape(len(x), -1).astype(np.float32)
    return flat
