"""The use cases of one model version: score, classify, encode, redraw, generate, complete."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypedDict, Unpack

import numpy as np

from likely import bayes, noise
from likely.answers import (
    Acceptance,
    Accepted,
    Classifications,
    Doubles,
    Draws,
    Features,
    Floats,
    Guarantee,
    LabelRule,
    Labels,
    Pixels,
    Redrawings,
    ScoreTable,
    SelfCheck,
    Traversal,
    Verdict,
    verdicts,
)
from likely.batching.admission import Bounds
from likely.batching.batches import Runner, feed_from_arrays
from likely.batching.lanes import Ask, Lanes
from likely.batching.traffic import Traffic
from likely.bundle import Bundle, Role
from likely.errors import BundleError, InvalidInput, NotAnswered
from likely.generation import Generator
from likely.graphs import Array, Device, Session
from likely.latent import Drawing, Redrawer, directions
from likely.outliers import Detector
from likely.ranking import RANKED, Ranked
from likely.trust import Trust
from likely.warmup import Warm, warm_up

_SCORE, _SURPRISE = (RANKED,), (RANKED, "surprise")
# A bundle that answers an RPC has at least one graph of each set.
_NEEDS: dict[str, tuple[frozenset[Role], ...]] = {
    "Score": (frozenset({Role.DENSITY}),),
    "Classify": (frozenset({Role.CONDITIONAL}),),
    "Encode": (frozenset({Role.ENCODE}),),
    "Generate": (frozenset({Role.SAMPLE, Role.GENERATE}),),
    "Complete": (frozenset({Role.SAMPLE}),),
    "Decode": (frozenset({Role.DECODE}),),
    "Traverse": (frozenset({Role.DECODE}), frozenset({Role.ENCODE})),
    "Interpolate": (frozenset({Role.DECODE}), frozenset({Role.ENCODE})),
}

Seen: TypeAlias = "Callable[[Engine, str, Doubles], None]"


def _ignore_scores(_: Engine, __: str, ___: Doubles) -> None:
    """Does nothing: the default, where no monitor is told."""


class JudgeOptions(TypedDict, total=False):
    """The keyword arguments of `Engine.judge`."""

    priors: Doubles | None
    min_posterior: float
    guarantee: Guarantee
    rule: LabelRule
    both: bool
    seen: bool


@dataclass(frozen=True, slots=True)
class Terms:
    """How an engine queues requests, and whom it tells of scores.

    Attributes:
        lanes: number of runs at once; 0 lets the warm-up find the best number.
        bounds: how much may wait in the queue of each graph.
        withheld_limit: number of consecutive non-finite answers of one graph after which the
            version counts as unhealthy; 0 for no limit.
        seen: callback that is called with the engine, the name of the method, and the rows of
            the `ScoreTable` whenever pictures were scored.
    """

    lanes: int = 0
    bounds: Bounds = field(default_factory=Bounds)
    withheld_limit: int = 0
    seen: Seen = _ignore_scores


class Engine:
    """Answers requests for one model version; its methods may run concurrently.

    Attributes:
        manifest: the bundle's manifest.
        digest: SHA-256 of that manifest.
        arrangement: the lanes and batch sizes that the warm-up found best, for the log.
        directions: the directions in the space of latent features, by name.
        providers: the execution providers of the graphs, as the opened sessions report them.
    """

    def __init__(
        self, bundle: Bundle, detector: Detector | None, warm: Warm, terms: Terms, traffic: Traffic
    ) -> None:
        """An engine over warm graphs; `load` makes it.

        Args:
            bundle: a verified bundle.
            detector: the bundle's detector; None if it has no density.
            warm: the bundle's graphs, and how each runs best.
            terms: how requests are queued.
            traffic: the metrics of queues and batches.
        """
        self.manifest = bundle.manifest
        self.digest = bundle.digest
        self._detector = detector
        self.directions = directions(
            bundle.manifest.latent,
            bundle.latent(),
            bundle.manifest.latent_dimensions(Role.DECODE),
        )
        self._seen = terms.seen
        self._trust = Trust(self.manifest.name, terms.withheld_limit, traffic)
        self._lanes = Lanes(
            self.manifest.name,
            warm.runners,
            lanes=warm.lanes,
            best=warm.best,
            bounds=terms.bounds,
            traffic=traffic,
        )
        self.providers = self._lanes.providers
        self.arrangement: dict[str, object] = {
            "lanes": warm.lanes,
            "graphs": {str(role): best.log_fields() for role, best in warm.best.items()},
        }
        self._generator = Generator(
            self.manifest,
            self._lanes,
            self._passes_check,
            self._surprise,
            self._p_label,
            rows=warm.best[Role.SAMPLE].rows if Role.SAMPLE in warm.best else 1,
        )
        self._redrawer = Redrawer(self.manifest, self._lanes)

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        *,
        device: Device,
        threads: int,
        max_batch: int = 0,
        filled: bool = False,
        terms: Terms | None = None,
        traffic: Traffic | None = None,
    ) -> Engine:
        """Returns the engine of a bundle, warmed up by replaying its golden outputs.

        Args:
            bundle: a verified bundle, so that only checked files are opened.
            device: where the graphs run.
            threads: number of CPU cores to use: each is a lane, and a batch that is the only
                work may run on several.
            max_batch: rows of one run at most; 0 lets the warm-up find the best number.
            filled: whether every run is padded to `max_batch` rows, which then must not be 0.
            terms: how requests are queued.
            traffic: the metrics of queues and batches.

        Raises:
            BundleError: a graph cannot be opened, is not the one that the manifest describes,
                or does not reproduce its golden outputs.
            DeviceError: the device is not available.
        """
        device = device.resolve()
        terms, traffic = terms or Terms(), traffic or Traffic()
        detector, weights = _detector(bundle), bundle.weights()

        def open_session(role: Role, threads: int) -> Session:
            graph = bundle.manifest.graphs[role]
            return Session(bundle.graph(role), graph, device, threads, weights)

        def wrap_runner(role: Role, runner: Runner) -> Runner:
            if role is Role.DENSITY and detector is not None:
                return Ranked(runner, detector, bundle.manifest.dimensions)
            return runner

        warm = warm_up(
            bundle,
            open_session,
            wrap_runner,
            lanes=terms.lanes,
            # A card runs one graph at a time; with more lanes, runs would only queue there.
            cores=1 if device.kind == "cuda" else threads,
            max_batch=max_batch,
            filled=filled,
        )
        return cls(bundle, detector, warm, terms, traffic)

    @property
    def detector(self) -> Detector:
        """The detector, which turns outlier statistics into p-values.

        Raises:
            NotAnswered: the bundle has no density.
        """
        if self._detector is None:
            raise NotAnswered(
                f"model {self.manifest.name} has no {Role.DENSITY} graph, "
                "so it does not answer this"
            )
        return self._detector

    @property
    def healthy(self) -> bool:
        """Whether the version may answer: false after too many non-finite answers in a row."""
        return self._trust.healthy

    def when_unhealthy(self, callback: Callable[[], None]) -> None:
        """Registers a callback for the moment when the version becomes unhealthy.

        It is called on the event loop.
        """
        self._trust.on_unhealthy = callback

    def answers(self, method: str) -> bool:
        """Whether the bundle has what an RPC, such as `Score`, needs."""
        return self._missing_requirement(method) is None

    def require(self, method: str) -> None:
        """Checks that the bundle answers an RPC.

        Raises:
            NotAnswered: the bundle lacks a graph, or directions, that the RPC needs.
        """
        if lacks := self._missing_requirement(method):
            raise NotAnswered(f"model {self.manifest.name} has {lacks}, so it does not answer this")

    def _missing_requirement(self, method: str) -> str | None:
        """What the bundle lacks to answer an RPC; None if it lacks nothing."""
        for roles in _NEEDS[method]:
            if not any(role in self._lanes for role in roles):
                return f"no {' or '.join(sorted(roles))} graph"
        return "no directions" if method == "Traverse" and not self.directions else None

    async def score(
        self,
        x: Pixels,
        alpha: float,
        *,
        surprise: bool = False,
        guarantee: Guarantee = Guarantee.MARGINAL,
        seen: bool = True,
    ) -> ScoreTable:
        """Scores how plausible pictures are.

        Args:
            x: pictures, uint8 (n, c, h, w), with values below the model's number of levels.
            alpha: accepted rate of false rejections, one that the calibration can guarantee.
            surprise: whether to return the map of -log p for each pixel.
            guarantee: whether alpha holds on average over calibration sets, or for this one.
            seen: whether monitors are told of the scores.
        """
        self._trust.require()
        outputs = _SURPRISE if surprise else _SCORE
        arrays = (await self._lanes.run_all(_ask(Role.DENSITY, {"x": x}, outputs)))[0]
        scores = self._scores(arrays, alpha, guarantee)
        if seen:
            self._seen(self, "Score", scores.rows)
        return scores

    async def classify(
        self, x: Pixels, alpha: float, **how: Unpack[JudgeOptions]
    ) -> Classifications:
        """Decides which label is assigned, if any: the second result of `judge`."""
        return (await self.judge(x, alpha, **how))[1]

    async def judge(
        self,
        x: Pixels,
        alpha: float,
        *,
        priors: Doubles | None = None,
        min_posterior: float = 0.0,
        guarantee: Guarantee = Guarantee.MARGINAL,
        rule: LabelRule = LabelRule.GENERATIVE,
        both: bool = False,
        seen: bool = True,
    ) -> tuple[ScoreTable, Classifications]:
        """Scores how plausible pictures are, and decides which label is assigned, if any.

        Args:
            x: pictures, uint8 (n, c, h, w), with values below the model's number of levels.
            alpha: accepted rate of false rejections, one that the calibration can guarantee.
            priors: p(y), float64 (labels,); None for the model's own.
            min_posterior: the smallest posterior at which a label is assigned.
            guarantee: whether alpha holds on average over calibration sets, or for this one.
            rule: the rule that assigns the label.
            both: whether to return log p(x|y) by the other rule too.
            seen: whether monitors are told of the scores.
        """
        self._trust.require()
        asks = [_ask(Role.DENSITY, {"x": x}, _SCORE)]
        if both or rule == LabelRule.GENERATIVE:
            asks.append(self._conditional_ask(x))
        if both or rule == LabelRule.DISCRIMINATIVE:
            asks.append(_ask(Role.DISCRIMINATE, {"x": x}, ("log_pyx",)))
        arrays = await self._lanes.run_all(*asks)
        arrays_by_role = {ask.role: outputs for ask, outputs in zip(asks, arrays, strict=True)}
        scores = self._scores(arrays_by_role[Role.DENSITY], alpha, guarantee)
        log_pxy = composed = label_p_values = np.empty((len(x), 0))
        if (conditional := arrays_by_role.get(Role.CONDITIONAL)) is not None:
            log_pxy = conditional["log_pxy"].astype(np.float64)
            evidence = self._evidence(conditional)
            # Label p-values use the model's own priors: what the pictures of a label look like
            # does not depend on how many of them a request expects.
            model_posterior = self._posterior(evidence)
            posterior = model_posterior if priors is None else self._posterior(evidence, priors)
            label_p_values = self.detector.label_p_values(scores.unusualness, model_posterior)
        if (discriminative := arrays_by_role.get(Role.DISCRIMINATE)) is not None:
            self._trust.check(Role.DISCRIMINATE, *discriminative.values())
            log_pyx, learnt = discriminative["log_pyx"].astype(np.float64), self.manifest.priors
            composed = bayes.composed(log_pyx, scores.log_px, learnt)
            if rule == LabelRule.DISCRIMINATIVE:
                expected = learnt if priors is None else priors
                posterior = bayes.under_priors(log_pyx, learnt, expected)
        label = posterior.argmax(1).astype(np.int64)
        if seen:
            self._seen(self, "Classify", scores.rows)
        return scores, Classifications(
            log_pxy=log_pxy,
            posterior=posterior,
            label=label,
            p_value=scores.p_value,
            label_p_values=label_p_values,
            verdict=verdicts(scores.verdict == Verdict.OUTLIER, posterior, min_posterior),
            alpha=alpha,
            model_version=self.manifest.version,
            composed=composed,
            rule=rule,
        )

    async def encode(self, x: Pixels, label: Labels | None = None) -> Features:
        """Computes the latent features of pictures.

        Args:
            x: pictures, uint8 (n, c, h, w), with values below the model's number of levels.
            label: int64 (n,), the label of each picture. If None, and features depend on a
                label, the most probable label of each picture is used.
        """
        self._trust.require()
        graph = self._lanes.graph(Role.ENCODE)
        feeds: dict[str, Array] = {"x": x}
        if graph.input("y") is None:
            if label is not None:
                raise InvalidInput("labels", "the model's features depend on no label")
            label = np.full(len(x), -1)
        else:
            if label is None:
                (conditional,) = await self._lanes.run_all(self._conditional_ask(x))
                label = self._posterior(self._evidence(conditional)).argmax(1).astype(np.int64)
            feeds["y"] = label
        outputs = [spec.name for spec in graph.outputs]
        arrays = await self._lanes.run(Role.ENCODE, feeds, outputs)
        self._trust.check(Role.ENCODE, *arrays.values())
        return Features(
            mean=arrays["mean"],
            log_variance=arrays.get("log_variance"),
            label=label,
            model_version=self.manifest.version,
        )

    async def decode(self, z: Floats, label: Labels | None, drawing: Drawing) -> Redrawings:
        """Decodes features into pictures, each row independently.

        Args:
            z: features, float32 (n, z).
            label: int64 (n,), the label of each row; None if the model decodes without labels.
            drawing: how many pictures are drawn for each row, and how.
        """
        self._trust.require()
        labels = None if label is None else label[:, None]
        redrawings = await self._redrawer.redraw(z[:, None], labels, drawing)
        self._check_redrawn(redrawings)
        deviation = None if redrawings.deviation is None else redrawings.deviation[:, 0]
        return replace(
            redrawings,
            mean=redrawings.mean[:, 0],
            deviation=deviation,
            drawn=redrawings.drawn[:, 0],
        )

    async def traverse(
        self,
        x: Pixels,
        direction: str,
        points: Doubles,
        drawing: Drawing,
        *,
        label: Labels | None = None,
    ) -> Traversal:
        """Redraws pictures at points along a direction, and finds their own positions on it.

        Args:
            x: pictures, uint8 (n, c, h, w), with values below the model's number of levels.
            direction: the name of one of `directions`.
            points: float64 (points,), distances from the picture's own position.
            drawing: how many pictures are drawn at each point, and how.
            label: int64 (n,), the label of each picture. If None, and features depend on a
                label, the most probable label of each picture is used.
        """
        self.require("Traverse")
        features = await self.encode(x, label)
        way = self.directions[direction]
        z = features.mean[:, None] + points[:, None] * way.step
        labels = self._decoder_labels(features.label[:, None].repeat(len(points), 1))
        redrawings = await self._redrawer.redraw(z.astype(np.float32), labels, drawing)
        self._check_redrawn(redrawings)
        position, spread = way.position_of(features)
        return Traversal(
            mean=redrawings.mean,
            deviation=redrawings.deviation,
            drawn=redrawings.drawn,
            seed=redrawings.seed,
            model_version=redrawings.model_version,
            position=position,
            spread=spread,
            label=features.label,
        )

    async def interpolate(
        self,
        x: Pixels,
        other: Pixels,
        points: Doubles,
        drawing: Drawing,
        *,
        label: Labels | None = None,
        other_label: Labels | None = None,
    ) -> Redrawings:
        """Redraws pictures at points on the line between the features of two pictures.

        Points from 0.5 on are decoded under the label of `other`.

        Args:
            x: the pictures at point 0, uint8 (n, c, h, w).
            other: the pictures at point 1, uint8 (n, c, h, w).
            points: float64 (points,), in [0, 1].
            drawing: how many pictures are drawn at each point, and how.
            label: int64 (n,), the labels of `x`. If None, and features depend on a label, the
                most probable label of each picture is used.
            other_label: int64 (n,), the labels of `other`; None likewise.
        """
        self.require("Interpolate")
        if other_label is not None and self._lanes.graph(Role.ENCODE).input("y") is None:
            raise InvalidInput("other_labels", "the model's features depend on no label")
        first, last = await self.encode(x, label), await self.encode(other, other_label)
        t = points[:, None]
        z = (1 - t) * first.mean[:, None] + t * last.mean[:, None]
        near = np.where(points < 0.5, first.label[:, None], last.label[:, None])
        labels = self._decoder_labels(near)
        redrawings = await self._redrawer.redraw(z.astype(np.float32), labels, drawing)
        self._check_redrawn(redrawings)
        return redrawings

    def generate(
        self,
        label: int | None,
        count: int,
        seed: int,
        *,
        first_index: int = 0,
        temperature: float = 1.0,
        chunk: int = 64,
        check: SelfCheck | None = None,
        acceptance: Acceptance | None = None,
    ) -> AsyncGenerator[Draws, None]:
        """Draws pictures from the model, in chunks.

        Args:
            label: the label of all pictures; None draws each label from the model's priors.
            count: number of pictures.
            seed: seed of the random numbers.
            first_index: index of the first picture. A picture depends on the seed and its
                index, not on the chunks.
            temperature: factor of the noise that levels are drawn with.
            chunk: pictures in one chunk.
            check: if given, pictures that do not pass this check are drawn again.
            acceptance: if given, pictures are drawn from p(x) and kept with probability p(y|x).
                `check` is then ignored.
        """
        self._trust.require()
        if acceptance:
            return self._generator.accept(
                label,
                count,
                seed,
                first_index=first_index,
                temperature=temperature,
                chunk=chunk,
                acceptance=acceptance,
            )
        return self._generator.generate(
            label,
            count,
            seed,
            first_index=first_index,
            temperature=temperature,
            chunk=chunk,
            check=check,
        )

    def complete(
        self,
        x: Pixels,
        known: Accepted,
        label: int | None,
        completions: int,
        seed: int,
        *,
        first_index: int = 0,
        temperature: float = 1.0,
        proposals: int = 1,
        chunk: int = 64,
    ) -> AsyncGenerator[Draws, None]:
        """Completes pictures by drawing their open pixels from the model, in chunks.

        Args:
            x: pictures, uint8 (n, c, h, w); the levels of open pixels do not matter.
            known: bool (n, c, h, w), true where a pixel is fixed.
            label: the label of all pictures; None draws from p(x).
            completions: number of completions of each picture.
            seed: seed of the random numbers.
            first_index: index of the first picture.
            temperature: factor of the noise that levels are drawn with.
            proposals: number of candidates from which each completion is chosen; more than 1
                helps where fixed pixels follow open ones, or a sketch is drawn first.
            chunk: completions in one chunk.

        Returns:
            Draws; row r completes picture r // completions.
        """
        self._trust.require()
        return self._generator.complete(
            x,
            known,
            label,
            completions,
            seed,
            first_index=first_index,
            temperature=temperature,
            proposals=proposals,
            chunk=chunk,
        )

    def close(self) -> None:
        """Refuses queued requests, waits for running graphs, and frees the lanes."""
        self._lanes.close()
        self._trust.end()

    async def _passes_check(self, x: Pixels, labels: Labels, alpha: float) -> Accepted:
        """Whether draws are accepted, and classified as the labels that they were drawn with."""
        if Role.CONDITIONAL in self._lanes and np.all(labels >= 0):
            answer = await self.classify(x, alpha, seen=False)
            assigned: Accepted = (answer.verdict == Verdict.ACCEPTED) & (answer.label == labels)
            return assigned
        scores = await self.score(x, alpha, seen=False)
        plausible: Accepted = scores.verdict == Verdict.ACCEPTED
        return plausible

    async def _p_label(self, x: Pixels, labels: Labels) -> Doubles:
        """The discriminative model's p(y|x) of one label for each picture, float64 (n,)."""
        outputs = await self._lanes.run(Role.DISCRIMINATE, {"x": x}, ["log_pyx"])
        self._trust.check(Role.DISCRIMINATE, *outputs.values())
        p: Doubles = np.exp(outputs["log_pyx"][np.arange(len(x)), labels].astype(np.float64))
        return p

    def _decoder_labels(self, label: Labels) -> Labels | None:
        """The labels, or None if the model decodes without labels."""
        return None if self._lanes.graph(Role.DECODE).input("y") is None else label

    def _check_redrawn(self, redrawings: Redrawings) -> None:
        deviation = () if redrawings.deviation is None else (redrawings.deviation,)
        self._trust.check(Role.DECODE, redrawings.mean, *deviation)

    async def _surprise(self, x: Pixels) -> Floats:
        outputs = await self._lanes.run(Role.DENSITY, {"x": x}, ["surprise"])
        self._trust.check(Role.DENSITY, outputs["surprise"])
        return outputs["surprise"]

    def _posterior(self, evidence: Doubles, priors: Doubles | None = None) -> Doubles:
        prior = self.manifest.priors if priors is None else priors
        return bayes.posterior(evidence, prior, self.manifest.calibrated.temperature)

    def _scores(
        self, arrays: Mapping[str, Array], alpha: float, guarantee: Guarantee
    ) -> ScoreTable:
        self._trust.check(Role.DENSITY, *arrays.values())
        rows = arrays[RANKED]
        if guarantee is not Guarantee.MARGINAL:
            rows = np.column_stack((rows[:, :3], self.detector.p_value(rows[:, 2], guarantee)))
        return ScoreTable(rows, alpha, arrays.get("surprise"), self.manifest.version)

    def _evidence(self, conditional: Mapping[str, Array]) -> Doubles:
        """log p(x|y) of each label, float64 (n, labels); pooled if there are several experts."""
        self._trust.check(Role.CONDITIONAL, *conditional.values())
        if "evidence" not in conditional:
            return conditional["log_pxy"].astype(np.float64)
        weights = np.array(self.manifest.calibrated.weights)
        return bayes.pooled(conditional["evidence"], weights)

    def _conditional_ask(self, x: Pixels) -> Ask:
        graph = self._lanes.graph(Role.CONDITIONAL)
        eps = graph.input("eps")
        outputs = ("log_pxy", "evidence") if graph.output("evidence") else ("log_pxy",)

        def feed(start: int, stop: int) -> Mapping[str, Array]:
            shape = eps.array_shape(stop - start) if eps else None
            common = {"eps": np.ascontiguousarray(noise.common(shape))} if shape else {}
            return {"x": x[start:stop], **common}

        return Ask(Role.CONDITIONAL, len(x), feed, outputs)


def _detector(bundle: Bundle) -> Detector | None:
    """The bundle's detector, checked against the manifest; None if there is no density."""
    calibration, graph = bundle.manifest.calibration, bundle.manifest.graphs.get(Role.DENSITY)
    if calibration is None or graph is None:
        return None
    try:
        detector = Detector(bundle.calibration())
    except KeyError as error:
        raise BundleError(f"{calibration.file} has no array {error}", "calibration") from error
    statistics = graph.output("statistics")
    width = statistics.shape[-1] if statistics else None
    if detector.statistics != width or len(detector.scores) != calibration.size:
        raise BundleError(
            f"{calibration.file} is for {detector.statistics} statistics and "
            f"{len(detector.scores)} scores; the manifest says {width} and {calibration.size}",
            "calibration",
        )
    labels = len(bundle.manifest.labels) if Role.CONDITIONAL in bundle.manifest.graphs else 0
    if flaw := detector.flaw(labels):
        raise BundleError(f"{calibration.file}: {flaw}", "calibration")
    return detector


def _ask(role: Role, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> Ask:
    return Ask(role, len(feeds["x"]), feed_from_arrays(feeds), outputs)
