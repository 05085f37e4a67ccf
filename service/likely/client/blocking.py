"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy.typing as npt

from likely import codec
from likely.answers import (
    A,
    Classifications,
    Completions,
    Draws,
    Features,
    Guarantee,
    LabelRule,
    ModelInfo,
    Redrawings,
    Scores,
    Traversal,
    joined,
)
from likely.client import catalogue, plans, values
from likely.client.channels import Address, File, Route, Token
from likely.client.feeds import BlockingFeed
from likely.client.line import ADDRESS, TIMEOUT, Line, Repeats, positive
from likely.client.plans import Held, Rule
from likely.client.values import Label
from likely.errors import (
    DeadlineExceeded,
    LikelyError,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from likely.v1.generation_pb2 import CompleteRequest, GenerateRequest

T = TypeVar("T")


class Client:
    """A synchronous client; may be used from several threads, and as a context manager.

    Every method takes `model` and `version`. No model means the server's only
    one; no version means the one that the server serves by default.
    """

    def __init__(
        self,
        address: Address = ADDRESS,
        *,
        timeout: float = TIMEOUT,
        retries: bool = True,
        token: Token | None = None,
        plaintext_token: bool = False,
        tls: bool = False,
        ca: File | None = None,
        certificate: File | None = None,
        key: File | None = None,
        server_name: str | None = None,
    ) -> None:
        """A client of one server; connects at the first question.

        Args:
            address: host:port, or any name that gRPC resolves; of several replicas, all
                their IP addresses, or `dns:///name:port` for all that the name stands for
                (`likely.client.channels`).
            timeout: seconds that one request may take, retries included; in a feed, that the next
                answer may, counted from the one before.
            retries: whether what is refused for now, and an answer that is cut off, is asked for
                again before it is an error, and a feed's stream that breaks is begun anew.
            token: a bearer token, or what gives one for each request.
            plaintext_token: whether it may go out unencrypted, as to a proxy that has TLS.
            tls: whether to encrypt; `ca`, `certificate` and `server_name` imply it.
            ca: PEM file of the authorities that may vouch for the server; None for gRPC's own.
                It is read again when it changes, and so are the next two.
            certificate: PEM file that this client shows of itself.
            key: PEM file of that certificate's key.
            server_name: that the server's certificate has to bear; None for the address's own.

        Raises:
            SettingsError: that is no address, the timeout is not positive, a file cannot be
                read, one of certificate and key is missing, several addresses are encrypted
                and have no server name, or the token would go unencrypted to another machine.
        """
        self._timeout = positive(timeout)
        self._retries = retries
        self._catalogue = catalogue.Catalogue()
        self._route = Route(
            address,
            token=token,
            plaintext_token=plaintext_token,
            tls=tls,
            ca=ca,
            certificate=certificate,
            key=key,
            server_name=server_name,
        )
        self._replicas = catalogue.REPLICAS if self._route.fleet else 1
        opening = partial(self._route.channel, once=not retries)
        self._line = Line(opening, self._route.edition, address, self._catalogue)

    def score(
        self,
        images: npt.ArrayLike,
        *,
        alpha: float | None = None,
        surprise: bool = False,
        guarantee: Held = Guarantee.MARGINAL,
        model: str | None = None,
        version: str | None = None,
    ) -> Scores:
        """log p(x), p-value and verdict of every picture.

        Args:
            images: uint8 (n, c, h, w), or (n, h, w) for one channel.
            alpha: accepted rate of false rejections; None for the server's default.
            surprise: whether to give -log p of every pixel.
            guarantee: what alpha is to hold for: on average (`marginal`), or with 95 % confidence
                (`pac`).
            model: its name.
            version: its version.

        Raises:
            LikelyError: InvalidInput, ModelNotFound, NotAnswered, Overloaded,
                Unavailable, DeadlineExceeded, AccessDenied or ServerFault.
        """
        plan = plans.score(self._catalogue, images, alpha, surprise, guarantee, model, version)
        return self._follow(plan)

    def classify(
        self,
        images: npt.ArrayLike,
        *,
        alpha: float | None = None,
        priors: npt.ArrayLike | None = None,
        min_posterior: float = 0.0,
        guarantee: Held = Guarantee.MARGINAL,
        rule: Rule = LabelRule.GENERATIVE,
        both: bool = False,
        model: str | None = None,
        version: str | None = None,
    ) -> Classifications:
        """log p(x|y), posterior, label and verdict of every picture.

        Args:
            images: uint8 (n, c, h, w), or (n, h, w) for one channel.
            alpha: accepted rate of false rejections; None for the server's default.
            priors: p(y) in the model's order; None for the model's own.
            min_posterior: the smallest posterior at which a label is assigned.
            guarantee: what alpha is to hold for: on average (`marginal`), or with 95 % confidence
                (`pac`).
            rule: what assigns the label: Bayes' rule over p(x|y), or p(y|x) itself.
            both: whether to give log p(x|y) by the other rule too.
            model: its name.
            version: its version.

        Raises:
            LikelyError: as `score`.
        """
        plan = plans.classify(
            self._catalogue,
            images,
            alpha,
            priors,
            min_posterior,
            guarantee,
            rule,
            both,
            model,
            version,
        )
        return self._follow(plan)

    def score_stream(
        self,
        images: Iterable[npt.ArrayLike],
        *,
        alpha: float | None = None,
        surprise: bool = False,
        guarantee: Held = Guarantee.MARGINAL,
        model: str | None = None,
        version: str | None = None,
    ) -> Iterator[Scores | LikelyError]:
        """What `score` says of each item of a feed, in its order, as the answers come.

        One stream carries what would be many requests, for about half the work. What the
        server refuses comes back as the error, in its item's place, and the feed goes on;
        where the stream breaks, what has no answer is asked again on a new one, unless the
        client is one without retries.

        Args:
            images: each item as `score` takes it, at most as large as one request
                (`ModelInfo.limits`); read in a thread, a little ahead of the answers.
            alpha: accepted rate of false rejections; None for the server's default.
            surprise: whether to give -log p of every pixel.
            guarantee: what alpha is to hold for: on average (`marginal`), or with 95 % confidence
                (`pac`).
            model: its name.
            version: its version.

        Raises:
            LikelyError: the server cannot be reached any more, or let nobody in; no item
                had an answer for the client's timeout; or the feed itself raised.
        """
        info = self.model(model, version)
        questions = plans.score_questions(info, alpha, surprise, guarantee, version)
        return self._feed(images, questions)

    def classify_stream(
        self,
        images: Iterable[npt.ArrayLike],
        *,
        alpha: float | None = None,
        priors: npt.ArrayLike | None = None,
        min_posterior: float = 0.0,
        guarantee: Held = Guarantee.MARGINAL,
        rule: Rule = LabelRule.GENERATIVE,
        both: bool = False,
        model: str | None = None,
        version: str | None = None,
    ) -> Iterator[Classifications | LikelyError]:
        """What `classify` says of each item of a feed, as `score_stream`.

        Args:
            images: each item as `classify` takes it, at most as large as one request.
            alpha: accepted rate of false rejections; None for the server's default.
            priors: p(y) in the model's order; None for the model's own.
            min_posterior: the smallest posterior at which a label is assigned.
            guarantee: what alpha is to hold for: on average (`marginal`), or with 95 % confidence
                (`pac`).
            rule: what assigns the label: Bayes' rule over p(x|y), or p(y|x) itself.
            both: whether to give log p(x|y) by the other rule too.
            model: its name.
            version: its version.

        Raises:
            LikelyError: as `score_stream`.
        """
        info = self.model(model, version)
        questions = plans.classify_questions(
            info, alpha, priors, min_posterior, guarantee, rule, both, version
        )
        return self._feed(images, questions)

    def encode(
        self,
        images: npt.ArrayLike,
        *,
        labels: npt.ArrayLike | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Features:
        """Mean and log-variance of the latent features of every picture.

        Args:
            images: uint8 (n, c, h, w), or (n, h, w) for one channel.
            labels: of every picture, names or indices; None for the most probable ones.
            model: its name.
            version: its version.

        Raises:
            LikelyError: as `score`.
        """
        return self._follow(plans.encode(self._catalogue, images, labels, model, version))

    def decode(
        self,
        features: npt.ArrayLike,
        *,
        labels: npt.ArrayLike | None = None,
        draws: int = 0,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Redrawings:
        """What features stand for: the distribution of every pixel, and draws.

        Args:
            features: float (n, z).
            labels: of every row, names or indices, for a model that decodes under one;
                -1 throughout, as `encode` tells of a model that does not, is none.
            draws: of each row; their mean and deviation come anyway.
            seed: one seed gives the same draws; None lets the server pick one.
            first_index: of the first row.
            temperature: multiplies the noise, in [0, 2]; None is 1.
            model: its name.
            version: its version.

        Raises:
            LikelyError: as `score`.
        """
        how = plans.Redrawing(draws, seed, first_index, temperature, version)
        return self._follow(plans.decode(self._catalogue, features, labels, how, model))

    def traverse(
        self,
        images: npt.ArrayLike,
        direction: str,
        points: npt.ArrayLike,
        *,
        labels: npt.ArrayLike | None = None,
        draws: int = 0,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Traversal:
        """Pictures redrawn at points along a direction, and where they themselves lie.

        Args:
            images: uint8 (n, c, h, w), or (n, h, w) for one channel.
            direction: the name of one of the model's (`ModelInfo.directions`).
            points: how far to go, (points,); 0 is the picture's own place.
            labels: of every picture, names or indices; None for the most probable ones.
            draws: at each point; their mean and deviation come anyway.
            seed: one seed gives the same draws; None lets the server pick one.
            first_index: of the first picture.
            temperature: multiplies the noise, in [0, 2]; None is 1.
            model: its name.
            version: its version.

        Raises:
            LikelyError: as `score`.
        """
        how = plans.Redrawing(draws, seed, first_index, temperature, version)
        return self._follow(
            plans.traverse(self._catalogue, images, direction, points, labels, how, model)
        )

    def interpolate(
        self,
        images: npt.ArrayLike,
        others: npt.ArrayLike,
        points: npt.ArrayLike,
        *,
        labels: npt.ArrayLike | None = None,
        other_labels: npt.ArrayLike | None = None,
        draws: int = 0,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Redrawings:
        """Pictures redrawn on the straight line between the features of two.

        Args:
            images: uint8 (n, c, h, w), or (n, h, w) for one channel; at point 0.
            others: as many; at point 1.
            points: (points,), in [0, 1].
            labels: of `images`; None for the most probable ones.
            other_labels: of `others`, likewise.
            draws: at each point; their mean and deviation come anyway.
            seed: one seed gives the same draws; None lets the server pick one.
            first_index: of the first pair.
            temperature: multiplies the noise, in [0, 2]; None is 1.
            model: its name.
            version: its version.

        Raises:
            LikelyError: as `score`.
        """
        how = plans.Redrawing(draws, seed, first_index, temperature, version)
        return self._follow(
            plans.interpolate(
                self._catalogue, images, others, points, labels, other_labels, how, model
            )
        )

    def generate(
        self,
        count: int,
        *,
        label: Label | None = None,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float | None = None,
        self_check: bool = False,
        acceptance: bool = False,
        alpha: float | None = None,
        max_draws: int | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Draws:
        """Pictures drawn from the model.

        Args:
            count: how many.
            label: of all of them, its name or index; None draws each from the model's priors.
            seed: one seed gives the same pictures; None lets the server pick one.
            first_index: of the first picture.
            temperature: multiplies the noise, in [0, 2]; None is 1.
            self_check: redraw what the server would reject, or assign another label.
            acceptance: draw from p(x), and keep with probability p(y|x); in place of a
                conditional model, and without a self-check.
            alpha: of the self-check; None for the server's default.
            max_draws: of one picture, of the self-check or by acceptance; None for the server's
                default.
            model: its name.
            version: its version.

        Raises:
            LikelyError: as `score`.
        """
        stream = self.generate_stream(
            count,
            label=label,
            seed=seed,
            first_index=first_index,
            temperature=temperature,
            self_check=self_check,
            acceptance=acceptance,
            alpha=alpha,
            max_draws=max_draws,
            model=model,
            version=version,
        )
        return joined(list(stream))

    def generate_stream(
        self,
        count: int,
        *,
        label: Label | None = None,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float | None = None,
        self_check: bool = False,
        acceptance: bool = False,
        alpha: float | None = None,
        max_draws: int | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Iterator[Draws]:
        """The pictures of `generate`, chunk by chunk as they are drawn."""
        check, kept = plans.checks(self_check, acceptance, alpha, max_draws)

        def divide(info: ModelInfo) -> Iterator[GenerateRequest]:
            return plans.generations(
                info, version, label, count, seed, first_index, temperature, check, kept
            )

        parts = catalogue.Parts(self._catalogue, model, version, label, divide, self._replicas)
        repeats = self._repeats()
        while (request := self._follow(parts.next())) is not None:
            call = self._ask(request, repeats.left())
            try:
                with self._line.told():
                    for message in call:
                        repeats.reset()
                        if not parts.takes(message):
                            break
                        yield codec.draws(message)
            except (Unavailable, Overloaded, DeadlineExceeded) as error:
                if self._retries and parts.resumes():
                    time.sleep(repeats.rest(error))
                else:
                    time.sleep(repeats.pause(error))
                    parts.repeats()
            except ModelNotFound:
                if not parts.seeks():
                    raise
            finally:
                call.cancel()  # of a reader that left; ended calls do not mind

    def complete(
        self,
        images: npt.ArrayLike,
        mask: npt.ArrayLike,
        *,
        label: Label | None = None,
        completions: int = 1,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float | None = None,
        proposals: int = 1,
        model: str | None = None,
        version: str | None = None,
    ) -> Completions:
        """Pictures with their open pixels drawn from the model.

        Args:
            images: uint8 (n, c, h, w), or (n, h, w) for one channel.
            mask: true where a pixel is fixed; of the images' shape, or one that broadcasts to it.
            label: of all pictures, its name or index; None for p(x).
            completions: of each picture.
            seed: one seed gives the same completions; None lets the server pick one.
            first_index: of the first picture.
            temperature: multiplies the noise, in [0, 2]; None is 1.
            proposals: behind each completion; 1 is exact where no fixed pixel follows an
                open one in raster order.
            model: its name.
            version: its version.

        Raises:
            LikelyError: as `score`.
        """
        x, how = values.pixels(images), (temperature, proposals)

        def divide(info: ModelInfo) -> Iterator[CompleteRequest]:
            return plans.completions(
                info, version, x, mask, label, completions, seed, first_index, *how
            )

        parts = catalogue.Parts(self._catalogue, model, version, label, divide, self._replicas)
        found: list[Completions] = []
        while (request := self._follow(parts.next())) is not None:
            try:
                answers = self._answers(request)
            except ModelNotFound:
                if not parts.seeks():
                    raise
                continue
            found += [codec.completions(answer) for answer in answers if parts.takes(answer)]
        return plans.completed(found, x, completions, seed, parts.info)

    def models(self) -> list[ModelInfo]:
        """Every version that is served, sorted by name.

        Raises:
            LikelyError: as `score`.
        """
        return self._follow(catalogue.models())

    def model(self, model: str | None = None, version: str | None = None) -> ModelInfo:
        """What one model version takes, gives and promises; asked for once, until it is old.

        Raises:
            LikelyError: as `score`.
        """
        return self._follow(self._catalogue.model(model, version))

    def close(self) -> None:
        """Ends the connection and whatever runs on it."""
        self._line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _follow(self, plan: catalogue.Plan[T]) -> T:
        plan = catalogue.seeking(plan, self._replicas)
        step: Callable[[], catalogue.Request] = partial(next, plan)
        while True:
            try:
                request = step()
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                step = partial(plan.send, self._answer(request))
            except ModelNotFound as error:
                step = partial(plan.throw, error)

    def _answer(self, request: Any) -> Any:
        """The answer, which is asked for again where it is cut off."""
        repeats = self._repeats()
        while True:
            try:
                with self._line.told():
                    return self._ask(request, repeats.left())
            except Unavailable as error:
                time.sleep(repeats.pause(error))

    def _answers(self, request: Any) -> list[Any]:
        """All messages of an answer, which is asked for as a whole again where it ends too soon."""
        repeats = self._repeats()
        while True:
            messages: list[Any] = []
            try:
                with self._line.told():
                    for message in self._ask(request, repeats.left()):
                        messages.append(message)  # noqa: PERF402 (one that fails is to leave them)
                    return messages
            except (Unavailable, Overloaded) as error:
                time.sleep(repeats.pause(error, begun=bool(messages)))

    def _repeats(self) -> Repeats:
        return Repeats(self._timeout, self._retries)

    def _ask(self, request: Any, timeout: float) -> Any:
        call = self._line.call(type(request))
        return call(request, timeout=timeout, metadata=self._route.metadata())

    def _feed(
        self, images: Iterable[npt.ArrayLike], questions: plans.Questions[A]
    ) -> Iterator[A | LikelyError]:
        def begin(messages: Iterator[Any]) -> Any:
            call = self._line.call(questions.stream)
            return call(messages, metadata=self._route.metadata())

        feed = BlockingFeed(begin, questions, self._timeout, self._retries, self._line.error)
        return feed.outcomes(images)
