"""The use cases: score, classify, encode and generate, on one version of one model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np

from likely import bayes, noise
from likely.answers import (
    Classifications,
    Doubles,
    Draws,
    Features,
    Labels,
    Pixels,
    Scores,
    Verdict,
)
from likely.bundle import Bundle, Role
from likely.errors import BundleError, NotAnswered, ServerFault
from likely.graphs import Array, Device, Session, agrees
from likely.outliers import Detector

T = TypeVar("T")
_METHODS: dict[str, tuple[Role, ...]] = {
    "Score": (Role.DENSITY,),
    "Classify": (Role.CONDITIONAL,),
    "Encode": (Role.ENCODE,),
    "Generate": (Role.SAMPLE, Role.GENERATE),
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
        self.detector = Detector(bundle.calibration())
        self.providers = next(iter(sessions.values())).providers
        self._sessions = sessions
        self._max_batch = max_batch
        self._lanes = ThreadPoolExecutor(lanes, thread_name_prefix=f"lane-{self.manifest.name}")
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
        """Whether the bundle has a graph for `Score`, `Classify`, `Encode` or `Generate`."""
        return any(role in self._sessions for role in _METHODS[method])

    async def score(self, x: Pixels, alpha: float, *, surprise: bool = False) -> Scores:
        """How plausible pictures are.

        Args:
            x: uint8 (n, c, h, w), levels below the model's.
            alpha: accepted rate of false rejections, promisable by the calibration.
            surprise: whether to give the per-pixel map.
        """
        outputs = ["log_px", "statistics"] + ["surprise"] * surprise
        arrays = await self._run(Role.DENSITY, {"x": x}, outputs)
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
        scores, log_pxy = await asyncio.gather(self.score(x, alpha), self._log_pxy(x))
        temperature = self.manifest.calibration.temperature
        prior = self.manifest.priors if priors is None else priors
        posterior = bayes.posterior(log_pxy, prior, temperature)
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
        if label is None:
            joint = bayes.posterior(await self._log_pxy(x), self.manifest.priors)
            label = joint.argmax(1).astype(np.int64)
        arrays = await self._run(Role.ENCODE, {"x": x, "y": label}, ["mean", "log_variance"])
        return Features(
            mean=_finite(arrays["mean"], np.float32),
            log_variance=_finite(arrays["log_variance"], np.float32),
            label=label,
            model_version=self.manifest.version,
        )

    async def generate(
        self,
        label: int | None,
        count: int,
        seed: int,
        *,
        first_index: int = 0,
        temperature: float = 1.0,
        chunk: int = 64,
    ) -> AsyncGenerator[Draws, None]:
        """Pictures drawn from the model, in chunks; the next is drawn while one is consumed.

        Args:
            label: of all pictures; None draws each from the model's own priors.
            count: how many pictures.
            seed: where the random numbers come from.
            first_index: of the first picture; picture i depends on i, not on the chunking.
            temperature: multiplies the noise that levels are drawn with.
            chunk: pictures of one chunk.
        """
        role = self._generator(label)
        draw = partial(self._draw, role, label, seed=seed, temperature=temperature)
        starts = range(first_index, first_index + count, chunk)
        upcoming: asyncio.Task[Draws] | None = None
        try:
            for start in starts:
                current = upcoming or asyncio.create_task(draw(start, min(chunk, count)))
                left = first_index + count - (start + chunk)
                upcoming = (
                    asyncio.create_task(draw(start + chunk, min(chunk, left))) if left > 0 else None
                )
                yield await current
        finally:
            if upcoming is not None:
                upcoming.cancel()

    def close(self) -> None:
        """Lets running graphs end and frees the lanes."""
        self._lanes.shutdown(wait=True)

    def _generator(self, label: int | None) -> Role:
        sample = self._sessions.get(Role.SAMPLE)
        if sample is not None and (label is None or sample.spec.input("y") is not None):
            return Role.SAMPLE
        return Role.GENERATE

    async def _draw(
        self, role: Role, label: int | None, first: int, n: int, *, seed: int, temperature: float
    ) -> Draws:
        takes_label = self._session(role).spec.input("y") is not None
        labels = self._labels(label, seed, first, n) if takes_label else np.full(n, -1)
        parts = [
            self._submit(
                self._draw_rows,
                role,
                labels[at : at + self._max_batch],
                seed,
                first + at,
                temperature,
            )
            for at in range(0, n, self._max_batch)
        ]
        return Draws(
            images=np.concatenate(await asyncio.gather(*parts)),
            label=labels,
            first_index=first,
            seed=seed,
            model_version=self.manifest.version,
        )

    def _draw_rows(
        self, role: Role, labels: Labels, seed: int, first: int, temperature: float
    ) -> Pixels:
        spec = self._session(role).spec
        feeds: dict[str, Array] = {}
        for tensor in spec.inputs:
            shape = tensor.array_shape(len(labels))[1:]
            if tensor.name == "y":
                feeds["y"] = labels
            elif tensor.name == "eps":
                feeds["eps"] = noise.normal(seed, first, len(labels), shape)
            else:
                gumbel = noise.gumbel(seed, first, len(labels), shape)
                feeds["gumbel"] = gumbel if temperature == 1 else gumbel * np.float32(temperature)
        return self._session(role).run(feeds, ["x"])[0]

    def _labels(self, label: int | None, seed: int, first: int, n: int) -> Labels:
        """The labels of pictures to draw."""
        if label is not None:
            return np.full(n, label, dtype=np.int64)
        bounds = np.cumsum(self.manifest.priors)[:-1]
        drawn = np.searchsorted(bounds, noise.uniform(seed, first, n), side="right")
        return drawn.astype(np.int64)

    async def _log_pxy(self, x: Pixels) -> Doubles:
        feeds = {"x": x}
        spec = self._session(Role.CONDITIONAL).spec
        if (eps := spec.input("eps")) is not None:
            # The same noise for every picture: an answer depends on its picture alone,
            # and errors of the estimate are shared by the labels that it compares.
            table = noise.normal(0, 0, 1, eps.array_shape(1)[1:])
            feeds["eps"] = np.broadcast_to(table, eps.array_shape(len(x)))
        arrays = await self._run(Role.CONDITIONAL, feeds, ["log_pxy"])
        log_pxy: Doubles = _finite(arrays["log_pxy"])
        return log_pxy

    async def _run(
        self, role: Role, feeds: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """The graph's outputs over all rows, in runs of at most max_batch rows side by side."""
        session = self._session(role)
        n = len(next(iter(feeds.values())))
        if n == 0:
            shapes = {spec.name: spec for spec in session.spec.outputs}
            return {
                name: np.empty(shapes[name].array_shape(0), dtype=shapes[name].dtype)
                for name in outputs
            }
        parts = []
        for at in range(0, n, self._max_batch):
            rows = slice(at, at + self._max_batch)
            part = {name: np.ascontiguousarray(feed[rows]) for name, feed in feeds.items()}
            parts.append(self._submit(session.run, part, outputs))
        columns = zip(*await asyncio.gather(*parts), strict=True)
        return {name: np.concatenate(column) for name, column in zip(outputs, columns, strict=True)}

    def _submit(self, call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._lanes, partial(call, *args))

    def _session(self, role: Role) -> Session:
        if role not in self._sessions:
            raise NotAnswered(
                f"model {self.manifest.name} has no {role} graph, so it does not answer this"
            )
        return self._sessions[role]

    def _replay(self, golden: Mapping[str, Array]) -> None:
        for role, session in self._sessions.items():
            feeds = {spec.name: golden[f"{role}/{spec.name}"] for spec in session.spec.inputs}
            outputs = [spec.name for spec in session.spec.outputs]
            for name, got in zip(outputs, session.run(feeds, outputs), strict=True):
                if not agrees(got, golden[f"{role}/{name}"]):
                    raise BundleError(
                        f"bundle {self.manifest.name}@{self.manifest.version} does not give its "
                        f"golden {name} of the {role} graph on this machine"
                    )


def _finite(values: Array, dtype: type[Any] = np.float64) -> Any:
    """The values as that type.

    Raises:
        ServerFault: one is not a finite number; it must not leave the service.
    """
    if not np.all(np.isfinite(values)):
        raise ServerFault("the model gave a value that is not finite")
    return values.astype(dtype)
