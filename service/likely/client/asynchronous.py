"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
)
from contextlib import aclosing
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
from likely.client.feeds import AsyncFeed
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


class AsyncClient:
    """The client for asyncio: the methods of `Client` as coroutines and asynchronous iterators.

    Create it while the event loop runs. Also an asynchronous context manager.
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
        """A client of one server or its replicas; the arguments are those of `Client`."""
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
        opening = partial(self._route.aio_channel, once=not retries)
        self._rpcs = ServerRpcs(opening, self._route.edition, address, self._catalogue)

    async def score(
        self,
        images: npt.ArrayLike,
        *,
        alpha: float | None = None,
        surprise: bool = False,
        guarantee: GuaranteeLike = Guarantee.MARGINAL,
        model: str | None = None,
        version: str | None = None,
    ) -> Scores:
        """As `Client.score`."""
        plan = plans.score(self._catalogue, images, alpha, surprise, guarantee, model, version)
        return await self._follow(plan)

    async def classify(
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
        """As `Client.classify`."""
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
        return await self._follow(plan)

    async def score_stream(
        self,
        images: AsyncIterable[npt.ArrayLike] | Iterable[npt.ArrayLike],
        *,
        alpha: float | None = None,
        surprise: bool = False,
        guarantee: GuaranteeLike = Guarantee.MARGINAL,
        model: str | None = None,
        version: str | None = None,
    ) -> AsyncIterator[Scores | LikelyError]:
        """As `Client.score_stream`; the feed may also be an asynchronous iterable."""
        info = await self.model(model, version)
        questions = plans.score_questions(info, alpha, surprise, guarantee, version)
        async with aclosing(self._feed(images, questions)) as outcomes:
            async for outcome in outcomes:
                yield outcome

    async def classify_stream(
        self,
        images: AsyncIterable[npt.ArrayLike] | Iterable[npt.ArrayLike],
        *,
        alpha: float | None = None,
        priors: npt.ArrayLike | None = None,
        min_posterior: float = 0.0,
        guarantee: GuaranteeLike = Guarantee.MARGINAL,
        rule: RuleLike = LabelRule.GENERATIVE,
        both: bool = False,
        model: str | None = None,
        version: str | None = None,
    ) -> AsyncIterator[Classifications | LikelyError]:
        """As `Client.classify_stream`; the feed may also be an asynchronous iterable."""
        info = await self.model(model, version)
        questions = plans.classify_questions(
            info, alpha, priors, min_posterior, guarantee, rule, both, version
        )
        async with aclosing(self._feed(images, questions)) as outcomes:
            async for outcome in outcomes:
                yield outcome

    async def encode(
        self,
        images: npt.ArrayLike,
        *,
        labels: npt.ArrayLike | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Features:
        """As `Client.encode`."""
        return await self._follow(plans.encode(self._catalogue, images, labels, model, version))

    async def decode(
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
        """As `Client.decode`."""
        how = plans.RedrawSettings(draws, seed, first_index, temperature, version)
        return await self._follow(plans.decode(self._catalogue, features, labels, how, model))

    async def traverse(
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
        """As `Client.traverse`."""
        how = plans.RedrawSettings(draws, seed, first_index, temperature, version)
        return await self._follow(
            plans.traverse(self._catalogue, images, direction, points, labels, how, model)
        )

    async def interpolate(
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
        """As `Client.interpolate`."""
        how = plans.RedrawSettings(draws, seed, first_index, temperature, version)
        return await self._follow(
            plans.interpolate(
                self._catalogue, images, others, points, labels, other_labels, how, model
            )
        )

    async def generate(
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
        """As `Client.generate`."""
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
        return joined([chunk async for chunk in stream])

    async def generate_stream(
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
    ) -> AsyncIterator[Draws]:
        """As `Client.generate_stream`."""
        check, kept = plans.build_checks(self_check, acceptance, alpha, max_draws)

        def divide(info: ModelInfo) -> Iterator[GenerateRequest]:
            return plans.generate_requests(
                info, version, label, count, seed, first_index, temperature, check, kept
            )

        parts = catalogue.Parts(self._catalogue, model, version, label, divide, self._replicas)
        retries = self._fresh_retries()
        while (request := await self._follow(parts.next())) is not None:
            call = self._ask(request, retries.time_left())
            try:
                with self._rpcs.translated_errors():
                    async for message in call:
                        retries.reset()
                        if not parts.accept(message):
                            break
                        yield codec.draws(message)
            except (Unavailable, Overloaded, DeadlineExceeded) as error:
                if self._retries and parts.resume():
                    await asyncio.sleep(retries.resume_delay(error))
                else:
                    await asyncio.sleep(retries.retry_delay(error))
                    parts.repeat()
            except ModelNotFound:
                if not parts.try_next_replica():
                    raise
            finally:
                call.cancel()

    async def complete(
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
        """As `Client.complete`."""
        x, how = values.pixels(images), (temperature, proposals)

        def divide(info: ModelInfo) -> Iterator[CompleteRequest]:
            return plans.complete_requests(
                info, version, x, mask, label, completions, seed, first_index, *how
            )

        parts = catalogue.Parts(self._catalogue, model, version, label, divide, self._replicas)
        received: list[Completions] = []
        while (request := await self._follow(parts.next())) is not None:
            try:
                answers = await self._answers(request)
            except ModelNotFound:
                if not parts.try_next_replica():
                    raise
                continue
            received += [codec.completions(answer) for answer in answers if parts.accept(answer)]
        return plans.join_completions(received, x, completions, seed, parts.info)

    async def models(self) -> list[ModelInfo]:
        """As `Client.models`."""
        return await self._follow(catalogue.models())

    async def model(self, model: str | None = None, version: str | None = None) -> ModelInfo:
        """As `Client.model`."""
        return await self._follow(self._catalogue.model(model, version))

    async def close(self) -> None:
        """As `Client.close`."""
        if closing := self._rpcs.close():
            await closing

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _follow(self, plan: catalogue.Plan[T]) -> T:
        plan = catalogue.asking_replicas(plan, self._replicas)
        step: Callable[[], catalogue.Request] = partial(next, plan)
        while True:
            try:
                request = step()
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                step = partial(plan.send, await self._answer(request))
            except ModelNotFound as error:
                step = partial(plan.throw, error)

    async def _answer(self, request: Any) -> Any:
        """The answer; the request is repeated if the connection ends before it."""
        retries = self._fresh_retries()
        while True:
            try:
                with self._rpcs.translated_errors():
                    return await self._ask(request, retries.time_left())
            except Unavailable as error:
                await asyncio.sleep(retries.retry_delay(error))

    async def _answers(self, request: Any) -> list[Any]:
        """All messages of a streamed answer; if it ends too soon, the whole request is repeated."""
        retries = self._fresh_retries()
        while True:
            messages: list[Any] = []
            try:
                with self._rpcs.translated_errors():
                    async for message in self._ask(request, retries.time_left()):
                        messages.append(message)  # noqa: PERF401 (an error must keep those received)
                    return messages
            except (Unavailable, Overloaded) as error:
                await asyncio.sleep(retries.retry_delay(error, begun=bool(messages)))

    def _fresh_retries(self) -> Retries:
        return Retries(self._timeout, self._retries)

    def _ask(self, request: Any, timeout: float) -> Any:
        return self._rpcs.begin(
            type(request), request, timeout=timeout, metadata=self._route.metadata()
        )

    def _feed(
        self,
        images: AsyncIterable[npt.ArrayLike] | Iterable[npt.ArrayLike],
        questions: plans.Questions[A],
    ) -> AsyncGenerator[A | LikelyError, None]:
        def begin(messages: AsyncIterator[Any]) -> Any:
            return self._rpcs.begin(questions.stream, messages, metadata=self._route.metadata())

        feed = AsyncFeed(begin, questions, self._timeout, self._retries, self._rpcs.error)
        return feed.outcomes(images)
