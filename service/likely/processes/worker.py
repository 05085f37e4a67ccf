"""One of several processes that serve on one port; begun and ended by the supervisor.

`python -m likely.processes.worker` reads one line of JSON, what it is and what it serves with,
from its standard input, and says `ready` on its standard output once it takes requests. When the
input ends, the supervisor is gone, and so it ends too.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from likely import logs, signals
from likely.errors import DeviceLost, LikelyError
from likely.processes import together
from likely.processes.process import patience, run, signalled
from likely.serving.server import Server
from likely.settings import Settings

READY = b"ready\n"
REFUSED, LOST = 1, 3  # exit codes: nothing can be served; the device is gone
HEARD = 0.1  # seconds in which the loop hears of a signal that came before the input's end


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is told.

    Attributes:
        index: which of the workers it is.
        socket: where it takes the admin RPCs that the supervisor hands on.
        settings: what it serves with, by field.
        settled: whether these name all bundles, be it none, as after a change.
        unloaded: names and versions that the others have unloaded, wherever they lie.
    """

    index: int
    socket: str
    settings: dict[str, Any]
    settled: bool
    unloaded: Sequence[Sequence[str]]

    def line(self) -> bytes:
        """The order as the worker reads it."""
        return json.dumps(asdict(self)).encode() + b"\n"


def main() -> int:
    """Serves, and gives the exit code."""
    order = Order(**json.loads(sys.stdin.buffer.readline()))
    settings = Settings(**order.settings)
    together.count_as(order.index)
    log = logs.logger(settings.log_level, settings.log_format).bind(worker=order.index)
    logs.adopt_stdlib(settings.log_format)
    try:
        asyncio.run(_work(order, settings, log))
    except DeviceLost:
        return LOST
    except LikelyError as error:
        with suppress(OSError):
            sys.stderr.write(f"Error: {error}\n")
        return REFUSED
    finally:
        signals.forget()
    return 0


async def _work(order: Order, settings: Settings, log: Any) -> None:
    ending = signalled()
    _end_with_the_input(ending, patience(settings))
    socket = Path(order.socket)
    server = Server(
        settings,
        log,
        shared=True,
        admin_socket=socket,
        settled=order.settled,
        unloaded=[(name, version) for name, version in order.unloaded],
    )

    async def ready() -> None:
        # Only now: the kernel would hand connections to a worker that cannot answer yet.
        await server.start()
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()

    await run(server, settings, log, ending, ready, LOST)


def _end_with_the_input(ending: asyncio.Future[signal.Signals], seconds: float) -> None:
    loop = asyncio.get_running_loop()

    def end() -> None:
        if ending.done():
            os._exit(REFUSED)  # the supervisor was told twice to end
        os.kill(os.getpid(), signal.SIGTERM)

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1 << 10):  # holds no lock that the end would want
            pass
        loop.call_soon_threadsafe(loop.call_later, HEARD, end)
        time.sleep(seconds)  # a loop that hangs hears of nothing, and nobody is left to kill it
        os._exit(REFUSED)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
