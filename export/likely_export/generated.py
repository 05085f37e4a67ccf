"""Judges what a bundle draws: do draws show their label, teach it, and copy nobody's picture?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from likely import noise
from likely.answers import Acceptance, Accepted, Doubles, Draws, Labels, Pixels, SelfCheck, joined
from likely.bundle import Bundle, Graph, Manifest, Role
from likely.engine import Engine
from likely.graphs import Array
from likely_export import calibrate, measures, passes
from likely_export.data import Dataset, Split, evenly_spaced
from likely_export.judge import Judge, train_judge
from likely_export.material import Completed

SEED = 20261122
COMPLETED = 6
MAX_DRAWS = 8  # draws per picture with the self-check
COMPARED = 500  # draws whose surprise and nearest neighbours are examined


@dataclass(frozen=True, slots=True)
class Sizes:
    """The largest number of pictures for each figure.

    Attributes:
        test: pictures of the test part.
        outliers: pictures of every set out of distribution.
        drawn: draws for faithfulness and for training on draws; 0 leaves these figures out.
        bound: pictures for the bound with many importance samples.
        steps: training steps of each judge.
        examples: pictures of each set to show.
    """

    test: int = 10_000
    outliers: int = 2000
    drawn: int = 10_000
    bound: int = 500
    steps: int = 3000
    examples: int = 12


def drawing_graphs(manifest: Manifest) -> list[Graph]:
    """The graphs that draw pictures; empty if the bundle cannot draw."""
    graphs = manifest.graphs
    return [graphs[role] for role in (Role.SAMPLE, Role.GENERATE) if role in graphs]


def count_drawable_labels(manifest: Manifest) -> int:
    """The number of labels that pictures can be drawn of; 0 if all draws are from p(x)."""
    takes_label = any(graph.input("y") is not None for graph in drawing_graphs(manifest))
    return len(manifest.labels) if takes_label else 0


async def draw_by_label(
    engine: Engine,
    labels: int,
    per_label: int,
    seed: int,
    *,
    check: SelfCheck | None = None,
    acceptance: Acceptance | None = None,
) -> list[Draws]:
    """Draws pictures of each label in turn; no index is drawn twice.

    Args:
        engine: engine that draws.
        labels: number of labels to draw; 0 for one group of pictures without a label.
        per_label: pictures per label.
        seed: seed of the draws.
        check: draw again what does not pass this self-check.
        acceptance: draw from p(x), and draw again what p(y|x) does not accept.
    """
    asked: Sequence[int | None] = range(labels) if labels else [None]
    groups = []
    for at, label in enumerate(asked):
        chunks = engine.generate(
            label, per_label, seed, first_index=at * per_label, check=check, acceptance=acceptance
        )
        groups.append(joined([chunk async for chunk in chunks]))
    return groups


class Drawing:
    """Draws of a bundle, and figures about them.

    Attributes:
        labels: number of labels that can be requested.
        examples: a few draws of each label, uint8 (labels, k, c, h, w); None before `figures`, or
            if the bundle cannot draw.
        nearest: draws beside their nearest training pictures, uint8 (k, 2, c, h, w); None as above.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        data: Dataset,
        test: Split,
        sizes: Sizes,
        judge: Judge | None,
    ) -> None:
        """Judges draws by `engine` of `bundle`; `judge` labels pictures independently."""
        self.bundle, self.engine, self.data, self.test = bundle, engine, data, test
        self.manifest, self.sizes, self.judge = bundle.manifest, sizes, judge
        self.labels = count_drawable_labels(self.manifest)
        self.examples: Pixels | None = None
        self.nearest: Pixels | None = None

    async def figures(self, alphas: Sequence[float]) -> dict[str, Any]:
        """All figures about draws, for JSON; empty if the bundle cannot draw."""
        if not drawing_graphs(self.manifest):
            return {}
        x, y, _, _ = await self._draw(None)
        groups = [x[y == label] for label in range(int(y.max()) + 1)]
        self.examples = np.stack([group[: self.sizes.examples] for group in groups])
        figures: dict[str, Any] = {}
        if self.labels and self.judge is not None and self.sizes.drawn:
            figures |= self._label_figures(self.judge, x, y)
            if Role.CONDITIONAL in self.manifest.graphs and alphas:
                check = SelfCheck(alpha=min(alphas), max_draws=MAX_DRAWS)
                figures |= await self._checked(self.judge, check)
        figures |= self._self_entropy(len(x))
        self.nearest, figures["memorisation"] = self._memorised(groups)
        return figures

    async def completed(self) -> Completed | None:
        """A few test pictures with a part hidden, and their completions."""
        if Role.SAMPLE not in self.manifest.graphs:
            return None
        x = self.test.subsample(COMPLETED).x
        known = np.zeros(x.shape, bool)
        h = x.shape[2]
        known[::2, :, : h // 2] = True  # given: alternately the upper half and the upper two thirds
        known[1::2, :, : 2 * h // 3] = True
        chunks = self.engine.complete(x, known, None, COMPLETED, SEED)
        images = np.concatenate([chunk.images async for chunk in chunks])
        return Completed(x, known, images.reshape(len(x), COMPLETED, *x.shape[1:]))

    async def _draw(self, check: SelfCheck | None) -> tuple[Pixels, Labels, Labels, Accepted]:
        """Draws pictures of each label, or of none.

        Returns:
            The pictures, their labels, the number of draws of each, and whether its last one passed
            the self-check.
        """
        per_label = max(self.sizes.examples, self.sizes.drawn // max(1, self.labels))
        groups = await draw_by_label(self.engine, self.labels, per_label, SEED, check=check)
        x, draws, accepted = (
            np.concatenate([getattr(group, name) for group in groups])
            for name in ("images", "draws", "accepted")
        )
        return x, np.repeat(np.arange(len(groups)), per_label), draws, accepted

    def _label_figures(self, judge: Judge, x: Pixels, y: Labels) -> dict[str, Any]:
        """Whether draws show their label, and whether a network can learn labels from them."""
        names = [label.name for label in self.manifest.labels]
        pupil = train_judge(x, y, self.manifest.levels, len(names), steps=self.sizes.steps)
        learnt = pupil.posterior(self.test.x).argmax(1) == self.test.y
        return {
            **self._faithful(judge, x, y),
            "train_on_draws_accuracy": measures.mean(learnt),
            **measures.by_label("train_on_draws_accuracy_by_label", learnt, self.test.y, names),
        }

    async def _checked(self, judge: Judge, check: SelfCheck) -> dict[str, Any]:
        """Whether draws with the self-check show their label, and the draws that this takes.

        A picture whose last permitted draw does not pass either is given as it is, and counts.
        """
        x, y, draws, accepted = await self._draw(check)
        return {
            "self_checked": {
                "alpha": check.alpha,
                **self._faithful(judge, x, y),
                "draws_a_picture": measures.mean(draws),
                "passed": measures.mean(accepted),
            }
        }

    def _faithful(self, judge: Judge, x: Pixels, y: Labels) -> dict[str, Any]:
        shown = judge.posterior(x).argmax(1) == y
        names = [label.name for label in self.manifest.labels]
        return {
            "faithfulness": measures.mean(shown),
            **measures.by_label("faithfulness_by_label", shown, y, names),
        }

    def _self_entropy(self, most: int) -> dict[str, Any]:
        """Whether draws are as surprising to their model as expected: mean surprise = entropy.

        Draws must be from the density's own p(x): a density with labels draws without one here. If
        another model draws, there is no figure.
        """
        sizes = self.manifest.calibrated.statistics
        if Role.SAMPLE not in self.manifest.graphs or not {"surprise", "entropy"} <= set(sizes):
            return {}
        if not self.manifest.samples_density:
            return {}
        spec = self.manifest.graphs[Role.SAMPLE]
        session = passes.open_graph(self.bundle, Role.SAMPLE)
        n = min(most, COMPARED)
        feeds: dict[str, Array] = {
            "gumbel": noise.gumbel(SEED, range(n), _noise_shape(spec)),
        }
        if spec.input("y") is not None:
            feeds["y"] = np.full(n, len(self.manifest.labels), np.int64)
        drawn = passes.run_graph_output(session, feeds, "x")
        seen = passes.open_graph(self.bundle, Role.DENSITY)
        statistics = passes.run_graph_output(seen, {"x": drawn}, "statistics").astype(np.float64)
        columns = calibrate.places(sizes)
        surprise, entropy = (statistics[:, columns[name][-1]] for name in ("surprise", "entropy"))
        return {
            "self_entropy": {
                "draws": n,
                "own_draws_nll_nats": measures.mean(surprise),
                "expected_nats": measures.mean(entropy),
                "difference_nats": measures.mean(surprise - entropy),
            }
        }

    def _memorised(self, groups: Sequence[Pixels]) -> tuple[Pixels, dict[str, Any]]:
        """Compares draws with their nearest training pictures, and tells whether they are too near.

        Too near is at or below the distance of the nearest 1 % of test pictures: if more of these
        are copies, that distance is 0, which that of a copied draw is not below.
        For each label, as many test pictures are compared as draws, because the pictures of some
        labels are nearer to each other than those of others.
        """
        drawn, held = self._matched_pictures(groups)
        near, distance = _nearest(drawn, self.data.train.x)
        _, usual = _nearest(held, self.data.train.x)
        shown = evenly_spaced(len(drawn), self.sizes.examples)
        pairs = np.stack([drawn[shown], self.data.train.x[near[shown]]], 1)
        return pairs, {
            "draws": len(drawn),
            "test_size": len(held),
            "distance_of_draws": measures.mean(distance),
            "distance_of_test": measures.mean(usual),
            "nearer_than_1_percent_of_test": float(np.mean(distance <= np.quantile(usual, 0.01))),
            "nearer_than_1_percent_of_test_standard_error": measures.error_below_quantile(
                distance, usual, 0.01
            ),
        }

    def _matched_pictures(self, groups: Sequence[Pixels]) -> tuple[Pixels, Pixels]:
        """Draws and test pictures, equally many of each label; of all, if draws have no label."""
        y = self.test.y
        test_groups = [self.test.x[y == label] for label in range(len(groups))]
        if not self.labels:
            test_groups = [self.test.x]
        drawn, held = [], []
        for ours, theirs in zip(groups, test_groups, strict=True):
            size = min(len(ours), len(theirs), max(1, COMPARED // len(groups)))
            drawn.append(ours[evenly_spaced(len(ours), size)])
            held.append(theirs[evenly_spaced(len(theirs), size)])
        return np.concatenate(drawn), np.concatenate(held)


def _nearest(x: Pixels, among: Pixels) -> tuple[Labels, Doubles]:
    """Returns the index of the nearest picture to each, and its distance in levels."""
    flat = among.reshape(len(among), -1).astype(np.float32)
    squares = np.square(flat).sum(1)
    queries = x.reshape(len(x), -1).astype(np.float32)
    indices = np.empty(len(x), np.int64)
    for start in range(0, len(x), 100):
        rows = slice(start, start + 100)
        indices[rows] = (squares - 2 * queries[rows] @ flat.T).argmin(1)
    distance: Doubles = np.linalg.norm(queries.astype(np.float64) - flat[indices], axis=1)
    return indices, distance


def _noise_shape(spec: Graph) -> tuple[int, ...]:
    gumbel = spec.input("gumbel")
    assert gumbel is not None  # every sampler takes Gumbel noise
    return gumbel.array_shape(1)[1:]
