"""What the engine, the client and the wire share: typed answers, and what may be asked for.

An answer consists of numpy arrays with one row per picture.
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

NAME_PATTERN = "[a-z0-9][a-z0-9_.-]{0,63}"  # of names of models and versions
VERSION_LABELS = ("stable", "canary")  # labels of versions, which no version may be called


class Verdict(IntEnum):
    """The decision about one picture; the numbers are those of the wire contract."""

    ACCEPTED = 1
    OUTLIER = 2
    AMBIGUOUS = 3


_ACCEPTED, _OUTLIER = np.int8(Verdict.ACCEPTED), np.int8(Verdict.OUTLIER)


def verdicts(outlier: Accepted, posterior: Doubles, min_posterior: float) -> Verdicts:
    """The verdicts on classified pictures, int8 (n,), values of `Verdict`.

    Args:
        outlier: bool (n,), whether p(x) rejects a picture; this takes precedence.
        posterior: float64 (n, labels), p(y|x).
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
    """The rule that assigns labels; the numbers are those of the wire contract."""

    GENERATIVE = 1
    DISCRIMINATIVE = 2


@dataclass(frozen=True, slots=True)
class Scores:
    """How plausible pictures are.

    Attributes:
        log_px: float64 (n,), log p(x) in nats.
        bits_per_dim: float64 (n,), -log2 p(x) per pixel and channel.
        unusualness: float64 (n,), the score that is ranked: about standard normal for
            in-distribution pictures, and unbounded where p-values saturate.
        p_value: float64 (n,), the calibrated p-value, in (0, 1].
        verdict: int8 (n,), values of `Verdict`: OUTLIER where p_value <= alpha.
        alpha: the rate of false rejections at which the verdicts were given.
        surprise: float32 (n, c, h, w), -log p of every pixel in nats, which sums to -log p(x);
            None if it was not requested.
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
    """`Scores` as an engine returns them: one table, whose columns are views.

    Attributes:
        rows: float64 (n, 4): `log_px`, `bits_per_dim`, `unusualness` and `p_value` of each picture.
        alpha: the rate of false rejections at which the verdicts are given.
        surprise: float32 (n, c, h, w), -log p of every pixel in nats; None if not requested.
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
        """Float64 (n,), -log2 p(x) per pixel and channel."""
        return self.rows[:, 1]

    @property
    def unusualness(self) -> Doubles:
        """Float64 (n,), the score that is ranked."""
        return self.rows[:, 2]

    @property
    def p_value(self) -> Doubles:
        """Float64 (n,), the calibrated p-value, in (0, 1]."""
        return self.rows[:, 3]

    @property
    def verdict(self) -> Verdicts:
        """Int8 (n,), values of `Verdict`: OUTLIER where p_value <= alpha."""
        return np.where(self.p_value <= self.alpha, _OUTLIER, _ACCEPTED)

    def scores(self) -> Scores:
        """The same answer, column by column."""
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
            on it; empty (n, 0) if that model was not asked.
        posterior: float64 (n, labels), p(y|x); rows sum to 1.
        label: int64 (n,), the most probable label, whatever the verdict.
        p_value: float64 (n,), the p-value of the picture under p(x), in (0, 1].
        label_p_values: float64 (n, labels), the p-values of the picture under each label. The
            labels whose p-value is above alpha form a set that contains the true label with
            probability 1 - alpha, whatever that label is. Empty (n, 0) if `log_pxy` is.
        verdict: int8 (n,), values of `Verdict`.
        alpha: the rate of false rejections at which the verdicts were given.
        model_version: the version that gave the answer.
        composed: float64 (n, labels), log p(x|y) = log p(y|x) + log p(x) - log p(y) in nats, by
            the discriminative model; empty (n, 0) if that model was not asked.
        rule: the rule that the posterior and the label come from.
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
        """Which labels are plausible, bool (n, labels): several for an ambiguous picture.

        `verdict` tells whether a picture is an outlier; an empty set does not. If alpha is finer
        than the calibration pictures of a label can resolve, every set contains that label.
        """
        return self.label_p_values > self.alpha


@dataclass(frozen=True, slots=True)
class Features:
    """Latent features.

    Attributes:
        mean: float32 (n, z), the means of q(z|x, y).
        log_variance: float32 (n, z), the natural logarithms of its variances; None for a
            deterministic model.
        label: int64 (n,), the labels under which the features were computed; -1 if they do not
            depend on a label.
        model_version: the version that gave the answer.
    """

    mean: Floats
    log_variance: Floats | None
    label: Labels
    model_version: str


@dataclass(frozen=True, slots=True)
class Redrawings:
    """Decoded features; the leading axes are (n,) for Decode, else (n, points).

    Attributes:
        mean: float32 (..., c, h, w), the mean of every pixel, with levels scaled to [0, 1]; for
            two levels, the probability of level 1.
        deviation: float32 (..., c, h, w), the standard deviation of every pixel, scaled
            likewise; None for a deterministic model.
        drawn: uint8 (..., draws, c, h, w), the levels of the draws.
        seed: the seed of the draws.
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
        position: float64 (n,), the position of each picture's own features along the direction,
            in the unit of its points: the mean over q(z|x).
        spread: float64 (n,), the standard deviation of the position; None for a deterministic
            model.
        label: int64 (n,), the labels under which the features were computed; -1 for none.
    """

    position: Doubles
    spread: Doubles | None
    label: Labels


@dataclass(frozen=True, slots=True)
class Direction:
    """A direction in the space of latent features, along which one property changes.

    Attributes:
        name: the name of an attribute, or `label ` and the name of a label.
        kind: `attribute`, where a point of 1 is one standard deviation within a label; or
            `label`, where it is the way from the mean of all other labels to that label's mean.
    """

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Draws:
    """Pictures drawn from the model, in the order of their index.

    Attributes:
        images: uint8 (n, c, h, w), levels.
        label: int64 (n,), the labels; -1 if the model draws from p(x) without a label.
        first_index: the index of the first picture.
        seed: the seed of the draws.
        draws: int64 (n,), how often each picture was drawn until it passed.
        accepted: bool (n,), whether the last draw of each picture passed the self-check, or was
            kept by acceptance; true if neither was requested.
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
    """The limits that a server enforces on requests.

    Attributes:
        images_per_request: most pictures in one request.
        images_per_generation: most pictures that one request may have drawn or redrawn.
        images_per_chunk: most pictures in one chunk of the stream of Generate or Complete.
        request_bytes: most bytes of one request message.
        response_bytes: most bytes of the pictures, or maps, in one answer message.
        queued_images: most pictures that may wait for one of a model's graphs.
        queued_bytes: most bytes that may wait for one of a model's graphs.
        client_images_per_second: pictures per second that one client may ask for; 0 for no limit.
        client_images_at_once: pictures that one client may ask for at once after a pause.
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
    """The description of one model version.

    Attributes:
        name: the model's name.
        version: its version.
        description: one sentence on what it was trained on.
        shape: (c, h, w) of a picture.
        levels: number of levels of a pixel: every value lies in [0, levels).
        labels: the labels' names in the model's order.
        priors: p(y) in the same order.
        methods: the full names of the RPCs that the model answers, sorted.
        density_kind: the kind of Score's log-likelihoods: exact, elbo or iwae; None if the model
            does not answer Score.
        conditional_kind: the kind of Classify's log-likelihoods; None if the model does not
            answer Classify.
        importance_samples: number of samples of each of Classify's bounds; 0 if exact.
        latent_dimensions: number of Encode's features; 0 if there are none.
        calibration_size: number of in-distribution pictures that p-values are ranked against.
        finest_alpha: the smallest alpha that the calibration can guarantee.
        default_alpha: the alpha of requests that name none.
        posterior_temperature: divides log-likelihoods before Bayes' rule is applied.
        execution_providers: the providers that run the model, in order of preference.
        limits: the limits on requests.
        digest: SHA-256 of the bundle's manifest, hexadecimal.
        version_labels: those of `stable` and `canary` that name this version.
        discriminative: whether the model has p(y|x) itself.
        directions: the directions that Traverse accepts.
        deterministic: whether features have no variance and are decoded to pictures without a
            distribution, so that nothing can be drawn from them.
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
    """The state of a version of a model."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of a model, or a bundle that was to become one.

    Attributes:
        state: the state of the version.
        folder: the folder of its bundle, as the server sees it.
        name: the name of the model; empty if it cannot be read from the bundle.
        version: the name of the version; empty if it cannot be read from the bundle.
        digest: SHA-256 of the bundle's manifest, hexadecimal.
        labels: the labels that name this version.
        is_default: whether this version answers requests that name no version.
        reason: why the bundle was refused, in one word.
        message: why the bundle was refused, in one sentence; a library's own message is only in
            the server's log.
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
        images: uint8 (n, completions, c, h, w), levels; fixed pixels are unchanged.
        seed: the seed of the draws.
        model_version: the version that drew them.
    """

    images: Pixels
    seed: int
    model_version: str


MAX_TEMPERATURE = 2.0  # highest temperature of a draw
# How often a picture is drawn at most with a self-check: by default, and on request.
DEFAULT_MAX_DRAWS, LARGEST_MAX_DRAWS = 16, 100


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """A check of every draw; a picture that does not pass is drawn again.

    Attributes:
        alpha: a draw is rejected if its p-value is at most alpha, as in Score.
        max_draws: most draws of one picture, including the first.
    """

    alpha: float
    max_draws: int


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Draws from p(x) that are kept with probability p(y|x) of the label.

    Attributes:
        max_draws: most draws of one picture, including the first.
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
