"""Validation of requests: every field is checked against the model and the server's limits.

Each check returns the checked value, or raises InvalidInput with the field's path, the
given value and what is allowed.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from likely import bayes, codec
from likely.answers import (
    DEFAULT_MAX_DRAWS,
    LARGEST_MAX_DRAWS,
    MAX_TEMPERATURE,
    Acceptance,
    Accepted,
    Doubles,
    Floats,
    Guarantee,
    LabelRule,
    Labels,
    Limits,
    Pixels,
    SelfCheck,
)
from likely.errors import InvalidInput
from likely.latent import Drawing
from likely.noise import SEED_LIMIT
from likely.v1 import generation_pb2, images_pb2, latent_pb2, scoring_pb2

if TYPE_CHECKING:
    from likely.bundle import Manifest
    from likely.engine import Engine
    from likely.outliers import Detector

_HIGHEST = np.iinfo(np.uint8).max
USUAL_ATTEMPTS, MOST_ATTEMPTS = 100, 1000  # default and limit of draws until p(y|x) keeps one
MOST_PROPOSALS = 256
LARGEST_FEATURE = 1e4  # with larger features, a decoder's sums could overflow
MAX_POINT = 100.0  # largest distance along a direction, in its units
T = TypeVar("T")
GenerationRequest = generation_pb2.GenerateRequest | generation_pb2.CompleteRequest
PathRequest = latent_pb2.TraverseRequest | latent_pb2.InterpolateRequest
RedrawRequest = latent_pb2.DecodeRequest | PathRequest
DrawRequest = GenerationRequest | RedrawRequest
_GUARANTEES: dict[int, Guarantee] = {0: Guarantee.MARGINAL, **{int(g): g for g in Guarantee}}
_RULES: dict[int, LabelRule] = {0: LabelRule.GENERATIVE, **{int(r): r for r in LabelRule}}
_AXES = ("pictures", "channels", "rows", "columns")


class Pictured(Protocol):
    """A request that contains pictures."""

    @property
    def images(self) -> images_pb2.Images:
        """The pictures."""


def pixels(
    request: Pictured, manifest: Manifest, limits: Limits, known: Accepted | None = None
) -> Pixels:
    """The request's pictures, uint8 (n, c, h, w), every byte in [0, levels).

    If `known` is given, levels where it is false may have any value, and become 0.
    """
    geometry(request, manifest, limits)
    x = codec.pixels(request.images)
    if known is not None:
        x = x * known
    if manifest.levels <= _HIGHEST:
        codec.check_levels(x, manifest.levels, "images.data")
    return x


def geometry(request: Pictured, manifest: Manifest, limits: Limits) -> None:
    """Checks that the claimed shape is the model's and that there are not too many pictures."""
    n, *claimed = codec.shape(request.images)
    if tuple(claimed) != manifest.shape:
        axis, given, asked = next(
            (axis, given, asked)
            for axis, given, asked in zip((1, 2, 3), claimed, manifest.shape, strict=True)
            if given != asked
        )
        raise InvalidInput(
            f"images.shape[{axis}]", f"{given} {_AXES[axis]}; the model takes {asked}"
        )
    if n > limits.images_per_request:
        raise InvalidInput(
            "images.shape[0]",
            f"{n} pictures; one request brings at most {limits.images_per_request}",
        )


def surprise(request: scoring_pb2.ScoreRequest, manifest: Manifest, limits: Limits) -> bool:
    """Whether surprise maps are requested; checks that the answer stays within the limits."""
    if not request.surprise:
        return False
    nbytes = 4 * codec.shape(request.images)[0] * manifest.dimensions
    if nbytes > limits.response_bytes:
        raise InvalidInput(
            "surprise",
            f"the maps would have {nbytes} bytes; one answer has at most {limits.response_bytes}",
        )
    return True


def chunk_size(manifest: Manifest, limits: Limits) -> int:
    """Number of drawn pictures per chunk of an answer, at least 1."""
    return max(1, min(limits.images_per_chunk, limits.response_bytes // manifest.dimensions))


def alpha(
    request: scoring_pb2.ScoreRequest | scoring_pb2.ClassifyRequest | generation_pb2.SelfCheck,
    detector: Detector,
    default: float,
) -> float:
    """The request's alpha or the default, in [finest_alpha, 1) for its guarantee."""
    asked = request.alpha if request.HasField("alpha") else default
    if isinstance(request, generation_pb2.SelfCheck):
        return detector.check_alpha(asked)
    return detector.check_alpha(asked, guarantee(request))


def guarantee(request: scoring_pb2.ScoreRequest | scoring_pb2.ClassifyRequest) -> Guarantee:
    """The guarantee that the request's alpha stands for."""
    member = _GUARANTEES.get(request.guarantee)
    if member is None:
        raise InvalidInput("guarantee", f"{request.guarantee} is not the number of a guarantee")
    return member


def rule(request: scoring_pb2.ClassifyRequest) -> LabelRule:
    """The rule that assigns labels."""
    member = _RULES.get(request.rule)
    if member is None:
        raise InvalidInput("rule", f"{request.rule} is not the number of a rule")
    return member


def priors(request: scoring_pb2.ClassifyRequest, manifest: Manifest) -> Doubles | None:
    """The request's priors, float64 (labels,); None if it uses the model's."""
    return bayes.check_priors(request.priors, len(manifest.labels)) if request.priors else None


def min_posterior(request: scoring_pb2.ClassifyRequest) -> float:
    """The smallest posterior at which a label is assigned, in [0, 1)."""
    if not 0 <= request.min_posterior < 1:
        raise InvalidInput("min_posterior", f"{request.min_posterior:g} is not in [0, 1)")
    return request.min_posterior


def labels(
    request: scoring_pb2.EncodeRequest | RedrawRequest,
    manifest: Manifest,
    n: int,
    field: str = "labels",
) -> Labels | None:
    """The label of each of n pictures, int64 (n,); None if the request names none."""
    indices: Sequence[int] = getattr(request, field)
    if not indices:
        return None
    if len(indices) != n:
        raise InvalidInput(field, f"{len(indices)} labels for {n} pictures; one each, or none")
    for i, label in enumerate(indices):
        _check_label(f"{field}[{i}]", label, manifest)
    return np.array(indices, dtype=np.int64)


def label(request: GenerationRequest, manifest: Manifest) -> int | None:
    """The label that all pictures should have; None if the request names none."""
    if not request.HasField("label"):
        return None
    return _check_label("label", request.label, manifest)


def count(request: generation_pb2.GenerateRequest, limits: Limits) -> int:
    """Number of pictures to draw, from 1 to the limit."""
    return _check_range("count", request.count, limits.images_per_generation)


def first_index(request: DrawRequest, count: int) -> int:
    """The first picture's index, which is not negative; the last one's is below 2**63."""
    if request.first_index < 0:
        raise InvalidInput("first_index", f"{request.first_index} is negative")
    if request.first_index + count > SEED_LIMIT:
        raise InvalidInput(
            "first_index", f"{request.first_index} leaves no room for {count} pictures below 2**63"
        )
    return request.first_index


def seed(request: DrawRequest) -> int:
    """The request's seed, or a random one."""
    return request.seed if request.HasField("seed") else secrets.randbelow(SEED_LIMIT)


def temperature(request: DrawRequest) -> float:
    """The factor of the noise, in [0, 2]; 1 if the request names none."""
    if not request.HasField("temperature"):
        return 1.0
    if not (math.isfinite(request.temperature) and 0 <= request.temperature <= MAX_TEMPERATURE):
        raise InvalidInput(
            "temperature", f"{request.temperature:g} is not in [0, {MAX_TEMPERATURE:g}]"
        )
    return request.temperature


def self_check(
    request: generation_pb2.GenerateRequest, engine: Engine, default_alpha: float
) -> SelfCheck | None:
    """The self-check that draws must pass; None if the request asks for none."""
    if not request.HasField("self_check"):
        return None
    asked = request.self_check
    draws = asked.max_draws if asked.HasField("max_draws") else DEFAULT_MAX_DRAWS
    return SelfCheck(
        _check_nested("self_check", alpha, asked, engine.detector, default_alpha),
        _check_range("self_check.max_draws", draws, LARGEST_MAX_DRAWS),
    )


def acceptance(request: generation_pb2.GenerateRequest) -> Acceptance | None:
    """How draws of p(x) are accepted for a label; None if the model should draw with the label."""
    if not request.HasField("acceptance"):
        return None
    if request.HasField("self_check"):
        raise InvalidInput("acceptance", "self_check is set as well; only one of them is allowed")
    asked = request.acceptance
    draws = asked.max_draws if asked.HasField("max_draws") else USUAL_ATTEMPTS
    return Acceptance(_check_range("acceptance.max_draws", draws, MOST_ATTEMPTS))


def mask(request: generation_pb2.CompleteRequest) -> Accepted:
    """Which of the pictures' levels are fixed, bool, in their claimed shape (n, c, h, w)."""
    claimed, data = codec.shape(request.images), request.mask  # once: each access copies the bytes
    expected = math.prod(claimed)
    if len(data) != expected:
        raise InvalidInput("mask", f"{len(data)} bytes; expected one for each of {expected} levels")
    known = np.frombuffer(data, dtype=np.uint8)
    if known.size and known.max() > 1:
        first = int(np.argmax(known > 1))
        raise InvalidInput("mask", f"byte {first} is {known[first]}; expected 0 or 1")
    return known.reshape(claimed).astype(np.bool_)


def completions(
    request: generation_pb2.CompleteRequest, manifest: Manifest, limits: Limits
) -> tuple[int, int]:
    """The number of completions per picture, and of proposals per completion.

    Their product with the number of pictures must be within the limit of one request.
    """
    n = max(1, codec.shape(request.images)[0])
    if n > limits.images_per_generation:
        raise InvalidInput(
            "images.shape[0]",
            f"{n} pictures; one request draws at most {limits.images_per_generation}",
        )
    count = request.completions if request.HasField("completions") else 1
    _check_range("completions", count, limits.images_per_generation // n)
    proposals = request.proposals if request.HasField("proposals") else 1
    if proposals > 1 and (request.HasField("label") or request.HasField("temperature")):
        raise InvalidInput("proposals", f"{proposals} need an absent label and temperature")
    if proposals > 1 and not manifest.samples_density:
        problem = f"{proposals} need a model that can compute log p(x) of its draws"
        raise InvalidInput("proposals", problem)
    _check_range(
        "proposals", proposals, min(MOST_PROPOSALS, limits.images_per_generation // (n * count))
    )
    return count, proposals


@dataclass(frozen=True, slots=True)
class _Second:
    """A request's second pictures, in place of the first, to be checked in the same way."""

    images: images_pb2.Images


def others(
    request: latent_pb2.InterpolateRequest, manifest: Manifest, limits: Limits, n: int
) -> Pixels:
    """The request's second pictures, uint8 (n, c, h, w), as many as the first."""
    try:
        x = pixels(_Second(request.others), manifest, limits)
    except InvalidInput as error:
        field = error.field.replace("images", "others", 1)
        raise InvalidInput(field, error.description) from None
    if len(x) != n:
        raise InvalidInput("others.shape[0]", f"{len(x)} pictures for {n} images; expected as many")
    return x


def features(request: latent_pb2.DecodeRequest, z: int) -> Floats:
    """The request's features, float32 (n, z), finite and at most LARGEST_FEATURE in size."""
    data = request.features  # once: each access copies the bytes
    if len(data) % (4 * z):
        raise InvalidInput("features", f"{len(data)} bytes; expected rows of {z} 32-bit floats")
    latents = codec.latents(data, z)
    bad = ~(np.abs(latents) <= LARGEST_FEATURE)  # NaN is not
    if bad.any():
        i, k = np.unravel_index(int(bad.argmax()), bad.shape)
        raise InvalidInput(
            "features",
            f"{latents[i, k]:g} at row {i}, dimension {k} is not in "
            f"[-{LARGEST_FEATURE:g}, {LARGEST_FEATURE:g}]",
        )
    return latents


def direction(request: latent_pb2.TraverseRequest, names: Collection[str]) -> str:
    """The requested direction, which is one of the model's."""
    if request.direction not in names:
        asked = repr(request.direction[:80])
        raise InvalidInput("direction", f"{asked} is none of {', '.join(names)}")
    return request.direction


def points(request: PathRequest, limits: Limits) -> Doubles:
    """The points at which to redraw, float64 (points,), at least one."""
    between = isinstance(request, latent_pb2.InterpolateRequest)
    low, high = (0.0, 1.0) if between else (-MAX_POINT, MAX_POINT)
    if not request.points:
        raise InvalidInput("points", "none are named; expected at least one")
    if len(request.points) > limits.images_per_generation:
        raise InvalidInput(
            "points", f"{len(request.points)} are more than {limits.images_per_generation}"
        )
    for i, point in enumerate(request.points):
        if not low <= point <= high:  # NaN is not
            raise InvalidInput(f"points[{i}]", f"{point:g} is not in [{low:g}, {high:g}]")
    return np.array(request.points, dtype=np.float64)


def drawing(
    request: RedrawRequest, n: int, rows: int, manifest: Manifest, limits: Limits
) -> Drawing:
    """How pictures are drawn from features; checks that the answer stays within the limits.

    Args:
        request: the request.
        n: number of pictures, or rows of features, in the request; each has its own noise index.
        rows: number of rows to redraw.
        manifest: the model's manifest.
        limits: the server's limits.
    """
    most = limits.images_per_generation
    if not 0 <= request.draws <= most:
        raise InvalidInput("draws", f"{request.draws} is not in 0 to {most}")
    repeats = max(1, request.draws)
    brought = "features" if isinstance(request, latent_pb2.DecodeRequest) else "images"
    field = "draws" if request.draws > 1 else "points" if rows > n else brought
    if rows * repeats > most:
        raise InvalidInput(
            field, f"{rows * repeats} pictures would be redrawn; at most {most} are in one request"
        )
    nbytes = rows * manifest.dimensions * (8 + request.draws)
    if nbytes > limits.response_bytes:
        raise InvalidInput(
            field,
            f"the answer would have {nbytes} bytes; one has at most {limits.response_bytes}",
        )
    return Drawing(
        count=request.draws,
        seed=seed(request),
        first_index=first_index(request, n),
        temperature=temperature(request),
    )


def _check_range(field: str, value: int, most: int) -> int:
    if not 1 <= value <= most:
        raise InvalidInput(field, f"{value} is not in 1 to {most}")
    return value


def _check_nested(field: str, check: Callable[..., T], *arguments: Any) -> T:
    try:
        return check(*arguments)
    except InvalidInput as error:
        raise InvalidInput(f"{field}.{error.field}", error.description) from None


def _check_label(field: str, label: int, manifest: Manifest) -> int:
    n = len(manifest.labels)
    if n == 0:
        raise InvalidInput(field, "the model has no labels")
    if not 0 <= label < n:
        names = ", ".join(entry.name for entry in manifest.labels[:10])
        more = ", …" if n > 10 else ""
        raise InvalidInput(field, f"{label} is not in 0 to {n - 1}: {names}{more}")
    return label
