"""How a process ends: by SIGTERM, the first one of a container too, and whatever its threads do.

The kernel gives the first one no default handlers, so that it hears of no signal that it does not
handle itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Told(SystemExit):
    """The process was told to end; raised wherever its main thread is."""


@contextmanager
def ending() -> Iterator[None]:
    """Within it the first SIGTERM raises `Told` in the main thread.

    A second one ends at once, be it within or behind: whoever was told has only to end. Where
    SIGTERM is handled or ignored already, that is left so.
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
        if signal.getsignal(signal.SIGTERM) is tell:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end(number: int, frame: FrameType | None = None) -> None:  # noqa: ARG001  Python's
    """Ends the process by a signal, at once; the first one of a container by its exit code.

    What a stream still holds is not written: who reads it may stand still, and the signal may
    have come in the middle of a write.
    """
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def forget() -> None:
    """Gives up a standard error that cannot be written, or the process would end with code 120."""
    try:
        if sys.stderr:
            sys.stderr.flush()
    except (OSError, ValueError):
        sys.stderr = None


def leave(code: int) -> NoReturn:
    """Ends the process with that code, at once, whatever its threads do.

    What was logged is written by then: standard error holds no line back.
    """
    os._exit(code)
