"""The caller of a request: its client for fair queuing, its priority, and its deadline."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from likely.tracing import Trace


class Priority(IntEnum):
    """The priority of a request: interactive requests go first, but bulk is never starved."""

    INTERACTIVE = 0
    BULK = 1


@dataclass(slots=True, eq=False)
class Caller:
    """The caller of one request.

    Attributes:
        client: identity for quotas and fair queuing; empty for the process itself.
        priority: the priority that the caller asked for; None lets the request's kind and size
            decide.
        deadline: when the answer becomes worthless, in seconds of the monotonic clock; None for
            never.
        admitted: whether the request has been admitted; its later rows are then never refused.
        counted: whether metrics count a failure; False if a failed request is retried in halves,
            each of which is counted.
        request_id: identifies the request to the caller and in the log.
        trace: records waits and runs; None if the request is not traced.
        scopes: the scopes that its token grants; None if no token is required.
    """

    client: str
    priority: Priority | None = None
    deadline: float | None = None
    admitted: bool = False
    counted: bool = True
    request_id: str = ""
    trace: Trace | None = None
    scopes: frozenset[str] | None = None


# Each RPC runs in its own task, and the tasks that it starts inherit its caller.
_CALLER: ContextVar[Caller] = ContextVar("caller")


def announce(caller: Caller) -> None:
    """Sets the caller of the current task and of all tasks that it starts from now on."""
    _CALLER.set(caller)


def current() -> Caller:
    """Returns the caller of the current task; if none is set, the process itself, admitted."""
    return _CALLER.get(None) or Caller("", admitted=True)
