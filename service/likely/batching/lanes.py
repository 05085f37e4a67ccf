"""Lanes: worker threads that run the graphs of one bundle on batches of queued requests.

Every graph has one queue. As soon as a lane is free, it takes a batch of what is
queued, so an idle server answers at once, and a busy one merges the requests that
arrived in the meantime. If enough rows are queued, a batch is prepared for a busy
lane, which takes it as soon as its run ends, without a detour over the event loop.
Everything but the runs happens on the event loop. A batch that is the only work also
runs there if that takes about a millisecond or less; otherwise it may run on all cores.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from likely.batching import callers
from likely.batching.admission import Bounds
from likely.batching.batcher import RESTARTED, Batcher
from likely.batching.batches import Batch, Feed, Member, Outcome, Runner, Span, feed_from_arrays
from likely.batching.callers import Caller, Priority
from likely.batching.traffic import Traffic
from likely.batching.tuning import Best
from likely.bundle import Graph, Role
from likely.errors import (
    DeadlineExceeded,
    LikelyError,
    NotAnswered,
    RunStopped,
    Unavailable,
)
from likely.graphs import Array

BULK_ROWS = 64  # a request with this many rows or more is bulk
# A few rows wait for a run of at most this many seconds rather than wake a lane.
SHORT_RUN_SECONDS = 1e-3
PASSES = 7  # interactive batches that may pass waiting bulk, which thus gets at least an eighth
_DRAWING = (Role.SAMPLE, Role.GENERATE)

Ready: TypeAlias = "deque[tuple[Role, Batch]]"


@dataclass(frozen=True, slots=True)
class Ask:
    """Rows to run through a graph.

    Attributes:
        role: role of the graph.
        rows: number of rows.
        feed: returns the graph's inputs for rows [start, stop). It is called in a lane, so that
            it does not delay the event loop.
        outputs: names of the requested outputs.
    """

    role: Role
    rows: int
    feed: Feed
    outputs: tuple[str, ...]


class Lanes:
    """The opened graphs of one bundle, their queues, and the threads that run them.

    Beside the configured lanes there is an express lane. It serves interactive requests
    only, and only while all other lanes run bulk batches. Bulk may thus occupy every
    lane, so that no core is idle, without delaying interactive requests.

    Attributes:
        providers: the execution providers that really run the graphs, as their sessions report.
    """

    def __init__(
        self,
        name: str,
        runners: Mapping[Role, Runner],
        *,
        lanes: int,
        best: Mapping[Role, Best],
        bounds: Bounds | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        """Creates the queues and threads for opened graphs.

        Args:
            name: name of the model, for threads, metrics and messages.
            runners: one runner for each graph of the bundle.
            lanes: number of concurrent runs, without the express lane.
            best: how each graph runs best.
            bounds: limits of each graph's queue.
            traffic: metrics of queues and batches.
        """
        self.providers = next(iter(runners.values())).providers
        self._name = name
        self._lane_count = lanes
        self._traffic = traffic or Traffic()
        self._batchers = {
            role: Batcher(name, runner, best[role], bounds or Bounds(), self._traffic, role)
            for role, runner in runners.items()
        }
        self._threads = ThreadPoolExecutor(lanes + 1, thread_name_prefix=f"lane-{name}")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: dict[Batch, Role] = {}
        # Prepared batches, all of one priority, which lanes take when their runs end.
        self._ready: Ready = deque()
        self._interactive_waits = False  # interactive rows wait, so no lane takes bulk by itself
        self._passes = 0  # interactive batches that passed waiting or prepared bulk
        self._wake_scheduled = False  # whether `_wake` has been scheduled
        # Wakes the lanes when rows have waited long enough for others.
        self._wake_timer: asyncio.TimerHandle | None = None
        self._closed = False

    def __contains__(self, role: Role) -> bool:
        return role in self._batchers

    @property
    def ready(self) -> int:
        """Number of rows in prepared batches."""
        return sum(batch.rows for _, batch in tuple(self._ready))

    def graph(self, role: Role) -> Graph:
        """Returns the manifest's description of the graph with that role.

        Raises:
            NotAnswered: the bundle has no such graph.
        """
        return self._batcher(role).runner.spec

    async def run(
        self, role: Role, feeds: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """Returns the named outputs of a graph over all rows of the feeds.

        Raises:
            NotAnswered: the bundle has no such graph.
            Overloaded: the queue is full, the answer would probably come after the deadline, or
                there is no memory for the run.
            DeadlineExceeded: the request could no longer be answered in time, so it was not run.
            Unavailable: the queue failed, or is closed.
        """
        rows = len(next(iter(feeds.values())))
        return (await self.run_all(Ask(role, rows, feed_from_arrays(feeds), tuple(outputs))))[0]

    async def run_all(self, *asks: Ask) -> list[dict[str, Array]]:
        """Returns the outputs of each ask; as soon as one ask fails, the others are abandoned.

        Raises:
            As `run`.
        """
        members, outputs = self._admit(asks), []
        # Futures are awaited in order, so each failure is passed on to the ask before it.
        for before, member in pairwise(members):
            member.future.add_done_callback(before.fail_with)
        try:
            for member in members:
                outputs.append(await member.future)  # noqa: PERF401  saves a coroutine
            return outputs
        except BaseException as error:
            if members[0].counted and isinstance(error.__cause__, MemoryError):
                self._traffic.shed.labels(self._name, "memory").inc()
            if isinstance(error, asyncio.CancelledError | DeadlineExceeded):
                began = any(batch.began for member in members for batch in member.batches)
                self._traffic.dropped.labels(self._name, "run" if began else "queue").inc()
            for member, ask in zip(members, asks, strict=True):
                if isinstance(error, asyncio.CancelledError):
                    self._batchers[ask.role].record_departure(member)
                self._abandon(member, ask.role)
            raise

    def close(self) -> None:
        """Refuses everything that waits, lets running batches end, and frees the threads."""
        self._closed = True
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(
                self._refuse_waiting, f"model {self._name} is being closed"
            )
        self._threads.shutdown(wait=True)

    def _batcher(self, role: Role) -> Batcher:
        if role not in self._batchers:
            raise NotAnswered(f"model {self._name} has no {role} graph, so it does not answer this")
        return self._batchers[role]

    def _admit(self, asks: Sequence[Ask]) -> list[Member]:
        """Admits the asks, and returns them as queued members."""
        if self._closed:
            raise Unavailable(f"model {self._name} is being closed")
        loop, caller = self._adopt_loop(), callers.current()
        members = [self._make_member(ask, caller, loop) for ask in asks]
        waiting = [
            (ask.role, member) for ask, member in zip(asks, members, strict=True) if ask.rows
        ]
        if not caller.admitted:
            # All graphs are checked before any member is evicted in favour of this request.
            victims = [
                self._batchers[role].check(member, self._estimate_wait, self._lane_count)
                for role, member in waiting
            ]
            for (role, _), chosen in zip(waiting, victims, strict=True):
                if chosen:
                    self._batchers[role].evict(chosen, self._estimate_wait)
            caller.admitted = True
        for role, member in waiting:
            self._batchers[role].add(member)
            self._interactive_waits |= member.priority is Priority.INTERACTIVE
        if waiting and not self._wake_scheduled:
            # Whatever else is queued in this turn of the event loop joins the same batch.
            self._wake_scheduled = True
            loop.call_soon(self._wake)
        return members

    def _make_member(self, ask: Ask, caller: Caller, loop: asyncio.AbstractEventLoop) -> Member:
        batcher = self._batcher(ask.role)
        bulk = ask.role in _DRAWING or ask.rows >= BULK_ROWS or caller.priority is Priority.BULK
        member = Member(
            client=caller.client,
            rows=ask.rows,
            row_bytes=batcher.row_bytes,
            future=loop.create_future(),
            feed=ask.feed,
            outputs=ask.outputs,
            priority=Priority.BULK if bulk else Priority.INTERACTIVE,
            deadline=caller.deadline,
            arrived_at=time.monotonic(),
            evictable=not caller.admitted,
            counted=caller.counted,
            trace=caller.trace,
        )
        if not ask.rows:
            arrays = batcher.runner.empty(ask.outputs)
            member.future.set_result(dict(zip(ask.outputs, arrays, strict=True)))
        return member

    def _adopt_loop(self) -> asyncio.AbstractEventLoop:
        """Returns the running event loop; if it is a new one, forgets what the last one left."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            for batcher in self._batchers.values():
                batcher.reset()
            for batch, role in self._running.items():
                self._batchers[role].record_end(batch)
            self._running.clear()
            self._ready = deque()  # lanes started by the earlier loop keep their own deque
            self._wake_scheduled, self._wake_timer = False, None
        return loop

    def _estimate_wait(self, member: Member) -> float:
        """Estimated seconds until the lanes have finished what goes before a newcomer."""
        seconds = 0.0
        for batcher in self._batchers.values():
            if batcher.rows:
                seconds += batcher.pace * batcher.rows_ahead(member)
        for batch, role in self._running.items():
            seconds += self._batchers[role].pace * batch.rows / 2  # about half of it is left
        return seconds / self._lane_count

    def _abandon(self, member: Member, role: Role) -> None:
        """Dequeues a member that nobody waits for, and stops runs that contain no other."""
        if member.future.done() and not member.future.cancelled():
            member.future.exception()  # marks it retrieved, so that the loop does not log it
        member.future.cancel()
        self._batchers[role].remove(member)
        self._batchers[role].report_waiting()
        member.leave()

    def _wake(self) -> None:
        """Starts batches in free lanes, and prepares batches for busy ones."""
        self._wake_scheduled, started = False, None
        try:
            while started := self._take_next(self._lane_count - len(self._running)):
                self._start(*started)
                started = None
            while len(self._ready) < self._lane_count and (ready := self._prepare_next()):
                self._ready.append(ready)
            self._interactive_waits = self._has_waiting(Priority.INTERACTIVE)
            for batcher in self._batchers.values():
                batcher.report_waiting()
        except Exception as error:
            self._restart(error, started and started[1])

    def _start(self, role: Role, batch: Batch) -> None:
        """Runs a batch in a lane or, if it is short, here on the event loop."""
        self._record_start(role, batch)
        if self._is_short(role, batch):
            self._deliver(batch, *batch.run_timed())
            return
        if self._is_alone():
            batch.alone = True
            if wide := self._batchers[role].width.choose():
                batch.use_all_cores(wide)
        try:
            self._threads.submit(self._run_in_lane, batch, self._ready, asyncio.get_running_loop())
        except RuntimeError:  # the threads have been freed already
            closed = Unavailable(f"model {self._name} is being closed")
            self._deliver(batch, [(span, closed) for span in batch.spans], 0.0)

    def _record_start(self, role: Role, batch: Batch) -> None:
        self._batchers[role].record_start(batch)
        self._running[batch] = role
        if batch.priority is Priority.BULK:
            self._passes = 0

    def _take_next(self, free: int) -> tuple[Role, Batch] | None:
        """The batch to start next, if one of `free` lanes or the express lane may run it."""
        # Prepared batches have had their turn, but bulk ones let interactive requests pass.
        if free > 0 and (ready := _take_ready(self._ready, Priority.INTERACTIVE)):
            return ready
        order = (Priority.BULK, Priority.INTERACTIVE)
        for priority in order if self._passes >= PASSES else reversed(order):
            if free <= 0 and not (priority is Priority.INTERACTIVE and self._express_is_free()):
                continue
            if free > 0 and (ready := _take_ready(self._ready, priority)):
                return ready
            for role in [r for r, b in self._batchers.items() if b.waiting(priority)]:
                if not self._is_worth_a_lane(role, priority) or self._should_gather(role, priority):
                    continue
                if batch := self._batchers[role].take_batch(priority, free, self._lane_count):
                    self._end_turn(role, priority)
                    return role, batch
        return None

    def _prepare_next(self) -> tuple[Role, Batch] | None:
        """The batch to prepare next; None if no batch should be prepared.

        A batch is prepared if it is its turn, if enough rows wait for a lane's share, and
        if all lanes run batches of its priority. Prepared batches thus never make an
        interactive request wait for the end of a long run. As soon as an interactive
        request is queued, lanes stop taking prepared bulk batches by themselves.
        """
        interactive_waits = self._has_waiting(Priority.INTERACTIVE)
        priority = Priority.INTERACTIVE if interactive_waits else Priority.BULK
        if len(self._running) < self._lane_count or (interactive_waits and self._passes >= PASSES):
            return None
        beside = [*self._running, *(batch for _, batch in tuple(self._ready))]
        if any(batch.priority is not priority for batch in beside):
            return None
        role = next((r for r, b in self._batchers.items() if b.waiting(priority)), None)
        if role is None or not self._batchers[role].is_enough(priority, self._lane_count):
            return None
        if batch := self._batchers[role].take_batch(priority, 0, self._lane_count, ready=True):
            self._end_turn(role, priority)
            return role, batch
        return None

    def _has_waiting(self, priority: Priority) -> bool:
        return any(batcher.waiting(priority) for batcher in self._batchers.values())

    def _end_turn(self, role: Role, priority: Priority) -> None:
        """Gives other graphs, and bulk, their turns after a batch of this graph."""
        self._batchers[role] = self._batchers.pop(role)
        if priority is Priority.INTERACTIVE:
            passed = self._has_waiting(Priority.BULK) or self._bulk_is_ready()
            self._passes = self._passes + 1 if passed else 0

    def _bulk_is_ready(self) -> bool:
        return bool(self._ready) and any(
            batch.priority is Priority.BULK for _, batch in tuple(self._ready)
        )

    def _is_worth_a_lane(self, role: Role, priority: Priority) -> bool:
        """Whether the waiting rows are enough for a lane, or no short run will soon free one."""
        batcher = self._batchers[role]
        return batcher.waiting(priority) >= batcher.min_rows or not any(
            of is role and batch.rows * batcher.pace <= SHORT_RUN_SECONDS
            for batch, of in self._running.items()
        )

    def _should_gather(self, role: Role, priority: Priority) -> bool:
        """Whether the waiting rows should wait for more; if so, sets a timer to wake the lanes."""
        seconds = self._batchers[role].gathering_delay(priority)
        if not seconds:
            return False
        if self._wake_timer is None:
            self._wake_timer = asyncio.get_running_loop().call_later(
                seconds, self._wake_after_delay
            )
        return True

    def _wake_after_delay(self) -> None:
        self._wake_timer = None
        self._wake()

    def _express_is_free(self) -> bool:
        return len(self._running) == self._lane_count and all(
            batch.priority is Priority.BULK for batch in self._running
        )

    def _is_short(self, role: Role, batch: Batch) -> bool:
        """Whether a batch is short, no other batch runs, and no more rows of its graph wait."""
        batcher = self._batchers[role]
        return batch.rows <= batcher.loop_rows and len(self._running) == 1 and not batcher.rows

    def _is_alone(self) -> bool:
        """Whether one batch runs and nothing else waits or runs."""
        return len(self._running) == 1 and not any(b.rows for b in self._batchers.values())

    def _run_in_lane(self, batch: Batch, ready: Ready, loop: asyncio.AbstractEventLoop) -> None:
        """Runs a batch in a lane, then prepared batches as long as there are any."""
        while True:
            outcomes, seconds = batch.run_timed()
            following = _take_ready(
                ready, *([Priority.INTERACTIVE] if self._interactive_waits else Priority)
            )
            try:
                loop.call_soon_threadsafe(self._finish_run, batch, outcomes, seconds, following)
            except RuntimeError:
                if not loop.is_closed():
                    raise
                return  # the loop is closed, so nobody waits for the answers
            if following is None:
                return
            _, batch = following

    def _finish_run(
        self,
        batch: Batch,
        outcomes: Sequence[tuple[Span, Outcome]],
        seconds: float,
        following: tuple[Role, Batch] | None,
    ) -> None:
        """Delivers the answers of a run, and finds work for the lane if it has taken none itself.

        Args:
            batch: the batch that ran.
            outcomes: the outcome of each span.
            seconds: duration of the run.
            following: the prepared batch that the lane took next, if any.
        """
        try:
            if following:
                self._record_start(*following)
        except Exception as error:
            self._restart(error, following and following[1])
        self._deliver(batch, outcomes, seconds)
        self._wake()

    def _deliver(
        self, batch: Batch, outcomes: Sequence[tuple[Span, Outcome]], seconds: float
    ) -> None:
        role = self._running.pop(batch, None)
        if role is None:
            return  # the batch belongs to an earlier loop
        self._batchers[role].record_end(batch)
        try:
            failed = any(isinstance(outcome, Exception) for _, outcome in outcomes)
            if not failed:
                # Rows of members that left before the run were not computed.
                ran = sum(stop - start for (_, start, stop), _ in outcomes)
                if batch.alone:
                    self._batchers[role].width.record_run(ran, seconds, batch.wide)
                if not batch.wide:
                    self._batchers[role].record_run(ran, seconds)
            for (member, start, stop), outcome in outcomes:
                member.trace_run(role, batch, seconds, start, stop)
                member.batches.discard(batch)
                member.add_outcome(start, stop, outcome)
                if member.answered:
                    self._batchers[role].record_answer(member)
                if isinstance(outcome, Exception):
                    self._handle_failure(member, role, outcome)
        except Exception as error:
            self._restart(error, batch)

    def _handle_failure(self, member: Member, role: Role, error: Exception) -> None:
        """Counts a failed run, and abandons the member's other rows, waiting or running."""
        if member.counted and not isinstance(error, RunStopped):  # such a member has left
            reason = type(error).__name__ if isinstance(error, LikelyError) else "raised"
            self._traffic.failures.labels(self._name, reason).inc()
        self._batchers[role].remove(member)
        member.leave()

    def _restart(self, error: Exception, batch: Batch | None = None) -> None:
        """Restarts the queues after an internal error; everything that waits fails at once.

        Args:
            error: the internal error.
            batch: the batch that was being handled, if any. Its members fail as well, and it no
                longer counts as running.
        """
        self._traffic.restarts.labels(self._name).inc()
        if batch and (role := self._running.pop(batch, None)):
            self._batchers[role].record_end(batch)
        context = {"message": f"the queue of model {self._name} failed", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)
        for member, _, _ in batch.spans if batch else ():
            member.fail(Unavailable(RESTARTED))
        self._refuse_waiting(RESTARTED)

    def _refuse_waiting(self, why: str) -> None:
        while ready := _take_ready(self._ready, *Priority):
            self._batchers[ready[0]].unmark_ready(ready[1])
            for member in {member for member, _, _ in ready[1].spans}:
                member.fail(Unavailable(why))
        for batcher in self._batchers.values():
            for member in batcher.clear():
                member.fail(Unavailable(why))
            batcher.report_waiting()


def _take_ready(ready: Ready, *priorities: Priority) -> tuple[Role, Batch] | None:
    """Takes the batch that was prepared first, if it has one of the priorities; else None.

    Also called in lanes.
    """
    try:
        first = ready.popleft()
    except IndexError:
        return None
    if first[1].priority in priorities:
        return first
    ready.appendleft(first)
    return None
