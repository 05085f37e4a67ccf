"""What clients saw of a server, request by request, and what has to be true of it.

A client notes when it begins a request and every outcome that it is given. Afterwards
`violations` tells what cannot be, whatever happened to the server meanwhile:

- a request has no outcome, or more than one;
- an answer is not what the version that it names answers to that question;
- a request failed in a way that does not invite another try, or the server did not say when;
- the server accepted a request, as its own log says, and the client got no answer;
- the server answered a request twice.

Accepted is what passed the server's door before it closed: a drain may refuse others, so long
as it tells them to come again.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from likely.serving.guard import REQUEST_ID
from tests.faults.alive import told_to_come_again

RETRYABLE = frozenset({"UNAVAILABLE"})


@dataclass(frozen=True)
class Outcome:
    """How a request ended.

    Attributes:
        code: OK, or the name of its status.
        version: the model's version that the answer names.
        answer: what was answered, in a form that compares exactly.
        trailing: what a failure ended with; holds a request's id if the server told of it.
        at: seconds of a clock that only grows.
    """

    code: str
    version: str = ""
    answer: object = None
    trailing: Mapping[str, str | bytes] = field(default_factory=dict)
    at: float = field(default_factory=time.monotonic)


@dataclass
class Request:
    """A question as it was begun.

    Attributes:
        question: what was asked, as the references know it.
        at: seconds of a clock that only grows.
        outcomes: all that the client was told; one, if all is well.
    """

    question: object
    at: float
    outcomes: list[Outcome] = field(default_factory=list)


class History:
    """All requests of all clients of a run; may be written by several threads."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def begin(self, question: object) -> str:
        """The id of a request that begins now."""
        with self._lock:
            name = f"request-{next(self._numbers)}"
            self.requests[name] = Request(question, time.monotonic())
        return name

    def end(self, name: str, outcome: Outcome) -> None:
        """Notes an outcome of that request."""
        with self._lock:
            self.requests[name].outcomes.append(outcome)

    def codes(self) -> Counter[str]:
        """How many requests ended with each code."""
        return Counter(outcome.code for outcome in self._outcomes())

    def versions(self) -> Counter[str]:
        """How many answers each version gave."""
        return Counter(o.version for o in self._outcomes() if o.code == "OK")

    def _outcomes(self) -> list[Outcome]:
        with self._lock:
            return [outcome for r in self.requests.values() for outcome in r.outcomes]


Right = Callable[[object, str, object], bool]


def violations(
    history: History,
    right: Right,
    log: Iterable[Mapping[str, object]] | None = None,
    retryable: frozenset[str] = RETRYABLE,
) -> list[str]:
    """What cannot be, a sentence each; none if the run was well.

    Args:
        history: of the run.
        right: whether a version answers a question so: called with question, version, answer.
        log: what the server logged; None where it could not log to the end.
        retryable: codes that a failed request may have.
    """
    found: list[str] = []
    for name, request in history.requests.items():
        if len(request.outcomes) != 1:
            found.append(f"{name} has {len(request.outcomes)} outcomes")
            continue
        (outcome,) = request.outcomes
        if outcome.at < request.at:
            found.append(f"{name} ended before it began")
        if outcome.code == "OK":
            if not right(request.question, outcome.version, outcome.answer):
                found.append(f"{name}: {outcome.version} does not answer so")
        elif outcome.code not in retryable:
            found.append(f"{name} failed with {outcome.code}")
        elif REQUEST_ID in outcome.trailing and not _is_told_when(outcome.trailing):
            found.append(f"{name} failed and was not told when to come again")
    return found + (_lost(history, log) if log is not None else [])


def _is_told_when(trailing: Mapping[str, str | bytes]) -> bool:
    try:
        told_to_come_again(trailing)
    except (AssertionError, KeyError):
        return False
    return True


def _lost(history: History, log: Iterable[Mapping[str, object]]) -> list[str]:
    """What the server accepted and the client did not get, or got without the server's doing."""
    ended = [event for event in log if event.get("event") == "rpc"]
    accepted = [event for event in ended if event.get("accepted", True)]
    found = []
    for event in accepted:
        name = str(event["request_id"])
        request = history.requests.get(name)
        codes = [outcome.code for outcome in request.outcomes] if request else []
        if request and event["code"] != "OK":
            found.append(f"{name} was accepted and ended with {event['code']}")
        elif request and codes != ["OK"]:
            found.append(f"{name} was accepted and answered, and the client saw {codes}")
    times = Counter(str(event["request_id"]) for event in accepted)
    found += [f"{name} was answered {n} times" for name, n in times.items() if n > 1]
    found += [
        f"{name} was answered, and the server knows nothing of it"
        for name, request in history.requests.items()
        if [outcome.code for outcome in request.outcomes] == ["OK"] and not times[name]
    ]
    return found


def events(text: str) -> list[dict[str, object]]:
    """The events of a log of JSON lines."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
