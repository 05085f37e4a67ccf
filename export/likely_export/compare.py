"""Compares the model family: what each member learns, which question it answers, at what cost.

A member is a bundle. All members are asked the same questions about the same pictures, through
ONNX Runtime as in a server. What a member has no graph for is missing from its row, which is an
answer too. The exception is the bound of a VAE, which torch computed when the bundle was built.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from sklearn.decomposition import PCA

from likely import bayes
from likely.answers import Doubles, Pixels
from likely.bundle import Bundle, Manifest, Role
from likely.engine import Engine
from likely.errors import InvalidInput
from likely.graphs import Device
from likely_export import composition, families, features, measures, passes
from likely_export.composition import noise_pictures
from likely_export.data import Dataset, Split, evenly_spaced
from likely_export.generated import SEED, count_drawable_labels, draw_by_label, drawing_graphs
from likely_export.graphs import example
from likely_export.judge import Judge, train_judge
from likely_export.material import BOUND, EVALUATION
from likely_export.passes import BATCH
from likely_export.recipes import MODEL_KEYS
from likely_export.train import Model

Inputs = npt.NDArray[np.floating]

ALPHA = 0.05
CONFIDENT_POSTERIOR = 0.9  # posterior above which a picture counts as labelled with confidence
ROUNDS = 5
TRAINING_BATCH = 32  # pictures in a training step whose time is taken
GENERATIVE, DISCRIMINATIVE = "by p(x|y)", "by p(y|x)"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The largest number of pictures for each figure.

    Attributes:
        test: pictures of the test part.
        outside: pictures of every set that is not of the data.
        drawn: draws by each member that can draw.
        composed: test pictures whose log p(x|y) is computed in two ways.
        accepted: draws by acceptance, by each member that can.
        labelled: pictures that linear probes learn from.
        steps: training steps of the judge.
        shown: draws of each member to show in the report.
    """

    test: int = 2000
    outside: int = 500
    drawn: int = 500
    composed: int = 500
    accepted: int = 300
    labelled: tuple[int, ...] = (1_000, 10_000)
    steps: int = 1500
    shown: int = 20


@dataclass(frozen=True, slots=True)
class Comparison:
    """The figures, and what a report shows beside them.

    Attributes:
        figures: values for JSON; `members` has a row for each bundle, by name.
        drawn: draws by member, uint8 (k, c, h, w).
        outside: a few pictures of each set that is not of the data, uint8 (k, c, h, w).
        levels: number of levels.
    """

    figures: dict[str, Any]
    drawn: dict[str, Pixels]
    outside: dict[str, Pixels]
    levels: int


def compare(
    bundles: Sequence[Path],
    data: Dataset,
    others: Mapping[str, Pixels] | None = None,
    sizes: Sizes | None = None,
) -> Comparison:
    """Compares bundles on the test part of the data that they were made with.

    Args:
        bundles: folders of the bundles; each is verified.
        data: the data set of all bundles.
        others: other data sets, uint8 (n, c, h, w), in addition to noise and blank pictures.
        sizes: numbers of pictures.

    Raises:
        InvalidInput: a bundle was made with other data, or two bundles have the same name.
    """
    sizes = sizes or Sizes()
    opened = [Bundle.open(folder) for folder in bundles]
    _require_same_data(opened, data)
    judge = None
    if data.labels:
        train, labels = data.train, len(data.labels)
        judge = train_judge(train.x, train.y, data.levels, labels, steps=sizes.steps)
    outside = _outside(data, others or {}, sizes.outside)
    test = data.test.subsample(sizes.test)
    members: dict[str, Any] = {}
    drawn: dict[str, Pixels] = {}
    for bundle in opened:
        member = _Member(bundle, data, test, judge, outside, sizes)
        members[bundle.manifest.name] = member.row()
        if member.drawn is not None:
            drawn[bundle.manifest.name] = member.drawn[: sizes.shown]
    figures: dict[str, Any] = {"pictures": len(test), "alpha": ALPHA, "members": members}
    if judge is not None:
        figures["judge_accuracy"] = measures.mean(judge.posterior(test.x).argmax(1) == test.y)
        figures["probe_of_pixels"] = _probe(
            features.flat(data.train.x), features.flat(test.x), data, test, sizes
        )
    return Comparison(figures, drawn, {n: x[:1] for n, x in outside.items()}, data.levels)


def _require_same_data(bundles: Sequence[Bundle], data: Dataset) -> None:
    names: set[str] = set()
    for bundle in bundles:
        manifest = bundle.manifest
        if (manifest.data_digest, manifest.levels) != data.identity:
            raise InvalidInput(manifest.name, "was made with other data, or another split of it")
        if manifest.name in names:
            raise InvalidInput(manifest.name, "is the name of two bundles")
        names.add(manifest.name)


def _outside(data: Dataset, others: Mapping[str, Pixels], most: int) -> dict[str, Pixels]:
    """Pictures that fit no label of the data."""
    noise = noise_pictures(data.shape, data.levels, most)["uniform"]
    made = {"noise": noise, "blank": np.zeros((1, *data.shape), np.uint8)}
    return made | {name: x[evenly_spaced(len(x), most)] for name, x in others.items()}


class _Member:
    """One bundle, which is asked everything that it can answer."""

    def __init__(
        self,
        bundle: Bundle,
        data: Dataset,
        test: Split,
        judge: Judge | None,
        outside: Mapping[str, Pixels],
        sizes: Sizes,
    ) -> None:
        self.bundle, self.data, self.test, self.judge = bundle, data, test, judge
        self.outside, self.sizes = outside, sizes
        self.manifest: Manifest = bundle.manifest
        self.drawn: Pixels | None = None

    def row(self) -> dict[str, Any]:
        engine = Engine.load(self.bundle, device=Device("cpu"), threads=1, max_batch=BATCH)
        try:
            return {
                "models": dict(self._models()),
                "learns": learnt_distributions(self.manifest),
                **asyncio.run(self._density(engine)),
                "accuracy": asyncio.run(self._accuracy(engine)),
                "outside": asyncio.run(self._outside_rates(engine)),
                **asyncio.run(self._draws(engine)),
                **asyncio.run(self._composition(engine)),
                **self._features(engine),
                "milliseconds": self._milliseconds(),
            }
        finally:
            engine.close()

    def _models(self) -> Iterator[tuple[str, list[str]]]:
        """The families of the models behind each graph."""
        recipe = self.manifest.recipe
        for role, named in recipe.get("roles", {}).items():
            names = [named] if isinstance(named, str) else named
            yield role, [recipe["models"][name]["family"] for name in names]

    async def _density(self, engine: Engine) -> dict[str, Any]:
        if Role.DENSITY in self.manifest.graphs:
            scores = await engine.score(self.test.x, ALPHA)
            return {
                "nats": measures.mean(-scores.log_px) | {"kind": "exact"},
                "bits_per_dim": measures.mean(scores.bits_per_dim),
            }
        if EVALUATION in self.manifest.files:
            figures = json.loads((self.bundle.path / EVALUATION).read_bytes())
            if BOUND in figures:
                return {"nats": figures[BOUND] | {"kind": "bound"}}
        return {}

    async def _accuracy(self, engine: Engine) -> dict[str, Any]:
        return {
            rule: measures.mean(posterior.argmax(1) == self.test.y)
            for rule, posterior in (await self._posteriors(engine, self.test.x)).items()
        }

    async def _posteriors(self, engine: Engine, x: Pixels) -> dict[str, Doubles]:
        """p(y|x), (n, labels), by each rule that the member has, also for outliers."""
        posteriors: dict[str, Doubles] = {}
        if Role.CONDITIONAL in self.manifest.graphs:
            posteriors[GENERATIVE] = (await engine.classify(x, ALPHA)).posterior
        if Role.DISCRIMINATE in self.manifest.graphs:
            session = passes.open_graph(self.bundle, Role.DISCRIMINATE)
            log_pyx = passes.run_graph_output(session, {"x": x}, "log_pyx").astype(np.float64)
            posteriors[DISCRIMINATIVE] = bayes.posterior(log_pyx, np.ones(log_pyx.shape[1]))
        return posteriors

    async def _outside_rates(self, engine: Engine) -> dict[str, Any]:
        """How many pictures that are not of the data are rejected, or labelled with confidence.

        Rejections are left out if the calibration is too small for `ALPHA`.
        """
        rates: dict[str, Any] = {}
        density = Role.DENSITY in self.manifest.graphs
        rejects = density and engine.detector.finest_alpha <= ALPHA
        for name, x in self.outside.items():
            row: dict[str, float] = {}
            if rejects:
                row["rejected"] = float(np.mean((await engine.score(x, ALPHA)).p_value <= ALPHA))
            for rule, posterior in (await self._posteriors(engine, x)).items():
                row[f"sure {rule}"] = float(np.mean(posterior.max(1) > CONFIDENT_POSTERIOR))
            if row:
                rates[name] = row
        return rates

    async def _draws(self, engine: Engine) -> dict[str, Any]:
        if not drawing_graphs(self.manifest):
            return {"draws": "nothing"}
        labels = count_drawable_labels(self.manifest)
        per_label = max(1, self.sizes.drawn // max(1, labels))
        groups = await draw_by_label(engine, labels, per_label, SEED)
        drawn = np.concatenate([group.images for group in groups])
        if not labels:
            self.drawn = drawn
            return {"draws": "pictures"}
        # In an order that shows some draws of each label first.
        order = np.argsort(np.arange(len(drawn)) % per_label, kind="stable")
        self.drawn = drawn[order]
        if self.judge is None:
            return {"draws": "by label"}
        shown = self.judge.posterior(drawn).argmax(1) == np.arange(len(drawn)) // per_label
        return {"draws": "by label", "faithfulness": measures.mean(shown)}

    async def _composition(self, engine: Engine) -> dict[str, Any]:
        """Bayes' rule from p(y|x) and p(x), compared with the member's own p(x|y)."""
        graphs = self.manifest.graphs
        figures: dict[str, Any] = {}
        if {Role.DENSITY, Role.CONDITIONAL, Role.DISCRIMINATE} <= set(graphs):
            part = self.test.subsample(self.sizes.composed)
            figures["likelihoods"] = await composition.likelihoods(engine, part, ALPHA)
        if self.judge is not None and {Role.SAMPLE, Role.DISCRIMINATE} <= set(graphs):
            per_label = max(1, self.sizes.accepted // len(self.manifest.labels))
            draws_by_label = graphs[Role.SAMPLE].input("y") is not None
            figures["drawings"] = await composition.drawings(
                engine, self.judge, per_label, draws_by_label=draws_by_label
            )
        return {"composition": figures} if figures else {}

    def _features(self, engine: Engine) -> dict[str, Any]:
        """Accuracies of linear probes on the features, and on as many principal components."""
        if not (features.can_encode_unlabelled(self.manifest) and self.data.labels):
            return {}
        train = self.data.train.x[: max(self.sizes.labelled)]
        z, z_test = (features.encode_pictures(engine, x) for x in (train, self.test.x))
        pixels = features.flat(train)
        reduced = PCA(min(z.shape[1], *pixels.shape), svd_solver="full").fit(pixels)
        components, others = (reduced.transform(features.flat(x)) for x in (train, self.test.x))
        return {
            "features": {
                "dimensions": z.shape[1],
                "probe": _probe(z, z_test, self.data, self.test, self.sizes),
                "probe_of_principal_components": _probe(
                    components, others, self.data, self.test, self.sizes
                ),
            }
        }

    def _milliseconds(self) -> dict[str, float]:
        """CPU milliseconds per picture on one thread: of each graph in batches, and of training."""
        milliseconds: dict[str, float] = {}
        levels, labels = self.manifest.levels, max(1, len(self.manifest.labels))
        for role, spec in self.manifest.graphs.items():
            session = passes.open_graph(self.bundle, role)
            feeds = example(spec.inputs, BATCH, levels, labels, SEED)
            outputs = [output.name for output in spec.outputs]
            milliseconds[role.value] = 1e3 / BATCH * min(_time_calls(session.run, feeds, outputs))
        return milliseconds | {"training": self._training_milliseconds()}

    def _training_milliseconds(self) -> float:
        """CPU milliseconds per picture for a forward and backward pass of all models."""
        recipe = self.manifest.recipe
        x, y = (
            torch.from_numpy(part[:TRAINING_BATCH])
            for part in (self.data.train.x, self.data.train.y)
        )
        total = 0.0
        for model in recipe.get("models", {}).values():
            options = {k: v for k, v in model.items() if k not in MODEL_KEYS}
            made = families.create(
                model["family"],
                options,
                shape=self.data.shape,
                levels=self.data.levels,
                labels=len(self.data.labels),
                seed=0,
            )
            total += min(_time_calls(_step, cast(Model, made.train()), x, y))
        return 1e3 / TRAINING_BATCH * total


def learnt_distributions(manifest: Manifest) -> list[str]:
    """The distributions that a bundle provides, in mathematical notation, and its features."""
    graphs = manifest.graphs
    by_label, draws = count_drawable_labels(manifest) > 0, len(drawing_graphs(manifest)) > 0
    return [
        *(["p(x)"] if Role.DENSITY in graphs or (draws and not by_label) else []),
        *(["p(x|y)"] if Role.CONDITIONAL in graphs or by_label else []),
        *(["p(y|x)"] if Role.DISCRIMINATE in graphs else []),
        *(["features"] if Role.ENCODE in graphs else []),
    ]


def _step(model: Model, x: torch.Tensor, y: torch.Tensor) -> None:
    """Runs forward and backward; gradients accumulate, which takes no extra time."""
    model.objective(x, y).mean().backward()


def _time_calls(call: Any, *arguments: Any) -> Iterator[float]:
    """Yields the CPU seconds of each call, after one that is not counted."""
    call(*arguments)
    for _ in range(ROUNDS):
        began = time.process_time()
        call(*arguments)
        yield time.process_time() - began


def _probe(z: Inputs, z_test: Inputs, data: Dataset, test: Split, sizes: Sizes) -> dict[str, float]:
    """The accuracy of a linear probe, by the number of labelled pictures that it learnt from."""
    accuracies = features.probe(z, data.train.y[: len(z)], z_test, test.y, sizes.labelled)
    return {str(size): value for size, value in accuracies.items()}
