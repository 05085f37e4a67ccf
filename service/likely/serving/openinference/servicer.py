"""The RPCs of the Open Inference Protocol, translated into requests of our own services."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc.aio

from likely import machine
from likely.batching import callers
from likely.engine import Engine
from likely.errors import AccessDenied, ModelNotFound, Unavailable
from likely.inference import inference_pb2, inference_pb2_grpc
from likely.serving.access import Scope
from likely.serving.feeds import Feed
from likely.serving.guard import Guard
from likely.serving.openinference import operations, parameters, tensors
from likely.serving.openinference.operations import Operation, Question, Services
from likely.serving.openinference.statistics import Key, Statistics, Stopwatch
from likely.serving.openinference.tensors import Tensor
from likely.versions.registry import Registry

Context = grpc.aio.ServicerContext[Any, Any]
EXTENSIONS = ("model_configuration", "statistics", "model_repository", "parameters")
PLATFORM, BACKEND = "onnxruntime_onnx", "onnxruntime"
STREAM = "ModelStreamInfer"
CONCURRENT_REQUESTS = 16  # requests of one stream that are answered concurrently


@dataclass(frozen=True, slots=True)
class _Message:
    """A request on a stream."""

    sequence_id: int
    request: inference_pb2.ModelInferRequest

    def ByteSize(self) -> int:
        return self.request.ByteSize()


class OpenInference(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves clients made for Triton, KServe and similar servers."""

    def __init__(
        self, registry: Registry, services: Services, guard: Guard, ready: Callable[[], bool]
    ) -> None:
        """Creates a servicer.

        Args:
            registry: the served models.
            services: our own services, which answer the requests.
            guard: has the door, reports failures and counts messages of streams.
            ready: returns whether the server accepts requests and is not shutting down.
        """
        self._registry = registry
        self._services = services
        self._guard = guard
        self._ready = ready
        self._statistics: defaultdict[Key, Statistics] = defaultdict(Statistics)

    async def ServerLive(
        self, request: inference_pb2.ServerLiveRequest, context: Context
    ) -> inference_pb2.ServerLiveResponse:
        """Reports that the server runs."""
        return inference_pb2.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: inference_pb2.ServerReadyRequest, context: Context
    ) -> inference_pb2.ServerReadyResponse:
        """Reports whether a model answers."""
        ready = self._ready() and any(engine.healthy for engine in self._registry.served())
        return inference_pb2.ServerReadyResponse(ready=ready)

    async def ModelReady(
        self, request: inference_pb2.ModelReadyRequest, context: Context
    ) -> inference_pb2.ModelReadyResponse:
        """Reports whether the named model answers."""
        try:
            engine, _ = self._find_model(request.name, request.version)
        except (ModelNotFound, Unavailable):
            return inference_pb2.ModelReadyResponse(ready=False)
        return inference_pb2.ModelReadyResponse(ready=self._ready() and engine.healthy)

    async def ServerMetadata(
        self, request: inference_pb2.ServerMetadataRequest, context: Context
    ) -> inference_pb2.ServerMetadataResponse:
        """Returns the server's name, version and extensions."""
        return inference_pb2.ServerMetadataResponse(
            name="likely", version=machine.version("likely") or "", extensions=EXTENSIONS
        )

    async def ModelMetadata(
        self, request: inference_pb2.ModelMetadataRequest, context: Context
    ) -> inference_pb2.ModelMetadataResponse:
        """Returns the versions, inputs and outputs of a model."""
        engine, operation = self._find_model(request.name, request.version)
        manifest = engine.manifest
        kind = inference_pb2.ModelMetadataResponse.TensorMetadata

        def metadata(specs: tuple[Tensor, ...]) -> list[Any]:
            return [kind(name=t.name, datatype=t.datatype, shape=t.shape) for t in specs]

        return inference_pb2.ModelMetadataResponse(
            name=request.name,
            versions=[
                served.manifest.version
                for served in self._registry.served()
                if served.manifest.name == manifest.name
            ],
            platform=PLATFORM,
            inputs=metadata(operation.inputs(manifest)),
            outputs=metadata(operation.outputs(manifest)),
        )

    async def ModelInfer(
        self, request: inference_pb2.ModelInferRequest, context: Context
    ) -> inference_pb2.ModelInferResponse:
        """Returns the model's answer."""
        return await self._infer(request)

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[inference_pb2.ModelInferRequest], context: Context
    ) -> AsyncIterator[inference_pb2.ModelStreamInferResponse]:
        """Answers each message as `ModelInfer` does."""
        pending: dict[int, inference_pb2.ModelInferRequest] = {}

        async def messages() -> AsyncIterator[_Message]:
            number = 0
            async for request in request_iterator:
                pending[number] = request
                yield _Message(number, request)
                number += 1

        feed: Feed[inference_pb2.ModelInferResponse] = Feed(
            self._infer,
            self._guard.door,
            self._services.limits,
            concurrent_groups=CONCURRENT_REQUESTS,
            merges=False,
        )
        request_id = callers.current().request_id
        async with aclosing(feed.outcomes(messages())) as groups:
            async for outcomes in groups:
                for number, outcome in outcomes:
                    request = pending.pop(number)
                    if not isinstance(outcome, Exception):
                        self._guard.count_stream_message(STREAM, request, 0)
                        yield inference_pb2.ModelStreamInferResponse(infer_response=outcome)
                        continue
                    failure = self._guard.failure(outcome, STREAM, request_id)
                    self._guard.count_stream_message(STREAM, request, failure.code)
                    yield inference_pb2.ModelStreamInferResponse(
                        error_message=failure.message,
                        infer_response=inference_pb2.ModelInferResponse(
                            id=request.id, model_name=request.model_name
                        ),
                    )

    async def ModelConfig(
        self, request: inference_pb2.ModelConfigRequest, context: Context
    ) -> inference_pb2.ModelConfigResponse:
        """Returns the configuration of a model."""
        engine, operation = self._find_model(request.name, request.version)
        first = 1 if operation.merged else 0  # max_batch_size stands for the pictures' axis
        config = inference_pb2.ModelConfig(
            name=request.name,
            platform=PLATFORM,
            backend=BACKEND,
            max_batch_size=self._services.limits.images_per_request if operation.merged else 0,
            input=[
                inference_pb2.ModelInput(
                    name=t.name,
                    data_type=t.type.number,
                    dims=t.shape[first:],
                    optional=t.optional,
                )
                for t in operation.inputs(engine.manifest)
            ],
            output=[
                inference_pb2.ModelOutput(
                    name=t.name, data_type=t.type.number, dims=t.shape[first:]
                )
                for t in operation.outputs(engine.manifest)
            ],
            model_transaction_policy=inference_pb2.ModelTransactionPolicy(decoupled=False),
        )
        if operation.merged:
            config.dynamic_batching.SetInParent()
        return inference_pb2.ModelConfigResponse(config=config)

    async def ModelStatistics(
        self, request: inference_pb2.ModelStatisticsRequest, context: Context
    ) -> inference_pb2.ModelStatisticsResponse:
        """Returns the statistics of this protocol's requests since the server started."""
        name, version = request.name, request.version
        if name:
            engine, _ = self._find_model(name, version)
            version = version and engine.manifest.version  # resolves a label
        keys = [
            key
            for key, _ in self._list_models()
            if name in ("", key[0]) and version in ("", key[1])
        ]
        return inference_pb2.ModelStatisticsResponse(
            model_stats=[self._statistics[key].message(*key) for key in keys]
        )

    async def RepositoryIndex(
        self, request: inference_pb2.RepositoryIndexRequest, context: Context
    ) -> inference_pb2.RepositoryIndexResponse:
        """Lists every model and version, or only those that answer."""
        kind = inference_pb2.RepositoryIndexResponse.ModelIndex
        states = {True: ("READY", ""), False: ("UNAVAILABLE", "unhealthy")}
        return inference_pb2.RepositoryIndexResponse(
            models=[
                kind(name=name, version=version, state=state, reason=reason)
                for (name, version), engine in sorted(self._list_models(), key=_model_name)
                if engine.healthy or not request.ready
                for state, reason in [states[engine.healthy]]
            ]
        )

    async def _infer(
        self, request: inference_pb2.ModelInferRequest
    ) -> inference_pb2.ModelInferResponse:
        bundle, _ = operations.split_name(request.model_name)
        watch = Stopwatch()
        with self._registry.lease(bundle, request.model_version) as engine:
            operation = self._find_operation(engine, request.model_name)
            version = engine.manifest.version
            statistics = self._statistics[request.model_name, version]
            try:
                _check_scope(operation)
                wanted = tensors.requested_outputs(request, operation.outputs(engine.manifest))
                manifest = engine.manifest
                settings = parameters.read(
                    request.parameters, operation.settings, len(manifest.labels)
                )
                most = self._services.limits.images_per_request
                read = partial(tensors.read, request, operation.inputs(manifest), most)
                question = Question(
                    engine,
                    await asyncio.to_thread(read) if tensors.is_long(request) else read(),
                    settings,
                    frozenset(tensor.name for tensor in wanted),
                )
                watch.lap()
                answer = await operation.run(self._services, question)
                watch.lap()
            except BaseException:
                watch.add_failure(statistics)
                raise
        response = inference_pb2.ModelInferResponse(
            model_name=request.model_name, model_version=version, id=request.id
        )
        for name, value in answer.parameters.items():
            field = "double_param" if isinstance(value, float) else "int64_param"
            setattr(response.parameters[name], field, value)
        raw = bool(request.raw_input_contents) or not any(
            tensor.HasField("contents") for tensor in request.inputs
        )
        outputs = [(tensor, answer.outputs[tensor.name]) for tensor in wanted]
        if raw or sum(values.size for _, values in outputs) <= tensors.CHUNK:
            tensors.write(response, outputs, raw)
        else:
            await asyncio.to_thread(tensors.write, response, outputs, raw)
        watch.lap()
        watch.add_success(statistics, len(outputs[0][1]))
        return response

    def _find_model(self, name: str, version: str) -> tuple[Engine, Operation]:
        engine = self._registry.lease(operations.split_name(name)[0], version).engine
        return engine, self._find_operation(engine, name)

    def _find_operation(self, engine: Engine, name: str) -> Operation:
        bundle, suffix = operations.split_name(name)
        offered = operations.available_operations(engine)
        operation = next((candidate for candidate in offered if candidate.suffix == suffix), None)
        if operation is None:
            names = ", ".join(operations.full_name(bundle, candidate) for candidate in offered)
            shown = suffix[:64] + ("…" if len(suffix) > 64 else "")
            raise ModelNotFound(
                f"{bundle}/{shown}", f"no model {bundle}/{shown}; there are {names}"
            )
        return operation

    def _list_models(self) -> Iterator[tuple[Key, Engine]]:
        """Yields every model and version with its engine."""
        for engine in self._registry.served():
            for operation in operations.available_operations(engine):
                name = operations.full_name(engine.manifest.name, operation)
                yield (name, engine.manifest.version), engine


def _model_name(entry: tuple[Key, Engine]) -> str:
    return entry[0][0]


def _check_scope(operation: Operation) -> None:
    """Checks that the caller's token, if one is required, allows the operation.

    Raises:
        AccessDenied: it does not.
    """
    scopes = callers.current().scopes
    scope = Scope.GENERATE if operation.suffix in operations.DRAWING_SUFFIXES else Scope.SCORE
    if scopes is not None and scope not in scopes:
        raise AccessDenied(f"the token lacks the scope {scope}")
