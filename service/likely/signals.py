"""Ends a process on SIGTERM, also as the first process of a container, whatever its threads do.

The kernel applies no default handlers to the first process of a container, so this process
receives only signals that it handles itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Terminated(SystemExit):
    """The process was told to end; raised in the main thread, wherever that is."""


@contextmanager
def ending() -> Iterator[None]:
    """Within this context, the first SIGTERM raises `Terminated` in the main thread.

    A second SIGTERM ends the process at once, also after the context: the process has nothing
    left to do but end. If SIGTERM is handled or ignored already, nothing changes.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  Python's
        signal.signal(signal.SIGTERM, end)
        raise Terminated(128 + number)

    try:
        signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # only the main thread may set signal handlers
        yield
        return
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end(number: int, frame: FrameType | None = None) -> None:  # noqa: ARG001  Python's
    """Ends the process by a signal, at once; the first process of a container by its exit code.

    Buffered output is not written: its reader may have stopped reading, and the signal may have
    interrupted a write.
    """
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def drop_unwritable() -> None:
    """Drops standard streams that cannot be written, or the process would end with code 120."""
    for name in ("stdout", "stderr"):
        try:
            if stream := getattr(sys, name):
                stream.flush()
        except (OSError, ValueError):
            setattr(sys, name, None)


def leave(code: int) -> NoReturn:
    """Ends the process with that exit code, at once, whatever its threads do.

    What was logged is written already, because standard error is written line by line.
    """
    os._exit(code)
