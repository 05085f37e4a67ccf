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
from likely.client.plans import GuaranteeLike, RuleLike
from likely.client.rpcs import ADDRESS, TIMEOUT, Retries, ServerRpcs, valid_timeout
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
    """A synchronous client, safe to use from several threads; also a context manager.

    Every method takes `model` and `version`. Without `model`, the server must have a single model.
    `version` is a version or one of the labels `stable` and `canary`; without it, the server's
    default version answers.
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
        """A client of one server or its replicas; it connects at the first request.

        Args:
            address: host:port, or any name that gRPC resolves. For several replicas: a sequence of
                all their IP addresses with ports, or `dns:///name:port` for all addresses of that
                name (`likely.client.channels`).
            timeout: maximum duration of one request with its retries, in seconds; in a feed, of
                the next answer, counted from the previous one.
            retries: whether a request is repeated that the server refuses for now or whose answer
                is cut off, and a feed's stream is reopened when it breaks.
            token: a bearer token, or a function called for the token of each request.
            plaintext_token: whether the token may be sent unencrypted, for example to a proxy that
                adds TLS.
            tls: whether to encrypt; `ca`, `certificate` and `server_name` imply it.
            ca: PEM file of the certificate authorities to trust; None for gRPC's own. This file,
                `certificate` and `key` are reread when they change.
            certificate: PEM file of the client's own certificate.
            key: PEM file of that certificate's key.
            server_name: name that the server's certificate must contain; None for the host of
                the address.

        Raises:
            SettingsError: the address is malformed, the timeout is not positive or is too long,
                a file cannot be read, only one of certificate and key is given, several
                addresses are encrypted without a server name, or the token would be sent
                unencrypted to another machine.
        """
        self._timeout = valid_timeout(timeout)
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
        self._rpcs = ServerRpcs(opening, self._route.edition, address, self._catalogue)

    def score(
        self,
        images: npt.ArrayLike,
        *,
        alpha: float | None = None,
        surprise: bool = False,
        guarantee: GuaranteeLike = Guarantee.MARGINAL,
        model: str | None = None,
        version: str | None = None,
    ) -> Scores:
        """log p(x), p-value and verdict of every picture.

        Args:
            images: uint8 (n, c, h, w), or (n, h, w) for one channel.
            alpha: accepted rate of false rejections; None for the server's default.
            surprise: whether to return -log p of every pixel, in nats.
            guarantee: what alpha is guaranteed for: on average over calibrations (`marginal`), or
                with 95 % confidence for this one (`pac`).
            model: name of the model.
            version: version of the model.

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
        guarantee: GuaranteeLike = Guarantee.MARGINAL,
        rule: RuleLike = LabelRule.GENERATIVE,
        both: bool = False,
        model: str | None = None,
        version: str | None = None,
    ) -> Classifications:
        """log p(x|y), posterior, label and verdict of every picture.

        Args:
            images: uint8 (n, c, h, w), or (n, h, w) for one channel.
            alpha: accepted rate of false rejections; None for the server's default.
            priors: p(y), (labels,), in the model's order; None for the model's own.
            min_posterior: smallest posterior at which a label is assigned, in [0, 1).
            guarantee: what alpha is guaranteed for: on average over calibrations (`marginal`), or
                with 95 % confidence for this one (`pac`).
            rule: the model that assigns the label: Bayes' rule over p(x|y) (`generative`), or
                p(y|x) itself (`discriminative`).
            both: whether to also return log p(x|y) by the other rule.
            model: name of the model.
            version: version of the model.

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
        guarantee: GuaranteeLike = Guarantee.MARGINAL,
        model: str | None = None,
        version: str | None = None,
    ) -> Iterator[Scores | LikelyError]:
        """Scores each item of a feed; yields the outcomes in the order of the items.

        One stream replaces many requests, at about half the cost. If the server refuses an item,
        its outcome is the error, and the feed continues. If the stream breaks, the items without
        an answer are sent again on a new stream, unless the client has `retries=False`.

        Args:
            images: items, each as `score` takes it and no larger than one request may be
                (`ModelInfo.limits`). A thread reads them slightly ahead of the answers.
            alpha: accepted rate of false rejections; None for the server's default.
            surprise: whether to return -log p of every pixel, in nats.
            guarantee: what alpha is guaranteed for: on average over calibrations (`marginal`), or
                with 95 % confidence for this one (`pac`).
            model: name of the model.
            version: version of the model.

        Raises:
            LikelyError: the server can no longer be reached or denies access, or no item got an
                answer for the client's timeout.
            Exception: the iterable of items raised it.
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
        guarantee: GuaranteeLike = Guarantee.MARGINAL,
        rule: RuleLike = LabelRule.GENERATIVE,
        both: bool = False,
        model: str | None = None,
        version: str | None = None,
    ) -> Iterator[Classifications | LikelyError]:
        """Classifies each item of a feed; works as `score_stream` does.

        Args:
            images: items, each as `classify` takes it and no larger than one request may be.
            alpha: accepted rate of false rejections; None for the server's default.
            priors: p(y), (labels,), in the model's order; None for the model's own.
            min_posterior: smallest posterior at which a label is assigned, in [0, 1).
            guarantee: what alpha is guaranteed for: on average over calibrations (`marginal`), or
                with 95 % confidence for this one (`pac`).
            rule: the model that assigns the label: Bayes' rule over p(x|y) (`generative`), or
                p(y|x) itself (`discriminative`).
            both: whether to also return log p(x|y) by the other rule.
            model: name of the model.
            version: version of the model.

        Raises:
            LikelyError, Exception: as `score_stream`.
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
            labels: (n,), label of every picture, names or indices, for a model whose features
                depend on it; None for the most probable ones.
            model: name of the model.
            version: version of the model.

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
        """The distribution of every pixel given latent features, and draws from it.

        Args:
            features: float (n, z).
            labels: (n,), label of every row, names or indices, for a model that decodes under a
                label. All -1, as `encode` returns for models without labels, counts as None.
            draws: number of pictures drawn for each row, beside the mean and deviation.
            seed: seed of the draws; the same seed gives the same draws. None lets the server pick
                one.
            first_index: index of the first row, for splitting a job.
            temperature: factor on the noise, in [0, 2]; None is 1.
            model: name of the model.
            version: version of the model.

        Raises:
            LikelyError: as `score`.
        """
        how = plans.RedrawSettings(draws, seed, first_index, temperature, version)
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
        """Pictures redrawn at points along a direction, and their own positions along it.

        Args:
            images: uint8 (n, c, h, w), or (n, h, w) for one channel.
            direction: name of one of the model's directions (`ModelInfo.directions`).
            points: (points,), distances to move, in the direction's unit, each in [-100, 100]; 0
                is the picture's own position.
            labels: (n,), label of every picture, names or indices; None for the most probable
                ones.
            draws: number of pictures drawn at each point, beside the mean and deviation.
            seed: seed of the draws; the same seed gives the same draws. None lets the server pick
                one.
            first_index: index of the first picture, for splitting a job.
            temperature: factor on the noise, in [0, 2]; None is 1.
            model: name of the model.
            version: version of the model.

        Raises:
            LikelyError: as `score`.
        """
        how = plans.RedrawSettings(draws, seed, first_index, temperature, version)
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
        """Pictures redrawn on the straight line between the features of two pictures.

        Args:
            images: pictures at point 0: uint8 (n, c, h, w), or (n, h, w) for one channel.
            others: pictures at point 1, as many as `images`.
            points: (points,), points on the line, each in [0, 1].
            labels: (n,), label of each of `images`, names or indices; None for the most probable
                ones.
            other_labels: (n,), the same for `others`.
            draws: number of pictures drawn at each point, beside the mean and deviation.
            seed: seed of the draws; the same seed gives the same draws. None lets the server pick
                one.
            first_index: index of the first pair, for splitting a job.
            temperature: factor on the noise, in [0, 2]; None is 1.
            model: name of the model.
            version: version of the model.

        Raises:
            LikelyError: as `score`.
        """
        how = plans.RedrawSettings(draws, seed, first_index, temperature, version)
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
            count: number of pictures, 1 or more.
            label: name or index of the label of all pictures; None draws a label for each picture
                from the model's priors.
            seed: seed of the pictures; the same seed gives the same pictures. None lets the server
                pick one.
            first_index: index of the first picture, for splitting a job.
            temperature: factor on the noise, in [0, 2]; None is 1.
            self_check: redraw pictures that the server would reject or label otherwise.
            acceptance: draw from p(x) and keep a draw with probability p(y|x), instead of using a
                sampler that takes the label; not together with `self_check`.
            alpha: alpha of the self-check; None for the server's default.
            max_draws: maximum number of draws of one picture, for the self-check or acceptance;
                None for the server's default.
            model: name of the model.
            version: version of the model.

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
        """Yields the pictures of `generate` in chunks, as they are drawn."""
        check, kept = plans.build_checks(self_check, acceptance, alpha, max_draws)

        def divide(info: ModelInfo) -> Iterator[GenerateRequest]:
            return plans.generate_requests(
                info, version, label, count, seed, first_index, temperature, check, kept
            )

        parts = catalogue.Parts(self._catalogue, model, version, label, divide, self._replicas)
        retries = self._fresh_retries()
        while (request := self._follow(parts.next())) is not None:
            call = self._ask(request, retries.time_left())
            try:
                with self._rpcs.translated_errors():
                    for message in call:
                        retries.reset()
                        if not parts.accept(message):
                            break
                        yield codec.draws(message)
            except (Unavailable, Overloaded, DeadlineExceeded) as error:
                if self._retries and parts.resume():
                    time.sleep(retries.resume_delay(error))
                else:
                    time.sleep(retries.retry_delay(error))
                    parts.repeat()
            except ModelNotFound:
                if not parts.try_next_replica():
                    raise
            finally:
                call.cancel()  # if the reader left early; no effect on a call that has ended

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
            mask: bool, true where a pixel is fixed, in a shape that broadcasts to that of the
                images.
            label: name or index of the label of all pictures; None for p(x).
            completions: number of completions of each picture.
            seed: seed of the completions; the same seed gives the same completions. None lets the
                server pick one.
            first_index: index of the first picture, for splitting a job.
            temperature: factor on the noise, in [0, 2]; None is 1.
            proposals: number of candidates for each completion, in [1, 256]; 1 is exact if no
                fixed pixel follows an open one in raster order, and the model does not draw a
                sketch of the whole picture first.
            model: name of the model.
            version: version of the model.

        Raises:
            LikelyError: as `score`.
        """
        x, how = values.pixels(images), (temperature, proposals)

        def divide(info: ModelInfo) -> Iterator[CompleteRequest]:
            return plans.complete_requests(
                info, version, x, mask, label, completions, seed, first_index, *how
            )

        parts = catalogue.Parts(self._catalogue, model, version, label, divide, self._replicas)
        received: list[Completions] = []
        while (request := self._follow(parts.next())) is not None:
            try:
                answers = self._answers(request)
            except ModelNotFound:
                if not parts.try_next_replica():
                    raise
                continue
            received += [codec.completions(answer) for answer in answers if parts.accept(answer)]
        return plans.join_completions(received, x, completions, seed, parts.info)

    def models(self) -> list[ModelInfo]:
        """The descriptions of all served versions, sorted by name.

        Raises:
            LikelyError: as `score`.
        """
        return self._follow(catalogue.models())

    def model(self, model: str | None = None, version: str | None = None) -> ModelInfo:
        """The description of one model version; cached until it turns out to be outdated.

        Raises:
            LikelyError: as `score`.
        """
        return self._follow(self._catalogue.model(model, version))

    def close(self) -> None:
        """Closes the connection and ends the calls that run on it."""
        self._rpcs.close()

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
        plan = catalogue.asking_replicas(plan, self._replicas)
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
        """The answer; the request is repeated if the connection ends before it."""
        retries = self._fresh_retries()
        while True:
            try:
                with self._rpcs.translated_errors():
                    return self._ask(request, retries.time_left())
            except Unavailable as error:
                time.sleep(retries.retry_delay(error))

    def _answers(self, request: Any) -> list[Any]:
        """All messages of a streamed answer; if it ends too soon, the whole request is repeated."""
        retries = self._fresh_retries()
        while True:
            messages: list[Any] = []
            try:
                with self._rpcs.translated_errors():
                    for message in self._ask(request, retries.time_left()):
                        messages.append(message)  # noqa: PERF402 (an error must keep those received)
                    return messages
            except (Unavailable, Overloaded) as error:
                time.sleep(retries.retry_delay(error, begun=bool(messages)))

    def _fresh_retries(self) -> Retries:
        return Retries(self._timeout, self._retries)

    def _ask(self, request: Any, timeout: float) -> Any:
        return self._rpcs.begin(
            type(request), request, timeout=timeout, metadata=self._route.metadata()
        )

    def _feed(
        self, images: Iterable[npt.ArrayLike], questions: plans.Questions[A]
    ) -> Iterator[A | LikelyError]:
        def begin(messages: Iterator[Any]) -> Any:
            return self._rpcs.begin(questions.stream, messages, metadata=self._route.metadata())

        feed = BlockingFeed(begin, questions, self._timeout, self._retries, self._rpcs.error)
        return feed.outcomes(images)
