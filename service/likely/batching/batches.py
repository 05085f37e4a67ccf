"""One run for several requests: put together, divided again, and none harmed by another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from likely.batching.callers import Priority
from likely.batching.turns import Waiting
from likely.bundle import Graph
from likely.errors import OutOfMemory, Overloaded, RunStopped, ServerFault
from likely.graphs import Array, Stop
from likely.tracing import Trace

Feed = Callable[[int, int], Mapping[str, Array]]
Arrays = dict[str, Array]
Span = tuple["Member", int, int]
Outcome = Arrays | Exception


class Runner(Protocol):
    """What runs rows: an opened graph, alone or with what is computed from its outputs."""

    @property
    def spec(self) -> Graph:
        """What the manifest says of the graph."""

    @property
    def providers(self) -> tuple[str, ...]:
        """What really runs it."""

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        """The outputs of that name, in that order."""

    def empty(self, outputs: Sequence[str]) -> list[Array]:
        """The outputs of no rows."""


@dataclass(slots=True, eq=False, kw_only=True)
class Member(Waiting):
    """One request's rows: waiting, running and answered in parts.

    Attributes:
        future: the answer, all outputs asked for over all rows.
        feed: the graph's inputs for rows [start, stop); called in a lane.
        outputs: names of those that the answer shall have.
        priority: which others it goes before.
        deadline: when it is worth nothing any more, by the monotonic clock; None for never.
        since: when it came, by the same clock.
        estimate: seconds that its answer was to take when it was let in; 0 where none was made.
        guest: whether it may still be refused in favour of another client's.
        counted: whether its failure counts.
        batches: those that run rows of it.
        trace: is told of its waits and runs; None where it is not traced.
    """

    future: asyncio.Future[Arrays]
    feed: Feed
    outputs: tuple[str, ...]
    priority: Priority
    deadline: float | None = None
    since: float = 0.0
    estimate: float = 0.0
    guest: bool = False
    counted: bool = True
    batches: set[Batch] = field(default_factory=set)
    trace: Trace | None = None
    _parts: list[tuple[int, Arrays]] = field(default_factory=list)
    _answered: int = 0

    @property
    def dead(self) -> bool:
        """Whether nobody waits for it any more: answered, failed, or its caller gone."""
        return self.future.done()

    @property
    def answered(self) -> bool:
        """Whether it has its answer, and did not fail."""
        future = self.future
        return future.done() and not future.cancelled() and future.exception() is None

    def ran(self, graph: str, batch: Batch, seconds: float, start: int, stop: int) -> None:
        """Tells the trace, if there is one, of those rows, which ran in a batch for so long."""
        if self.trace:
            if start == 0:
                self.trace.waited(graph, self.since, batch.began, self.rows)
            self.trace.ran(graph, batch.began, batch.began + seconds, stop - start, batch.rows)

    def leave(self) -> None:
        """Lets batches that run for nobody else end."""
        for batch in self.batches:
            batch.leave()
        self.batches.clear()

    def fail_with(self, other: asyncio.Future[Arrays]) -> None:
        """Fails, where another ask of its request has."""
        if not self.dead and not other.cancelled() and (error := other.exception()):
            self.future.set_exception(error)

    def take(self, start: int, stop: int, outcome: Outcome) -> None:
        """Keeps the outcome of those rows; answers with the last of them, fails with the first."""
        if self.dead:
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
            return
        if stop - start == self.rows:
            self.future.set_result(outcome)
            return
        self._parts.append((start, outcome))
        self._answered += stop - start
        if self._answered == self.rows:
            self._parts.sort(key=lambda part: part[0])
            parts = [arrays for _, arrays in self._parts]
            self.future.set_result(
                {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}
            )


class Batch:
    """Rows of several members that run together.

    Attributes:
        spans: the members, each with its first row and the one past its last.
        rows: of all members.
        priority: that of every member.
        began: when its run began, by the monotonic clock; 0 until then.
        ready: rows that wait in it for a lane to end; who leaves takes theirs along.
        alone: whether it was all there was when it began.
        wide: whether it then runs on all cores, and tells nothing of the pace of a lane.
    """

    began = 0.0
    ready = 0
    alone = False
    wide = False

    def __init__(self, runner: Runner, spans: list[Span]) -> None:
        self.spans = spans
        self.rows = sum(stop - start for _, start, stop in spans)
        self.priority = spans[0][0].priority
        self._runner = runner
        self._stop = Stop()
        self._living = len(spans)
        for member, _, _ in spans:
            member.batches.add(self)

    def widen(self, runner: Runner) -> None:
        """Has it run by what takes all cores, for nothing else wants them."""
        self._runner, self.wide = runner, True

    def leave(self) -> None:
        """Counts a member that does not wait any more; without the last one, the run ends."""
        self._living -= 1
        if self._living == 0:
            self._stop.now()

    def timed(self) -> tuple[Sequence[tuple[Span, Outcome]], float]:
        """What comes of every span, whatever happens, and how long it took in seconds."""
        began = self.began = time.monotonic()
        outcomes: Sequence[tuple[Span, Outcome]]
        try:
            outcomes = self.run()
        except BaseException as error:  # the lane must come back, the members hear of it
            fault = ServerFault(f"a batch failed: {error!r}")
            outcomes = [(span, fault) for span in self.spans]
        return outcomes, time.monotonic() - began

    def run(self) -> list[tuple[Span, Outcome]]:
        """What comes of every span; called in a lane.

        Where the run fails, halves of it are run, so that in the end only the member
        that makes the model raise is told. Where it finds no memory, each half is run
        once more, and then refused.
        """
        return list(self._attempt(self.spans, halved=False))

    def _attempt(self, spans: list[Span], halved: bool) -> Iterable[tuple[Span, Outcome]]:
        spans = [span for span in spans if not span[0].dead]
        if not spans:
            return
        try:
            outcomes = self._run(spans)
        except RunStopped as error:
            yield from ((span, error) for span in spans)
        except OutOfMemory as error:
            if halved or sum(stop - start for _, start, stop in spans) == 1:
                for span in spans:  # each its own: a raised error gathers its traceback
                    refusal = Overloaded("there is no memory for the run, nor for half of it")
                    refusal.__cause__ = error
                    yield span, refusal
                return
            for half in _halves(spans):
                yield from self._attempt(half, halved=True)
        except Exception as error:
            if len(spans) == 1:
                yield spans[0], error
                return
            middle = len(spans) // 2
            yield from self._attempt(spans[:middle], halved)
            yield from self._attempt(spans[middle:], halved)
        else:
            yield from zip(spans, outcomes, strict=True)

    def _run(self, spans: list[Span]) -> list[Arrays]:
        feeds = [member.feed(start, stop) for member, start, stop in spans]
        if len(spans) == 1:
            names: Sequence[str] = spans[0][0].outputs
            found = self._runner.run(feeds[0], names, self._stop)
            return [dict(zip(names, found, strict=True))]
        names = tuple(dict.fromkeys(name for member, _, _ in spans for name in member.outputs))
        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        outputs = dict(zip(names, self._runner.run(joined, names, self._stop), strict=True))
        outcomes, at = [], 0
        for member, start, stop in spans:
            end = at + stop - start
            outcomes.append({name: outputs[name][at:end] for name in member.outputs})
            at = end
        return outcomes


def _halves(spans: list[Span]) -> tuple[list[Span], list[Span]]:
    """The same rows in two parts, a member's rows divided where the middle is."""
    room = sum(stop - start for _, start, stop in spans) // 2
    first: list[Span] = []
    second: list[Span] = []
    for member, start, stop in spans:
        middle = start + min(room, stop - start)
        room -= middle - start
        first += [(member, start, middle)] * (middle > start)
        second += [(member, middle, stop)] * (stop > middle)
    return first, second


def rows_of(feeds: Mapping[str, Array]) -> Feed:
    """The feed of arrays that are there already."""

    def feed(start: int, stop: int) -> Mapping[str, Array]:
        return {name: np.ascontiguousarray(array[start:stop]) for name, array in feeds.items()}

    return feed
