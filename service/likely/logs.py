"""Structured logs on standard error: one line per event, as JSON or for people."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal, TextIO


@contextmanager
def _hidden_module(name: str) -> Iterator[None]:
    """Hides a module from what is imported within this context."""
    there = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(there)


# If rich is installed, structlog imports it to colour tracebacks. A server would then start 0.2 s
# (a twelfth) later and use 3 MiB more.
with _hidden_module("rich"):
    import structlog

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger, Processor

Format = Literal["auto", "json", "console"]


class _Writer(structlog.WriteLogger):
    """Writes events, and drops those that cannot be written, as `logging` does.

    A full disk, or a reader that is gone, must not fail a request or end the server.
    """

    def msg(self, message: str) -> None:
        """Writes an event if possible."""
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            super().msg(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


def logger(
    level: str = "info", form: Format = "auto", stream: TextIO | None = None
) -> FilteringBoundLogger:
    """A logger of events of at least that level."""
    out = stream or sys.stderr
    *prepare, render = _processors(form, out)
    bound: FilteringBoundLogger = structlog.wrap_logger(
        _Writer(out),
        processors=[*prepare, render],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
    )
    return bound


def adopt_stdlib(form: Format = "auto") -> None:
    """Gives the same form to what libraries log through `logging` (warnings and above)."""
    *prepare, render = _processors(form, sys.stderr)
    handler = logging.StreamHandler()
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=prepare, processors=[remove, render])
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _processors(form: Format, out: TextIO) -> list[Processor]:
    console = form == "console" or (form == "auto" and out.isatty())
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if console:
        renderer = structlog.dev.ConsoleRenderer(
            colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        return [*shared, renderer]
    return [*shared, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
