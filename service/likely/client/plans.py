"""The requests of each question and the order in which to send them; shared by both clients.

A plan is a generator: it yields requests, receives their answers by `send`, and returns the
result for the caller. It does no input or output: the clients send its requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from likely import codec
from likely.answers import (
    A,
    Classifications,
    Completions,
    Features,
    Guarantee,
    LabelRule,
    ModelInfo,
    Pixels,
    Redrawings,
    Scores,
    Traversal,
    joined,
)
from likely.client.catalogue import Catalogue, LabelResolver, Plan, Request
from likely.client.values import (
    Label,
    array,
    build_message,
    enum_member,
    index_of,
    pixels,
    to_int,
)
from likely.errors import InvalidInput
from likely.v1 import generation_pb2, latent_pb2, scoring_pb2

T = TypeVar("T")
R = TypeVar("R", bound=Any)  # a message
GuaranteeLike: TypeAlias = Guarantee | Literal["marginal", "pac"]
RuleLike: TypeAlias = LabelRule | Literal["generative", "discriminative"]

# Room for everything in a request except its pictures: names, priors, tags and lengths.
OVERHEAD_BYTES = 16 << 10
NO_LABEL = -1  # the label that Encode returns for a model whose features depend on no label


@dataclass(frozen=True, slots=True)
class Questions(Generic[A]):
    """How to build the requests of one question about pictures, and how to read the answers.

    Attributes:
        ask: builds the request for pictures (n, c, h, w) and a version, empty for the default.
        read: builds the answer from the response and the shape of the pictures.
        version: the version that the caller named; empty for the default.
        stream: type of the message that carries such a request in a feed; None if there is none.
        max_bytes: maximum size in bytes of such a message; None for no limit.
        pictures: maximum number of pictures that fit in one answer; None for no limit.
    """

    ask: Callable[[Pixels, str], Request]
    read: Callable[[Any, tuple[int, ...]], A]
    version: str = ""
    stream: Any = None
    max_bytes: int | None = None
    pictures: int | None = None


def require_size(request: R, most: int | None, field: str = "images") -> R:
    """The request unchanged, if it is not too large for the server.

    Args:
        request: any request message.
        most: maximum size of a message in bytes; None for no limit.
        field: the field to name in the error: the one that makes the request large.

    Raises:
        InvalidInput: the request is larger.
    """
    if most is not None and (size := request.ByteSize()) > most:
        problem = f"{size} bytes with what is asked about them; the server takes {most} at a time"
        raise InvalidInput(field, problem)
    return request


def score_questions(
    info: ModelInfo,
    alpha: float | None,
    surprise: bool,
    guarantee: GuaranteeLike,
    version: str | None,
) -> Questions[Scores]:
    """The questions of `Client.score` and `score_stream`."""
    held = enum_member("guarantee", Guarantee, guarantee)

    def ask(x: Pixels, version: str) -> Request:
        return build_message(
            scoring_pb2.ScoreRequest,
            model_name=info.name,
            model_version=version,
            images=codec.images(x),
            alpha=alpha,
            surprise=surprise,
            guarantee=int(held),
        )

    def read(answer: scoring_pb2.ScoreResponse, shape: tuple[int, ...]) -> Scores:
        return codec.scores(answer, shape if surprise else None)

    limits = info.limits
    room = limits.response_bytes // (4 * math.prod(info.shape)) if surprise else None
    stream = scoring_pb2.ScoreStreamRequest
    return Questions(ask, read, version or "", stream, limits.request_bytes, room)


def classify_questions(
    info: ModelInfo,
    alpha: float | None,
    priors: npt.ArrayLike | None,
    min_posterior: float,
    guarantee: GuaranteeLike,
    rule: RuleLike,
    both: bool,
    version: str | None,
) -> Questions[Classifications]:
    """The questions of `Client.classify` and `classify_stream`."""
    held, by = enum_member("guarantee", Guarantee, guarantee), enum_member("rule", LabelRule, rule)
    prior_values = None if priors is None else array("priors", priors, np.float64).tolist()

    def ask(x: Pixels, version: str) -> Request:
        return build_message(
            scoring_pb2.ClassifyRequest,
            model_name=info.name,
            model_version=version,
            images=codec.images(x),
            alpha=alpha,
            priors=prior_values,
            min_posterior=min_posterior,
            guarantee=int(held),
            rule=int(by),
            both=both,
        )

    def read(answer: scoring_pb2.ClassifyResponse, _: tuple[int, ...]) -> Classifications:
        return codec.classifications(answer, len(info.labels))

    most = info.limits.request_bytes
    return Questions(ask, read, version or "", scoring_pb2.ClassifyStreamRequest, most)


def score(
    catalogue: Catalogue,
    images: npt.ArrayLike,
    alpha: float | None,
    surprise: bool,
    guarantee: GuaranteeLike,
    model: str | None,
    version: str | None,
) -> Plan[Scores]:
    """The scores of all pictures."""
    x = pixels(images)

    def plan(info: ModelInfo) -> Plan[Scores]:
        questions = score_questions(info, alpha, surprise, guarantee, version)
        return (yield from _ask_in_parts(x, info, questions))

    yield from _check_levels(catalogue, model, version, x)
    return (yield from LabelResolver(catalogue, model, version, None).follow(plan))


def classify(
    catalogue: Catalogue,
    images: npt.ArrayLike,
    alpha: float | None,
    priors: npt.ArrayLike | None,
    min_posterior: float,
    guarantee: GuaranteeLike,
    rule: RuleLike,
    both: bool,
    model: str | None,
    version: str | None,
) -> Plan[Classifications]:
    """The classifications of all pictures."""
    x = pixels(images)

    def plan(info: ModelInfo) -> Plan[Classifications]:
        questions = classify_questions(
            info, alpha, priors, min_posterior, guarantee, rule, both, version
        )
        return (yield from _ask_in_parts(x, info, questions))

    yield from _check_levels(catalogue, model, version, x)
    return (yield from LabelResolver(catalogue, model, version, None).follow(plan))


def encode(
    catalogue: Catalogue,
    images: npt.ArrayLike,
    labels: npt.ArrayLike | None,
    model: str | None,
    version: str | None,
) -> Plan[Features]:
    """The latent features of all pictures."""
    x = pixels(images)

    def plan(info: ModelInfo) -> Plan[Features]:
        remaining = iter(_labels(labels, len(x), info) or ())

        def ask(part: Pixels, version: str) -> Request:
            return build_message(
                scoring_pb2.EncodeRequest,
                model_name=info.name,
                model_version=version,
                images=codec.images(part),
                labels=list(islice(remaining, len(part))),
            )

        return (yield from _ask_in_parts(x, info, Questions(ask, read, version or "")))

    def read(answer: scoring_pb2.EncodeResponse, _: tuple[int, ...]) -> Features:
        return codec.features(answer)

    yield from _check_levels(catalogue, model, version, x)
    resolver = _resolver(catalogue, model, version, len(x), labels)
    return (yield from resolver.follow(plan))


@dataclass(frozen=True, slots=True)
class RedrawSettings:
    """Settings of Decode, Traverse and Interpolate: how many pictures are drawn, and how.

    Attributes:
        draws: number of pictures drawn at each point, or for each row of features.
        seed: seed of the draws; None lets the server pick one.
        first_index: index of the first picture.
        temperature: factor on the noise, in [0, 2]; None is 1.
        version: version of the model; None for the default.

    Raises:
        InvalidInput: draws or first_index is not an integer.
    """

    draws: int = 0
    seed: int | None = None
    first_index: int = 0
    temperature: float | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        to_int("draws", self.draws)
        to_int("first_index", self.first_index)

    def fields(self, info: ModelInfo, at: int, last: Redrawings | None) -> dict[str, Any]:
        """The fields of the request for pictures from `at` on; `last` is the previous answer."""
        return {
            "model_name": info.name,
            "model_version": last.model_version if last else self.version or "",
            "draws": self.draws,
            "seed": last.seed if last else self.seed,
            "first_index": self.first_index + at,
            "temperature": self.temperature,
        }

    def step(self, info: ModelInfo, points: int, nbytes: int) -> int:
        """Number of pictures, of `nbytes` bytes each, that fit in one request and its answer."""
        rows = max(1, points * max(1, self.draws))
        answer = max(1, points) * math.prod(info.shape) * (8 + max(0, self.draws))
        return max(
            1,
            min(
                info.limits.images_per_request,
                (info.limits.request_bytes - OVERHEAD_BYTES) // max(1, nbytes),
                info.limits.images_per_generation // rows,
                info.limits.response_bytes // answer,
            ),
        )


def decode(
    catalogue: Catalogue,
    features: npt.ArrayLike,
    labels: npt.ArrayLike | None,
    how: RedrawSettings,
    model: str | None,
) -> Plan[Redrawings]:
    """The redrawings of all features."""
    z: npt.NDArray[Any] = array("features", features, np.float32)
    if z.ndim != 2:
        raise InvalidInput("features", f"shape {z.shape}; expected (n, z)")

    def plan(info: ModelInfo) -> Plan[Redrawings]:
        label_indices = _labels(labels, len(z), info)
        if label_indices == [NO_LABEL] * len(z):
            label_indices = None
        step, parts = how.step(info, 1, z[:1].nbytes), list[Redrawings]()
        for at in range(0, max(len(z), 1), step):
            message = build_message(
                latent_pb2.DecodeRequest,
                features=codec.packed(z[at : at + step]),
                labels=label_indices and label_indices[at : at + step],
                **how.fields(info, at, parts[-1] if parts else None),
            )
            answer: latent_pb2.DecodeResponse = yield require_size(
                message, info.limits.request_bytes, "features"
            )
            parts.append(codec.redrawn(answer, how.draws))
        return joined(parts)

    # A request contains no shape: with another width, the server would read other rows.
    def check(info: ModelInfo) -> None:
        if info.latent_dimensions and z.shape[1] != info.latent_dimensions:
            asked = f"(n, {info.latent_dimensions})"
            raise InvalidInput("features", f"shape {z.shape}; expected {asked}")

    yield from _check_arguments(catalogue, model, how.version, check)
    resolver = _resolver(catalogue, model, how.version, len(z), labels)
    return (yield from resolver.follow(plan))


def traverse(
    catalogue: Catalogue,
    images: npt.ArrayLike,
    direction: str,
    points: npt.ArrayLike,
    labels: npt.ArrayLike | None,
    how: RedrawSettings,
    model: str | None,
) -> Plan[Traversal]:
    """All pictures redrawn along a direction."""
    x, places = pixels(images), _to_points(points)

    def plan(info: ModelInfo) -> Plan[Traversal]:
        label_indices = _labels(labels, len(x), info)
        step, parts = how.step(info, len(places), x[:1].nbytes), list[Traversal]()
        for at in range(0, max(len(x), 1), step):
            message = build_message(
                latent_pb2.TraverseRequest,
                images=codec.images(x[at : at + step]),
                direction=direction,
                points=places,
                labels=label_indices and label_indices[at : at + step],
                **how.fields(info, at, parts[-1] if parts else None),
            )
            answer: latent_pb2.TraverseResponse = yield require_size(
                message, info.limits.request_bytes
            )
            parts.append(codec.traversal(answer, how.draws, (len(places),)))
        return joined(parts)

    yield from _check_levels(catalogue, model, how.version, x)
    resolver = _resolver(catalogue, model, how.version, len(x), labels)
    return (yield from resolver.follow(plan))


def interpolate(
    catalogue: Catalogue,
    images: npt.ArrayLike,
    others: npt.ArrayLike,
    points: npt.ArrayLike,
    labels: npt.ArrayLike | None,
    other_labels: npt.ArrayLike | None,
    how: RedrawSettings,
    model: str | None,
) -> Plan[Redrawings]:
    """All pictures redrawn on the lines to as many others."""
    x, far, places = pixels(images), pixels(others), _to_points(points)
    if len(x) != len(far):
        raise InvalidInput("others", f"{len(far)} pictures for {len(x)} images; expected as many")

    def plan(info: ModelInfo) -> Plan[Redrawings]:
        label_indices = _labels(labels, len(x), info)
        other_label_indices = _labels(other_labels, len(x), info)
        step = how.step(info, len(places), x[:1].nbytes + far[:1].nbytes)
        parts: list[Redrawings] = []
        for at in range(0, max(len(x), 1), step):
            message = build_message(
                latent_pb2.InterpolateRequest,
                images=codec.images(x[at : at + step]),
                others=codec.images(far[at : at + step]),
                points=places,
                labels=label_indices and label_indices[at : at + step],
                other_labels=other_label_indices and other_label_indices[at : at + step],
                **how.fields(info, at, parts[-1] if parts else None),
            )
            answer: latent_pb2.InterpolateResponse = yield require_size(
                message, info.limits.request_bytes
            )
            parts.append(codec.redrawn(answer, how.draws, (len(places),)))
        return joined(parts)

    yield from _check_levels(catalogue, model, how.version, x, far)
    resolver = _resolver(catalogue, model, how.version, len(x), labels, other_labels)
    return (yield from resolver.follow(plan))


def _to_points(points: npt.ArrayLike) -> list[float]:
    places = array("points", points, np.float64)
    if places.ndim != 1:
        raise InvalidInput("points", f"shape {places.shape}; expected (points,)")
    numbers: list[float] = places.tolist()
    return numbers


def generate_requests(
    info: ModelInfo,
    version: str | None,
    label: Label | None,
    count: int,
    seed: int | None,
    first_index: int,
    temperature: float | None,
    self_check: generation_pb2.SelfCheck | None,
    acceptance: generation_pb2.Acceptance | None,
) -> Iterator[generation_pb2.GenerateRequest]:
    """The requests that draw `count` pictures, each within the server's limits.

    The server picks the version and seed if the caller names none; `Parts` pins them afterwards.
    """
    most = info.limits.images_per_generation
    count, first = to_int("count", count), to_int("first_index", first_index)
    for start in range(0, max(count, 1), most):
        yield build_message(
            generation_pb2.GenerateRequest,
            model_name=info.name,
            model_version=version or "",
            label=index_of(label, info.labels),
            count=min(most, count - start),
            seed=seed,
            first_index=first + start,
            temperature=temperature,
            self_check=self_check,
            acceptance=acceptance,
        )


def build_checks(
    self_check: bool, acceptance: bool, alpha: float | None, max_draws: int | None
) -> tuple[generation_pb2.SelfCheck | None, generation_pb2.Acceptance | None]:
    """The self-check and the acceptance of a Generate request, each None if not requested.

    Raises:
        InvalidInput: alpha or max_draws is given without the option it belongs to.
    """
    if alpha is not None and not self_check:
        raise InvalidInput("alpha", "is of a self_check only")
    if max_draws is not None and not (self_check or acceptance):
        raise InvalidInput("max_draws", "is of a self_check or of acceptance only")
    return (
        build_message(generation_pb2.SelfCheck, alpha=alpha, max_draws=max_draws)
        if self_check
        else None,
        build_message(generation_pb2.Acceptance, max_draws=max_draws) if acceptance else None,
    )


def complete_requests(
    info: ModelInfo,
    version: str | None,
    x: Pixels,
    mask: npt.ArrayLike,
    label: Label | None,
    count: int,
    seed: int | None,
    first_index: int,
    temperature: float | None,
    proposals: int,
) -> Iterator[generation_pb2.CompleteRequest]:
    """The requests that complete pictures x, each within the server's limits."""
    count, first = to_int("completions", count), to_int("first_index", first_index)
    drawn = max(1, count) * max(1, to_int("proposals", proposals))  # for each picture
    known = array("mask", mask, np.bool_)
    known = known[:, None] if known.ndim == 3 and x.shape[1] == 1 else known
    try:
        known = np.broadcast_to(known, x.shape).astype(np.uint8)
    except ValueError as error:
        message = f"shape {known.shape} for pictures of shape {x.shape}"
        raise InvalidInput("mask", message) from error
    fitting = (info.limits.request_bytes - OVERHEAD_BYTES) // max(1, 2 * x[:1].nbytes)
    most = info.limits.images_per_generation // drawn
    step = max(1, min(info.limits.images_per_request, fitting, most))
    for at in range(0, max(len(x), 1), step):
        part = x[at : at + step]
        request = build_message(
            generation_pb2.CompleteRequest,
            model_name=info.name,
            model_version=version or "",
            images=codec.images(part),
            mask=known[at : at + step].tobytes(),
            label=index_of(label, info.labels),
            completions=count,
            seed=seed,
            first_index=first + at,
            temperature=temperature,
            proposals=proposals,
        )
        yield require_size(request, info.limits.request_bytes)


def join_completions(
    parts: Sequence[Completions], x: Pixels, count: int, seed: int | None, info: ModelInfo
) -> Completions:
    """The completions of all chunks joined; images (n, completions, c, h, w), for pictures x."""
    first = parts[0] if parts else Completions(x[:0], seed or 0, info.version)
    rows = np.concatenate([x[:0], *(part.images for part in parts)])
    return replace(first, images=rows.reshape(len(x), count, *x.shape[1:]))


def _resolver(
    catalogue: Catalogue,
    model: str | None,
    version: str | None,
    n: int,
    *labels: npt.ArrayLike | None,
) -> LabelResolver:
    """The resolver for a question about n pictures with labels for each."""

    def to_indices(info: ModelInfo) -> list[list[int] | None]:
        return [_labels(sequence, n, info) for sequence in labels]

    named = any(
        array("labels", sequence).dtype.kind == "U" for sequence in labels if sequence is not None
    )
    return LabelResolver(catalogue, model, version, to_indices if named else None)


def _labels(labels: npt.ArrayLike | None, n: int, info: ModelInfo) -> list[int] | None:
    """The label index of each of n pictures, from names or indices; None without labels."""
    if labels is None:
        return None
    entries = array("labels", labels)
    if entries.shape != (n,):
        raise InvalidInput("labels", f"shape {entries.shape} for {n} pictures; one label each")
    # A text may also be a number of any size; building the message checks the range.
    if entries.dtype.kind == "U":
        named: list[Any] = [index_of(str(entry), info.labels, "labels") for entry in entries]
        return named
    if n and not np.issubdtype(entries.dtype, np.integer):
        raise InvalidInput("labels", f"type {entries.dtype}; expected integers")
    numbers: list[int] = entries.tolist()
    return numbers


def _check_levels(
    catalogue: Catalogue,
    model: str | None,
    version: str | None,
    x: Pixels,
    far: Pixels | None = None,
) -> Plan[None]:
    """Checks the levels of all pictures before they are split into requests.

    The server would name a picture by its index within one request. Pictures of another shape
    are left to the server to refuse.
    """

    def check(info: ModelInfo) -> None:
        for field, pictures in (("images.data", x), ("others.data", far)):
            if pictures is not None and pictures.shape[1:] == info.shape:
                codec.check_levels(pictures, info.levels, field)

    yield from _check_arguments(catalogue, model, version, check)


def _check_arguments(
    catalogue: Catalogue,
    model: str | None,
    version: str | None,
    check: Callable[[ModelInfo], None],
) -> Plan[None]:
    """Checks arguments against the model's description; a cached one is renewed before failing."""
    for is_first_try in (True, False):
        info = yield from catalogue.model(model, version)
        try:
            check(info)
        except InvalidInput:
            if not is_first_try:
                raise
            catalogue.forget(model, version)  # a newer version may take it
        else:
            return


def _ask_in_parts(x: Pixels, info: ModelInfo, questions: Questions[A]) -> Plan[A]:
    """Asks about all pictures in requests that, with their answers, are within the limits."""
    fitting = (info.limits.request_bytes - OVERHEAD_BYTES) // max(1, x[:1].nbytes)
    most = info.limits.images_per_request
    step = max(1, min(most, fitting, most if questions.pictures is None else questions.pictures))
    largest = info.limits.request_bytes if step == 1 else None  # else `step` keeps to the limit
    answers: list[A] = []
    for at in range(0, max(len(x), 1), step):
        part = x[at : at + step]
        # Once one version has answered, it must answer the other requests too.
        pinned = answers[0].model_version if answers else questions.version
        answer = yield require_size(questions.ask(part, pinned), largest)
        answers.append(questions.read(answer, part.shape))
    return joined(answers)
