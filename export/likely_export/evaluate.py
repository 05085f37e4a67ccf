"""The figures of a bundle, computed from the bundle alone through ONNX Runtime.

Every figure is a function of the bundle and the data: seeds are fixed, and nothing that is
reported influenced any choice. Simple methods are reported beside it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from likely import bayes
from likely.answers import (
    Accepted,
    Classifications,
    Doubles,
    Floats,
    Labels,
    Pixels,
    ScoreTable,
    Verdict,
)
from likely.bundle import Bundle, Kind, Manifest, Role, write_manifest
from likely.engine import Engine
from likely.graphs import Device
from likely_export import attribution, baselines, corruptions, costs, measures, passes, report
from likely_export.data import BINARISATION, Dataset, bernoulli, evenly_spaced
from likely_export.generated import SEED, Drawing, Sizes
from likely_export.judge import Judge, train_judge
from likely_export.material import (
    EVALUATION,
    REPORT,
    Compared,
    Explained,
    Labelled,
    Material,
    PictureSet,
)

BINARISATIONS = 3
BOUND_SAMPLES = 64
MEDIAN_PICTURES = 1000  # training pictures whose median replaces a patch


def evaluate(
    bundle: Path,
    data: Dataset,
    alphas: Sequence[float],
    others: Mapping[str, Pixels] | None = None,
    sizes: Sizes | None = None,
) -> tuple[dict[str, Any], Material]:
    """Computes the figures of a bundle on the test part, and the material of its report.

    Args:
        bundle: folder of the bundle, which is verified and loaded as in a server.
        data: the data set of its recipe.
        alphas: rates of false rejections to check; those that the calibration is too small for are
            listed as left out.
        others: other data sets to tell from this one, uint8 (n, c, h, w).
        sizes: numbers of pictures.

    Returns:
        Values for JSON: nats and bits/dim with standard errors, rates, and areas under curves. A
        value is None for a label without test pictures.
    """
    opened = Bundle.open(bundle)
    engine = Engine.load(opened, device=Device("cpu"), threads=2)
    try:
        evaluation = _Evaluation(opened, engine, data, alphas, others or {}, sizes or Sizes())
        return asyncio.run(evaluation.run())
    finally:
        engine.close()


def attach(bundle: Path, figures: Mapping[str, Any], material: Material) -> Manifest:
    """Adds figures and report to a bundle's files, and returns the new manifest.

    Both texts are made before any file is written. Until the manifest is written, the folder does
    not agree with it: use a copy (`replacing.rewriting`) of a bundle that may be served.
    """
    manifest = Bundle.open(bundle).manifest
    text = json.dumps(figures, indent=1, allow_nan=False) + "\n"
    page = report.page(manifest, figures, material)
    (bundle / EVALUATION).write_text(text)
    (bundle / REPORT).write_text(page, encoding="utf-8")
    return write_manifest(bundle, manifest.model_dump(exclude={"files"}))


class _Evaluation:
    """One evaluation in progress; computes only once what several figures need."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        data: Dataset,
        alphas: Sequence[float],
        others: Mapping[str, Pixels],
        sizes: Sizes,
    ) -> None:
        self.bundle, self.engine, self.data, self.sizes = bundle, engine, data, sizes
        self.manifest: Manifest = bundle.manifest
        finest = engine.detector.finest_alpha
        self.alphas = [alpha for alpha in alphas if alpha >= finest]
        self.left_out = [alpha for alpha in alphas if alpha < finest]
        self.largest = max(self.alphas, default=finest)
        self.test = data.test.subsample(sizes.test)
        # Rows that are corrupted. For corruptions of two pictures, errors account for the first.
        self.original_rows = evenly_spaced(len(self.test), sizes.outliers)
        self.corruptible = self.test.x[self.original_rows]
        self.others = {name: x[evenly_spaced(len(x), sizes.outliers)] for name, x in others.items()}

    async def run(self) -> tuple[dict[str, Any], Material]:
        """Computes everything, in the order of the report."""
        scores = await self._score(self.test.x)
        figures: dict[str, Any] = {
            "name": self.manifest.name,
            "version": self.manifest.version,
            "test_size": len(self.test),
            "copies_of_training": self.data.count_copies(),
            "test_copies_of": {
                part: self.data.count_copies(part, ["test"])["test"]
                for part in ("fit", "calibrate")
            },
            "bits_per_dim": measures.mean(scores.bits_per_dim),
            "nll_nats": measures.mean(-scores.log_px),
        }
        sets = {corruptions.INLIERS: _picture_set(self.test.x, scores, self.sizes.examples)}
        sets |= await self._outside()
        if idle := [n for n in (*corruptions.PANEL, *corruptions.HARD) if n not in sets]:
            figures["corruptions_left_out"] = idle
        figures |= self._separations(sets)
        figures["parity_nats"] = self.manifest.parity_nats
        figures["test_parity_nats"] = self.manifest.test_parity_nats
        figures["decisions"] = {
            "compared_with_torch": self.manifest.decisions_compared,
            "changed": self.manifest.decisions_changed,
        }
        figures["baselines"] = baselines.evaluate(self.data)
        figures |= costs.measure(self.bundle, self._p_value, self.corruptible)
        classified = None
        labelled = discriminated = None
        judge = None
        if self.manifest.labels:
            labels = len(self.manifest.labels)
            steps = self.sizes.steps
            train = self.data.train
            judge = train_judge(train.x, train.y, self.manifest.levels, labels, steps=steps)
        if Role.CONDITIONAL in self.manifest.graphs:
            classified = await self._classify(self.test.x)
            labelled = Labelled(self.test.y, classified.posterior, classified.p_value)
            figures |= self._labels(classified)
            figures |= await self._likelihoods(classified)
        if Role.DISCRIMINATE in self.manifest.graphs:
            discriminated = self._discriminated(scores)
            kept = scores.verdict == Verdict.ACCEPTED
            figures["discriminative"] = measures.labelling(
                discriminated.posterior, self.test.y, kept
            )
        figures["alphas_left_out"] = self.left_out
        figures["false_rejection"] = {
            f"{alpha:g}": self._false_rejection(scores.p_value, alpha) for alpha in self.alphas
        }
        if judge is not None and (labelled or discriminated):
            figures["cnn"] = measures.labelling(judge.posterior(self.test.x), self.test.y)
        if judge is not None and classified is not None:
            figures["mixed"] = await self._open_set_figures(judge, classified)
        drawing = Drawing(self.bundle, self.engine, self.data, self.test, self.sizes, judge)
        figures |= await drawing.figures(self.alphas)
        material = Material(
            levels=self.manifest.levels,
            labels=tuple(label.name for label in self.manifest.labels),
            sets=sets,
            labelled=labelled,
            discriminated=discriminated,
            drawn=drawing.examples,
            nearest=drawing.nearest,
            completed=await drawing.completed(),
            explained=await self._explained(classified),
        )
        return figures, material

    async def _score(self, x: Pixels, *, surprise: bool = False) -> ScoreTable:
        return await self.engine.score(x, self.largest, surprise=surprise)

    async def _classify(self, x: Pixels) -> Classifications:
        return await self.engine.classify(x, self.largest)

    def _p_value(self, statistics: Floats, label: Labels | None = None) -> Doubles:
        detector = self.engine.detector
        return detector.p_value(detector.score(statistics, label))

    async def _outside(self) -> dict[str, PictureSet]:
        pictures = corruptions.corrupt_for_report(self.corruptible, self.manifest.levels)
        sets: dict[str, PictureSet] = {}
        for name, x in {**self.others, **pictures}.items():
            sets[name] = _picture_set(x, await self._score(x), self.sizes.examples)
        return sets

    def _separations(self, sets: Mapping[str, PictureSet]) -> dict[str, Any]:
        """AUROC, FPR95 and AUPR of every outlier set, by our score and by likelihood alone."""
        inside = sets[corruptions.INLIERS]
        ours: dict[str, Any] = {}
        likelihood: dict[str, Any] = {}
        for name, outside in sets.items():
            if name == corruptions.INLIERS:
                continue
            original_rows = None if name in self.others else self.original_rows
            apart = measures.separation(inside.unusualness, outside.unusualness, original_rows)
            accepted = {f"{alpha:g}": outside.p_value > alpha for alpha in self.alphas}
            ours[name] = apart | {
                "size": len(outside.p_value),
                "accepted": {alpha: float(np.mean(one)) for alpha, one in accepted.items()},
                "accepted_standard_error": {
                    alpha: measures.standard_error(one) for alpha, one in accepted.items()
                },
            }
            likelihood[name] = measures.separation(inside.nats, outside.nats, original_rows)
        panel = _panel(sets, ours, self.original_rows)
        return {"outliers": ours, "likelihood_only": likelihood, "panel": panel}

    def _false_rejection(self, p_value: Doubles, alpha: float) -> dict[str, Any]:
        size, n = self.manifest.calibrated.size, len(p_value)
        names = [label.name for label in self.manifest.labels]
        figures: dict[str, Any] = {
            "overall": float(np.mean(p_value <= alpha)),
            "overall_standard_error": measures.standard_error(p_value <= alpha),
            "band": measures.rejection_band(alpha, size, n),
        }
        if names:
            # Not guaranteed, because all labels are ranked together. For comparison, the bands are
            # those of a label ranked alone, among its share of the calibration split.
            counts = np.bincount(self.test.y, minlength=len(names))
            bands = [measures.rejection_band(alpha, round(size * c / n), int(c)) for c in counts]
            figures |= self._by_label("by_label", p_value <= alpha)
            figures["band_by_label"] = dict(zip(names, bands, strict=True))
        return figures

    def _by_label(self, name: str, values: Accepted) -> dict[str, Any]:
        """The share of true values (n,) of the test part by label, with standard errors."""
        return measures.by_label(
            name, values, self.test.y, [label.name for label in self.manifest.labels]
        )

    def _labels(self, classified: Classifications) -> dict[str, Any]:
        y, rows = self.test.y, np.arange(len(self.test))
        kept = classified.verdict == Verdict.ACCEPTED
        return {
            "conditional_nll_nats": measures.mean(-classified.log_pxy[rows, y]) | self._kind(),
            **measures.labelling(classified.posterior, y, kept),
            "label_set": {
                f"{alpha:g}": self._label_set(classified.label_p_values, alpha)
                for alpha in self.alphas
            },
        }

    def _discriminated(self, scores: ScoreTable) -> Labelled:
        """The labels of the test part by p(y|x), given the part's scores."""
        session = passes.open_graph(self.bundle, Role.DISCRIMINATE)
        log_pyx = passes.run_graph_output(session, {"x": self.test.x}, "log_pyx")
        posterior = bayes.under_priors(log_pyx, self.manifest.priors, self.manifest.priors)
        return Labelled(self.test.y, posterior, scores.p_value)

    def _kind(self) -> dict[str, Any]:
        """The kind of the conditional graph's log p(x|y)."""
        graph = self.manifest.graphs[Role.CONDITIONAL]
        samples = {"importance_samples": graph.importance_samples}
        return {"kind": graph.kind} | (samples if graph.kind == Kind.IWAE else {})

    def _label_set(self, p_values: Doubles, alpha: float) -> dict[str, Any]:
        members = p_values > alpha
        covered = members[np.arange(len(members)), self.test.y]
        counts = self.engine.detector.label_counts
        return {
            "coverage": float(covered.mean()),
            "coverage_standard_error": measures.standard_error(covered),
            **self._by_label("coverage_by_label", covered),
            "least_by_label": {
                label.name: self._least_coverage(alpha, y, int(counts[y]))
                for y, label in enumerate(self.manifest.labels)
            },
            "mean_size": float(members.sum(1).mean()),
            "mean_size_standard_error": measures.standard_error(members.sum(1)),
        }

    def _least_coverage(self, alpha: float, y: int, calibration: int) -> float | None:
        """The smallest share of a label's sets that may contain it, at 99 %."""
        band = measures.rejection_band(alpha, calibration, int(np.sum(self.test.y == y)))
        return None if band is None else 1 - band[1]

    async def _likelihoods(self, classified: Classifications) -> dict[str, Any]:
        """-log p(x) as a mixture over labels if p(x|y) is exact, otherwise a tighter bound."""
        graph = self.manifest.graphs[Role.CONDITIONAL]
        if graph.kind != Kind.EXACT:
            return self._bound()
        draws = [classified.log_pxy]
        if self.test.grey is not None:
            # The test part is draw 0; the figure is the mean over several draws.
            for draw in range(1, BINARISATIONS):
                generator = np.random.Generator(np.random.Philox(key=[BINARISATION, draw]))
                x = bernoulli(self.test.grey, self.test.peak, generator)
                draws.append((await self._classify(x)).log_pxy)
        log_prior = np.log(self.manifest.priors)
        nats = [-np.logaddexp.reduce(log_pxy + log_prior, axis=1) for log_pxy in draws]
        mixed = measures.mean(np.mean(nats, 0))
        return {"marginal_nll_nats": mixed | {"by_draw": [float(row.mean()) for row in nats]}}

    def _bound(self) -> dict[str, Any]:
        """The IWAE bound with more samples, by averaging the weights of several calls."""
        graph = self.manifest.graphs[Role.CONDITIONAL]
        eps = graph.input("eps")
        if eps is None:
            return {}
        session = passes.open_graph(self.bundle, Role.CONDITIONAL)
        part = self.test.subsample(self.sizes.bound)
        calls = max(1, BOUND_SAMPLES // graph.importance_samples)
        rows = np.arange(len(part))
        bounds = []
        for call in range(calls):
            generator = np.random.Generator(np.random.Philox(key=[SEED, call]))
            noises = generator.standard_normal(eps.array_shape(len(part)), dtype=np.float32)
            log_pxy = passes.run_graph_output(session, {"x": part.x, "eps": noises}, "log_pxy")
            bounds.append(log_pxy[rows, part.y])
        bound = np.logaddexp.reduce(np.array(bounds, np.float64), axis=0) - np.log(calls)
        bits = -bound / (self.manifest.dimensions * np.log(2))
        counts = {"importance_samples": calls * graph.importance_samples, "test_size": len(part)}
        return {"conditional_bits_per_dim": measures.mean(bits) | counts}

    async def _open_set_figures(self, judge: Judge, classified: Classifications) -> dict[str, Any]:
        """Classification with outliers mixed in, where accepting one is an error.

        There are as many outliers as test pictures: of the larger set, only so many are used. For
        comparison, the largest softmax of a convolutional network trained on the same pictures.
        """
        y, posterior = self.test.y, judge.posterior(self.test.x)
        right, sure = posterior.argmax(1) == y, posterior.max(1)
        figures: dict[str, Any] = {}
        for name, x in self.others.items():
            rows = evenly_spaced(len(self.test), len(x))
            x = x[evenly_spaced(len(x), len(rows))]
            outside = await self._classify(x)
            ours = measures.open_set(
                self._doubt(classified)[rows], (classified.label == y)[rows], self._doubt(outside)
            )
            softmax = -judge.posterior(x).max(1)
            theirs = measures.open_set(-sure[rows], right[rows], softmax)
            apart = measures.placement_mean(*measures.placements(-sure[rows], softmax))
            theirs |= {"auroc": apart["mean"], "auroc_standard_error": apart["standard_error"]}
            figures[name] = {
                "size": len(x),
                **ours,
                **{f"cnn_max_softmax_{key}": one for key, one in theirs.items()},
            }
        return figures

    def _doubt(self, answer: Classifications) -> Doubles:
        """Doubt, (n,): minus the largest label p-value, with near ties broken by the posterior."""
        return -answer.label_p_values.max(1) - 1e-3 * answer.posterior.max(1)

    async def _explained(self, classified: Classifications | None) -> Explained | None:
        """Explains pictures whose two best labels are closest, or any pictures without labels."""
        rows = evenly_spaced(len(self.test), self.sizes.examples)
        compared = classified is not None and classified.posterior.shape[1] > 1
        if classified is not None and compared:
            closest = np.sort(classified.posterior, 1)
            rows = np.argsort(closest[:, -1] - closest[:, -2])[: self.sizes.examples]
        x = self.test.x[rows]
        surprise = (await self._score(x, surprise=True)).surprise
        assert surprise is not None
        if classified is None or not compared:
            return Explained(x, surprise)
        pair = np.argsort(-classified.posterior[rows], 1)[:, :2].astype(np.int64)
        session = passes.open_graph(self.bundle, Role.CONDITIONAL)
        if session.spec.output("surprise") is not None:
            maps = attribution.by_pixel(session, x, pair)
            sums = maps.sum((1, 2, 3), dtype=np.float64)
            return Explained(x, surprise, Compared(pair, sums, maps))
        typical = np.median(self.data.train.subsample(MEDIAN_PICTURES).x, 0).astype(np.uint8)
        ratios, maps = attribution.by_occlusion(session, x, pair, typical)
        return Explained(x, surprise, Compared(pair, ratios, maps, attribution.PATCH))


def _panel(
    sets: Mapping[str, PictureSet], outliers: Mapping[str, Any], original_rows: Labels
) -> dict[str, float]:
    """The least and the mean AUROC over PANEL, whose sets are corruptions of the same pictures."""
    panel = [name for name in corruptions.PANEL if name in sets]
    least = outliers[min(panel, key=lambda name: float(outliers[name]["auroc"]))]
    scores = [(sets[corruptions.INLIERS].unusualness, sets[name].unusualness) for name in panel]
    over, under = zip(*(measures.placements(*pair) for pair in scores), strict=True)
    mean = measures.placement_mean(np.mean(over, 0), np.mean(under, 0), original_rows)
    return {
        "auroc_min": least["auroc"],
        "auroc_min_standard_error": least["auroc_standard_error"],
        "auroc_mean": mean["mean"],
        "auroc_mean_standard_error": mean["standard_error"],
    }


def _picture_set(x: Pixels, scores: ScoreTable, examples: int) -> PictureSet:
    return PictureSet(
        x[evenly_spaced(len(x), examples)], -scores.log_px, scores.unusualness, scores.p_value
    )
