"""A batch: one run for several requests, whose outcomes are separate again afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from likely.batching.callers import Priority
from likely.batching.fair import Waiting
from likely.bundle import Graph
from likely.errors import Overloaded, RunStopped, ServerFault
from likely.graphs import Array, Stop
from likely.tracing import Trace

Feed = Callable[[int, int], Mapping[str, Array]]
Arrays = dict[str, Array]
Span = tuple["Member", int, int]
Outcome = Arrays | Exception


class Runner(Protocol):
    """Runs an opened graph, possibly followed by computations on its outputs."""

    @property
    def spec(self) -> Graph:
        """The manifest's description of the graph."""

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that really run the graph."""

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        """Returns the named outputs, in the order of the names."""

    def empty(self, outputs: Sequence[str]) -> list[Array]:
        """Returns the named outputs for zero rows."""


@dataclass(slots=True, eq=False, kw_only=True)
class Member(Waiting):
    """The rows of one request for one graph, which may wait, run and be answered in parts.

    Attributes:
        future: the answer: all requested outputs over all rows.
        feed: returns the graph's inputs for rows [start, stop); called in a lane.
        outputs: names of the requested outputs.
        priority: priority of the request.
        deadline: when the answer becomes worthless, in seconds of the monotonic clock; None for
            never.
        arrived_at: arrival, by the same clock.
        estimate: estimated seconds until its answer, made at admission; 0 if none was made.
        evictable: whether it may still be refused in favour of another client's request.
        counted: whether metrics count its failure.
        batches: batches that contain rows of it and have not ended.
        trace: records waits and runs; None if the request is not traced.
    """

    future: asyncio.Future[Arrays]
    feed: Feed
    outputs: tuple[str, ...]
    priority: Priority
    deadline: float | None = None
    arrived_at: float = 0.0
    estimate: float = 0.0
    evictable: bool = False
    counted: bool = True
    batches: set[Batch] = field(default_factory=set)
    trace: Trace | None = None
    _parts: list[tuple[int, Arrays]] = field(default_factory=list)
    _answered: int = 0

    @property
    def is_done(self) -> bool:
        """Whether nobody waits for it any more: it is answered or failed, or its caller left."""
        return self.future.done()

    @property
    def answered(self) -> bool:
        """Whether it has been answered without an error."""
        future = self.future
        return future.done() and not future.cancelled() and future.exception() is None

    def trace_run(self, graph: str, batch: Batch, seconds: float, start: int, stop: int) -> None:
        """Records in the trace, if there is one, the run of rows [start, stop) in a batch.

        Args:
            graph: name of the graph.
            batch: the batch that contained the rows.
            seconds: duration of its run.
            start: first row.
            stop: one past the last row.
        """
        if self.trace:
            if start == 0:
                self.trace.waited(graph, self.arrived_at, batch.began, self.rows)
            self.trace.ran(graph, batch.began, batch.began + seconds, stop - start, batch.rows)

    def leave(self) -> None:
        """Leaves all its batches; a batch that runs for nobody else is stopped."""
        for batch in self.batches:
            batch.drop_member()
        self.batches.clear()

    def fail(self, error: Exception) -> None:
        """Fails with an error, unless nobody waits for the answer any more."""
        if not self.is_done:
            self.future.set_exception(error)

    def fail_with(self, other: asyncio.Future[Arrays]) -> None:
        """Fails with the error of another ask of the same request, if that ask failed."""
        if not self.is_done and not other.cancelled() and (error := other.exception()):
            self.future.set_exception(error)

    def add_outcome(self, start: int, stop: int, outcome: Outcome) -> None:
        """Takes the outcome of rows [start, stop).

        The future is resolved once all rows have an outcome, or at the first error.
        """
        if self.is_done:
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
            try:
                joined = {
                    name: np.concatenate([part[name] for part in parts]) for name in self.outputs
                }
            except MemoryError as error:
                refusal = Overloaded("there is no memory to join the answer's parts")
                refusal.__cause__ = error
                self.future.set_exception(refusal)
            else:
                self.future.set_result(joined)


class Batch:
    """Rows of several members that run together.

    Attributes:
        spans: the members, each with its rows [start, stop).
        rows: number of rows of all members.
        priority: priority of all members.
        began: when its run began, in seconds of the monotonic clock; 0 until then.
        ready: rows that wait in this batch, prepared in advance, for a lane to take it; rows of
            members that have left are not counted.
        alone: whether nothing else of its version ran or waited when it began.
        wide: whether it runs on all cores; such a run says nothing about a lane's pace.
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
        self._remaining_members = len(spans)
        for member, _, _ in spans:
            member.batches.add(self)

    def use_all_cores(self, runner: Runner) -> None:
        """Runs the batch on all cores, with a runner for them, as nothing else needs them."""
        self._runner, self.wide = runner, True

    def drop_member(self) -> None:
        """Notes that a member has left; when the last one leaves, the run is stopped."""
        self._remaining_members -= 1
        if self._remaining_members == 0:
            self._stop.now()

    def run_timed(self) -> tuple[Sequence[tuple[Span, Outcome]], float]:
        """Runs the batch; returns each span's outcome and the seconds taken, and never raises."""
        began = self.began = time.monotonic()
        outcomes: Sequence[tuple[Span, Outcome]]
        try:
            outcomes = self.run()
        except BaseException as error:  # the lane must survive, and the members must be told
            fault = ServerFault(f"a batch failed: {error!r}")
            outcomes = [(span, fault) for span in self.spans]
        return outcomes, time.monotonic() - began

    def run(self) -> list[tuple[Span, Outcome]]:
        """Runs the batch and returns each span's outcome; called in a lane.

        If the run fails, the batch is split in halves, repeatedly, so that in the end
        only the member that makes the model raise gets the error. If the run finds no
        memory, each half of its rows is run once, and refused if that fails as well.
        """
        return list(self._run_or_split(self.spans, halved=False))

    def _run_or_split(self, spans: list[Span], halved: bool) -> Iterable[tuple[Span, Outcome]]:
        spans = [span for span in spans if not span[0].is_done]
        if not spans:
            return
        try:
            outcomes = self._run(spans)
        except RunStopped as error:
            yield from ((span, error) for span in spans)
        except MemoryError as error:  # of the runtime, or of numpy around the run
            if halved or sum(stop - start for _, start, stop in spans) == 1:
                for span in spans:  # one error each: raising an error adds to its traceback
                    refusal = Overloaded("there is no memory for the run, nor for half of it")
                    refusal.__cause__ = error
                    yield span, refusal
                return
            for half in _split_rows(spans):
                yield from self._run_or_split(half, halved=True)
        except Exception as error:
            if len(spans) == 1:
                yield spans[0], error
                return
            middle = len(spans) // 2
            yield from self._run_or_split(spans[:middle], halved)
            yield from self._run_or_split(spans[middle:], halved)
        else:
            yield from zip(spans, outcomes, strict=True)

    def _run(self, spans: list[Span]) -> list[Arrays]:
        feeds = [member.feed(start, stop) for member, start, stop in spans]
        if len(spans) == 1:
            names: Sequence[str] = spans[0][0].outputs
            arrays = self._runner.run(feeds[0], names, self._stop)
            return [dict(zip(names, arrays, strict=True))]
        names = tuple(dict.fromkeys(name for member, _, _ in spans for name in member.outputs))
        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        outputs = dict(zip(names, self._runner.run(joined, names, self._stop), strict=True))
        outcomes, at = [], 0
        for member, start, stop in spans:
            end = at + stop - start
            outcomes.append({name: outputs[name][at:end] for name in member.outputs})
            at = end
        return outcomes


def _split_rows(spans: list[Span]) -> tuple[list[Span], list[Span]]:
    """Splits the rows in two halves; a member in the middle is divided."""
    room = sum(stop - start for _, start, stop in spans) // 2
    first: list[Span] = []
    second: list[Span] = []
    for member, start, stop in spans:
        middle = start + min(room, stop - start)
        room -= middle - start
        first += [(member, start, middle)] * (middle > start)
        second += [(member, middle, stop)] * (stop > middle)
    return first, second


def feed_from_arrays(feeds: Mapping[str, Array]) -> Feed:
    """Returns a feed that takes its rows from existing arrays."""

    def feed(start: int, stop: int) -> Mapping[str, Array]:
        return {name: np.ascontiguousarray(array[start:stop]) for name, array in feeds.items()}

    return feed
