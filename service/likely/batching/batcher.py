"""One graph's queue: lets requests in or refuses them, and forms the batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from likely.batching.admission import Bounds, patience
from likely.batching.batches import Batch, Member, Runner
from likely.batching.callers import Priority
from likely.batching.gathering import Gathering
from likely.batching.headroom import TELLS, Headroom
from likely.batching.traffic import Traffic
from likely.batching.tuning import Best
from likely.batching.turns import Turns
from likely.batching.width import Width
from likely.errors import DeadlineExceeded, Overloaded

SHARED = 8e-3  # seconds: less work than this is not divided among lanes
BATCH_BYTES = 64 << 20  # of a batch's inputs and outputs
_SMOOTHING = 0.1


class Batcher:
    """The requests that wait for one graph.

    Attributes:
        runner: what runs the graph.
        pace: seconds that one row takes a lane, as of late; 0 while that is not known.
        at_once: the most rows that need no lane.
        grain: the fewest rows that are worth a lane while others run.
        width: what runs that which has all lanes to itself.
    """

    def __init__(
        self, name: str, runner: Runner, best: Best, bounds: Bounds, traffic: Traffic, graph: str
    ) -> None:
        """An empty queue.

        Args:
            name: of the model.
            runner: what runs the graph.
            best: sizes of batches.
            bounds: how much may wait.
            traffic: is told of it.
            graph: its name there.
        """
        specs = (*runner.spec.inputs, *runner.spec.outputs)
        self.runner = runner
        self.pace = best.pace
        self._first_pace = 0.0  # of the first run, where the warm-up measured none
        self.at_once = best.at_once
        self.width = Width(best)
        self.row_bytes = sum(
            math.prod(spec.array_shape(1)) * np.dtype(spec.dtype).itemsize for spec in specs
        )
        self._most = max(1, min(best.rows, BATCH_BYTES // self.row_bytes))
        self.grain = min(best.grain, self._most)
        self._measured = best.pace
        self._gathering = Gathering(self.grain, best.fixed)
        self._headroom = tuple(Headroom() for _ in Priority)
        self._ready = 0  # rows of batches that a lane has not taken yet
        self._runs = 0  # batches that run
        self._under_way = 0  # rows of these
        self._bounds = bounds
        self._turns: tuple[Turns[Member], ...] = tuple(Turns() for _ in Priority)
        self._name = name
        self._traffic = traffic
        self._running = traffic.running.labels(name, graph)
        self._waiting = traffic.waiting.labels(name, graph)
        self._batches = traffic.batches.labels(name, graph)
        self._waits = traffic.waits.labels(name, graph)
        self._told = 0

    @property
    def rows(self) -> int:
        """How many rows wait, for their turn or for a lane."""
        interactive, bulk = self._turns
        return interactive.rows + bulk.rows + self._ready

    def waiting(self, priority: Priority) -> int:
        """How many rows of that priority wait for their turn."""
        return self._turns[priority].rows

    def is_enough(self, priority: Priority, lanes: int) -> bool:
        """Whether as many rows of that priority wait as a busy one of so many lanes takes next."""
        return self._turns[priority].rows >= self._share(lanes, 2)

    def ahead(self, priority: Priority) -> int:
        """How many rows wait that go before a newcomer of that priority."""
        if priority is Priority.BULK:
            return self.rows
        return self._turns[priority].rows + self._ready

    def check(
        self, member: Member, wait: Callable[[Priority], float], lanes: int
    ) -> Sequence[Member]:
        """Whom a member takes the place of: requests of greedier clients, where there is no room.

        Args:
            member: does not wait yet.
            wait: seconds until the turn of a newcomer of that priority, as far as can be told.
            lanes: that share the work.

        Raises:
            Overloaded: not enough may give way, or its deadline comes before it would be answered.
        """
        if not self.rows:
            return ()
        if member.deadline is not None:
            seconds, batch = wait(member.priority), min(member.rows, self._most)
            # Its last batch runs when all before it have run, its own others too.
            answered = seconds + ((member.rows - batch) / lanes + batch) * self.pace
            # What comes too late is work for nothing.
            if member.since + self._headroom[member.priority].times * answered > member.deadline:
                self._shed(member, "deadline")
                raise Overloaded(
                    f"an answer would take about {answered:.3g} s, longer than the deadline allows",
                    patience(seconds),
                )
            member.estimate = answered
        if not self._full(member):
            return ()
        greedier = self._greedier(member)
        if not greedier:
            self._shed(member, "queue")
            raise Overloaded(
                f"{self.rows} pictures wait already; the limits are {self._bounds.rows} "
                f"pictures and {self._bounds.nbytes} bytes",
                patience(wait(member.priority)),
            )
        return greedier

    def refuse(self, members: Sequence[Member], wait: Callable[[Priority], float]) -> None:
        """Lets members give way to one of a client who asks for less; `wait` is as above."""
        for greedy in members:
            self._turns[greedy.priority].remove(greedy)
            if greedy.dead:  # its caller left, and the loop has not come to that yet
                continue
            self._shed(greedy, "share")
            greedy.future.set_exception(
                Overloaded(
                    "the queue is full, and other clients ask for less",
                    patience(wait(greedy.priority)),
                )
            )

    def add(self, member: Member) -> None:
        """Lets a member wait."""
        self._gathering.came(alone=not (self.rows or self._runs))
        self._turns[member.priority].add(member)

    def wait(self, priority: Priority) -> float:
        """Seconds that those of that priority shall wait for others; one must be there."""
        turns = self._turns[priority]
        return self._gathering.wait(turns.rows, turns.first().since)

    def began(self, batch: Batch) -> None:
        """That batch runs from now on, or since a lane took it."""
        now = batch.began or time.monotonic()
        for member, start, _ in batch.spans:
            if start == 0:
                self._waits.observe(now - member.since)
        self.unready(batch)
        self._runs += 1
        self._under_way += batch.rows
        self._running.inc()

    def unready(self, batch: Batch) -> None:
        """That batch is not ready any more, if it was."""
        self._ready -= batch.ready
        batch.ready = 0

    def ended(self, batch: Batch) -> None:
        """That batch runs no more."""
        self._runs -= 1
        self._under_way -= batch.rows
        self._running.dec()

    def remove(self, member: Member) -> None:
        """Frees the place of a member."""
        self._turns[member.priority].remove(member)
        for batch in member.batches:
            if batch.ready:
                rows = sum(stop - start for each, start, stop in batch.spans if each is member)
                batch.ready -= rows
                self._ready -= rows

    def batch(
        self, priority: Priority, free: int, lanes: int, *, ready: bool = False
    ) -> Batch | None:
        """The next batch of that priority; None where no living member waits.

        Args:
            priority: of its members.
            free: lanes that are free: what waits is spread over them, as far as it is
                worth a lane.
            lanes: that share the work.
            ready: whether it is for a lane that still runs another.
        """
        turns, now = self._turns[priority], time.monotonic()
        while turns.rows:
            size = self._share(lanes, 2) if ready else self._share(lanes)
            if free > 0:
                size = min(size, max(self.grain, -(-turns.rows // free)))
            spans = turns.take(size)
            # Of what the lane runs, about half is left.
            half = self._under_way / lanes / 2 if ready else 0.0
            takes = self.pace * (half + sum(stop - start for _, start, stop in spans))
            for member, _, _ in spans:
                # Where others wait, whoever would be answered too late makes room for them.
                spare = takes if turns.rows > member.left else 0.0
                late = member.deadline is not None and member.deadline <= now + spare
                if late and not member.dead:
                    self._miss(member)
            if living := [span for span in spans if not span[0].dead]:
                batch = Batch(self.runner, living)
                self._batches.observe(batch.rows)
                if ready:
                    batch.ready = batch.rows
                    self._ready += batch.rows
                return batch
        return None

    def ran(self, rows: int, seconds: float) -> None:
        """Learns from a run of so many rows in a lane; from none of them, nothing."""
        if not rows:
            return
        pace = seconds / rows
        if self.pace:
            self.pace += (pace - self.pace) * _SMOOTHING
        elif self._first_pace:  # one run alone may have stood still for want of a core
            self.pace = min(self._first_pace, pace)
        else:
            self._first_pace = pace

    def answered(self, member: Member) -> None:
        """Learns how long the answer of that member took, beside the estimate."""
        seconds = time.monotonic() - member.since
        self._headroom[member.priority].answered(member.estimate, seconds)

    def left(self, member: Member) -> None:
        """Learns whether that member, whose caller is gone, was not answered by its deadline."""
        if member.deadline is None or member.answered:
            return
        if time.monotonic() >= member.deadline - TELLS:
            self._headroom[member.priority].missed(member.estimate)

    def tell(self) -> None:
        """Tells how many rows wait."""
        rows = self.rows
        if rows != self._told:
            self._waiting.inc(rows - self._told)
            self._told = rows

    def clear(self) -> Sequence[Member]:
        """All members that waited for their turn; none waits any more."""
        return [member for turns in self._turns for member in turns.clear()]

    def forget(self) -> None:
        """Forgets all that an earlier event loop has left waiting."""
        self.clear()
        self._ready = 0  # what a lane has taken by itself is never told to have begun
        self.tell()

    def _miss(self, member: Member) -> None:
        """Fails a member whose deadline comes before its answer could."""
        self._turns[member.priority].remove(member)
        self._headroom[member.priority].missed(member.estimate)
        member.future.set_exception(
            DeadlineExceeded(
                "the deadline comes before the answer could: allow more time, or ask for less at "
                "once"
            )
        )

    def _share(self, lanes: int, each: int = 1) -> int:
        """Rows of a batch where all that waits and runs is to be so many for each of the lanes."""
        share = math.ceil((self.rows + self._under_way) / (lanes * each))
        # Where nothing was measured, nobody knows what a run costs whatever its rows.
        least = int(SHARED / self._measured) if self._measured else self._most
        return min(self._most, max(self.grain, least, share))

    def _full(self, member: Member, less_rows: int = 0, less_bytes: int = 0) -> bool:
        """Whether there is no room for a member, where so much less waits."""
        rows = self.rows - less_rows
        if not rows:
            return False
        if rows + member.rows > self._bounds.rows:
            return True
        interactive, bulk = self._turns
        nbytes = interactive.nbytes + bulk.nbytes + self._ready * member.row_bytes - less_bytes
        return nbytes + member.rows * member.row_bytes > self._bounds.nbytes

    def _greedier(self, member: Member) -> Sequence[Member]:
        """The latest requests of clients with most rows waiting; none if they are too few."""
        found: list[Member] = []
        rows = nbytes = 0
        most = member.rows + sum(turns.held(member.client) for turns in self._turns)
        for turns in (self._turns[p] for p in reversed(Priority) if p >= member.priority):
            for latest in turns.above(most):
                if not latest.guest or latest.taken:
                    break
                found.append(latest)
                rows += latest.left
                nbytes += latest.left * latest.row_bytes
                if not self._full(member, rows, nbytes):
                    return found
        return ()

    def _shed(self, member: Member, reason: str) -> None:
        if member.counted:
            self._traffic.shed.labels(self._name, reason).inc()
