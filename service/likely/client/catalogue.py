"""Cached descriptions of a server's models, and the resolution of label names by version.

A plan is a generator: it yields requests, receives their answers by `send`, and returns the
result for the caller. docs/decisions/0030 explains how label names are resolved.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from likely import codec
from likely.answers import ModelInfo
from likely.client.values import Label, build_message, index_of
from likely.errors import InvalidInput, ModelNotFound, Unavailable
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
Drawn: TypeAlias = generation_pb2.GenerateResponse | generation_pb2.CompleteResponse
# The answer that is sent in has the type that belongs to the request: Generator cannot say that.
Plan = Generator[Request, Any, T]

MAX_ATTEMPTS = 8  # attempts at a question while other versions than the described one answer
REPLICAS = 16  # replicas asked in turn for a version before it counts as not found
MAX_ROUNDS = 3  # attempts at a question whose version disappears before all parts are answered


class Catalogue:
    """A cache of model descriptions; an entry is kept until it turns out to be outdated."""

    def __init__(self) -> None:
        self._known: dict[tuple[str | None, str | None], ModelInfo] = {}

    def model(self, name: str | None, version: str | None) -> Plan[ModelInfo]:
        """The description of a model; without a name, of the server's only model.

        Raises:
            InvalidInput: no name is given, and the server has several models or none.
        """
        if info := self._known.get((name, version)):
            return info
        asked = name if name is not None else (yield from _only_model_name())
        answer: models_pb2.GetModelResponse = yield build_message(
            models_pb2.GetModelRequest, model_name=asked, model_version=version or ""
        )
        info = codec.model_info(answer.model)
        self._known[name, version] = self._known[info.name, info.version] = info
        return info

    def store(self, name: str | None, version: str | None, known: ModelInfo) -> None:
        """Stores a known description as that of this name and version."""
        self._known[name, version] = known

    def forget(self, name: str | None, version: str | None) -> None:
        """Removes a description, so that it is requested again when it is next needed."""
        self._known.pop((name, version), None)

    def clear(self) -> None:
        """Removes all descriptions."""
        self._known.clear()

    def version(self, name: str, version: str) -> ModelInfo | None:
        """The cached description of exactly this version, if any."""
        return self._known.get((name, version))


class LabelResolver:
    """Resolves the label names of one question for the version that answers it.

    A name is sent as its index in the described version. If a version answers that numbers the
    labels differently, the question is repeated. It is also repeated if the version that gave the
    first answer is no longer found.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        model: str | None,
        version: str | None,
        to_indices: Callable[[ModelInfo], Any] | None,
    ) -> None:
        """The resolver for one question.

        Args:
            catalogue: cache of model descriptions.
            model: name of the model, as the caller gave it.
            version: version of the model, as the caller gave it.
            to_indices: maps a description to the label indices to send to that model; None if no
                label is given by name.
        """
        self._catalogue = catalogue
        self._model, self._version = model, version
        self._to_indices = to_indices
        self._attempts = 0
        # A version that answered, whose description is needed next.
        self._answering_version: str | None = None

    def begin_attempt(self) -> Plan[ModelInfo]:
        """The description to use for the first or the next attempt at the question.

        Raises:
            Unavailable: at each attempt, a version answered that numbers the labels differently.
        """
        self._attempts += 1
        if self._attempts > MAX_ATTEMPTS:
            raise Unavailable(
                "versions that number the labels differently answer in turn; name one version, or "
                "give the label's index"
            )
        info = yield from self._catalogue.model(self._model, self._version)
        if self._indices_in(info) is None:  # a newer version may have these labels
            info = yield from self._fetch_again()
        for _ in range(MAX_ATTEMPTS):  # replicas of several versions answer in turn
            if self._answering_version in (None, info.version):
                break
            info = yield from self._fetch_again()
        self._answering_version = None
        return info

    def is_right_for(self, info: ModelInfo, answered: str) -> bool:
        """Whether the indices sent by that description are right for the version that answered."""
        if self._to_indices is None or answered == info.version:
            return True
        other = self._catalogue.version(info.name, answered)
        if other and self._indices_in(other) == self._indices_in(info):
            return True
        # At every other attempt, keep the description: of two replicas in turn, the other answers.
        if self._attempts % 2:
            self._answering_version = answered
            if other:
                self._catalogue.store(self._model, self._version, other)
        return False

    def forget(self) -> None:
        """Removes the description, which may be outdated; the next attempt requests it again."""
        self._catalogue.forget(self._model, self._version)

    def _fetch_again(self) -> Plan[ModelInfo]:
        self.forget()
        return (yield from self._catalogue.model(self._model, self._version))

    def follow(self, plan: Callable[[ModelInfo], Plan[T]]) -> Plan[T]:
        """Runs a plan that pins all requests to the version of its first answer; its result."""
        rounds = 0
        while True:
            asking, answer = yield from self._ask_first(plan)
            try:
                while True:
                    answer = yield asking.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            except ModelNotFound:
                rounds += 1
                if rounds == MAX_ROUNDS:
                    raise
                self.forget()

    def _ask_first(self, plan: Callable[[ModelInfo], Plan[T]]) -> Plan[tuple[Plan[T], Any]]:
        """A started plan, and its first answer from a version that the labels were meant for."""
        while True:
            info = yield from self.begin_attempt()
            asking = plan(info)
            try:
                request = next(asking)
            except InvalidInput:
                self.forget()
                raise
            answer = yield request
            if self.is_right_for(info, answer.model_version):
                return asking, answer

    def _indices_in(self, info: ModelInfo) -> tuple[Any, ...] | None:
        """The label indices in that version, in a tuple; None if it lacks these labels."""
        try:
            return (self._to_indices(info),) if self._to_indices else ()
        except InvalidInput:
            return None


def asking_replicas(plan: Plan[T], replicas: int) -> Plan[T]:
    """The same plan; a request that raises ModelNotFound is tried on up to `replicas` replicas."""
    step: Callable[[], Request] = partial(next, plan)
    while True:
        try:
            request = step()
        except StopIteration as end:
            result: T = end.value
            return result
        for left in reversed(range(replicas)):
            try:
                step = partial(plan.send, (yield request))
                break
            except ModelNotFound as error:
                if not left:
                    step = partial(plan.throw, error)


def models() -> Plan[list[ModelInfo]]:
    """The descriptions of all served versions."""
    answer: models_pb2.ListModelsResponse = yield models_pb2.ListModelsRequest()
    return [codec.model_info(message) for message in answer.models]


def _only_model_name() -> Plan[str]:
    names = sorted({info.name for info in (yield from models())})
    if len(names) != 1:
        raise InvalidInput("model", f"name one of {', '.join(names) or 'none: none is served'}")
    return names[0]


class Parts(Generic[G]):
    """The requests of one Generate or Complete question that is split, one after another.

    The first answer fixes the version and the seed of all further requests, and of the remainder
    of a request whose stream broke.

    Attributes:
        info: description of the model; set once the first request has been made.
    """

    info: ModelInfo

    def __init__(
        self,
        catalogue: Catalogue,
        model: str | None,
        version: str | None,
        label: Label | None,
        divide: Callable[[ModelInfo], Iterator[G]],
        replicas: int = 1,
    ) -> None:
        """The parts of a question.

        Args:
            catalogue: cache of model descriptions.
            model: name of the model.
            version: version of the model.
            label: name or index of the label.
            divide: maps a description to the requests for that model.
            replicas: number of replicas to ask in turn if the version is not found.
        """
        named = isinstance(label, str)
        to_indices = (lambda info: index_of(label, info.labels)) if named else None
        self._resolver = LabelResolver(catalogue, model, version, to_indices)
        self._divide: Callable[[ModelInfo], Iterator[G]] = divide
        self._requests: Iterator[G] | None = None
        self._pinned: tuple[str, int] | None = None
        self._asked: G | None = None
        self._received = 0  # pictures received for the last request
        self._resend: G | None = None
        self._replicas = self._left = replicas

    def next(self) -> Plan[G | None]:
        """The next request, which may be the first one again; None if all have been answered."""
        if self._requests is None:
            self.info = yield from self._resolver.begin_attempt()
            self._requests = self._divide(self.info)
        try:
            request, self._resend = self._resend or next(self._requests, None), None
        except InvalidInput:
            self._resolver.forget()
            raise
        if request is not None and self._pinned:
            request.model_version, request.seed = self._pinned
        self._asked, self._received = request, 0
        return request

    def accept(self, answer: Drawn) -> bool:
        """Whether an answer is usable; after an unusable one, all requests are made again."""
        if self._requests is not None and not self._pinned:
            if self._resolver.is_right_for(self.info, answer.model_version):
                self._pinned = answer.model_version, answer.seed
            else:
                self._requests = None
        if self._requests is None:
            return False
        self._received += answer.images.shape[0]
        self._left = self._replicas
        return True

    def try_next_replica(self) -> bool:
        """Whether to try another replica after ModelNotFound; if so, the request comes next."""
        self._left -= 1
        self.repeat()
        return self._left > 0 and not self._received

    def repeat(self) -> None:
        """Makes the last request the next one again."""
        self._resend = self._asked

    def resume(self) -> bool:
        """Whether a broken Generate stream had delivered pictures; if so, the rest comes next.

        The same seed gives the same remaining pictures on any replica.
        """
        asked = self._asked
        if not self._received or not isinstance(asked, generation_pb2.GenerateRequest):
            return False
        if self._received < asked.count:
            asked.count -= self._received
            asked.first_index += self._received
            self._resend = asked
        return True
