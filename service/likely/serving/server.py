"""The composition root: builds a server from settings, and starts, loads and stops it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from likely.batching.admission import Quota
from likely.errors import DeviceLost, SettingsError
from likely.inference import inference_pb2, inference_pb2_grpc
from likely.serving import access, ports
from likely.serving.admin import Admin
from likely.serving.guard import Guard, GuardedServices
from likely.serving.health import NOT_SERVING, SERVING, Health
from likely.serving.openinference.operations import Services
from likely.serving.openinference.servicer import OpenInference
from likely.serving.reflecting import add_reflection
from likely.serving.servicers import Generation, Latent, Models, Scoring
from likely.settings import Settings
from likely.telemetry.metrics import Exporter, Metrics
from likely.tracing import Tracing
from likely.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    latent_pb2,
    latent_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    scoring_pb2,
    scoring_pb2_grpc,
)
from likely.versions.lifecycle import Lifecycle
from likely.versions.loading import Loader, shipped
from likely.versions.registry import Registry
from likely.versions.watch import Watcher

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

SERVICES = (
    scoring_pb2.DESCRIPTOR.services_by_name["ScoringService"].full_name,
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    latent_pb2.DESCRIPTOR.services_by_name["LatentService"].full_name,
    models_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)
_ADMIN_SERVICE = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name

HOLD_SECONDS = 0.05  # seconds of each step of closing the door, in which racing requests are held
MODEL_PREFIX = "model/"  # prefix of a model's name in the health service
# Seconds for clients to read the last answers, as nothing shows whether they have.
READ_SECONDS = 5.0
CUT_OFF_SECONDS = 2.0  # seconds for requests that are cut off to report it


class Server:
    """One gRPC server with health, reflection, metrics, and the admin RPCs on their own port.

    Attributes:
        port: port of the services, once started.
        admin_port: port of the admin RPCs, once started; None if they are off.
        metrics_port: port of the metrics, once started; None if they are off.
        registry: the served models.
        lifecycle: changes which models are served.
        device_lost: done when the device is gone, with its error.
    """

    def __init__(
        self,
        settings: Settings,
        log: FilteringBoundLogger,
        *,
        shared: bool = False,
        admin_socket: Path | None = None,
        settled: bool = False,
        unloaded: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Creates a server; an event loop must be running.

        Args:
            settings: the server's settings.
            log: receives the server's events.
            shared: whether other processes listen on the same port.
            admin_socket: Unix socket for the admin RPCs, in place of the settings' port. It must
                be private, as it requires no token.
            settled: whether the settings name all bundles, even if that is none. If not, an empty
                list of bundles stands for those that the package ships.
            unloaded: names and versions that are not served although the watched folder holds
                them, until their files change.

        Raises:
            SettingsError: settings contradict each other, or need an extra that is missing.
        """
        self.port = 0
        self.admin_port: int | None = None
        self.metrics_port: int | None = None
        self.registry = Registry(settings.default_version)
        self._settings = settings
        self._log = log
        self._metrics = Metrics(settings.drift_level, settings.workers or 1)
        self._exporter: Exporter | None = None
        self._tracing = Tracing() if settings.tracing else None
        self.device_lost: asyncio.Future[DeviceLost] = asyncio.get_running_loop().create_future()
        loader = Loader(settings, self._metrics.traffic, self._metrics.monitor.collect)
        self.lifecycle = Lifecycle(self.registry, loader, self._metrics, log, self._update_health)
        self._watcher: Watcher | None = None
        if settings.watch:
            self._watcher = Watcher(
                settings.watch,
                settings.watch_seconds,
                self.lifecycle,
                self._metrics,
                log,
                self._handle_device_lost,
                unloaded,
            )
        self._watch_task: asyncio.Task[None] | None = None
        self._loaded = False
        self._models: set[str] = set()  # models that the health service knows
        self._is_shutting_down = False
        self._admin_socket = admin_socket
        self._settled = settled
        self._health = Health()
        self._guard = Guard(
            self.registry,
            self._metrics,
            log,
            # Whatever comes through the socket has been authenticated by the supervisor.
            access.gate(settings, log, frozenset({_ADMIN_SERVICE} if admin_socket else ())),
            slow_reader_seconds=settings.slow_reader_seconds,
            tracing=self._tracing,
            on_device_lost=self._handle_device_lost,
        )
        self._grpc = self._create_server(shared)
        self._add_services(GuardedServices(self._guard, self._grpc))
        self._admin = None
        if admin_socket or settings.admin_port != "off":
            self._admin = self._create_server(shared=False)
            admin: Any = GuardedServices(self._guard, self._admin)
            admin_pb2_grpc.add_AdminServiceServicer_to_server(Admin(self.lifecycle), admin)
            if admin_socket:  # the supervisor also checks health through it
                health_pb2_grpc.add_HealthServicer_to_server(self._health, admin)

    async def start(self) -> None:
        """Opens the ports; health reports NOT_SERVING until `load` has completed.

        Raises:
            SettingsError: the server cannot listen on an address.
        """
        settings = self._settings
        self._set_health(NOT_SERVING)
        await self._update_health()
        self.port = ports.listen(self._grpc, settings, settings.host, settings.port, self._log)
        if self._admin and self._admin_socket:
            self._admin.add_insecure_port(f"unix:{self._admin_socket}")
        elif self._admin and settings.admin_port != "off":
            self.admin_port = ports.listen(
                self._admin, settings, settings.admin_host, settings.admin_port, self._log
            )
        if settings.metrics_port != "off":
            self._exporter = Exporter(
                self._metrics.registry, settings.metrics_host, settings.metrics_port
            )
            self.metrics_port = self._exporter.port
        await self._grpc.start()
        if self._admin:
            await self._admin.start()

    async def load(self) -> None:
        """Verifies the bundles, opens and warms up their engines, then reports SERVING.

        Raises:
            BundleError: a bundle is refused.
            DeviceError: the requested device is not available.
            SettingsError: a bundle's calibration is too small for the default alpha, a label's
                version is not served, or the watched folder cannot be read.
        """
        settings = self._settings
        empty = settings.watch is not None or self._settled
        await self.lifecycle.begin(settings.bundles or (() if empty else shipped()))
        if self._watcher:
            try:
                await self._watcher.begin()
            except OSError as error:
                raise SettingsError(f"{settings.watch} cannot be read: {error.strerror}") from error
            self._watch_task = asyncio.create_task(self._watcher.run())
        self.lifecycle.set_labels(settings.version_labels)
        self.registry.open()
        self._loaded = True
        await self._update_health()

    async def stop(
        self,
        drain_seconds: float | None = None,
        delay: float = 0.0,
        load_seconds: float | None = None,
    ) -> bool:
        """Reports NOT_SERVING, drains and closes everything.

        The server keeps accepting requests for `delay` seconds, then answers those that it has
        accepted. Returns True if everything was closed, False if bundles are still being loaded.

        Args:
            drain_seconds: seconds for accepted requests to end, after which they are cut off; None
                for the settings' value.
            delay: seconds for clients and load balancers that check health to find other servers.
            load_seconds: seconds for loads to end after the drain; None for as long as they take.
        """
        grace = self._settings.drain_seconds if drain_seconds is None else drain_seconds
        self._announce_shutdown()
        if self._watch_task:
            self._watch_task.cancel()
        await asyncio.sleep(delay)
        self.lifecycle.end()
        await self._drain(grace)
        self._metrics.monitor.flush()
        if self._exporter:
            await asyncio.to_thread(self._exporter.close)
        if self._tracing:
            await asyncio.to_thread(self._tracing.close)
        return await self.lifecycle.close(load_seconds)

    async def _drain(self, grace: float) -> None:
        # gRPC's own stop cancels requests that arrive while the connections are being told to go
        # elsewhere. Newcomers are therefore held first, and refused only after that.
        door, servers = self._guard.door, [s for s in (self._grpc, self._admin) if s]
        door.close()
        self._guard.end_probes()
        await asyncio.sleep(HOLD_SECONDS)
        stopping = [asyncio.create_task(server.stop(grace + READ_SECONDS)) for server in servers]
        await asyncio.sleep(HOLD_SECONDS)
        door.turn_away()
        is_empty = await door.wait_until_empty(grace)
        if not is_empty:
            self._log.warning("cut off", requests=door.cut_off())
        # What is left are incomplete requests, or answers that nobody may read.
        left = READ_SECONDS if is_empty else CUT_OFF_SECONDS
        await asyncio.gather(*stopping, *(server.stop(left) for server in servers))

    def _create_server(self, shared: bool) -> grpc.aio.Server:
        return grpc.aio.server(options=ports.options(self._settings, shared))

    def _add_services(self, guarded: Any) -> None:
        limits, alpha = self._settings.limits, self._settings.default_alpha
        quota = Quota(
            limits.client_images_per_second,
            limits.client_images_at_once,
            traffic=self._metrics.traffic,
        )
        scoring = Scoring(self.registry, limits, alpha, quota, guard=self._guard)
        scoring_pb2_grpc.add_ScoringServiceServicer_to_server(scoring, guarded)
        generation = Generation(self.registry, limits, alpha, quota)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, guarded)
        latent = Latent(self.registry, limits, quota)
        latent_pb2_grpc.add_LatentServiceServicer_to_server(latent, guarded)
        models = Models(self.registry, limits, alpha)
        models_pb2_grpc.add_ModelServiceServicer_to_server(models, guarded)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, guarded)
        services = Services(scoring, generation, limits)
        inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            OpenInference(self.registry, services, self._guard, self._is_ready), guarded
        )
        if self._settings.reflection:
            health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            add_reflection((*SERVICES, health), guarded)

    def _handle_device_lost(self, error: DeviceLost) -> None:
        if not self.device_lost.done():
            self._log.error("device lost", message=str(error))
            self.device_lost.set_result(error)
            self._announce_shutdown()

    async def _update_health(self) -> None:
        """Updates the health of the server and of each model."""
        if not self._loaded:
            return
        serving = {e.manifest.name for e in self.registry.engines() if e.healthy}
        self._set_health(SERVING if serving else NOT_SERVING)
        self._models |= {engine.manifest.name for engine in self.registry.engines()}
        for name in self._models:
            self._health.set(f"{MODEL_PREFIX}{name}", SERVING if name in serving else NOT_SERVING)

    def _is_ready(self) -> bool:
        """Whether everything is loaded and no shutdown has been announced, as health reports."""
        return self._loaded and not self._is_shutting_down

    def _announce_shutdown(self) -> None:
        self._is_shutting_down = True
        self._health.end()
        self._metrics.set_ready(False)

    def _set_health(self, status: int) -> None:
        self._metrics.set_ready(status == SERVING and not self._is_shutting_down)
        for service in ("", *SERVICES):
            self._health.set(service, status)
