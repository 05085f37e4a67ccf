"""One graph's queue: admits or refuses requests, and forms batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from likely.batching.admission import Bounds, retry_delay
from likely.batching.batches import Batch, Member, Runner, Span
from likely.batching.callers import Priority
from likely.batching.fair import FairQueue
from likely.batching.gathering import Gathering
from likely.batching.headroom import MIN_ESTIMATE, Headroom
from likely.batching.traffic import Traffic
from likely.batching.tuning import Best
from likely.batching.width import Width
from likely.errors import DeadlineExceeded, Overloaded, Unavailable

# Minimum seconds of work in a share; for less, the overhead of a batch matters.
MIN_SHARE_SECONDS = 8e-3
RESTARTED = "the queue failed and was restarted"  # what members are told after an internal error
MAX_BATCH_BYTES = 64 << 20  # of a batch's inputs and outputs, at most
_SMOOTHING = 0.1


class Batcher:
    """The queue of one graph.

    Attributes:
        runner: runs the graph.
        pace: seconds per row in a lane, smoothed over recent runs; 0 while unknown.
        loop_rows: maximum number of rows that may run on the event loop.
        min_rows: minimum number of rows that are worth a lane while others run.
        row_bytes: bytes of one row's inputs and outputs.
        width: chooses between one core and all cores for lone batches.
    """

    def __init__(
        self, name: str, runner: Runner, best: Best, bounds: Bounds, traffic: Traffic, graph: str
    ) -> None:
        """Creates an empty queue.

        Args:
            name: name of the model.
            runner: runs the graph.
            best: how the graph runs best, as the warm-up found.
            bounds: limits of the queue.
            traffic: metrics to update.
            graph: name of the graph in the metrics.
        """
        specs = (*runner.spec.inputs, *runner.spec.outputs)
        self.runner = runner
        self.pace = best.pace
        self._first_pace = 0.0  # pace of the first run, if the warm-up measured none
        self.loop_rows = best.loop_rows
        self.width = Width(best)
        self.row_bytes = sum(
            math.prod(spec.array_shape(1)) * np.dtype(spec.dtype).itemsize for spec in specs
        )
        self._max_rows = max(1, min(best.rows, MAX_BATCH_BYTES // self.row_bytes))
        self.min_rows = min(best.min_rows, self._max_rows)
        self._warm_up_pace = best.pace
        self._gathering = Gathering(self.min_rows, best.fixed_cost)
        self._headroom = tuple(Headroom() for _ in Priority)
        self._ready = 0  # rows of prepared batches that no lane has taken yet
        self._runs = 0  # number of running batches
        self._running_rows = 0  # their rows
        self._bounds = bounds
        self._queues: tuple[FairQueue[Member], ...] = tuple(FairQueue() for _ in Priority)
        self._name = name
        self._traffic = traffic
        self._running = traffic.running.labels(name, graph)
        self._waiting = traffic.waiting.labels(name, graph)
        self._batches = traffic.batches.labels(name, graph)
        self._waits = traffic.waits.labels(name, graph)
        self._reported = 0

    @property
    def rows(self) -> int:
        """Number of rows that wait, for their turn or, in prepared batches, for a lane."""
        interactive, bulk = self._queues
        return interactive.rows + bulk.rows + self._ready

    def waiting(self, priority: Priority) -> int:
        """Number of rows of that priority that wait for their turn."""
        return self._queues[priority].rows

    def is_enough(self, priority: Priority, lanes: int) -> bool:
        """Whether enough rows of that priority wait to prepare a batch for one of `lanes` lanes."""
        return self._queues[priority].rows >= self._batch_rows(lanes, 2)

    def rows_ahead(self, member: Member) -> int:
        """Number of waiting rows that run before a newcomer has been answered.

        Rows of other clients run before it or with it, at least those of one batch.
        """
        interactive, bulk = self._queues
        queue = self._queues[member.priority]
        turns = queue.rows_before(member.client, member.rows)
        ahead = max(turns, min(queue.rows, self._max_rows)) + self._ready
        return ahead + interactive.rows if queue is bulk else ahead

    def check(
        self, member: Member, wait: Callable[[Member], float], lanes: int
    ) -> Sequence[Member]:
        """Decides whether a member may be queued, and returns the members to evict in its favour.

        If the queue is full, these are the latest requests of the clients with the most rows. If
        they cannot be evicted, such as streams that have begun, a client with less than its share
        of the queue is admitted beyond the limit.

        Args:
            member: is not queued yet; its estimate is set.
            wait: estimates the seconds until a newcomer's last turn.
            lanes: number of lanes that share the work.

        Raises:
            Overloaded: evicting other members would not make enough room, or its deadline would
                probably pass before its answer.
        """
        if not self.rows:
            return ()
        if member.deadline is not None:
            seconds, batch = wait(member), min(member.rows, self._max_rows)
            # Its last batch runs once everything before it has run, its own other batches included.
            answered = seconds + ((member.rows - batch) / lanes + batch) * self.pace
            # An answer that comes too late is wasted work.
            if (
                member.arrived_at + self._headroom[member.priority].multiple * answered
                > member.deadline
            ):
                self._count_refusal(member, "deadline")
                raise Overloaded(
                    f"an answer would take about {answered:.3g} s, longer than the deadline allows",
                    retry_delay(seconds),
                )
            member.estimate = answered
        if not self._has_no_room(member):
            return ()
        victims = self._members_to_evict(member)
        if not victims and not self._is_within_share(member):
            self._count_refusal(member, "queue")
            raise Overloaded(
                f"{self.rows} pictures wait already; the limits are {self._bounds.rows} "
                f"pictures and {self._bounds.nbytes} bytes",
                retry_delay(wait(member)),
            )
        return victims

    def evict(self, members: Sequence[Member], wait: Callable[[Member], float]) -> None:
        """Removes members from the queue, and refuses them, in favour of a client with fewer rows.

        Args:
            members: the members to evict, as `check` returned them.
            wait: as for `check`.
        """
        for victim in members:
            self._queues[victim.priority].remove(victim)
            if victim.is_done:  # its caller has left, and the event loop has not handled that yet
                continue
            self._count_refusal(victim, "share")
            victim.future.set_exception(
                Overloaded(
                    "the queue is full, and other clients ask for less",
                    retry_delay(wait(victim)),
                )
            )

    def add(self, member: Member) -> None:
        """Queues a member."""
        self._gathering.record_arrival(alone=not (self.rows or self._runs))
        self._queues[member.priority].add(member)

    def gathering_delay(self, priority: Priority) -> float:
        """Seconds for which the rows of that priority wait for more; the queue must have some."""
        queue = self._queues[priority]
        return self._gathering.delay(queue.rows, queue.first().arrived_at)

    def record_start(self, batch: Batch) -> None:
        """Notes that a batch runs, from now on or since a lane took it."""
        now = batch.began or time.monotonic()
        for member, start, _ in batch.spans:
            if start == 0:
                self._waits.observe(now - member.arrived_at)
        self.unmark_ready(batch)
        self._runs += 1
        self._running_rows += batch.rows
        self._running.inc()

    def unmark_ready(self, batch: Batch) -> None:
        """Notes that a batch no longer waits for a lane, if it did."""
        self._ready -= batch.ready
        batch.ready = 0

    def record_end(self, batch: Batch) -> None:
        """Notes that a batch has ended."""
        self._runs -= 1
        self._running_rows -= batch.rows
        self._running.dec()

    def remove(self, member: Member) -> None:
        """Removes a member from the queue and from prepared batches."""
        self._queues[member.priority].remove(member)
        for batch in member.batches:
            if batch.ready:
                rows = sum(
                    stop - start for candidate, start, stop in batch.spans if candidate is member
                )
                batch.ready -= rows
                self._ready -= rows

    def take_batch(
        self, priority: Priority, free: int, lanes: int, *, ready: bool = False
    ) -> Batch | None:
        """Takes the next batch from the queue; None if no living member waits.

        Members that can no longer be answered in time fail with `DeadlineExceeded`. If
        their deadline has not passed yet, they do so only if others wait.

        Args:
            priority: priority of the batch's members.
            free: number of free lanes; the waiting rows are spread over them, but no batch
                gets fewer rows than are worth a lane.
            lanes: number of lanes that share the work.
            ready: whether to prepare the batch for a lane that is still busy.
        """
        queue, now = self._queues[priority], time.monotonic()
        while queue.rows:
            size = self._batch_rows(lanes, 2) if ready else self._batch_rows(lanes)
            if free > 0:
                size = min(size, max(self.min_rows, -(-queue.rows // free)))
            spans = queue.take(size)
            # About half of what the lane runs is left.
            half = self._running_rows / lanes / 2 if ready else 0.0
            takes = self.pace * (half + sum(stop - start for _, start, stop in spans))
            try:
                for member, _, _ in spans:
                    # If others wait, a member that would be answered too late makes room for them.
                    spare = takes if queue.rows > member.rows_left else 0.0
                    late = member.deadline is not None and member.deadline <= now + spare
                    if late and not member.is_done:
                        self._fail_late(member)
                if living := [span for span in spans if not span[0].is_done]:
                    return self._make_batch(living, ready=ready)
            except Exception:  # the queue will be restarted, and no longer has these members
                for member, _, _ in spans:
                    member.fail(Unavailable(RESTARTED))
                raise
        return None

    def _make_batch(self, spans: list[Span], *, ready: bool) -> Batch:
        batch = Batch(self.runner, spans)
        self._batches.observe(batch.rows)
        if ready:
            batch.ready = batch.rows
            self._ready += batch.rows
        return batch

    def record_run(self, rows: int, seconds: float) -> None:
        """Updates the pace after a run in a lane; a run of no rows changes nothing."""
        if not rows:
            return
        pace = seconds / rows
        if self.pace:
            self.pace += (pace - self.pace) * _SMOOTHING
        elif self._first_pace:  # a single run may have been stalled for want of a core
            self.pace = min(self._first_pace, pace)
        else:
            self._first_pace = pace

    def record_answer(self, member: Member) -> None:
        """Updates the headroom with the time that a member's answer took."""
        seconds = time.monotonic() - member.arrived_at
        self._headroom[member.priority].record_answer(member.estimate, seconds)

    def record_departure(self, member: Member) -> None:
        """Updates the headroom if a member's caller left because the deadline passed."""
        if member.deadline is None or member.answered:
            return
        if time.monotonic() >= member.deadline - MIN_ESTIMATE:
            self._headroom[member.priority].record_miss(member.estimate)

    def report_waiting(self) -> None:
        """Updates the metric of waiting rows."""
        rows = self.rows
        if rows != self._reported:
            self._waiting.inc(rows - self._reported)
            self._reported = rows

    def clear(self) -> Sequence[Member]:
        """Removes and returns all members that wait for their turn; not those of ready batches."""
        return [member for queue in self._queues for member in queue.clear()]

    def reset(self) -> None:
        """Forgets everything that an earlier event loop has left waiting."""
        self.clear()
        self._ready = 0  # a batch that a lane took by itself is never reported as begun
        self.report_waiting()

    def _fail_late(self, member: Member) -> None:
        """Fails a member whose answer would come after its deadline."""
        self._queues[member.priority].remove(member)
        self._headroom[member.priority].record_miss(member.estimate)
        member.future.set_exception(
            DeadlineExceeded(
                "the answer would come after the deadline: allow more time, or ask for less at once"
            )
        )

    def _batch_rows(self, lanes: int, batches_per_lane: int = 1) -> int:
        """Rows of a batch if all rows that wait or run are divided among the lanes.

        Each lane gets `batches_per_lane` batches. The result is at least `min_rows` and
        `MIN_SHARE_SECONDS` seconds of work, and at most a full batch.
        """
        share = math.ceil((self.rows + self._running_rows) / (lanes * batches_per_lane))
        # If nothing was measured, the fixed cost of a run is unknown, so all batches are full.
        least = (
            int(MIN_SHARE_SECONDS / self._warm_up_pace) if self._warm_up_pace else self._max_rows
        )
        return min(self._max_rows, max(self.min_rows, least, share))

    def _has_no_room(self, member: Member, less_rows: int = 0, less_bytes: int = 0) -> bool:
        """Whether there is no room for a member, if so many fewer rows and bytes waited."""
        rows = self.rows - less_rows
        if not rows:
            return False
        if rows + member.rows > self._bounds.rows:
            return True
        interactive, bulk = self._queues
        nbytes = interactive.nbytes + bulk.nbytes + self._ready * member.row_bytes - less_bytes
        return nbytes + member.rows * member.row_bytes > self._bounds.nbytes

    def _members_to_evict(self, member: Member) -> Sequence[Member]:
        """The latest requests of the clients with the most waiting rows, enough to make room.

        Empty if evicting them would not make enough room, or if no client has more rows waiting
        than the member's client would have.
        """
        victims: list[Member] = []
        rows = nbytes = 0
        most = member.rows + sum(queue.client_rows(member.client) for queue in self._queues)
        for queue in (self._queues[p] for p in reversed(Priority) if p >= member.priority):
            for latest in queue.iter_eviction_order(most):
                if not latest.evictable or latest.taken:
                    break
                victims.append(latest)
                rows += latest.rows_left
                nbytes += latest.rows_left * latest.row_bytes
                if not self._has_no_room(member, rows, nbytes):
                    return victims
        return ()

    def _is_within_share(self, member: Member) -> bool:
        """Whether others wait, and the member's client would have no more rows than its share.

        With n clients, a share is the nth part of the limits, so what is admitted in this way is at
        most 1/2 + ... + 1/n of them. Prepared batches count as one client more.
        """
        clients = {client for queue in self._queues for client in queue.clients} | {member.client}
        n = len(clients) + (self._ready > 0)
        rows = member.rows + sum(queue.client_rows(member.client) for queue in self._queues)
        fits = rows * n <= self._bounds.rows
        return len(clients) > 1 and fits and rows * n * member.row_bytes <= self._bounds.nbytes

    def _count_refusal(self, member: Member, reason: str) -> None:
        if member.counted:
            self._traffic.shed.labels(self._name, reason).inc()
