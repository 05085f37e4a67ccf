"""What a client has learnt of a server's models, and what labels given by name mean to each.

A plan is a generator: it yields requests, is sent their answers, and returns what the caller
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from likely import codec
from likely.answers import ModelInfo
from likely.client.values import Label, built, index_of
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
# A request goes out and its own answer comes in: a pairing that Generator cannot type.
Plan = Generator[Request, Any, T]

TURNS = 8  # of a question whose answers come of other versions than the one described
REPLICAS = 16  # that are asked for a version, one after another, until it is found nowhere
ROUNDS = 3  # of a question whose version goes away before all of its parts are answered


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
        answer: models_pb2.GetModelResponse = yield built(
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
    may number its labels otherwise, the question is put anew. So it is where the version that
    answered first is found no more.
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

    def forget(self) -> None:
        """Has the description asked for anew when the question is put next: it may be old."""
        self._catalogue.forget(self._model, self._version)

    def _anew(self) -> Plan[ModelInfo]:
        self.forget()
        return (yield from self._catalogue.model(self._model, self._version))

    def follow(self, plan: Callable[[ModelInfo], Plan[T]]) -> Plan[T]:
        """What a plan gives that pins all its requests to the version of its first answer."""
        rounds = 0
        while True:
            asking, answer = yield from self._first(plan)
            try:
                while True:
                    answer = yield asking.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            except ModelNotFound:
                rounds += 1
                if rounds == ROUNDS:
                    raise
                self.forget()

    def _first(self, plan: Callable[[ModelInfo], Plan[T]]) -> Plan[tuple[Plan[T], Any]]:
        """A plan begun, and the first answer that holds."""
        while True:
            info = yield from self.begin()
            asking = plan(info)
            try:
                request = next(asking)
            except InvalidInput:
                self.forget()
                raise
            answer = yield request
            if self.holds(info, answer.model_version):
                return asking, answer

    def _means(self, info: ModelInfo) -> tuple[Any, ...] | None:
        """What the labels are in that version; None if it has no such labels."""
        try:
            return (self._meant(info),) if self._meant else ()
        except InvalidInput:
            return None


def seeking(plan: Plan[T], replicas: int) -> Plan[T]:
    """The same plan; what one replica does not find, up to so many are asked for in turn."""
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
    """Every version that is served."""
    answer: models_pb2.ListModelsResponse = yield models_pb2.ListModelsRequest()
    return [codec.model_info(message) for message in answer.models]


def _only() -> Plan[str]:
    names = sorted({info.name for info in (yield from models())})
    if len(names) != 1:
        raise InvalidInput("model", f"name one of {', '.join(names) or 'none: none is served'}")
    return names[0]


class Parts(Generic[G]):
    """The requests that one question with a label is divided into, as their answers need them.

    The first answer settles version and seed of all others, and of what is left of a request whose
    stream broke off.

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
        replicas: int = 1,
    ) -> None:
        """The parts of a question.

        Args:
            catalogue: where descriptions come from.
            model: its name.
            version: its version.
            label: its name or index.
            divide: the requests to a model so described.
            replicas: that are asked in turn where one does not find the version.
        """
        named = isinstance(label, str)
        meant = (lambda info: index_of(label, info.labels)) if named else None
        self._naming = Naming(catalogue, model, version, meant)
        self._divide: Callable[[ModelInfo], Iterator[G]] = divide
        self._requests: Iterator[G] | None = None
        self._settled: tuple[str, int] | None = None
        self._asked: G | None = None
        self._came = 0  # pictures of what was asked last
        self._rest: G | None = None
        self._replicas = self._left = replicas

    def next(self) -> Plan[G | None]:
        """The next request, which may be the first again; None where there is no more."""
        if self._requests is None:
            self.info = yield from self._naming.begin()
            self._requests = self._divide(self.info)
        try:
            request, self._rest = self._rest or next(self._requests, None), None
        except InvalidInput:
            self._naming.forget()
            raise
        if request is not None and self._settled:
            request.model_version, request.seed = self._settled
        self._asked, self._came = request, 0
        return request

    def takes(self, answer: Drawn) -> bool:
        """Whether an answer is to the question; after one that is not, all are asked anew."""
        if self._requests is not None and not self._settled:
            if self._naming.holds(self.info, answer.model_version):
                self._settled = answer.model_version, answer.seed
            else:
                self._requests = None
        if self._requests is None:
            return False
        self._came += answer.images.shape[0]
        self._left = self._replicas
        return True

    def seeks(self) -> bool:
        """Whether another replica is to be asked for what one did not find; then it comes next."""
        self._left -= 1
        self.repeats()
        return self._left > 0 and not self._came

    def repeats(self) -> None:
        """Has what was asked last come next once more."""
        self._rest = self._asked

    def resumes(self) -> bool:
        """Whether draws whose stream ended too soon had begun to come; then the others come next.

        The same seed gives the pictures that were still to come, whoever draws them.
        """
        asked = self._asked
        if not self._came or not isinstance(asked, generation_pb2.GenerateRequest):
            return False
        if self._came < asked.count:
            asked.count -= self._came
            asked.first_index += self._came
            self._rest = asked
        return True
