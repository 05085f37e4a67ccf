"""Who asks: the client to be fair to, how urgent it is, and until when an answer counts."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from likely.tracing import Trace


class Priority(IntEnum):
    """Which of two waiting requests goes first; each is served in the end."""

    INTERACTIVE = 0
    BULK = 1


@dataclass(slots=True, eq=False)
class Caller:
    """One request's caller.

    Attributes:
        client: whom the request is counted against; empty for the process itself.
        priority: what the caller asks for; None leaves it to the request's kind and size.
        deadline: when the answer is worth nothing any more, by the monotonic clock.
        admitted: whether the request was let in: what it asks for later is not refused.
        counted: whether its failure counts; not where what fails is asked again in parts.
        request_id: what the caller and the log call the request.
        trace: is told of its waits and runs; None where it is not traced.
        scopes: what its token allows; None where none is asked for.
    """

    client: str
    priority: Priority | None = None
    deadline: float | None = None
    admitted: bool = False
    counted: bool = True
    request_id: str = ""
    trace: Trace | None = None
    scopes: frozenset[str] | None = None


# Each RPC is a task of its own, and what it starts inherits its caller.
_CALLER: ContextVar[Caller] = ContextVar("caller")


def announce(caller: Caller) -> None:
    """Makes it the caller of this task and of all that it starts from now on."""
    _CALLER.set(caller)


def current() -> Caller:
    """The caller of this task; the process itself, always admitted, where there is none."""
    return _CALLER.get(None) or Caller("", admitted=True)
