"""Runs graphs side by side: rows in, rows out, merged with those of other requests.

Requests wait in a queue for each graph. As soon as a lane, a thread of its own, is
free, it takes a batch of what waits: an idle server answers at once, and a busy one
merges what has come meanwhile. Where enough waits, a batch is made ready for a busy
lane, which takes it as it ends, without a way to the event loop and back. All else
happens on the event loop but the runs; and those too, where they are shorter than the
way to a lane. A batch that is all there is may run on all cores.
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
from likely.batching.batcher import Batcher
from likely.batching.batches import Batch, Feed, Member, Outcome, Runner, Span, rows_of
from likely.batching.callers import Caller, Priority
from likely.batching.traffic import Traffic
from likely.batching.tuning import Best
from likely.bundle import Graph, Role
from likely.errors import (
    DeadlineExceeded,
    LikelyError,
    NotAnswered,
    OutOfMemory,
    Unavailable,
)
from likely.graphs import Array

BULK_ROWS = 64  # a request of so many rows yields to smaller ones
SOON = 1e-3  # seconds: for a run this short, few rows wait, and wake no other lane
PASSES = 7  # batches that may go before waiting bulk: so it gets an eighth, at least
_DRAWING = (Role.SAMPLE, Role.GENERATE)

Ready: TypeAlias = "deque[tuple[Role, Batch]]"


@dataclass(frozen=True, slots=True)
class Ask:
    """Rows for a graph.

    Attributes:
        role: of the graph.
        rows: how many.
        feed: the graph's inputs for rows [start, stop); called in a lane, where work is cheap.
        outputs: names of those that the answer shall have.
    """

    role: Role
    rows: int
    feed: Feed
    outputs: tuple[str, ...]


class Lanes:
    """The opened graphs of one bundle, their queues, and the threads that run them.

    Beside the lanes proper there is one that only interactive requests may take, and
    only where none of theirs runs: so a long bulk run holds nobody up, and no core idles.

    Attributes:
        providers: what really runs the graphs, as their sessions report.
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
        """Lanes over opened graphs.

        Args:
            name: of the model, for threads, metrics and messages.
            runners: one for each graph of the bundle.
            lanes: runs at once.
            best: how each graph runs best.
            bounds: how much may wait for each graph.
            traffic: is told of queues and batches.
        """
        self.providers = next(iter(runners.values())).providers
        self._name = name
        self._count = lanes
        self._traffic = traffic or Traffic()
        self._batchers = {
            role: Batcher(name, runner, best[role], bounds or Bounds(), self._traffic, role)
            for role, runner in runners.items()
        }
        self._threads = ThreadPoolExecutor(lanes + 1, thread_name_prefix=f"lane-{name}")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: dict[Batch, Role] = {}
        self._ready: Ready = deque()  # for lanes to take as they end, all of one priority
        self._hurried = False  # interactive rows wait: no lane takes bulk by itself
        self._passed = 0  # interactive batches that went before bulk that waits or is ready
        self._woken = False
        self._alarm: asyncio.TimerHandle | None = None  # when those wake that wait for others
        self._closed = False

    def __contains__(self, role: Role) -> bool:
        return role in self._batchers

    @property
    def ready(self) -> int:
        """Rows of batches that are ready for lanes to take."""
        return sum(batch.rows for _, batch in tuple(self._ready))

    def graph(self, role: Role) -> Graph:
        """What the manifest says of the graph of that role.

        Raises:
            NotAnswered: the bundle has none.
        """
        return self._batcher(role).runner.spec

    async def run(
        self, role: Role, feeds: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """The graph's outputs of these names over all rows of the feeds.

        Raises:
            NotAnswered: the bundle has no such graph.
            Overloaded: there is no room to wait, or no memory to run.
            Unavailable: the queue broke, or is closed.
        """
        rows = len(next(iter(feeds.values())))
        return (await self.run_all(Ask(role, rows, rows_of(feeds), tuple(outputs))))[0]

    async def run_all(self, *asks: Ask) -> list[dict[str, Array]]:
        """The outputs of each ask; as soon as one fails, the others are given up.

        Raises:
            As `run`.
        """
        members, found = self._admitted(asks), []
        for before, member in pairwise(members):  # they are awaited in order
            member.future.add_done_callback(before.fail_with)
        try:
            for member in members:
                found.append(await member.future)  # noqa: PERF401  that would be a coroutine more
            return found
        except BaseException as error:
            if members[0].counted and isinstance(error.__cause__, OutOfMemory):
                self._traffic.shed.labels(self._name, "memory").inc()
            if isinstance(error, asyncio.CancelledError | DeadlineExceeded):
                began = any(batch.began for member in members for batch in member.batches)
                self._traffic.dropped.labels(self._name, "run" if began else "queue").inc()
            for member, ask in zip(members, asks, strict=True):
                if isinstance(error, asyncio.CancelledError):
                    self._batchers[ask.role].left(member)
                self._abandon(member, ask.role)
            raise

    def close(self) -> None:
        """Refuses what waits, lets running graphs end and frees the threads."""
        self._closed = True
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._refuse, f"model {self._name} is being closed")
        self._threads.shutdown(wait=True)

    def _batcher(self, role: Role) -> Batcher:
        if role not in self._batchers:
            raise NotAnswered(f"model {self._name} has no {role} graph, so it does not answer this")
        return self._batchers[role]

    def _admitted(self, asks: Sequence[Ask]) -> list[Member]:
        """The asks as members that wait for their turn."""
        if self._closed:
            raise Unavailable(f"model {self._name} is being closed")
        loop, caller = self._adopted(), callers.current()
        members = [self._member(ask, caller, loop) for ask in asks]
        waiting = [
            (ask.role, member) for ask, member in zip(asks, members, strict=True) if ask.rows
        ]
        if not caller.admitted:
            # Nobody gives way for a request that another graph has no room for.
            greedier = [
                self._batchers[role].check(member, self._wait, self._count)
                for role, member in waiting
            ]
            for (role, _), greedy in zip(waiting, greedier, strict=True):
                if greedy:
                    self._batchers[role].refuse(greedy, self._wait)
            caller.admitted = True
        for role, member in waiting:
            self._batchers[role].add(member)
            self._hurried |= member.priority is Priority.INTERACTIVE
        if waiting and not self._woken:
            # What else is ready in this turn of the loop comes along in the same batch.
            self._woken = True
            loop.call_soon(self._wake)
        return members

    def _member(self, ask: Ask, caller: Caller, loop: asyncio.AbstractEventLoop) -> Member:
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
            since=time.monotonic(),
            guest=not caller.admitted,
            counted=caller.counted,
            trace=caller.trace,
        )
        if not ask.rows:
            found = batcher.runner.empty(ask.outputs)
            member.future.set_result(dict(zip(ask.outputs, found, strict=True)))
        return member

    def _adopted(self) -> asyncio.AbstractEventLoop:
        """The running loop; what an earlier one left behind is forgotten."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            for batcher in self._batchers.values():
                batcher.forget()
            for batch, role in self._running.items():
                self._batchers[role].ended(batch)
            self._running.clear()
            self._ready = deque()  # runs of the earlier loop keep theirs
            self._woken, self._alarm = False, None
        return loop

    def _wait(self, priority: Priority) -> float:
        """Seconds until the lanes have done what goes before a newcomer."""
        seconds = 0.0
        for batcher in self._batchers.values():
            if batcher.rows:
                seconds += batcher.pace * batcher.ahead(priority)
        for batch, role in self._running.items():
            seconds += self._batchers[role].pace * batch.rows / 2  # about half of it is left
        return seconds / self._count

    def _abandon(self, member: Member, role: Role) -> None:
        """Frees the place of a member that nobody waits for, and ends a run that is its alone."""
        if member.future.done() and not member.future.cancelled():
            member.future.exception()  # seen: the loop need not complain that nobody looked
        member.future.cancel()
        self._batchers[role].remove(member)
        self._batchers[role].tell()
        member.leave()

    def _wake(self) -> None:
        """Gives free lanes what waits for them, and makes ready what busy ones shall take next."""
        self._woken, started = False, None
        try:
            while started := self._next(self._count - len(self._running)):
                self._start(*started)
                started = None
            while len(self._ready) < self._count and (ready := self._next_ready()):
                self._ready.append(ready)
            self._hurried = self._waits(Priority.INTERACTIVE)
            for batcher in self._batchers.values():
                batcher.tell()
        except Exception as error:
            self._restart(error, started and started[1])

    def _start(self, role: Role, batch: Batch) -> None:
        """Runs a batch in a lane, or here."""
        self._began(role, batch)
        if self._is_short(role, batch):
            self._ended(batch, *batch.timed())
            return
        if self._is_alone():
            batch.alone = True
            if wide := self._batchers[role].width.choose():
                batch.widen(wide)
        try:
            self._threads.submit(self._work, batch, self._ready, asyncio.get_running_loop())
        except RuntimeError:  # the threads are freed already
            closed = Unavailable(f"model {self._name} is being closed")
            self._ended(batch, [(span, closed) for span in batch.spans], 0.0)

    def _began(self, role: Role, batch: Batch) -> None:
        self._batchers[role].began(batch)
        self._running[batch] = role
        if batch.priority is Priority.BULK:
            self._passed = 0

    def _next(self, free: int) -> tuple[Role, Batch] | None:
        """The batch whose turn it is, if one of so many free lanes, or the express, is for it."""
        # What is ready has had its turn; but bulk lets those in a hurry go before.
        if free > 0 and (ready := _taken(self._ready, Priority.INTERACTIVE)):
            return ready
        order = (Priority.BULK, Priority.INTERACTIVE)
        for priority in order if self._passed >= PASSES else reversed(order):
            if free <= 0 and not (priority is Priority.INTERACTIVE and self._express_is_free()):
                continue
            if free > 0 and (ready := _taken(self._ready, priority)):
                return ready
            for role in [r for r, b in self._batchers.items() if b.waiting(priority)]:
                if not self._is_worth_a_lane(role, priority) or self._gathers(role, priority):
                    continue
                if batch := self._batchers[role].batch(priority, free, self._count):
                    self._turned(role, priority)
                    return role, batch
        return None

    def _next_ready(self) -> tuple[Role, Batch] | None:
        """The batch whose turn it is, where it is a lane's share and all lanes run its like.

        So nobody in a hurry is kept for the end of a long run; and as soon as one waits,
        what is ready of bulk waits as well.
        """
        hurried = self._waits(Priority.INTERACTIVE)
        priority = Priority.INTERACTIVE if hurried else Priority.BULK
        if len(self._running) < self._count or (hurried and self._passed >= PASSES):
            return None
        beside = [*self._running, *(batch for _, batch in tuple(self._ready))]
        if any(batch.priority is not priority for batch in beside):
            return None
        role = next((r for r, b in self._batchers.items() if b.waiting(priority)), None)
        if role is None or not self._batchers[role].is_enough(priority, self._count):
            return None
        if batch := self._batchers[role].batch(priority, 0, self._count, ready=True):
            self._turned(role, priority)
            return role, batch
        return None

    def _waits(self, priority: Priority) -> bool:
        return any(batcher.waiting(priority) for batcher in self._batchers.values())

    def _turned(self, role: Role, priority: Priority) -> None:
        """Lets other graphs, and bulk, have their turns after a batch."""
        self._batchers[role] = self._batchers.pop(role)
        if priority is Priority.INTERACTIVE:
            passed = self._waits(Priority.BULK) or self._bulk_is_ready()
            self._passed = self._passed + 1 if passed else 0

    def _bulk_is_ready(self) -> bool:
        return bool(self._ready) and any(
            batch.priority is Priority.BULK for _, batch in tuple(self._ready)
        )

    def _is_worth_a_lane(self, role: Role, priority: Priority) -> bool:
        """Whether what waits is enough for a lane, or would wait long for one that is at it."""
        batcher = self._batchers[role]
        return batcher.waiting(priority) >= batcher.grain or not any(
            of is role and batch.rows * batcher.pace <= SOON for batch, of in self._running.items()
        )

    def _gathers(self, role: Role, priority: Priority) -> bool:
        """Whether what waits shall wait for others; if so, the lanes are woken in time."""
        seconds = self._batchers[role].wait(priority)
        if not seconds:
            return False
        if self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_later(seconds, self._ring)
        return True

    def _ring(self) -> None:
        self._alarm = None
        self._wake()

    def _express_is_free(self) -> bool:
        return len(self._running) == self._count and all(
            batch.priority is Priority.BULK for batch in self._running
        )

    def _is_short(self, role: Role, batch: Batch) -> bool:
        """Whether a batch is all there is, and done sooner than a lane would be."""
        batcher = self._batchers[role]
        return batch.rows <= batcher.at_once and len(self._running) == 1 and not batcher.rows

    def _is_alone(self) -> bool:
        """Whether the one batch that runs is all there is."""
        return len(self._running) == 1 and not any(b.rows for b in self._batchers.values())

    def _work(self, batch: Batch, ready: Ready, loop: asyncio.AbstractEventLoop) -> None:
        """Runs a batch, and what was made ready meanwhile; in a lane."""
        while True:
            outcomes, seconds = batch.timed()
            following = _taken(ready, *([Priority.INTERACTIVE] if self._hurried else Priority))
            try:
                loop.call_soon_threadsafe(self._ran, batch, outcomes, seconds, following)
            except RuntimeError:
                if not loop.is_closed():
                    raise
                return  # nobody waits any more
            if following is None:
                return
            _, batch = following

    def _ran(
        self,
        batch: Batch,
        outcomes: Sequence[tuple[Span, Outcome]],
        seconds: float,
        following: tuple[Role, Batch] | None,
    ) -> None:
        """Hands the answers out, and the lane on where it has not taken the next batch itself."""
        try:
            if following:
                self._began(*following)
        except Exception as error:
            self._restart(error, following and following[1])
        self._ended(batch, outcomes, seconds)
        self._wake()

    def _ended(
        self, batch: Batch, outcomes: Sequence[tuple[Span, Outcome]], seconds: float
    ) -> None:
        role = self._running.pop(batch, None)
        if role is None:
            return  # of an earlier loop
        self._batchers[role].ended(batch)
        try:
            failed = any(isinstance(outcome, Exception) for _, outcome in outcomes)
            if not failed:
                # Who left before the run cost nothing, and teaches nothing.
                ran = sum(stop - start for (_, start, stop), _ in outcomes)
                if batch.alone:
                    self._batchers[role].width.ran(ran, seconds, batch.wide)
                if not batch.wide:
                    self._batchers[role].ran(ran, seconds)
            for (member, start, stop), outcome in outcomes:
                member.ran(role, batch, seconds, start, stop)
                member.batches.discard(batch)
                member.take(start, stop, outcome)
                if member.answered:
                    self._batchers[role].answered(member)
                if isinstance(outcome, Exception):
                    self._failed(member, role, outcome)
        except Exception as error:
            self._restart(error, batch)

    def _failed(self, member: Member, role: Role, error: Exception) -> None:
        """Counts a failed run, and gives up what else its member has waiting or running."""
        if member.counted:
            reason = type(error).__name__ if isinstance(error, LikelyError) else "raised"
            self._traffic.failures.labels(self._name, reason).inc()
        self._batchers[role].remove(member)
        member.leave()

    def _restart(self, error: Exception, batch: Batch | None = None) -> None:
        """Begins the queues anew after a fault of their own: what waits fails at once.

        So do the members of the batch that met with it, which is not counted as running any more.
        """
        self._traffic.restarts.labels(self._name).inc()
        if batch and (role := self._running.pop(batch, None)):
            self._batchers[role].ended(batch)
        context = {"message": f"the queue of model {self._name} broke", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)
        for member, _, _ in batch.spans if batch else ():
            if not member.dead:
                member.future.set_exception(Unavailable("the queue broke and was begun anew"))
        self._refuse("the queue broke and was begun anew")

    def _refuse(self, why: str) -> None:
        while ready := _taken(self._ready, *Priority):
            self._batchers[ready[0]].unready(ready[1])
            for member in {member for member, _, _ in ready[1].spans}:
                if not member.dead:
                    member.future.set_exception(Unavailable(why))
        for batcher in self._batchers.values():
            for member in batcher.clear():
                if not member.dead:
                    member.future.set_exception(Unavailable(why))
            batcher.tell()


def _taken(ready: Ready, *priorities: Priority) -> tuple[Role, Batch] | None:
    """The batch that was made ready first, if of such a priority; called in lanes, too."""
    try:
        first = ready.popleft()
    except IndexError:
        return None
    if first[1].priority in priorities:
        return first
    ready.appendleft(first)
    return None
