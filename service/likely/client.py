"""The clients: numpy in, typed answers out, every failure a `LikelyError`.

Both divide large inputs to the server's limits and join the answers; gRPC
itself retries what a busy or restarting server refuses.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy.typing as npt

from likely import codec, plans, statuses
from likely.answers import (
    Classifications,
    Completions,
    Draws,
    Features,
    Guarantee,
    ModelInfo,
    Scores,
)
from likely.channels import File, Route, Token
from likely.v1 import (
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
)

ADDRESS = "127.0.0.1:50051"
TIMEOUT = 60.0
T = TypeVar("T")

_RETRY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
}
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": _RETRY}]})),
    ("grpc.max_receive_message_length", -1),  # bounded by what was asked
    ("grpc.max_send_message_length", -1),
)


class Client:
    """A synchronous client; may be used from several threads, and as a context manager.

    Every method takes `model` and `version`. No model means the server's only
    one; no version means the one that the server serves by default.
    """

    def __init__(
        self,
        address: str = ADDRESS,
        *,
        timeout: float = TIMEOUT,
        token: Token | None = None,
        tls: bool = False,
        ca: File | None = None,
        certificate: File | None = None,
        key: File | None = None,
    ) -> None:
        """A client of one server; connects at the first question.

        Args:
            address: host:port, or any name that gRPC resolves.
            timeout: seconds that one request may take, retries included.
            token: a bearer token, or what gives one for each request.
            tls: whether to encrypt; `ca` and `certificate` imply it.
            ca: PEM file of the authorities that may vouch for the server; None for gRPC's own.
            certificate: PEM file that this client shows of itself.
            key: PEM file of that certificate's key.

        Raises:
            SettingsError: a file cannot be read, one of certificate and key is missing, or
                the token would go unencrypted to another machine.
        """
        self._timeout = timeout
        self._catalogue = plans.Catalogue()
        self._route = Route(address, token=token, tls=tls, ca=ca, certificate=certificate, key=key)
        self._channel = self._route.channel(OPTIONS)
        generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._generate = generation.Generate
        self._complete = generation.Complete
        self._calls = _calls(self._channel)

    def score(
        self,
        images: npt.ArrayLike,
        *,
        alpha: float | None = None,
        surprise: bool = False,
        guarantee: Guarantee = Guarantee.MARGINAL,
        model: str | None = None,
        version: str | None = None,
    ) -> Scores:
        """log p(x), p-value and verdict of every picture.

        Args:
            images: uint8 (n, c, h, w), or (n, h, w) for one channel.
            alpha: accepted rate of false rejections; None for the server's default.
            surprise: whether to give -log p of every pixel.
            guarantee: what alpha is to hold for: on average, or with 95 % confidence.
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
        guarantee: Guarantee = Guarantee.MARGINAL,
        model: str | None = None,
        version: str | None = None,
    ) -> Classifications:
        """log p(x|y), posterior, label and verdict of every picture.

        Args:
            images: uint8 (n, c, h, w), or (n, h, w) for one channel.
            alpha: accepted rate of false rejections; None for the server's default.
            priors: p(y) in the model's order; None for the model's own.
            min_posterior: the smallest posterior at which a label is assigned.
            guarantee: what alpha is to hold for: on average, or with 95 % confidence.
            model: its name.
            version: its version.

        Raises:
            LikelyError: as `score`.
        """
        plan = plans.classify(
            self._catalogue, images, alpha, priors, min_posterior, guarantee, model, version
        )
        return self._follow(plan)

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
            labels: of every picture; None for the most probable ones.
            model: its name.
            version: its version.

        Raises:
            LikelyError: as `score`.
        """
        return self._follow(plans.encode(self._catalogue, images, labels, model, version))

    def generate(
        self,
        count: int,
        *,
        label: int | None = None,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float | None = None,
        self_check: bool = False,
        alpha: float | None = None,
        max_draws: int | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Draws:
        """Pictures drawn from the model.

        Args:
            count: how many.
            label: of all of them; None draws each from the model's priors.
            seed: one seed gives the same pictures; None lets the server pick one.
            first_index: of the first picture.
            temperature: multiplies the noise, in [0, 2]; None is 1.
            self_check: redraw what the server would reject, or assign another label.
            alpha: of the self-check; None for the server's default.
            max_draws: of one picture; None for the server's default.
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
            alpha=alpha,
            max_draws=max_draws,
            model=model,
            version=version,
        )
        return plans.joined(list(stream))

    def generate_stream(
        self,
        count: int,
        *,
        label: int | None = None,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float | None = None,
        self_check: bool = False,
        alpha: float | None = None,
        max_draws: int | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> Iterator[Draws]:
        """The pictures of `generate`, chunk by chunk as they are drawn."""
        info = self.model(model, version)
        last: Draws | None = None
        check = plans.self_check(self_check, alpha, max_draws)
        for request in plans.generations(
            info, version, label, count, seed, first_index, temperature, check
        ):
            plans.pin(request, last)
            call = self._generate(request, timeout=self._timeout, metadata=self._route.metadata())
            try:
                with _told():
                    for message in call:
                        last = codec.draws(message)
                        yield last
            finally:
                call.cancel()  # of a reader that left; ended calls do not mind

    def complete(
        self,
        images: npt.ArrayLike,
        mask: npt.ArrayLike,
        *,
        label: int | None = None,
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
            label: of all pictures; None for p(x).
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
        info = self.model(model, version)
        x = plans.pixels(images)
        parts: list[Completions] = []
        for request in plans.completions(
            info, version, x, mask, label, completions, seed, first_index, temperature, proposals
        ):
            plans.pin(request, parts[-1] if parts else None)
            with _told():
                call = self._complete(
                    request, timeout=self._timeout, metadata=self._route.metadata()
                )
                parts += [codec.completions(message) for message in call]
        return plans.completed(parts, x, completions, info)

    def models(self) -> list[ModelInfo]:
        """Every version that is served, sorted by name.

        Raises:
            LikelyError: as `score`.
        """
        return self._follow(plans.models())

    def model(self, model: str | None = None, version: str | None = None) -> ModelInfo:
        """What one model version takes, gives and promises; asked for once.

        Raises:
            LikelyError: as `score`.
        """
        return self._follow(self._catalogue.model(model, version))

    def close(self) -> None:
        """Ends the connection and whatever runs on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _follow(self, plan: plans.Plan[T]) -> T:
        answer: Any = None
        while True:
            try:
                request = plan.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            with _told():
                answer = self._calls[type(request)](
                    request, timeout=self._timeout, metadata=self._route.metadata()
                )


class AsyncClient:
    """The client for asyncio: the methods of `Client`, awaited.

    To be made where the event loop runs; also an asynchronous context manager.
    """

    def __init__(
        self,
        address: str = ADDRESS,
        *,
        timeout: float = TIMEOUT,
        token: Token | None = None,
        tls: bool = False,
        ca: File | None = None,
        certificate: File | None = None,
        key: File | None = None,
    ) -> None:
        """A client of one server, as `Client`."""
        self._timeout = timeout
        self._catalogue = plans.Catalogue()
        self._route = Route(address, token=token, tls=tls, ca=ca, certificate=certificate, key=key)
        self._channel = self._route.aio_channel(OPTIONS)
        generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._generate = generation.Generate
        self._complete = generation.Complete
        self._calls = _calls(self._channel)

    async def score(
        self,
        images: npt.ArrayLike,
        *,
        alpha: float | None = None,
        surprise: bool = False,
        guarantee: Guarantee = Guarantee.MARGINAL,
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
        guarantee: Guarantee = Guarantee.MARGINAL,
        model: str | None = None,
        version: str | None = None,
    ) -> Classifications:
        """As `Client.classify`."""
        plan = plans.classify(
            self._catalogue, images, alpha, priors, min_posterior, guarantee, model, version
        )
        return await self._follow(plan)

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

    async def generate(
        self,
        count: int,
        *,
        label: int | None = None,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float | None = None,
        self_check: bool = False,
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
            alpha=alpha,
            max_draws=max_draws,
            model=model,
            version=version,
        )
        return plans.joined([chunk async for chunk in stream])

    async def generate_stream(
        self,
        count: int,
        *,
        label: int | None = None,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float | None = None,
        self_check: bool = False,
        alpha: float | None = None,
        max_draws: int | None = None,
        model: str | None = None,
        version: str | None = None,
    ) -> AsyncIterator[Draws]:
        """As `Client.generate_stream`."""
        info = await self.model(model, version)
        last: Draws | None = None
        check = plans.self_check(self_check, alpha, max_draws)
        for request in plans.generations(
            info, version, label, count, seed, first_index, temperature, check
        ):
            plans.pin(request, last)
            call = self._generate(request, timeout=self._timeout, metadata=self._route.metadata())
            try:
                with _told():
                    async for message in call:
                        last = codec.draws(message)
                        yield last
            finally:
                call.cancel()

    async def complete(
        self,
        images: npt.ArrayLike,
        mask: npt.ArrayLike,
        *,
        label: int | None = None,
        completions: int = 1,
        seed: int | None = None,
        first_index: int = 0,
        temperature: float | None = None,
        proposals: int = 1,
        model: str | None = None,
        version: str | None = None,
    ) -> Completions:
        """As `Client.complete`."""
        info = await self.model(model, version)
        x = plans.pixels(images)
        parts: list[Completions] = []
        for request in plans.completions(
            info, version, x, mask, label, completions, seed, first_index, temperature, proposals
        ):
            plans.pin(request, parts[-1] if parts else None)
            with _told():
                call = self._complete(
                    request, timeout=self._timeout, metadata=self._route.metadata()
                )
                parts += [codec.completions(message) async for message in call]
        return plans.completed(parts, x, completions, info)

    async def models(self) -> list[ModelInfo]:
        """As `Client.models`."""
        return await self._follow(plans.models())

    async def model(self, model: str | None = None, version: str | None = None) -> ModelInfo:
        """As `Client.model`."""
        return await self._follow(self._catalogue.model(model, version))

    async def close(self) -> None:
        """As `Client.close`."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _follow(self, plan: plans.Plan[T]) -> T:
        answer: Any = None
        while True:
            try:
                request = plan.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            with _told():
                answer = await self._calls[type(request)](
                    request, timeout=self._timeout, metadata=self._route.metadata()
                )


def _calls(channel: Any) -> dict[type[plans.Request], Any]:
    """The RPC that carries each kind of request."""
    scoring = scoring_pb2_grpc.ScoringServiceStub(channel)
    models = models_pb2_grpc.ModelServiceStub(channel)
    return {
        scoring_pb2.ScoreRequest: scoring.Score,
        scoring_pb2.ClassifyRequest: scoring.Classify,
        scoring_pb2.EncodeRequest: scoring.Encode,
        models_pb2.ListModelsRequest: models.ListModels,
        models_pb2.GetModelRequest: models.GetModel,
    }


@contextmanager
def _told() -> Iterator[None]:
    """Raises a failed call as the error that it tells of."""
    try:
        yield
    except grpc.RpcError as failure:
        raise statuses.error(failure) from failure
