"""What a bundle draws: whether draws show their label, teach it, and are nobody's copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from likely import noise
from likely.answers import Doubles, Labels, Pixels, SelfCheck
from likely.bundle import Bundle, Graph, Role
from likely.engine import Engine
from likely.graphs import Array, Device, Session
from likely_export import measures
from likely_export.data import Dataset, Split
from likely_export.judge import Judge, taught
from likely_export.material import Completed

BATCH = 16
SEED = 20261122
COMPLETED = 6
MOST_DRAWS = 8  # of a picture that checks itself
COMPARED = 500  # draws whose surprise and nearest neighbours are looked at


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many pictures each figure is taken over, at most.

    Attributes:
        test: of the test part.
        outliers: of every set out of distribution.
        drawn: drawn for faithfulness and for training on draws; 0 leaves these out.
        bound: for the bound of many importance samples.
        steps: of training each judge.
        examples: shown of each set.
    """

    test: int = 10_000
    outliers: int = 2000
    drawn: int = 10_000
    bound: int = 500
    steps: int = 3000
    examples: int = 12


class Drawing:
    """What a bundle draws, and what it is worth.

    Attributes:
        examples: uint8 (labels, k, c, h, w), a few draws of each label; None before `figures`,
            or if the bundle draws nothing.
        nearest: uint8 (k, 2, c, h, w), draws beside their nearest training pictures; likewise.
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
        """What `engine` draws from `bundle`; `judge` names labels independently."""
        self.bundle, self.engine, self.data, self.test = bundle, engine, data, test
        self.manifest, self.sizes, self.judge = bundle.manifest, sizes, judge
        self.examples: Pixels | None = None
        self.nearest: Pixels | None = None

    async def figures(self, alphas: Sequence[float]) -> dict[str, Any]:
        """Everything about draws, for JSON; nothing where the bundle draws nothing."""
        if not {Role.SAMPLE, Role.GENERATE} & set(self.manifest.graphs):
            return {}
        x, y, _ = await self._draw(None)
        labels = range(int(y.max()) + 1)
        self.examples = np.stack([x[y == label][: self.sizes.examples] for label in labels])
        found = self._taught(x, y)
        if self.judge is not None and Role.CONDITIONAL in self.manifest.graphs and alphas:
            found |= await self._checked(SelfCheck(alpha=min(alphas), max_draws=MOST_DRAWS))
        found |= self._own_surprise(len(x))
        self.nearest, found["memorisation"] = self._memorised(x)
        return found

    async def completed(self) -> Completed | None:
        """A few test pictures with a part hidden, and drawn again."""
        if Role.SAMPLE not in self.manifest.graphs:
            return None
        x = self.test.x[:: max(1, len(self.test) // COMPLETED)][:COMPLETED]
        known = np.zeros(x.shape, bool)
        h = x.shape[2]
        known[::2, :, : h // 2] = True  # the upper half is given, or the upper two thirds
        known[1::2, :, : 2 * h // 3] = True
        chunks = self.engine.complete(x, known, None, COMPLETED, SEED)
        images = np.concatenate([chunk.images async for chunk in chunks])
        return Completed(x, known, images.reshape(len(x), COMPLETED, *x.shape[1:]))

    async def _draw(self, check: SelfCheck | None) -> tuple[Pixels, Labels, Labels]:
        """Pictures in turn of every label, or of none; their labels, and draws each took."""
        labels = max(1, len(self.manifest.labels))
        each = max(self.sizes.examples, self.sizes.drawn // labels)
        pictures, named, draws = [], [], []
        for y in range(labels):
            label = y if self.manifest.labels else None
            first = y * each
            async for chunk in self.engine.generate(
                label, each, SEED, first_index=first, check=check
            ):
                pictures.append(chunk.images)
                named.append(np.full(len(chunk.images), y))
                draws.append(chunk.draws)
        return np.concatenate(pictures), np.concatenate(named), np.concatenate(draws)

    def _taught(self, x: Pixels, y: Labels) -> dict[str, Any]:
        """Whether draws show their label, and whether they teach it."""
        if self.judge is None or not self.sizes.drawn:
            return {}
        names = [label.name for label in self.manifest.labels]
        pupil = taught(x, y, self.manifest.levels, len(names), steps=self.sizes.steps)
        learnt = pupil.posterior(self.test.x).argmax(1) == self.test.y
        return {
            **self._faithful(x, y),
            "train_on_draws_accuracy": measures.mean(learnt),
            **measures.by_label("train_on_draws_accuracy_by_label", learnt, self.test.y, names),
        }

    async def _checked(self, check: SelfCheck) -> dict[str, Any]:
        """The same of draws that check themselves, and what that costs."""
        if not self.sizes.drawn:
            return {}
        x, y, draws = await self._draw(check)
        return {
            "self_checked": {
                "alpha": check.alpha,
                **self._faithful(x, y),
                "draws_a_picture": measures.mean(draws),
            }
        }

    def _faithful(self, x: Pixels, y: Labels) -> dict[str, Any]:
        assert self.judge is not None
        shown = self.judge.posterior(x).argmax(1) == y
        names = [label.name for label in self.manifest.labels]
        return {
            "faithfulness": measures.mean(shown),
            **measures.by_label("faithfulness_by_label", shown, y, names),
        }

    def _own_surprise(self, most: int) -> dict[str, Any]:
        """Whether draws are as surprising to their model as it expects: mean surprise = entropy.

        The same p(x) must have drawn: a density that knows labels draws without one here.
        """
        sizes = self.manifest.calibrated.statistics
        if Role.SAMPLE not in self.manifest.graphs or not {"surprise", "entropy"} <= set(sizes):
            return {}
        spec = self.manifest.graphs[Role.SAMPLE]
        session = Session(self.bundle.graph(Role.SAMPLE), spec, Device("cpu"))
        n = min(most, COMPARED)
        feeds: dict[str, Array] = {
            "gumbel": noise.gumbel(SEED, range(n), _noise_shape(spec)),
        }
        if spec.input("y") is not None:
            feeds["y"] = np.full(n, len(self.manifest.labels), np.int64)
        drawn = batched(session, feeds, "x")
        density = self.manifest.graphs[Role.DENSITY]
        seen = Session(self.bundle.graph(Role.DENSITY), density, Device("cpu"))
        statistics = batched(seen, {"x": drawn}, "statistics").astype(np.float64)
        ends = dict(zip(sizes, np.cumsum(list(sizes.values())), strict=True))
        surprise = statistics[:, ends["surprise"] - 1]
        entropy = statistics[:, ends["entropy"] - 1]
        return {
            "self_entropy": {
                "draws": n,
                "own_draws_nll_nats": measures.mean(surprise),
                "expected_nats": measures.mean(entropy),
                "difference_nats": measures.mean(surprise - entropy),
            }
        }

    def _memorised(self, x: Pixels) -> tuple[Pixels, dict[str, Any]]:
        """Draws beside their nearest training pictures, and whether they lie too near."""
        rows = np.linspace(0, len(x) - 1, min(len(x), COMPARED)).astype(int)
        held = self.test.x[np.linspace(0, len(self.test) - 1, len(rows)).astype(int)]
        near, distance = _nearest(x[rows], self.data.train.x)
        _, usual = _nearest(held, self.data.train.x)
        shown = np.linspace(0, len(rows) - 1, self.sizes.examples).astype(int)
        pairs = np.stack([x[rows][shown], self.data.train.x[near[shown]]], 1)
        return pairs, {
            "draws": len(rows),
            "test_size": len(held),
            "distance_of_draws": measures.mean(distance),
            "distance_of_test": measures.mean(usual),
            "nearer_than_1_percent_of_test": float(np.mean(distance < np.quantile(usual, 0.01))),
            "nearer_than_1_percent_of_test_standard_error": measures.error_below_quantile(
                distance, usual, 0.01
            ),
        }


def batched(session: Session, feeds: Mapping[str, Array], output: str) -> Array:
    """One output of a graph for all rows of its inputs, a small batch at a time."""
    n = len(next(iter(feeds.values())))
    parts = [
        {name: np.ascontiguousarray(feed[at : at + BATCH]) for name, feed in feeds.items()}
        for at in range(0, n, BATCH)
    ]
    return np.concatenate([session.run(part, [output])[0] for part in parts])


def _nearest(x: Pixels, among: Pixels) -> tuple[Labels, Doubles]:
    """Which of some pictures is the nearest to each, and its distance in levels."""
    flat = among.reshape(len(among), -1).astype(np.float32)
    squares = np.square(flat).sum(1)
    own = x.reshape(len(x), -1).astype(np.float32)
    found = np.empty(len(x), np.int64)
    for start in range(0, len(x), 100):
        rows = slice(start, start + 100)
        found[rows] = (squares - 2 * own[rows] @ flat.T).argmin(1)
    distance: Doubles = np.linalg.norm(own.astype(np.float64) - flat[found], axis=1)
    return found, distance


def _noise_shape(spec: Graph) -> tuple[int, ...]:
    gumbel = spec.input("gumbel")
    assert gumbel is not None  # a sampler has no other way to draw
    return gumbel.array_shape(1)[1:]
