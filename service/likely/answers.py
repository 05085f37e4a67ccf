"""What engine, client and wire have in common: typed answers, and what may be asked for.

An answer is of numpy arrays, one row a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Verdicts = npt.NDArray[np.int8]
Accepted = npt.NDArray[np.bool_]

VERSION_LABELS = ("stable", "canary")  # which name versions, and are none themselves


class Verdict(IntEnum):
    """What is decided about one picture; the numbers are those of the wire contract."""

    ACCEPTED = 1
    OUTLIER = 2
    AMBIGUOUS = 3


_ACCEPTED, _OUTLIER = np.int8(Verdict.ACCEPTED), np.int8(Verdict.OUTLIER)


def verdicts(outlier: Accepted, posterior: Doubles, min_posterior: float) -> Verdicts:
    """What is decided about classified pictures, int8 (n,) of `Verdict`.

    Args:
        outlier: bool (n,), rejected by p(x), which goes before all else.
        posterior: (n, labels).
        min_posterior: a picture whose largest posterior is smaller is ambiguous.
    """
    unsure = posterior.max(1, initial=0.0) < min_posterior
    verdict = np.where(unsure, Verdict.AMBIGUOUS, Verdict.ACCEPTED)
    return np.where(outlier, Verdict.OUTLIER, verdict).astype(np.int8)


class Guarantee(IntEnum):
    """What a rate of false rejections holds for; the numbers are those of the wire contract."""

    MARGINAL = 1
    PAC = 2


class LabelRule(IntEnum):
    """What a label is assigned by; the numbers are those of the wire contract."""

    GENERATIVE = 1
    DISCRIMINATIVE = 2


@dataclass(frozen=True, slots=True)
class Scores:
    """How plausible pictures are.

    Attributes:
        log_px: float64 (n,), log p(x) in nats.
        bits_per_dim: float64 (n,), -log2 p(x) a pixel and channel.
        unusualness: float64 (n,), the score that is ranked: about standard normal for
            in-distribution pictures, and unbounded where p-values saturate.
        p_value: float64 (n,), calibrated, in (0, 1].
        verdict: int8 (n,) of `Verdict`: OUTLIER where p_value <= alpha.
        alpha: the rate of false rejections that the verdicts were given at.
        surprise: float32 (n, c, h, w) in nats, summing to -log p(x), if asked for.
        model_version: the version that gave the answer.
    """

    log_px: Doubles
    bits_per_dim: Doubles
    unusualness: Doubles
    p_value: Doubles
    verdict: Verdicts
    alpha: float
    surprise: Floats | None
    model_version: str


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """`Scores` as an engine gives them: rows, whose columns are cut out where they are asked for.

    Attributes:
        rows: float64 (n, 4): `log_px`, `bits_per_dim`, `unusualness` and `p_value` of each picture.
        alpha: the rate of false rejections that the verdicts are given at.
        surprise: float32 (n, c, h, w) in nats, if asked for.
        model_version: the version that gave the answer.
    """

    rows: Doubles
    alpha: float
    surprise: Floats | None
    model_version: str

    @property
    def log_px(self) -> Doubles:
        """Float64 (n,), log p(x) in nats."""
        return self.rows[:, 0]

    @property
    def bits_per_dim(self) -> Doubles:
        """Float64 (n,), -log2 p(x) a pixel and channel."""
        return self.rows[:, 1]

    @property
    def unusualness(self) -> Doubles:
        """Float64 (n,), the score that is ranked."""
        return self.rows[:, 2]

    @property
    def p_value(self) -> Doubles:
        """Float64 (n,), calibrated, in (0, 1]."""
        return self.rows[:, 3]

    @property
    def verdict(self) -> Verdicts:
        """Int8 (n,) of `Verdict`: OUTLIER where p_value <= alpha."""
        return np.where(self.p_value <= self.alpha, _OUTLIER, _ACCEPTED)

    def scores(self) -> Scores:
        """The same, column by column."""
        return Scores(
            log_px=self.log_px,
            bits_per_dim=self.bits_per_dim,
            unusualness=self.unusualness,
            p_value=self.p_value,
            verdict=self.verdict,
            alpha=self.alpha,
            surprise=self.surprise,
            model_version=self.model_version,
        )


@dataclass(frozen=True, slots=True)
class Classifications:
    """Which label is assigned, if any.

    Attributes:
        log_pxy: float64 (n, labels), the conditional model's log p(x|y) in nats, or a bound
            on it; empty (n, 0) where it was not asked.
        posterior: float64 (n, labels), rows sum to 1.
        label: int64 (n,), the most probable label, whatever the verdict.
        p_value: float64 (n,), of the picture under p(x), in (0, 1].
        label_p_values: float64 (n, labels), of the picture under each label: those above
            alpha make a set that holds the true label with probability 1 - alpha, for every
            label; empty (n, 0) where `log_pxy` is.
        verdict: int8 (n,) of `Verdict`.
        alpha: the rate of false rejections that the verdicts were given at.
        model_version: the version that gave the answer.
        composed: float64 (n, labels), log p(y|x) + log p(x) - log p(y) in nats, of the
            discriminative model; empty (n, 0) where it was not asked.
        rule: what the posterior and the label are by.
    """

    log_pxy: Doubles
    posterior: Doubles
    label: Labels
    p_value: Doubles
    label_p_values: Doubles
    verdict: Verdicts
    alpha: float
    model_version: str
    composed: Doubles
    rule: LabelRule

    @property
    def label_sets(self) -> Accepted:
        """Which labels are plausible, bool (n, labels): several if unsure.

        Whether it is an outlier, `verdict` tells, not whether this is empty. At an alpha finer
        than a label's own calibration can tell, always that label too.
        """
        return self.label_p_values > self.alpha


@dataclass(frozen=True, slots=True)
class Features:
    """Latent features.

    Attributes:
        mean: float32 (n, z), of q(z|x, y).
        log_variance: float32 (n, z), natural logarithm; None of a deterministic model.
        label: int64 (n,), the labels that the features were computed under; -1 where they
            depend on none.
        model_version: the version that gave the answer.
    """

    mean: Floats
    log_variance: Floats | None
    label: Labels
    model_version: str


@dataclass(frozen=True, slots=True)
class Redrawings:
    """What features stand for; leading axes are (n,) of Decode, else (n, points).

    Attributes:
        mean: float32 (..., c, h, w), of every pixel, levels scaled to [0, 1]; for two levels
            the probability of level 1.
        deviation: float32 (..., c, h, w), likewise; None of a deterministic model.
        drawn: uint8 (..., draws, c, h, w) of levels.
        seed: what they were drawn with.
        model_version: the version that gave the answer.
    """

    mean: Floats
    deviation: Floats | None
    drawn: Pixels
    seed: int
    model_version: str


@dataclass(frozen=True, slots=True)
class Traversal(Redrawings):
    """Pictures redrawn along a direction.

    Attributes:
        position: float64 (n,), where the pictures' own features lie along it, in the unit of
            its points: the mean over q(z|x).
        spread: float64 (n,), the standard deviation of that; None of a deterministic model.
        label: int64 (n,), the labels that the features were computed under; -1 for none.
    """

    position: Doubles
    spread: Doubles | None
    label: Labels


@dataclass(frozen=True, slots=True)
class Direction:
    """A way through the latent features, along which one thing changes.

    Attributes:
        name: of an attribute, or `label ` and a label's name.
        kind: of an attribute a point of 1 is one standard deviation within a label; of a
            label it is the way from the mean of all others to its own.
    """

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Draws:
    """Pictures drawn from the model, in the order of their index.

    Attributes:
        images: uint8 (n, c, h, w) of levels.
        label: int64 (n,); -1 where the model draws from p(x) without one.
        first_index: index of the first picture.
        seed: what they were drawn with.
        draws: int64 (n,), how often each picture was drawn until it passed.
        accepted: bool (n,), whether its last draw passed the self-check, or was kept by
            acceptance; true without either.
        model_version: the version that drew them.
    """

    images: Pixels
    label: Labels
    first_index: int
    seed: int
    draws: Labels
    accepted: Accepted
    model_version: str


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that a server holds requests to.

    Attributes:
        images_per_request: pictures in one request that brings some.
        images_per_generation: pictures that one request may have drawn or redrawn.
        images_per_chunk: pictures in one chunk of Generate's or Complete's stream.
        request_bytes: bytes of one request message.
        response_bytes: bytes of the pictures, or maps, in one answer message.
        queued_images: pictures that may wait for one of a model's graphs.
        queued_bytes: bytes of what may wait for one of a model's graphs.
        client_images_per_second: that one client may ask for; 0 for no limit.
        client_images_at_once: that one client may ask for after a pause.
    """

    images_per_request: int
    images_per_generation: int
    images_per_chunk: int
    request_bytes: int
    response_bytes: int = 64 << 20
    queued_images: int = 4096
    queued_bytes: int = 64 << 20
    client_images_per_second: float = 0.0
    client_images_at_once: int = 1024


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What one model version takes, gives and promises.

    Attributes:
        name: the model's name.
        version: its version.
        description: one sentence on what it was trained on.
        shape: (c, h, w) of a picture.
        levels: number of levels of a pixel: every value lies in [0, levels).
        labels: the labels' names in the model's order.
        priors: p(y) in the same order.
        methods: the full RPC names that the model answers, sorted.
        density_kind: what Score's log-likelihoods are: exact, elbo or iwae.
        conditional_kind: what Classify's are; None where it is not answered.
        importance_samples: behind each of Classify's bounds; 0 where exact.
        latent_dimensions: of Encode's features; 0 where there are none.
        calibration_size: in-distribution pictures that p-values are ranked against.
        finest_alpha: the smallest alpha that the calibration can promise.
        default_alpha: used where a request names none.
        posterior_temperature: applied to log-likelihoods before Bayes' rule.
        execution_providers: what really runs the model, in order of preference.
        limits: what requests are held to.
        digest: SHA-256 of the bundle's manifest, hexadecimal.
        version_labels: those of `stable` and `canary` that name this version.
        discriminative: whether it has p(y|x) itself.
        directions: that Traverse takes.
        deterministic: whether features are points without a variance, which stand for
            pictures without a distribution: nothing can be drawn.
    """

    name: str
    version: str
    description: str
    shape: tuple[int, int, int]
    levels: int
    labels: tuple[str, ...]
    priors: tuple[float, ...]
    methods: tuple[str, ...]
    density_kind: str | None
    conditional_kind: str | None
    importance_samples: int
    latent_dimensions: int
    calibration_size: int
    finest_alpha: float
    default_alpha: float
    posterior_temperature: float
    execution_providers: tuple[str, ...]
    limits: Limits
    digest: str
    version_labels: tuple[str, ...] = ()
    discriminative: bool = False
    directions: tuple[Direction, ...] = ()
    deterministic: bool = False


class VersionState(StrEnum):
    """How far a model's version has come."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of a model, or a bundle that was to become one.

    Attributes:
        state: how far it has come.
        folder: of its bundle, as the server sees it.
        name: of the model; empty where the bundle does not tell.
        version: of the model; empty where the bundle does not tell.
        digest: SHA-256 of the bundle's manifest, hexadecimal.
        labels: those that name it.
        is_default: whether it answers requests that name no version.
        reason: why its bundle was refused, in one word.
        message: the same in one sentence; what a library said of it is in the server's log.
    """

    state: VersionState
    folder: Path
    name: str = ""
    version: str = ""
    digest: str = ""
    labels: tuple[str, ...] = ()
    is_default: bool = False
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Completions:
    """Pictures whose open pixels were drawn.

    Attributes:
        images: uint8 (n, completions, c, h, w) of levels; fixed pixels unchanged.
        seed: what they were drawn with.
        model_version: the version that drew them.
    """

    images: Pixels
    seed: int
    model_version: str


HOTTEST = 2.0  # temperature of a draw
USUAL_DRAWS, MOST_DRAWS = 16, 100  # of a picture that checks itself


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What a draw must pass; one that does not is drawn again.

    Attributes:
        alpha: a draw whose p-value is at most alpha is rejected, as Score would.
        max_draws: draws of one picture, the first included.
    """

    alpha: float
    max_draws: int


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Drawing from p(x) and keeping what p(y|x) makes of the label.

    Attributes:
        max_draws: draws of one picture, the first included.
    """

    max_draws: int


A = TypeVar("A", Scores, Classifications, Features, Draws, Redrawings, Traversal)


def joined(parts: Sequence[A]) -> A:
    """Joins the answers for consecutive pictures into one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in (field.name for field in fields(first))
        if isinstance(getattr(first, name), np.ndarray)
    }
    return replace(first, **columns)
