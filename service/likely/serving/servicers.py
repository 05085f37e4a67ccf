"""The servicers of our own RPCs: each method checks a request, asks the engine and encodes."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc.aio

from likely import codec
from likely.answers import (
    Acceptance,
    Classifications,
    Draws,
    Features,
    Limits,
    ModelInfo,
    ScoreTable,
    SelfCheck,
)
from likely.batching import callers
from likely.batching.admission import Quota
from likely.bundle import Role
from likely.engine import Engine
from likely.serving import checks
from likely.serving.feeds import Feed
from likely.serving.guard import Guard
from likely.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    latent_pb2,
    latent_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
)
from likely.versions.registry import Registry, describe

Context = grpc.aio.ServicerContext[Any, Any]


class Scoring(scoring_pb2_grpc.ScoringServiceServicer):
    """Scores, classifies and encodes pictures, for single requests and for feeds."""

    def __init__(
        self,
        registry: Registry,
        limits: Limits,
        default_alpha: float,
        quota: Quota,
        *,
        guard: Guard,
    ) -> None:
        self._registry = registry
        self._limits = limits
        self._default_alpha = default_alpha
        self._quota = quota
        self._guard = guard

    async def Score(
        self, request: scoring_pb2.ScoreRequest, context: Context
    ) -> scoring_pb2.ScoreResponse:
        """Returns log p(x), the p-value and the verdict of every picture."""
        with self._registry.lease(request.model_name, request.model_version) as engine:
            return codec.score_response(await self.compute_scores(engine, request))

    async def compute_scores(self, engine: Engine, request: scoring_pb2.ScoreRequest) -> ScoreTable:
        """Returns the answer of `Score` as arrays."""
        x = checks.pixels(request, engine.manifest, self._limits)
        alpha = checks.alpha(request, engine.detector, self._default_alpha)
        surprise = checks.surprise(request, engine.manifest, self._limits)
        guarantee = checks.guarantee(request)
        with self._quota.charged(len(x), engine.manifest.name):
            return await engine.score(x, alpha, surprise=surprise, guarantee=guarantee)

    async def Classify(
        self, request: scoring_pb2.ClassifyRequest, context: Context
    ) -> scoring_pb2.ClassifyResponse:
        """Returns log p(x|y), the posterior and the label of every picture."""
        with self._registry.lease(request.model_name, request.model_version) as engine:
            return codec.classify_response((await self.compute_classifications(engine, request))[1])

    async def compute_classifications(
        self, engine: Engine, request: scoring_pb2.ClassifyRequest
    ) -> tuple[ScoreTable, Classifications]:
        """Returns the answers of `Score` and `Classify` as arrays, from one run."""
        x = checks.pixels(request, engine.manifest, self._limits)
        alpha = checks.alpha(request, engine.detector, self._default_alpha)
        priors = checks.priors(request, engine.manifest)
        floor, rule = checks.min_posterior(request), checks.rule(request)
        guarantee = checks.guarantee(request)
        with self._quota.charged(len(x), engine.manifest.name):
            return await engine.judge(
                x,
                alpha,
                priors=priors,
                min_posterior=floor,
                guarantee=guarantee,
                rule=rule,
                both=request.both,
            )

    async def Encode(
        self, request: scoring_pb2.EncodeRequest, context: Context
    ) -> scoring_pb2.EncodeResponse:
        """Returns the latent features of every picture."""
        with self._registry.lease(request.model_name, request.model_version) as engine:
            return codec.encode_response(await self.compute_features(engine, request))

    async def compute_features(
        self, engine: Engine, request: scoring_pb2.EncodeRequest
    ) -> Features:
        """Returns the answer of `Encode` as arrays."""
        x = checks.pixels(request, engine.manifest, self._limits)
        labels = checks.labels(request, engine.manifest, len(x))
        with self._quota.charged(len(x), engine.manifest.name):
            return await engine.encode(x, labels)

    async def ScoreStream(
        self, request_iterator: AsyncIterator[scoring_pb2.ScoreStreamRequest], context: Context
    ) -> AsyncIterator[scoring_pb2.ScoreStreamResponse]:
        """Answers each message of a feed as `Score` does."""
        feed: Feed[scoring_pb2.ScoreResponse] = Feed(
            partial(self.Score, context=context), self._guard.door, self._limits
        )
        async with aclosing(feed.outcomes(request_iterator)) as groups:
            async for outcomes in groups:
                yield scoring_pb2.ScoreStreamResponse(
                    outcomes=[
                        scoring_pb2.ScoreOutcome(
                            sequence_id=n, **self._outcome_field(outcome, "ScoreStream")
                        )
                        for n, outcome in outcomes
                    ]
                )

    async def ClassifyStream(
        self, request_iterator: AsyncIterator[scoring_pb2.ClassifyStreamRequest], context: Context
    ) -> AsyncIterator[scoring_pb2.ClassifyStreamResponse]:
        """Answers each message of a feed as `Classify` does."""
        feed: Feed[scoring_pb2.ClassifyResponse] = Feed(
            partial(self.Classify, context=context), self._guard.door, self._limits
        )
        async with aclosing(feed.outcomes(request_iterator)) as groups:
            async for outcomes in groups:
                yield scoring_pb2.ClassifyStreamResponse(
                    outcomes=[
                        scoring_pb2.ClassifyOutcome(
                            sequence_id=n, **self._outcome_field(outcome, "ClassifyStream")
                        )
                        for n, outcome in outcomes
                    ]
                )

    def _outcome_field(self, outcome: object, method: str) -> dict[str, Any]:
        """Returns an outcome as the field of the message that holds it: response or failure."""
        if not isinstance(outcome, Exception):
            return {"response": outcome}
        return {"failure": self._guard.failure(outcome, method, callers.current().request_id)}


def _expected_attempts(
    labels: int, check: SelfCheck | None, acceptance: Acceptance | None
) -> float:
    """Expected number of draws per picture, approximately."""
    if acceptance:  # about one draw of p(x) per number of labels is kept
        return min(labels, acceptance.max_draws)
    if check:  # a fraction of 1 - alpha of the draws is kept
        return min(1 / (1 - check.alpha), check.max_draws)
    return 1


class Generation(generation_pb2_grpc.GenerationServiceServicer):
    """Generates and completes pictures."""

    def __init__(
        self, registry: Registry, limits: Limits, default_alpha: float, quota: Quota
    ) -> None:
        self._registry = registry
        self._limits = limits
        self._default_alpha = default_alpha
        self._quota = quota

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """Yields chunks of pictures in the order of their index."""
        with self._registry.lease(request.model_name, request.model_version) as engine:
            async with aclosing(self.generate_draws(engine, request)) as chunks:
                async for chunk in chunks:
                    yield codec.generate_response(chunk)

    async def generate_draws(
        self, engine: Engine, request: generation_pb2.GenerateRequest
    ) -> AsyncGenerator[Draws, None]:
        """Yields the answer of `Generate` as arrays."""
        count, acceptance = checks.count(request, self._limits), checks.acceptance(request)
        check = checks.self_check(request, engine, self._default_alpha)
        drawn = engine.generate(
            checks.label(request, engine.manifest),
            count,
            checks.seed(request),
            first_index=checks.first_index(request, count),
            temperature=checks.temperature(request),
            chunk=checks.chunk_size(engine.manifest, self._limits),
            check=check,
            acceptance=acceptance,
        )
        attempts = _expected_attempts(len(engine.manifest.labels), check, acceptance)
        async with aclosing(
            self._charge_chunks(engine, drawn, math.ceil(count * attempts))
        ) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Complete(
        self, request: generation_pb2.CompleteRequest, context: Context
    ) -> AsyncIterator[generation_pb2.CompleteResponse]:
        """Yields chunks of completions, picture by picture."""
        with self._registry.lease(request.model_name, request.model_version) as engine:
            async with aclosing(self.complete_draws(engine, request)) as chunks:
                async for chunk in chunks:
                    yield codec.complete_response(chunk)

    async def complete_draws(
        self, engine: Engine, request: generation_pb2.CompleteRequest
    ) -> AsyncGenerator[Draws, None]:
        """Yields the answer of `Complete` as arrays."""
        checks.geometry(request, engine.manifest, self._limits)
        known = checks.mask(request)
        x = checks.pixels(request, engine.manifest, self._limits, known)
        completions, proposals = checks.completions(request, engine.manifest, self._limits)
        drawn = engine.complete(
            x,
            known,
            checks.label(request, engine.manifest),
            completions,
            checks.seed(request),
            first_index=checks.first_index(request, len(x)),
            temperature=checks.temperature(request),
            proposals=proposals,
            chunk=checks.chunk_size(engine.manifest, self._limits),
        )
        rows = len(x) * completions * proposals
        async with aclosing(self._charge_chunks(engine, drawn, rows)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _charge_chunks(
        self, engine: Engine, drawn: AsyncGenerator[Draws, None], rows: int
    ) -> AsyncGenerator[Draws, None]:
        """Yields the chunks, and charges the quota unless the first chunk is refused for now."""
        async with aclosing(drawn) as chunks:
            with self._quota.charged(rows, engine.manifest.name):
                first = await anext(chunks, None)
            if first is None:
                return  # there are no pictures
            yield first
            async for chunk in chunks:
                yield chunk


class Latent(latent_pb2_grpc.LatentServiceServicer):
    """Redraws pictures from latent features."""

    def __init__(self, registry: Registry, limits: Limits, quota: Quota) -> None:
        self._registry = registry
        self._limits = limits
        self._quota = quota

    async def Decode(
        self, request: latent_pb2.DecodeRequest, context: Context
    ) -> latent_pb2.DecodeResponse:
        """Decodes latent features into pictures."""
        with self._registry.lease(request.model_name, request.model_version) as engine:
            engine.require("Decode")
            z = checks.features(request, engine.manifest.latent_dimensions(Role.DECODE))
            labels = checks.labels(request, engine.manifest, len(z))
            drawing = checks.drawing(request, len(z), len(z), engine.manifest, self._limits)
            charged = len(z) * max(1, drawing.count)
            with self._quota.charged(charged, engine.manifest.name):
                redrawings = await engine.decode(z, labels, drawing)
        return latent_pb2.DecodeResponse(
            model_version=redrawings.model_version,
            redrawings=codec.redrawings(redrawings),
            seed=redrawings.seed,
        )

    async def Traverse(
        self, request: latent_pb2.TraverseRequest, context: Context
    ) -> latent_pb2.TraverseResponse:
        """Redraws pictures along a direction of the latent features."""
        with self._registry.lease(request.model_name, request.model_version) as engine:
            engine.require("Traverse")
            x = checks.pixels(request, engine.manifest, self._limits)
            labels = checks.labels(request, engine.manifest, len(x))
            direction = checks.direction(request, engine.directions)
            points = checks.points(request, self._limits)
            rows = len(x) * len(points)
            drawing = checks.drawing(request, len(x), rows, engine.manifest, self._limits)
            charged = rows * max(1, drawing.count)
            with self._quota.charged(charged, engine.manifest.name):
                traversal = await engine.traverse(x, direction, points, drawing, label=labels)
        return codec.traverse_response(traversal)

    async def Interpolate(
        self, request: latent_pb2.InterpolateRequest, context: Context
    ) -> latent_pb2.InterpolateResponse:
        """Redraws pictures between pairs of pictures."""
        with self._registry.lease(request.model_name, request.model_version) as engine:
            engine.require("Interpolate")
            x = checks.pixels(request, engine.manifest, self._limits)
            others = checks.others(request, engine.manifest, self._limits, len(x))
            labels = checks.labels(request, engine.manifest, len(x))
            other_labels = checks.labels(request, engine.manifest, len(x), "other_labels")
            points = checks.points(request, self._limits)
            rows = len(x) * len(points)
            drawing = checks.drawing(request, len(x), rows, engine.manifest, self._limits)
            charged = rows * max(1, drawing.count)
            with self._quota.charged(charged, engine.manifest.name):
                redrawings = await engine.interpolate(
                    x, others, points, drawing, label=labels, other_label=other_labels
                )
        return latent_pb2.InterpolateResponse(
            model_version=redrawings.model_version,
            redrawings=codec.redrawings(redrawings),
            seed=redrawings.seed,
        )


class Models(models_pb2_grpc.ModelServiceServicer):
    """Describes the models."""

    def __init__(self, registry: Registry, limits: Limits, default_alpha: float) -> None:
        self._registry = registry
        self._limits = limits
        self._default_alpha = default_alpha

    async def ListModels(
        self, request: models_pb2.ListModelsRequest, context: Context
    ) -> models_pb2.ListModelsResponse:
        """Describes every served version."""
        infos = [self._described(engine) for engine in self._registry.served()]
        return models_pb2.ListModelsResponse(models=[codec.model_message(info) for info in infos])

    async def GetModel(
        self, request: models_pb2.GetModelRequest, context: Context
    ) -> models_pb2.GetModelResponse:
        """Describes one version."""
        held = self._registry.lease(request.model_name, request.model_version)
        info = self._described(held.engine)
        return models_pb2.GetModelResponse(
            model_version=info.version, model=codec.model_message(info)
        )

    def _described(self, engine: Engine) -> ModelInfo:
        labels = self._registry.labels(engine.manifest.name, engine.manifest.version)
        return describe(engine, self._limits, self._default_alpha, labels)
