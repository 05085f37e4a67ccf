"""A serving process: starts a server, serves until a signal comes, drains, and ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from likely import graphs, logs, signals
from likely.serving.server import Server
from likely.settings import Settings

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

LOST_SECONDS = 1.0  # seconds for requests to end if the device is gone
LOAD_SECONDS = 0.5  # seconds for loads to end, once all requests have ended
MARGIN = 10.0  # seconds that a process may take to end, beyond its drain


def serve(settings: Settings) -> None:
    """Serves in this process until SIGTERM or SIGINT; a second signal ends it at once.

    Raises:
        LikelyError: nothing can be served.
        DeviceLost: the device is gone; a new process may find one.
    """
    graphs.require_runtime()
    log = logs.logger(settings.log_level, settings.log_format)
    logs.adopt_stdlib(settings.log_format)
    asyncio.run(_serve(settings, log))


async def _serve(settings: Settings, log: FilteringBoundLogger) -> None:
    ending = end_signal()
    server = Server(settings, log)
    try:
        await server.start()
        log.info(
            "listening",
            host=settings.host,
            port=server.port,
            metrics=server.metrics_port,
            admin=server.admin_port,
        )
    except BaseException:
        await server.stop(0)
        raise
    await run(server, settings, log, ending)


async def run(
    server: Server,
    settings: Settings,
    log: FilteringBoundLogger,
    ending: asyncio.Future[signal.Signals],
    ready: Callable[[], Awaitable[None]] | None = None,
    lost_code: int = 1,
) -> None:
    """Loads the models, serves until a signal comes, and drains.

    If models are still being loaded after that, the process ends here.

    Args:
        server: a server whose ports are open, or are opened by `ready`.
        settings: the server's settings.
        log: receives an event for each phase.
        ending: done when a signal to end has come.
        ready: awaited once the models are loaded.
        lost_code: exit code if the device is gone and models are still being loaded.

    Raises:
        LikelyError: nothing can be served.
        DeviceLost: the device is gone.
    """
    delay, grace = 0.0, settings.drain_seconds
    loading, closed = asyncio.create_task(server.load()), False
    try:
        await wait_for_first(loading, ending, server.device_lost)
        if loading.done():
            await loading
            if ready:
                await ready()
            log.info("serving", host=settings.host, port=server.port)
            await wait_for_first(ending, server.device_lost)
            # The delay lets clients find other servers, which is pointless after Ctrl-C.
            if ending.done() and ending.result() == signal.SIGTERM:
                delay = settings.drain_delay
        if server.device_lost.done():
            delay, grace = 0.0, LOST_SECONDS
        log.info("draining", seconds=grace, delay=delay)
    finally:
        closed = await server.stop(grace, delay, LOAD_SECONDS)
    if loading.done():
        loading.exception()  # marks it retrieved; an error caused by the shutdown does not matter
    # A thread that opens a bundle cannot be stopped, but may be killed with the process.
    loads = not (closed and loading.done())
    if server.device_lost.done():
        if loads:
            log.error("ended", message=str(server.device_lost.result()))
            signals.leave(lost_code)
        raise server.device_lost.result()
    log.info("ended")
    if loads:
        signals.leave(0)


def end_timeout(settings: Settings) -> float:
    """Seconds that a process may take to end after a signal; after that, it counts as hung."""
    return settings.drain_delay + settings.drain_seconds + MARGIN


async def wait_for_first(*awaited: asyncio.Future[Any]) -> None:
    """Waits until one of the futures is done."""
    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)


def end_signal() -> asyncio.Future[signal.Signals]:
    """Returns a future for the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    ending: asyncio.Future[signal.Signals] = loop.create_future()

    def end(number: signal.Signals) -> None:
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(one)
            # Not the default handlers: a container's first process has none for SIGTERM, and a
            # KeyboardInterrupt would wait for threads.
            signal.signal(one, signals.end)
        ending.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    return ending
