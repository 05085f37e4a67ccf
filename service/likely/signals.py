"""How a process ends: by SIGTERM, the first one of a container too, and whatever its threads do.

The kernel gives the first one no default handlers, so that it hears of no signal that it does not
handle itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn


class Told(SystemExit):
    """The process was told to end; raised wherever its main thread is."""


@contextmanager
def ending() -> Iterator[None]:
    """Within it the first SIGTERM raises `Told` in the main thread, and a second one ends at once.

    Where SIGTERM is handled or ignored already, that is left so.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def tell(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  Python's
        signal.signal(signal.SIGTERM, end)
        raise Told(128 + number)

    try:
        signal.signal(signal.SIGTERM, tell)
    except ValueError:  # not the main thread, which alone hears of signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end(number: int, frame: FrameType | None = None) -> None:  # noqa: ARG001  Python's
    """Ends the process by a signal, at once; the first one of a container by its exit code."""
    _flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def leave(code: int) -> NoReturn:
    """Ends the process with that code, at once, whatever its threads do."""
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
