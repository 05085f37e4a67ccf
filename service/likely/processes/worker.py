"""A worker: one of several processes that serve on one port, started by the supervisor.

`python -m likely.processes.worker` reads its `Order`, one line of JSON, from standard input. It
writes `ready` to standard output once it accepts requests. When standard input is closed, the
supervisor is gone, so the worker ends too.
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
from likely.processes import worker_metrics
from likely.processes.process import end_signal, end_timeout, run
from likely.serving.server import Server
from likely.settings import Settings

READY = b"ready\n"
REFUSED, LOST = 1, 3  # exit codes: nothing can be served; the device is gone
# Seconds for the event loop to handle a signal that came before the input's end.
SIGNAL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Order:
    """What the supervisor tells a worker.

    Attributes:
        index: number of the worker.
        socket: path of the Unix socket for the admin RPCs that the supervisor forwards.
        settings: the server's settings, by field.
        settled: whether the settings name all bundles, even if that is none, as after a change.
            If not, an empty list of bundles stands for those that the package ships.
        unloaded: names and versions that were unloaded by RPC, which the worker must not serve
            although the watched folder may hold them.
    """

    index: int
    socket: str
    settings: dict[str, Any]
    settled: bool
    unloaded: Sequence[Sequence[str]]

    def line(self) -> bytes:
        """Encodes the order as the line that the worker reads."""
        return json.dumps(asdict(self)).encode() + b"\n"


def main() -> int:
    """Serves, and returns the exit code."""
    order = Order(**json.loads(sys.stdin.buffer.readline()))
    settings = Settings(**order.settings)
    worker_metrics.write_metrics_as(order.index)
    log = logs.logger(settings.log_level, settings.log_format).bind(worker=order.index)
    logs.adopt_stdlib(settings.log_format)
    try:
        asyncio.run(_serve(order, settings, log))
    except DeviceLost:
        return LOST
    except LikelyError as error:
        with suppress(OSError):
            sys.stderr.write(f"Error: {error}\n")
        return REFUSED
    finally:
        signals.drop_unwritable()
    return 0


async def _serve(order: Order, settings: Settings, log: Any) -> None:
    ending = end_signal()
    _end_when_input_closes(ending, end_timeout(settings))
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
        # Ports open only now, as the kernel assigns connections to every process that listens.
        await server.start()
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()

    await run(server, settings, log, ending, ready, LOST)


def _end_when_input_closes(ending: asyncio.Future[signal.Signals], seconds: float) -> None:
    loop = asyncio.get_running_loop()

    def end() -> None:
        if ending.done():
            os._exit(REFUSED)  # the supervisor got a second signal, which ends at once
        os.kill(os.getpid(), signal.SIGTERM)

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1 << 10):  # unlike sys.stdin, holds no lock at exit
            pass
        loop.call_soon_threadsafe(loop.call_later, SIGNAL_SECONDS, end)
        time.sleep(seconds)  # if the event loop hangs, no supervisor is left to kill the worker
        os._exit(REFUSED)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
