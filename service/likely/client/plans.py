"""What to ask a server, and in which order, without asking it: shared by both clients.

A plan is a generator: it yields requests, is sent their answers, and returns
what the caller asked for. The clients differ only in how they carry a request.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from likely import codec
from likely.answers import (
    Classifications,
    Completions,
    Draws,
    Features,
    Guarantee,
    LabelRule,
    ModelInfo,
    Pixels,
    Redrawings,
    Scores,
    Traversal,
)
from likely.errors import InvalidInput, Unavailable
from likely.v1 import generation_pb2, latent_pb2, models_pb2, scoring_pb2

Request = (
    scoring_pb2.ScoreRequest
    | scoring_pb2.ClassifyRequest
    | scoring_pb2.EncodeRequest
    | latent_pb2.DecodeRequest
    | latent_pb2.TraverseRequest
    | latent_pb2.InterpolateRequest
    | models_pb2.ListModelsRequest
    | models_pb2.GetModelRequest
)
T = TypeVar("T")
G = TypeVar("G", generation_pb2.GenerateRequest, generation_pb2.CompleteRequest)
M = TypeVar("M")
E = TypeVar("E", bound=IntEnum)
Held: TypeAlias = Guarantee | Literal["marginal", "pac"]
Rule: TypeAlias = LabelRule | Literal["generative", "discriminative"]
Label: TypeAlias = int | str
Drawn: TypeAlias = generation_pb2.GenerateResponse | generation_pb2.CompleteResponse
A = TypeVar("A", Scores, Classifications, Features, Draws, Redrawings, Traversal)
# A request goes out and its own answer comes in: a pairing that Generator cannot type.
Plan = Generator[Request, Any, T]

# What a request carries beside its pictures: names, priors, tags and lengths.
OVERHEAD_BYTES = 16 << 10
TURNS = 8  # of a question whose answers come of other versions than the one described
NO_LABEL = -1  # what Encode tells of a model whose features depend on no label


class Catalogue:
    """What a client has learnt of the server's models; asked for once, until it turns out old."""

    def __init__(self) -> None:
        self._known: dict[tuple[str | None, str | None], ModelInfo] = {}

    def model(self, name: str | None, version: str | None) -> Plan[ModelInfo]:
        """The description of a model; of the server's only one where no name is given.

        Raises:
            InvalidInput: no name is given and the server has several models, or none.
        """
        if info := self._known.get((name, version)):
            return info
        asked = name if name is not None else (yield from _only())
        answer: models_pb2.GetModelResponse = yield _message(
            models_pb2.GetModelRequest, model_name=asked, model_version=version or ""
        )
        info = codec.model_info(answer.model)
        self._known[name, version] = self._known[info.name, info.version] = info
        return info

    def moved(self, name: str | None, version: str | None, known: ModelInfo) -> None:
        """Takes that description for the one of this name and version from now on."""
        self._known[name, version] = known

    def forget(self, name: str | None, version: str | None) -> None:
        """Has the description asked for anew when it is wanted next."""
        self._known.pop((name, version), None)

    def clear(self) -> None:
        """Forgets all."""
        self._known.clear()

    def version(self, name: str, version: str) -> ModelInfo | None:
        """The description of exactly that version, if it has been asked for."""
        return self._known.get((name, version))


class Naming:
    """What labels that are given by name mean to the version that answers.

    A name is sent as its index in the version that was described. Where another one answers, which
    may number its labels otherwise, the question is put anew.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        model: str | None,
        version: str | None,
        meant: Callable[[ModelInfo], Any] | None,
    ) -> None:
        """The naming of one question.

        Args:
            catalogue: where descriptions come from.
            model: its name, as the caller gave it.
            version: its version, likewise.
            meant: what is sent for the labels to a model so described; None where no label
                is given by name.
        """
        self._catalogue = catalogue
        self._model, self._version = model, version
        self._meant = meant
        self._turns = 0
        self._met: str | None = None  # the version that is to be described, once it has answered

    def begin(self) -> Plan[ModelInfo]:
        """The description to put the question by, at first or anew.

        Raises:
            Unavailable: versions that number the labels otherwise have answered each turn.
        """
        self._turns += 1
        if self._turns > TURNS:
            raise Unavailable(
                "versions that number the labels otherwise answer in turn; name one, or give the "
                "label's index"
            )
        info = yield from self._catalogue.model(self._model, self._version)
        if self._means(info) is None:  # a newer version may have such labels
            info = yield from self._anew()
        for _ in range(TURNS):  # replicas of several versions answer in turn
            if self._met in (None, info.version):
                break
            info = yield from self._anew()
        self._met = None
        return info

    def holds(self, info: ModelInfo, answered: str) -> bool:
        """Whether the version that answered was asked what the caller meant."""
        if self._meant is None or answered == info.version:
            return True
        other = self._catalogue.version(info.name, answered)
        if other and self._means(other) == self._means(info):
            return True
        # Every other time the same is asked again: of two replicas in turn, the other one answers.
        if self._turns % 2:
            self._met = answered
            if other:
                self._catalogue.moved(self._model, self._version, other)
        return False

    def _anew(self) -> Plan[ModelInfo]:
        self._catalogue.forget(self._model, self._version)
        return (yield from self._catalogue.model(self._model, self._version))

    def follow(self, plan: Callable[[ModelInfo], Plan[T]]) -> Plan[T]:
        """What a plan gives that pins all its requests to the version of its first answer."""
        while True:
            info = yield from self.begin()
            asking = plan(info)
            answer = yield next(asking)
            if self.holds(info, answer.model_version):
                break
        try:
            while True:
                answer = yield asking.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result

    def _means(self, info: ModelInfo) -> tuple[Any, ...] | None:
        """What the labels are in that version; None if it has no such labels."""
        try:
            return (self._meant(info),) if self._meant else ()
        except InvalidInput:
            return None


def models() -> Plan[list[ModelInfo]]:
    """Every version that is served."""
    answer: models_pb2.ListModelsResponse = yield models_pb2.ListModelsRequest()
    return [codec.model_info(message) for message in answer.models]


def _only() -> Plan[str]:
    names = sorted({info.name for info in (yield from models())})
    if len(names) != 1:
        raise InvalidInput("model", f"name one of {', '.join(names) or 'none: none is served'}")
    return names[0]


@dataclass(frozen=True, slots=True)
class Questions(Generic[A]):
    """One kind of question about pictures: how it is asked, and how its answer is read.

    Attributes:
        ask: the request about pictures (n, c, h, w) to that version, empty for the default.
        read: the answer to it, from the response and the pictures' shape.
        version: that was asked for.
        stream: the type of message that brings such a request in a stream; None for none.
        most: bytes of such a message that the server takes; None for any.
    """

    ask: Callable[[Pixels, str], Request]
    read: Callable[[Any, tuple[int, ...]], A]
    version: str = ""
    stream: Any = None
    most: int | None = None


def score_questions(
    info: ModelInfo,
    alpha: float | None,
    surprise: bool,
    guarantee: Held,
    version: str | None,
) -> Questions[Scores]:
    """How plausible pictures are."""
    held = _member("guarantee", Guarantee, guarantee)

    def ask(x: Pixels, version: str) -> Request:
        return _message(
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

    most = info.limits.request_bytes
    return Questions(ask, read, version or "", scoring_pb2.ScoreStreamRequest, most)


def classify_questions(
    info: ModelInfo,
    alpha: float | None,
    priors: npt.ArrayLike | None,
    min_posterior: float,
    guarantee: Held,
    rule: Rule,
    both: bool,
    version: str | None,
) -> Questions[Classifications]:
    """Which labels pictures have."""
    held, by = _member("guarantee", Guarantee, guarantee), _member("rule", LabelRule, rule)
    given = None if priors is None else _array("priors", priors, np.float64).tolist()

    def ask(x: Pixels, version: str) -> Request:
        return _message(
            scoring_pb2.ClassifyRequest,
            model_name=info.name,
            model_version=version,
            images=codec.images(x),
            alpha=alpha,
            priors=given,
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
    guarantee: Held,
    model: str | None,
    version: str | None,
) -> Plan[Scores]:
    """The scores of all pictures."""
    info = yield from catalogue.model(model, version)
    questions = score_questions(info, alpha, surprise, guarantee, version)
    return (yield from _divided(pixels(images), info, questions))


def classify(
    catalogue: Catalogue,
    images: npt.ArrayLike,
    alpha: float | None,
    priors: npt.ArrayLike | None,
    min_posterior: float,
    guarantee: Held,
    rule: Rule,
    both: bool,
    model: str | None,
    version: str | None,
) -> Plan[Classifications]:
    """The classifications of all pictures."""
    info = yield from catalogue.model(model, version)
    questions = classify_questions(
        info, alpha, priors, min_posterior, guarantee, rule, both, version
    )
    return (yield from _divided(pixels(images), info, questions))


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
        left = _labels(labels, len(x), info) or []

        def ask(part: Pixels, version: str) -> Request:
            return _message(
                scoring_pb2.EncodeRequest,
                model_name=info.name,
                model_version=version,
                images=codec.images(part),
                labels=[left.pop(0) for _ in part] if left else (),
            )

        return (yield from _divided(x, info, Questions(ask, read, version or "")))

    def read(answer: scoring_pb2.EncodeResponse, _: tuple[int, ...]) -> Features:
        return codec.features(answer)

    naming = _naming(catalogue, model, version, len(x), labels)
    return (yield from naming.follow(plan))


@dataclass(frozen=True, slots=True)
class Redrawing:
    """How pictures are redrawn: of which version, and what is drawn with which noise.

    Attributes:
        draws: at each point, or of each row of features.
        seed: None lets the server pick one.
        first_index: of the first picture.
        temperature: multiplies the noise; None is 1.
        version: of the model; None for the default.

    Raises:
        InvalidInput: draws or first_index is no whole number.
    """

    draws: int = 0
    seed: int | None = None
    first_index: int = 0
    temperature: float | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        whole("draws", self.draws)
        whole("first_index", self.first_index)

    def fields(self, info: ModelInfo, at: int, last: Redrawings | None) -> dict[str, Any]:
        """What a request says of it, for pictures from `at` on, after that answer."""
        return {
            "model_name": info.name,
            "model_version": last.model_version if last else self.version or "",
            "draws": self.draws,
            "seed": last.seed if last else self.seed,
            "first_index": self.first_index + at,
            "temperature": self.temperature,
        }

    def step(self, info: ModelInfo, points: int, nbytes: int) -> int:
        """How many pictures of so many bytes one request and its answer have room for."""
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
    how: Redrawing,
    model: str | None,
) -> Plan[Redrawings]:
    """What all features stand for."""
    z: npt.NDArray[Any] = _array("features", features, np.float32)
    if z.ndim != 2:
        raise InvalidInput("features", f"shape {z.shape}; (n, z) is asked")

    def plan(info: ModelInfo) -> Plan[Redrawings]:
        given = _labels(labels, len(z), info)
        if given == [NO_LABEL] * len(z):
            given = None
        step, parts = how.step(info, 1, z[:1].nbytes), list[Redrawings]()
        for at in range(0, max(len(z), 1), step):
            message = _message(
                latent_pb2.DecodeRequest,
                features=np.ascontiguousarray(z[at : at + step], "<f4").tobytes(),
                labels=given and given[at : at + step],
                **how.fields(info, at, parts[-1] if parts else None),
            )
            answer: latent_pb2.DecodeResponse = yield message
            parts.append(codec.redrawn(answer, how.draws))
        return joined(parts)

    naming = _naming(catalogue, model, how.version, len(z), labels)
    return (yield from naming.follow(plan))


def traverse(
    catalogue: Catalogue,
    images: npt.ArrayLike,
    direction: str,
    points: npt.ArrayLike,
    labels: npt.ArrayLike | None,
    how: Redrawing,
    model: str | None,
) -> Plan[Traversal]:
    """All pictures along a direction."""
    x, places = pixels(images), _places(points)

    def plan(info: ModelInfo) -> Plan[Traversal]:
        given = _labels(labels, len(x), info)
        step, parts = how.step(info, len(places), x[:1].nbytes), list[Traversal]()
        for at in range(0, max(len(x), 1), step):
            message = _message(
                latent_pb2.TraverseRequest,
                images=codec.images(x[at : at + step]),
                direction=direction,
                points=places,
                labels=given and given[at : at + step],
                **how.fields(info, at, parts[-1] if parts else None),
            )
            answer: latent_pb2.TraverseResponse = yield message
            parts.append(codec.traversal(answer, how.draws, (len(places),)))
        return joined(parts)

    naming = _naming(catalogue, model, how.version, len(x), labels)
    return (yield from naming.follow(plan))


def interpolate(
    catalogue: Catalogue,
    images: npt.ArrayLike,
    others: npt.ArrayLike,
    points: npt.ArrayLike,
    labels: npt.ArrayLike | None,
    other_labels: npt.ArrayLike | None,
    how: Redrawing,
    model: str | None,
) -> Plan[Redrawings]:
    """All pictures on the way to as many others."""
    x, far, places = pixels(images), pixels(others), _places(points)
    if len(x) != len(far):
        raise InvalidInput("others", f"{len(far)} pictures for {len(x)} images; as many are asked")

    def plan(info: ModelInfo) -> Plan[Redrawings]:
        given = _labels(labels, len(x), info)
        others_given = _labels(other_labels, len(x), info)
        step = how.step(info, len(places), x[:1].nbytes + far[:1].nbytes)
        parts: list[Redrawings] = []
        for at in range(0, max(len(x), 1), step):
            message = _message(
                latent_pb2.InterpolateRequest,
                images=codec.images(x[at : at + step]),
                others=codec.images(far[at : at + step]),
                points=places,
                labels=given and given[at : at + step],
                other_labels=others_given and others_given[at : at + step],
                **how.fields(info, at, parts[-1] if parts else None),
            )
            answer: latent_pb2.InterpolateResponse = yield message
            parts.append(codec.redrawn(answer, how.draws, (len(places),)))
        return joined(parts)

    naming = _naming(catalogue, model, how.version, len(x), labels, other_labels)
    return (yield from naming.follow(plan))


def _places(points: npt.ArrayLike) -> list[float]:
    places = _array("points", points, np.float64)
    if places.ndim != 1:
        raise InvalidInput("points", f"shape {places.shape}; (points,) is asked")
    found: list[float] = places.tolist()
    return found


def generations(
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
    """The requests that draw `count` pictures, none of them above the server's limit.

    The server picks what the caller leaves open, which `Parts` then pins.
    """
    most = info.limits.images_per_generation
    count, first = whole("count", count), whole("first_index", first_index)
    for start in range(0, max(count, 1), most):
        yield _message(
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


def self_check(
    wanted: bool, alpha: float | None, max_draws: int | None
) -> generation_pb2.SelfCheck | None:
    """The self-check that a request asks for, if any."""
    if not wanted:
        return None
    return _message(generation_pb2.SelfCheck, alpha=alpha, max_draws=max_draws)


def acceptance(wanted: bool, max_draws: int | None) -> generation_pb2.Acceptance | None:
    """The drawing by acceptance that a request asks for, if any."""
    return _message(generation_pb2.Acceptance, max_draws=max_draws) if wanted else None


def completions(
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
    """The requests that complete pictures x, none of them above the server's limits."""
    count, first = whole("completions", count), whole("first_index", first_index)
    drawn = max(1, count) * max(1, whole("proposals", proposals))  # of each picture
    known = _array("mask", mask, np.bool_)
    known = known[:, None] if known.ndim == 3 else known
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
        yield _message(
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


def completed(parts: Sequence[Completions], x: Pixels, count: int, info: ModelInfo) -> Completions:
    """The chunks' completions joined, images (n, completions, c, h, w) of pictures x."""
    first = parts[0] if parts else Completions(x[:0], 0, info.version)
    rows = np.concatenate([x[:0], *(part.images for part in parts)])
    return replace(first, images=rows.reshape(len(x), count, *x.shape[1:]))


class Parts(Generic[G]):
    """The requests that one question with a label is divided into, as their answers need them.

    The first answer settles version and seed of all others.

    Attributes:
        info: the model's description, once a request is asked for.
    """

    info: ModelInfo

    def __init__(
        self,
        catalogue: Catalogue,
        model: str | None,
        version: str | None,
        label: Label | None,
        divide: Callable[[ModelInfo], Iterator[G]],
    ) -> None:
        """The parts of a question.

        Args:
            catalogue: where descriptions come from.
            model: its name.
            version: its version.
            label: its name or index.
            divide: the requests to a model so described.
        """
        named = isinstance(label, str)
        meant = (lambda info: index_of(label, info.labels)) if named else None
        self._naming = Naming(catalogue, model, version, meant)
        self._divide: Callable[[ModelInfo], Iterator[G]] = divide
        self._requests: Iterator[G] | None = None
        self._settled: tuple[str, int] | None = None

    def next(self) -> Plan[G | None]:
        """The next request, which may be the first again; None where there is no more."""
        if self._requests is None:
            self.info = yield from self._naming.begin()
            self._requests = self._divide(self.info)
        request = next(self._requests, None)
        if request is not None and self._settled:
            request.model_version, request.seed = self._settled
        return request

    def takes(self, answer: Drawn) -> bool:
        """Whether an answer is to the question; after one that is not, all are asked anew."""
        if self._requests is not None and not self._settled:
            if self._naming.holds(self.info, answer.model_version):
                self._settled = answer.model_version, answer.seed
            else:
                self._requests = None
        return self._requests is not None


def pixels(images: npt.ArrayLike, name: str = "images") -> Pixels:
    """Pictures as uint8 (n, c, h, w).

    Args:
        images: (n, c, h, w), or (n, h, w) for pictures of one channel; of any
            integer type whose values are those of uint8.
        name: what to call them in an error.

    Raises:
        InvalidInput: another number of axes, another type, or a value outside 0 to 255.
    """
    x = _array(name, images)
    if x.ndim not in (3, 4):
        raise InvalidInput(name, f"shape {x.shape}; (n, c, h, w) or (n, h, w) is asked")
    if not np.issubdtype(x.dtype, np.integer):
        how = ": multiply by the top level and round" if x.dtype.kind == "f" else ""
        raise InvalidInput(name, f"type {x.dtype}; integers from 0 to 255 are asked{how}")
    if x.dtype != np.uint8 and x.size and (x.min() < 0 or x.max() > 255):
        raise InvalidInput(name, f"values {x.min()} to {x.max()}; 0 to 255 are asked")
    return x.astype(np.uint8, copy=False).reshape(x.shape if x.ndim == 4 else _one_channel(x.shape))


def index_of(label: Label | None, names: Sequence[str], field: str = "label") -> int | None:
    """The index of a label that is given by its name or its index.

    Raises:
        InvalidInput: no label has that name.
    """
    if not isinstance(label, str):
        return label
    if label in names:
        return names.index(label)
    if label.removeprefix("-").isdecimal():
        return int(label)
    raise InvalidInput(field, f"{label!r} is none of {', '.join(names) or 'none'}")


def whole(field: str, value: Any) -> int:
    """The same number, if it is a whole one.

    Raises:
        InvalidInput: it is none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidInput(field, f"{value!r} is no whole number") from None


def _member(field: str, kind: type[E], given: E | str) -> E:
    """The member of an enumeration that is given, or that has that name.

    Raises:
        InvalidInput: there is none.
    """
    try:
        return kind[given.upper()] if isinstance(given, str) else kind(given)
    except (KeyError, ValueError):
        names = ", ".join(each.name.lower() for each in kind)
        raise InvalidInput(field, f"{given!r} is none of {names}") from None


def _message(kind: Callable[..., M], **fields: Any) -> M:
    """The message with these fields.

    Raises:
        InvalidInput: one of them is of a type or size that the message cannot hold.
    """
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise _unsendable(kind, fields, error) from error


def _unsendable(kind: Any, fields: dict[str, Any], error: Exception) -> InvalidInput:
    """What says which of the fields a message cannot hold."""
    for name, value in fields.items():
        try:
            kind(**{name: value})
        except (TypeError, ValueError) as own:
            field = kind.DESCRIPTOR.fields_by_name[name]
            bits = {field.TYPE_INT32: 31, field.TYPE_INT64: 63}.get(field.type)
            if isinstance(value, int) and bits:
                return InvalidInput(name, f"{value} is not in [-2**{bits}, 2**{bits})")
            return InvalidInput(name, f"{reprlib.repr(value)} cannot be sent: {own}")
    return InvalidInput("", f"a value cannot be sent: {error}")


def _array(field: str, values: npt.ArrayLike, dtype: Any = None) -> npt.NDArray[Any]:
    try:
        return np.asarray(values, dtype=dtype)
    except (TypeError, ValueError) as error:
        asked = "an array" if dtype is None else np.dtype(dtype)
        raise InvalidInput(field, f"not to be read as {asked}: {error}") from error


def _naming(
    catalogue: Catalogue,
    model: str | None,
    version: str | None,
    n: int,
    *labels: npt.ArrayLike | None,
) -> Naming:
    """The naming of a question about n pictures, with labels of each."""

    def meant(info: ModelInfo) -> list[list[int] | None]:
        return [_labels(each, n, info) for each in labels]

    named = any(_array("labels", each).dtype.kind == "U" for each in labels if each is not None)
    return Naming(catalogue, model, version, meant if named else None)


def _labels(labels: npt.ArrayLike | None, n: int, info: ModelInfo) -> list[int] | None:
    """The index of the label of each of n pictures, given by name or index; None for none."""
    if labels is None:
        return None
    given = _array("labels", labels)
    if given.shape != (n,):
        raise InvalidInput("labels", f"shape {given.shape} for {n} pictures; one label each")
    if given.dtype.kind == "U":
        given = np.array([index_of(str(each), info.labels, "labels") for each in given], np.int64)
    if n and not np.issubdtype(given.dtype, np.integer):
        raise InvalidInput("labels", f"type {given.dtype}; integers are asked")
    numbers: list[int] = given.tolist()
    return numbers


def _one_channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    n, h, w = shape
    return n, 1, h, w


def _divided(x: Pixels, info: ModelInfo, questions: Questions[A]) -> Plan[A]:
    """Asks about at most as many pictures at a time as the server takes."""
    fitting = (info.limits.request_bytes - OVERHEAD_BYTES) // max(1, x[:1].nbytes)
    step = max(1, min(info.limits.images_per_request, fitting))
    answers: list[A] = []
    for at in range(0, max(len(x), 1), step):
        part = x[at : at + step]
        # Once one version has answered, the others must be the same one.
        pinned = answers[0].model_version if answers else questions.version
        answer = yield questions.ask(part, pinned)
        answers.append(questions.read(answer, part.shape))
    return joined(answers)


def joined(parts: Sequence[A]) -> A:
    """One answer from the answers for consecutive pictures."""
    first = parts[0]
    if len(parts) == 1:
        return first
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in (field.name for field in fields(first))
        if isinstance(getattr(first, name), np.ndarray)
    }
    return replace(first, **columns)
