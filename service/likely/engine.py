"""The use cases: score, classify, encode, generate and complete, on one model version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import numpy as np

from likely import bayes, noise
from likely.answers import (
    Accepted,
    Classifications,
    Doubles,
    Draws,
    Features,
    Floats,
    Labels,
    Pixels,
    Scores,
    SelfCheck,
    Verdict,
)
from likely.bundle import Bundle, Role
from likely.errors import BundleError, ServerFault
from likely.generation import Generator
from likely.graphs import Array, Device, Session, agrees
from likely.lanes import Lanes
from likely.outliers import Detector

_METHODS: dict[str, tuple[Role, ...]] = {
    "Score": (Role.DENSITY,),
    "Classify": (Role.CONDITIONAL,),
    "Encode": (Role.ENCODE,),
    "Generate": (Role.SAMPLE, Role.GENERATE),
    "Complete": (Role.SAMPLE,),
}


class Engine:
    """One model version that answers; its methods may run concurrently.

    Attributes:
        manifest: what the bundle says of itself.
        digest: SHA-256 of that manifest.
        detector: turns outlier statistics into p-values.
        providers: what really runs the graphs, as their sessions report.
    """

    def __init__(
        self, bundle: Bundle, sessions: Mapping[Role, Session], *, lanes: int, max_batch: int
    ) -> None:
        """An engine over opened graphs.

        Args:
            bundle: where the sessions came from.
            sessions: one for each graph of the bundle.
            lanes: runs at once.
            max_batch: rows of one run; longer inputs are divided.
        """
        self.manifest = bundle.manifest
        self.digest = bundle.digest
        self.detector = _detector(bundle)
        self._lanes = Lanes(self.manifest.name, sessions, lanes=lanes, max_batch=max_batch)
        self.providers = self._lanes.providers
        self._generator = Generator(self.manifest, self._lanes, self._passes, self._surprise)
        self._replay(bundle.golden())

    @classmethod
    def load(cls, bundle: Bundle, *, device: Device, threads: int, max_batch: int) -> Engine:
        """The engine of a verified bundle, warmed up by replaying its golden outputs.

        Args:
            bundle: verified, so that only checked files are opened.
            device: where the graphs shall run.
            threads: cores to use, each as a lane of its own: lanes of one thread
                beat one run of many threads on graphs of this size.
            max_batch: rows of one run.

        Raises:
            BundleError: a graph does not open, is not the one described, or does not
                give its golden outputs.
            DeviceError: the device is not really there.
        """
        device = device.resolve()
        sessions = {
            role: Session(bundle.graph(role), spec, device)
            for role, spec in bundle.manifest.graphs.items()
        }
        # A card runs one graph at a time; more lanes would only queue there.
        lanes = 1 if device.kind == "cuda" else threads
        return cls(bundle, sessions, lanes=lanes, max_batch=max_batch)

    def answers(self, method: str) -> bool:
        """Whether the bundle has a graph for that RPC, such as `Score`."""
        return any(role in self._lanes for role in _METHODS[method])

    async def score(self, x: Pixels, alpha: float, *, surprise: bool = False) -> Scores:
        """How plausible pictures are.

        Args:
            x: uint8 (n, c, h, w), levels below the model's.
            alpha: accepted rate of false rejections, promisable by the calibration.
            surprise: whether to give the per-pixel map.
        """
        outputs = ["log_px", "statistics"] + ["surprise"] * surprise
        arrays = await self._lanes.run(Role.DENSITY, {"x": x}, outputs)
        log_px = _finite(arrays["log_px"])
        p_value = self.detector.p_value(_finite(arrays["statistics"]))
        return Scores(
            log_px=log_px,
            bits_per_dim=-log_px / (self.manifest.dimensions * np.log(2)),
            p_value=p_value,
            verdict=np.where(p_value <= alpha, Verdict.OUTLIER, Verdict.ACCEPTED).astype(np.int8),
            alpha=alpha,
            surprise=arrays.get("surprise"),
            model_version=self.manifest.version,
        )

    async def classify(
        self, x: Pixels, alpha: float, *, priors: Doubles | None = None, min_posterior: float = 0.0
    ) -> Classifications:
        """Which label Bayes' rule assigns, if any.

        Args:
            x: uint8 (n, c, h, w), levels below the model's.
            alpha: accepted rate of false rejections, promisable by the calibration.
            priors: p(y) (labels,); None for the model's own.
            min_posterior: the smallest posterior at which a label is assigned.
        """
        self._lanes.graph(Role.CONDITIONAL)
        scores, log_pxy = await asyncio.gather(self.score(x, alpha), self._log_pxy(x))
        posterior = self._posterior(log_pxy, priors)
        label = posterior.argmax(1).astype(np.int64)
        unsure = posterior.max(1, initial=0.0) < min_posterior
        verdict = np.where(unsure, Verdict.AMBIGUOUS, Verdict.ACCEPTED)
        verdict = np.where(scores.verdict == Verdict.OUTLIER, Verdict.OUTLIER, verdict)
        return Classifications(
            log_pxy=log_pxy,
            posterior=posterior,
            label=label,
            p_value=scores.p_value,
            verdict=verdict.astype(np.int8),
            alpha=alpha,
            model_version=self.manifest.version,
        )

    async def encode(self, x: Pixels, label: Labels | None = None) -> Features:
        """The latent features of pictures.

        Args:
            x: uint8 (n, c, h, w), levels below the model's.
            label: int64 (n,); None for each picture's most probable one.
        """
        self._lanes.graph(Role.ENCODE)
        if label is None:
            label = self._posterior(await self._log_pxy(x)).argmax(1).astype(np.int64)
        arrays = await self._lanes.run(Role.ENCODE, {"x": x, "y": label}, ["mean", "log_variance"])
        return Features(
            mean=_finite(arrays["mean"], np.float32),
            log_variance=_finite(arrays["log_variance"], np.float32),
            label=label,
            model_version=self.manifest.version,
        )

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
    ) -> AsyncGenerator[Draws, None]:
        """Pictures drawn from the model, in chunks.

        Args:
            label: of all pictures; None draws each from the model's own priors.
            count: how many pictures.
            seed: where the random numbers come from.
            first_index: of the first picture; picture i depends on i, not on the chunking.
            temperature: multiplies the noise that levels are drawn with.
            chunk: pictures of one chunk.
            check: redraw what does not pass.
        """
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
        """Pictures with their open pixels drawn from the model, in chunks.

        Args:
            x: uint8 (n, c, h, w); levels of open pixels do not matter.
            known: bool (n, c, h, w), true where a pixel is fixed.
            label: of all pictures; None for p(x).
            completions: of each picture.
            seed: where the random numbers come from.
            first_index: of the first picture.
            temperature: multiplies the noise that levels are drawn with.
            proposals: behind each completion, where fixed pixels follow open ones.
            chunk: completions of one chunk.

        Returns:
            Draws whose row r completes picture r // completions.
        """
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
        """Lets running graphs end and frees the lanes."""
        self._lanes.close()

    async def _passes(self, x: Pixels, labels: Labels, alpha: float) -> Accepted:
        """Whether draws would be accepted, and assigned the labels they were drawn with."""
        if Role.CONDITIONAL in self._lanes and np.all(labels >= 0):
            answer = await self.classify(x, alpha)
            assigned: Accepted = (answer.verdict == Verdict.ACCEPTED) & (answer.label == labels)
            return assigned
        plausible: Accepted = (await self.score(x, alpha)).verdict == Verdict.ACCEPTED
        return plausible

    async def _surprise(self, x: Pixels) -> Floats:
        return (await self._lanes.run(Role.DENSITY, {"x": x}, ["surprise"]))["surprise"]

    def _posterior(self, log_pxy: Doubles, priors: Doubles | None = None) -> Doubles:
        prior = self.manifest.priors if priors is None else priors
        return bayes.posterior(log_pxy, prior, self.manifest.calibration.temperature)

    async def _log_pxy(self, x: Pixels) -> Doubles:
        feeds: dict[str, Array] = {"x": x}
        spec = self._lanes.graph(Role.CONDITIONAL)
        if (eps := spec.input("eps")) is not None:
            feeds["eps"] = noise.common(eps.array_shape(len(x)))
        arrays = await self._lanes.run(Role.CONDITIONAL, feeds, ["log_pxy"])
        log_pxy: Doubles = _finite(arrays["log_pxy"])
        return log_pxy

    def _replay(self, golden: Mapping[str, Array]) -> None:
        for role, graph in self.manifest.graphs.items():
            outputs = [spec.name for spec in graph.outputs]
            names = [*(spec.name for spec in graph.inputs), *outputs]
            if missing := [name for name in names if f"{role}/{name}" not in golden]:
                raise BundleError(f"the golden arrays have no {role}/{missing[0]}")
            feeds = {spec.name: golden[f"{role}/{spec.name}"] for spec in graph.inputs}
            found = self._lanes.run_once(role, feeds, outputs)
            for name, got in zip(outputs, found, strict=True):
                if not agrees(got, golden[f"{role}/{name}"]):
                    raise BundleError(
                        f"bundle {self.manifest.name}@{self.manifest.version} does not give its "
                        f"golden {name} of the {role} graph on this machine"
                    )


def _detector(bundle: Bundle) -> Detector:
    """The bundle's detector, held to what the manifest says of it."""
    calibration, graph = bundle.manifest.calibration, bundle.manifest.graphs[Role.DENSITY]
    try:
        detector = Detector(bundle.calibration())
    except KeyError as error:
        raise BundleError(f"{calibration.file} has no array {error}") from error
    width = next((out.shape[-1] for out in graph.outputs if out.name == "statistics"), None)
    if detector.knots.shape[1:] != (width,) or detector.scores.shape != (calibration.size,):
        raise BundleError(
            f"{calibration.file} is for {detector.knots.shape[1:]} statistics and "
            f"{detector.scores.shape} scores where the manifest says {width} and {calibration.size}"
        )
    return detector


def _finite(values: Array, dtype: type[Any] = np.float64) -> Any:
    """The values as that type.

    Raises:
        ServerFault: one is not a finite number; it must not leave the service.
    """
    if not np.all(np.isfinite(values)):
        raise ServerFault("the model gave a value that is not finite")
    return values.astype(dtype)
