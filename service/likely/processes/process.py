"""One serving process: begins, serves until it is told to end, drains, and says how it ended."""

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

LOST_SECONDS = 1.0  # to end requests in, where the device is gone
LOAD_SECONDS = 0.5  # to end loads in, once all requests have ended
MARGIN = 10.0  # seconds beyond its drain that a process may take to end


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; a second one ends at once.

    Raises:
        LikelyError: why nothing can be served.
        DeviceLost: why it was given up; a new process may do better.
    """
    graphs.require_runtime()
    log = logs.logger(settings.log_level, settings.log_format)
    logs.adopt_stdlib(settings.log_format)
    asyncio.run(_serve(settings, log))


async def _serve(settings: Settings, log: FilteringBoundLogger) -> None:
    ending = signalled()
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
    lost: int = 1,
) -> None:
    """Loads, serves until the signal comes, and drains; ends the process if it loads even then.

    Args:
        server: whose ports are open, or opened by `ready`.
        settings: what it runs with.
        log: where it tells how far it has come.
        ending: the signal to end at.
        ready: awaited when the models are loaded.
        lost: the code to end the process with if the device is gone while it loads.

    Raises:
        LikelyError: why nothing can be served.
        DeviceLost: why it was given up.
    """
    delay, grace = 0.0, settings.drain_seconds
    loading, closed = asyncio.create_task(server.load()), False
    try:
        await first(loading, ending, server.lost)
        if loading.done():
            await loading
            if ready:
                await ready()
            log.info("serving", host=settings.host, port=server.port)
            await first(ending, server.lost)
            # Who types Ctrl-C has no other servers to find first.
            if ending.done() and ending.result() == signal.SIGTERM:
                delay = settings.drain_delay
        if server.lost.done():
            delay, grace = 0.0, LOST_SECONDS
        log.info("draining", seconds=grace, delay=delay)
    finally:
        closed = await server.stop(grace, delay, LOAD_SECONDS)
    if loading.done():
        loading.exception()  # what it came to meanwhile, with all closed round it, says nothing
    # A thread that opens a bundle cannot be stopped, and has nothing to lose.
    loads = not (closed and loading.done())
    if server.lost.done():
        if loads:
            log.error("ended", message=str(server.lost.result()))
            signals.leave(lost)
        raise server.lost.result()
    log.info("ended")
    if loads:
        signals.leave(0)


def patience(settings: Settings) -> float:
    """Seconds that a process may take to end once it is told to; longer, and it hangs."""
    return settings.drain_delay + settings.drain_seconds + MARGIN


async def first(*awaited: asyncio.Future[Any]) -> None:
    """Returns once one of them is done."""
    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)


def signalled() -> asyncio.Future[signal.Signals]:
    """Done at the first SIGTERM or SIGINT; the second one, of either, ends the process at once."""
    loop = asyncio.get_running_loop()
    ending: asyncio.Future[signal.Signals] = loop.create_future()

    def end(number: signal.Signals) -> None:
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(one)
            # Not its default: that of SIGTERM is none in a container, and a KeyboardInterrupt
            # would wait for threads.
            signal.signal(one, signals.end)
        ending.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    return ending
