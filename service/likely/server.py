"""The composition root: settings in, a server that answers, drains and ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from likely import access, graphs, logs, machine, tls
from likely.admission import Bounds, Quota
from likely.bundle import MANIFEST, Bundle
from likely.engine import Engine, Terms
from likely.errors import BundleError, SettingsError
from likely.interceptors import Guard
from likely.metrics import Exporter, Metrics
from likely.registry import Registry
from likely.servicers import Generation, Models, Scoring
from likely.settings import Settings
from likely.traffic import Traffic
from likely.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
)

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

SERVICES = (
    scoring_pb2.DESCRIPTOR.services_by_name["ScoringService"].full_name,
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    models_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)
_STATUS = health_pb2.HealthCheckResponse


class Server:
    """One gRPC server with its health, reflection and metrics.

    Attributes:
        port: where gRPC listens, once started.
        metrics_port: where metrics are scraped, once started; None where they are off.
        registry: the models served.
    """

    def __init__(self, settings: Settings, log: FilteringBoundLogger) -> None:
        self.port = 0
        self.metrics_port: int | None = None
        self.registry = Registry(settings.default_version)
        self._settings = settings
        self._log = log
        self._metrics = Metrics()
        self._exporter: Exporter | None = None
        self._health = health_aio.HealthServicer()
        self._guard = Guard(
            self.registry,
            self._metrics,
            log,
            access.gate(settings, log),
            slow_reader_seconds=settings.slow_reader_seconds,
        )
        self._grpc = grpc.aio.server(
            interceptors=[self._guard],
            options=[
                ("grpc.max_receive_message_length", settings.request_bytes),
                ("grpc.max_send_message_length", -1),  # bounded by what a request may ask
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server
            ],
        )
        self._add_services()

    async def start(self) -> None:
        """Opens the ports and says NOT_SERVING; `load` does the rest.

        Raises:
            SettingsError: an address cannot be listened on.
        """
        settings = self._settings
        await self._tell_health(_STATUS.NOT_SERVING)
        try:
            # An IPv6 address stands in brackets before a port.
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            self.port = self._listen(f"{host}:{settings.port}")
        except RuntimeError as error:
            raise SettingsError(
                f"gRPC cannot listen on {settings.host}:{settings.port}: in use, "
                "not this machine's, or not allowed"
            ) from error
        if settings.metrics_port != "off":
            self._exporter = Exporter(self._metrics, settings.metrics_host, settings.metrics_port)
            self.metrics_port = self._exporter.port
        await self._grpc.start()

    async def load(self) -> None:
        """Verifies the bundles, opens and warms their engines, then says SERVING.

        Raises:
            BundleError: a bundle is refused.
            DeviceError: the device asked for is not really there.
            SettingsError: a bundle cannot promise the default alpha.
        """
        engines = await asyncio.to_thread(load_engines, self._settings, self._metrics.traffic)
        self.registry.fill(engines)
        self._metrics.serving(engines)
        for engine in self.registry.engines():
            self._log.info(
                "model",
                name=engine.manifest.name,
                version=engine.manifest.version,
                digest=engine.digest,
                providers=list(engine.providers),
            )
        await self._tell_health(_STATUS.SERVING)

    async def stop(self, drain_seconds: float | None = None) -> None:
        """Says NOT_SERVING, lets running requests end, closes everything."""
        grace = self._settings.drain_seconds if drain_seconds is None else drain_seconds
        await self._health.enter_graceful_shutdown()
        self._guard.end_probes()
        await self._grpc.stop(grace)
        if self._exporter:
            await asyncio.to_thread(self._exporter.close)
        await asyncio.to_thread(self.registry.close)

    def _listen(self, address: str) -> int:
        """The port that is bound; encrypted where there is a certificate."""
        settings = self._settings
        if settings.tls_certificate is None or settings.tls_key is None:
            return self._grpc.add_insecure_port(address)
        credentials = tls.server_credentials(
            settings.tls_certificate, settings.tls_key, settings.tls_client_ca, self._log
        )
        return self._grpc.add_secure_port(address, credentials)

    def _add_services(self) -> None:
        limits, alpha = self._settings.limits, self._settings.default_alpha
        quota = Quota(limits.client_images_per_second, limits.client_images_at_once)
        scoring = Scoring(self.registry, limits, alpha, quota)
        scoring_pb2_grpc.add_ScoringServiceServicer_to_server(scoring, self._grpc)
        generation = Generation(self.registry, limits, alpha, quota)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, self._grpc)
        models = Models(self.registry, limits, alpha)
        models_pb2_grpc.add_ModelServiceServicer_to_server(models, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if self._settings.reflection:
            health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            reflection.enable_server_reflection(
                (*SERVICES, health, reflection.SERVICE_NAME), self._grpc
            )

    async def _tell_health(self, status: int) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)


def load_engines(settings: Settings, traffic: Traffic) -> list[Engine]:
    """The engines of all bundles that the settings name, verified and warm."""
    device = graphs.Device.parse(settings.device, memory=settings.gpu_memory << 20)
    threads = settings.threads or machine.cores()
    bundles = [Bundle.open(path) for path in settings.bundles or shipped()]
    for bundle in bundles:
        finest = bundle.manifest.calibration.finest_alpha
        if settings.default_alpha < finest:
            raise SettingsError(
                f"default_alpha = {settings.default_alpha:g} is finer than {finest:.6g}, "
                f"the finest that {bundle.path} can promise"
            )
    terms = Terms(
        settings.lanes,
        Bounds(settings.queued_images, settings.queued_bytes),
        settings.withheld_answers,
    )
    return [
        Engine.load(
            bundle,
            device=device,
            threads=threads,
            max_batch=settings.max_batch,
            terms=terms,
            traffic=traffic,
        )
        for bundle in bundles
    ]


def shipped() -> Sequence[Path]:
    """The folders of the bundles inside the package.

    Raises:
        BundleError: there is none.
    """
    shelf = Path(str(resources.files("likely"))) / "bundles"
    if found := sorted(manifest.parent for manifest in shelf.glob(f"*/{MANIFEST}")):
        return found
    raise BundleError(f"{shelf} holds no bundle; name one by --bundle")


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; a second one ends at once.

    Raises:
        LikelyError: why nothing can be served.
    """
    graphs.require_runtime()
    log = logs.logger(settings.log_level, settings.log_format)
    logs.adopt_stdlib(settings.log_format)
    asyncio.run(_serve(settings, log))


async def _serve(settings: Settings, log: FilteringBoundLogger) -> None:
    ending = _signalled()
    server = Server(settings, log)
    try:
        await server.start()
        log.info("listening", host=settings.host, port=server.port, metrics=server.metrics_port)
        loading = asyncio.create_task(server.load())
        await asyncio.wait({loading, ending}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            log.info("serving", host=settings.host, port=server.port)
            await ending
        log.info("draining", seconds=settings.drain_seconds)
    finally:
        await server.stop()
    log.info("ended")


def _signalled() -> asyncio.Future[None]:
    """Done at the first SIGTERM or SIGINT; the second one has its ordinary effect."""
    loop = asyncio.get_running_loop()
    ending: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        ending.set_result(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    return ending
