"""Requests merge and come apart: none lost, none harmed by another, none kept waiting unfairly."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from likely import warmup
from likely.batching import batcher as batching
from likely.batching import callers, gathering, headroom, tuning
from likely.batching.admission import MAX_DELAY, MIN_DELAY, Bounds, Quota, retry_delay
from likely.batching.batcher import Batcher
from likely.batching.batches import Batch, feed_from_arrays
from likely.batching.callers import Caller, Priority
from likely.batching.fair import FairQueue, Waiting
from likely.batching.lanes import BULK_ROWS, Ask, Lanes
from likely.batching.traffic import Traffic
from likely.batching.tuning import Best
from likely.bundle import Graph, Role, TensorSpec
from likely.errors import (
    DeadlineExceeded,
    NotAnswered,
    OutOfMemory,
    Overloaded,
    RunStopped,
    ServerFault,
    Unavailable,
)
from likely.graphs import CPU, CUDA, Array, Stop

POISON, HUGE = -1, 10**6
SECONDS = 30  # a bound for what hangs, not a measure of what is fast


class Doubler:
    """A graph that gives 2x; raises on poison, and finds no memory for more rows than `fits`."""

    providers = ("Fake",)
    spec = Graph(
        file="density.onnx",
        inputs=(TensorSpec(name="x", dtype="int64", shape=("batch",)),),
        outputs=(TensorSpec(name="y", dtype="int64", shape=("batch",)),),
        importance_samples=0,
    )

    def __init__(self, fits: int = HUGE) -> None:
        self.runs: list[list[int]] = []
        self.stopped: list[list[int]] = []
        self.fits = fits
        self._gate = threading.Event()
        self._gate.set()
        self._arrived = threading.Semaphore(0)

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        x = feeds["x"]
        self.runs.append(x.tolist())
        self._arrived.release()
        while not self._gate.wait(0.005):
            if stop and stop.options.terminate:
                self.stopped.append(x.tolist())
                raise RunStopped("stopped")
        if np.any(x == POISON):
            raise RuntimeError("poison")
        if len(x) > self.fits:
            raise OutOfMemory("too many")
        return [2 * x]

    def empty(self, outputs: Sequence[str]) -> list[Array]:
        return [np.empty(0, dtype=np.int64)]

    def hold(self) -> None:
        """Lets runs wait within until `release`."""
        self._gate.clear()

    def release(self) -> None:
        self._gate.set()

    def await_arrival(self) -> None:
        """Returns once a run more has begun; nothing else happens on the event loop meanwhile."""
        assert self._arrived.acquire(timeout=SECONDS)

    async def arrived(self) -> None:
        """The same, and the event loop goes on."""
        await asyncio.to_thread(self.await_arrival)


@asynccontextmanager
async def opened(graph: Doubler, **more: Any) -> AsyncIterator[Lanes]:
    options = {"lanes": 1, "best": {Role.DENSITY: Best(4)}, "traffic": Traffic()}
    lanes = Lanes("fake", {Role.DENSITY: graph}, **{**options, **more})
    try:
        yield lanes
    finally:
        graph.release()
        await asyncio.to_thread(lanes.close)


async def ask(lanes: Lanes, *x: int, client: str = "", **more: Any) -> list[int]:
    if client or more:
        callers.announce(Caller(client, **more))
    answer = await lanes.run(Role.DENSITY, {"x": np.array(x, dtype=np.int64)}, ["y"])
    return [int(y) for y in answer["y"]]


def going(work: Coroutine[Any, Any, list[int]]) -> asyncio.Task[list[int]]:
    return asyncio.get_running_loop().create_task(work)


async def settled() -> None:
    """Returns once all that is ready has had its turn."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await work

    asyncio.run(bounded())


def gauge(traffic: Traffic, name: str) -> float:
    (metric,) = getattr(traffic, name).collect()
    values = (s.value for s in metric.samples if not s.name.endswith(("_created", "_bucket")))
    return float(sum(values))


def test_an_idle_lane_answers_at_once_and_alone() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph) as lanes:
            assert await ask(lanes, 7) == [14]
            assert await ask(lanes) == []
        assert graph.runs == [[7]]

    run(work())


def test_what_comes_together_runs_together() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph) as lanes:
            answers = await asyncio.gather(*(ask(lanes, i) for i in range(4)))
            assert answers == [[2 * i] for i in range(4)]
        assert graph.runs == [[0, 1, 2, 3]]

    run(work())


def test_what_comes_while_lanes_are_busy_merges_up_to_the_best_size() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph) as lanes:
            graph.hold()
            first = going(ask(lanes, 100))
            await graph.arrived()
            rest = [going(ask(lanes, i, i + 10)) for i in range(5)]
            await settled()
            assert graph.runs == [[100]]
            graph.release()
            assert await first == [200]
            assert [await task for task in rest] == [[2 * i, 2 * i + 20] for i in range(5)]
        assert sorted(map(len, graph.runs[1:])) == [2, 4, 4]

    run(work())


def test_a_large_request_is_divided_and_comes_back_in_order() -> None:
    async def work() -> None:
        graph, traffic = Doubler(), Traffic()
        async with opened(graph, lanes=3, traffic=traffic) as lanes:
            assert await ask(lanes, *range(50)) == list(range(0, 100, 2))
        assert max(map(len, graph.runs)) == 4
        (waits,) = traffic.waits.collect()
        assert [s.value for s in waits.samples if s.name.endswith("_count")] == [1]

    run(work())


@pytest.mark.parametrize(("nbytes", "rows"), [(3 * 16, 3), (1, 1)])
def test_a_batch_has_no_more_rows_than_bytes_allow(
    monkeypatch: pytest.MonkeyPatch, nbytes: int, rows: int
) -> None:
    monkeypatch.setattr(batching, "MAX_BATCH_BYTES", nbytes)

    async def work() -> None:
        graph = Doubler()
        async with opened(graph, best={Role.DENSITY: Best(8)}) as lanes:
            assert await ask(lanes, *range(9)) == list(range(0, 18, 2))
        assert max(map(len, graph.runs)) == rows

    run(work())


def test_free_lanes_share_what_is_worth_sharing() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, lanes=2, best={Role.DENSITY: Best(16, min_rows=3)}) as lanes:
            await ask(lanes, *range(10))
            assert sorted(map(len, graph.runs)) == [5, 5]
            graph.runs.clear()
            await ask(lanes, *range(4))
            assert sorted(map(len, graph.runs)) == [1, 3]

    run(work())


def test_few_light_rows_wait_for_a_run_that_is_about_to_end() -> None:
    async def work() -> None:
        graph = Doubler()
        best = Best(16, min_rows=3, pace=1e-6)
        async with opened(graph, lanes=2, best={Role.DENSITY: best}) as lanes:
            graph.hold()
            first = going(ask(lanes, 0))
            await graph.arrived()
            others = [going(ask(lanes, i)) for i in (1, 2)]
            await settled()
            assert graph.runs == [[0]]  # a lane is free, but not worth waking
            others.append(going(ask(lanes, 3)))
            await graph.arrived()
            assert graph.runs == [[0], [1, 2, 3]]
            graph.release()
            assert await asyncio.gather(first, *others) == [[0], [2], [4], [6]]

    run(work())


def test_few_light_rows_do_not_wait_for_a_run_of_another_graph() -> None:
    async def work() -> None:
        graphs = {Role.DENSITY: Doubler(), Role.CONDITIONAL: Doubler()}
        best = dict.fromkeys(graphs, Best(16, min_rows=3, pace=1e-6))
        lanes = Lanes("fake", graphs, lanes=2, best=best)
        graphs[Role.DENSITY].hold()
        first = going(ask(lanes, 0))
        await graphs[Role.DENSITY].arrived()
        answer = await lanes.run(Role.CONDITIONAL, {"x": np.arange(1)}, ["y"])
        assert answer["y"].tolist() == [0] and not first.done()
        graphs[Role.DENSITY].release()
        assert await first == [0]
        await asyncio.to_thread(lanes.close)

    run(work())


def test_light_rows_wait_for_company_once_callers_have_met(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        graph, waited = Doubler(), list[bool]()
        monkeypatch.setattr(gathering, "MAX_WAIT", 0.25)  # more than a machine stalls for
        best = Best(16, min_rows=8, fixed_cost=1.0)
        async with opened(graph, best={Role.DENSITY: best}) as lanes:
            gathers = lanes._should_gather

            def noted(role: Role, priority: Priority) -> bool:
                waited.append(gathers(role, priority))
                return waited[-1]

            monkeypatch.setattr(lanes, "_should_gather", noted)
            for i in range(10):
                assert await ask(lanes, i) == [2 * i]
            assert waited == [False] * 10  # alone, however fast it comes
            await asyncio.gather(ask(lanes, 1), ask(lanes, 2))
            assert waited[10]
            assert graph.runs[-1] == [1, 2]

    run(work())


def test_nobody_is_alone_beside_what_runs_or_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        graph, found = Doubler(), list[bool]()
        monkeypatch.setattr(
            gathering.Gathering, "record_arrival", lambda _, *, alone: found.append(alone)
        )
        async with opened(graph) as lanes:
            graph.hold()
            asked = [going(ask(lanes, 1))]
            await graph.arrived()
            for i in (2, 3):
                asked.append(going(ask(lanes, i)))
                await settled()
            graph.release()
            await asyncio.gather(*asked)
            await ask(lanes, 4)
        assert found == [True, False, False, True]

    run(work())


def test_what_is_shorter_than_the_way_to_a_lane_runs_where_it_came() -> None:
    async def work() -> None:
        threads = set[str]()

        class Seen(Doubler):
            def run(
                self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
            ) -> list[Array]:
                threads.add(threading.current_thread().name)
                return super().run(feeds, outputs, stop)

        graph = Seen()
        best = Best(4, loop_rows=2, pace=1e-6)
        async with opened(graph, best={Role.DENSITY: best}) as lanes:
            assert list(await asyncio.gather(ask(lanes, 1), ask(lanes, 2))) == [[2], [4]]
            assert threads == {threading.current_thread().name}
            with pytest.raises(RuntimeError, match="poison"):
                await ask(lanes, POISON)
            assert await ask(lanes, 1, 2, 3) == [2, 4, 6]
            assert len(threads) == 2

    run(work())


def test_what_is_short_takes_a_lane_where_it_is_not_all_there_is() -> None:
    async def work() -> None:
        here = list[list[int]]()

        class Seen(Doubler):
            def run(
                self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
            ) -> list[Array]:
                if threading.current_thread() is threading.main_thread():
                    here.append(feeds["x"].tolist())
                return super().run(feeds, outputs, stop) if 9 in feeds["x"] else [2 * feeds["x"]]

        graph, best = Seen(), Best(3, min_rows=3, loop_rows=2, pace=1e-3)
        async with opened(graph, lanes=2, best={Role.DENSITY: best}) as lanes:
            graph.hold()
            long = going(ask(lanes, 9, 9, 9))
            await graph.arrived()
            assert await ask(lanes, 1) == [2]  # beside another that runs
            graph.release()
            assert await long == [18, 18, 18]
            assert not here
        async with opened(graph, best={Role.DENSITY: Best(2, loop_rows=2, pace=1e-6)}) as lanes:
            assert await ask(lanes, 1, 2, 3) == [2, 4, 6]
            assert [1, 2] not in here  # as a third waits

    run(work())


def test_what_is_all_there_is_runs_on_all_cores() -> None:
    async def work() -> None:
        graph, wide, traffic = Doubler(), Doubler(), Traffic()
        best = Best(4, pace=0.25, wide=wide)
        options: dict[str, Any] = {"lanes": 2, "best": {Role.DENSITY: best}, "traffic": traffic}
        async with opened(graph, **options) as lanes:
            wide.hold()
            alone = going(ask(lanes, 1))
            await wide.arrived()
            assert await ask(lanes, 2) == [4]  # in the other lane, on one core
            wide.release()
            assert await alone == [2]
            # What waits beside it wants a core as well.
            assert list(await asyncio.gather(ask(lanes, 3), ask(lanes, 4))) == [[6], [8]]
            assert sorted(graph.runs) == [[2], [3], [4]]
            assert wide.runs == [[1]]
            with pytest.raises(RuntimeError, match="poison"):
                await ask(lanes, POISON)
            await wide.arrived()
            wide.hold()
            leaver = going(ask(lanes, 5))
            await wide.arrived()
            leaver.cancel()
            while not wide.stopped:
                await asyncio.sleep(0.001)
            wide.release()
            assert await ask(lanes, 6) == [12]
        assert wide.stopped == [[5]]
        assert gauge(traffic, "running") == gauge(traffic, "waiting") == 0

    run(work())


def test_runs_on_all_cores_tell_nothing_of_the_pace_of_a_lane() -> None:
    async def work() -> None:
        graph, wide = Doubler(), Doubler()
        best = Best(4, pace=0.25, wide=wide)
        async with opened(graph, lanes=2, best={Role.DENSITY: best}) as lanes:
            for x in range(5):
                await ask(lanes, x)
            assert len(wide.runs) == 5
            assert lanes._batchers[Role.DENSITY].pace == 0.25

    run(work())


def test_runs_that_fail_tell_nothing_of_the_pace() -> None:
    async def work() -> None:
        async with opened(Doubler(), best={Role.DENSITY: Best(4, pace=0.25)}) as lanes:
            with pytest.raises(RuntimeError, match="poison"):
                await ask(lanes, POISON)
            assert lanes._batchers[Role.DENSITY].pace == 0.25

    run(work())


def test_a_caller_that_leaves_the_queue_is_never_run() -> None:
    async def work() -> None:
        graph, traffic = Doubler(), Traffic()
        async with opened(graph, traffic=traffic) as lanes:
            graph.hold()
            first = going(ask(lanes, 1))
            await graph.arrived()
            leaver, stayer = going(ask(lanes, 2)), going(ask(lanes, 3))
            await settled()
            assert gauge(traffic, "waiting") == 2
            leaver.cancel()
            await settled()
            assert gauge(traffic, "waiting") == 1
            graph.release()
            assert (await first, await stayer) == ([2], [6])
        assert graph.runs == [[1], [3]]
        assert gauge(traffic, "waiting") == gauge(traffic, "running") == 0

    run(work())


def test_a_batch_goes_on_for_one_caller_and_is_stopped_without_any() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph) as lanes:
            graph.hold()
            tasks = [going(ask(lanes, i)) for i in range(3)]
            await graph.arrived()
            tasks[0].cancel()
            tasks[2].cancel()
            await settled()
            graph.release()
            assert await tasks[1] == [2]
            graph.hold()
            tasks = [going(ask(lanes, i)) for i in (8, 9)]
            await graph.arrived()
            for task in tasks:
                task.cancel()
            while not graph.stopped:
                await asyncio.sleep(0.001)
            graph.release()
            assert await ask(lanes, 5) == [10]  # the lane is back
        assert graph.stopped == [[8, 9]]

    run(work())


def test_a_deadline_that_passes_in_the_queue_is_not_run() -> None:
    async def work() -> None:
        graph, traffic = Doubler(), Traffic()
        async with opened(graph, traffic=traffic) as lanes:
            graph.hold()
            first = going(ask(lanes, 1))
            await graph.arrived()
            late = going(ask(lanes, 2, client="a", deadline=time.monotonic()))
            fine = going(ask(lanes, 3, client="b", deadline=time.monotonic() + SECONDS))
            await settled()
            graph.release()
            assert (await first, await fine) == ([2], [6])
            with pytest.raises(DeadlineExceeded):
                await late
            assert traffic.dropped.labels("fake", "queue")._value.get() == 1
        assert graph.runs == [[1], [3]]

    run(work())


@pytest.mark.parametrize(
    ("crowded", "seconds", "dropped"),
    [(True, 15, True), (True, 22, True), (True, 28, False), (False, 15, False)],
)
def test_who_would_be_answered_too_late_makes_room_for_others_that_wait(
    crowded: bool, seconds: float, dropped: bool
) -> None:
    async def work() -> None:
        graph = Doubler()
        best = {Role.DENSITY: Best(2, pace=10.0)}
        async with opened(graph, best=best, lanes=2) as lanes:
            graph.hold()
            first = [going(ask(lanes, 0)), going(ask(lanes, 1))]
            await graph.arrived()
            # Let in before, as the chunks of a stream: else it would have been refused.
            soon = time.monotonic() + seconds  # 20 for its own rows, 5 for half of those that run
            late = going(ask(lanes, 2, 2, client="a", deadline=soon, admitted=True))
            fine = [going(ask(lanes, 3, 3, client="b"))] if crowded else []
            await settled()
            graph.release()
            await asyncio.gather(*first, *fine)
            if dropped:
                with pytest.raises(DeadlineExceeded):
                    await late
            else:
                assert await late == [4, 4]
        assert any(2 in rows for rows in graph.runs) is not dropped

    run(work())


@pytest.mark.parametrize("poisoned", [[0], [3], [1, 2], [0, 1, 2, 3]])
def test_who_makes_the_model_raise_is_alone_in_failing(poisoned: list[int]) -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph) as lanes:
            rows = [POISON if i in poisoned else i for i in range(4)]
            found = await asyncio.gather(*(ask(lanes, x) for x in rows), return_exceptions=True)
            for i, answer in enumerate(found):
                if i in poisoned:
                    assert isinstance(answer, RuntimeError)
                else:
                    assert answer == [2 * i]

    run(work())


def test_a_lane_comes_back_whatever_is_raised_in_it() -> None:
    class Leaving(Doubler):
        def run(
            self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
        ) -> list[Array]:
            if np.any(feeds["x"] == POISON):
                raise SystemExit
            return super().run(feeds, outputs, stop)

    async def work() -> None:
        async with opened(Leaving()) as lanes:
            with pytest.raises(ServerFault, match="a batch failed: SystemExit"):
                await ask(lanes, POISON)
            assert await ask(lanes, 1) == [2]

    run(work())


def test_a_request_that_fails_in_one_part_fails_once_and_leaves() -> None:
    async def work() -> None:
        graph, traffic = Doubler(), Traffic()
        async with opened(graph, traffic=traffic) as lanes:
            with pytest.raises(RuntimeError, match="poison"):
                await ask(lanes, POISON, *range(400))
            assert gauge(traffic, "waiting") == 0
            assert await ask(lanes, 1) == [2]
        assert sum(map(len, graph.runs)) < 100

    run(work())


def test_without_memory_half_is_tried_once_and_then_refused() -> None:
    async def work() -> None:
        graph = Doubler(fits=2)
        async with opened(graph) as lanes:
            assert await ask(lanes, 1, 2, 3, 4) == [2, 4, 6, 8]
            assert list(map(len, graph.runs)) == [4, 2, 2]
            graph.fits, graph.runs = 1, []
            with pytest.raises(Overloaded, match="no memory"):
                await ask(lanes, 1, 2, 3, 4)
            assert list(map(len, graph.runs)) == [4, 2, 2]
            graph.fits, graph.runs = 0, []
            with pytest.raises(Overloaded, match="no memory"):
                await ask(lanes, 1)
            assert graph.runs == [[1]]  # of one row there is no half
            graph.fits = HUGE  # and never for good
            assert await ask(lanes, 1, 2, 3, 4) == [2, 4, 6, 8]

    run(work())


@pytest.mark.parametrize("counted", [True, False])
def test_failures_are_counted_by_reasons_that_are_known_before(counted: bool) -> None:
    async def work() -> None:
        graph, traffic = Doubler(fits=1), Traffic()
        async with opened(graph, traffic=traffic) as lanes:
            with pytest.raises(RuntimeError, match="poison"):
                await ask(lanes, POISON, client="a", counted=counted)
            with pytest.raises(Overloaded):
                await ask(lanes, 1, 2, 3, 4, client="a", counted=counted)
        (failures,) = traffic.failures.collect()
        reasons = [s.labels["reason"] for s in failures.samples if s.name.endswith("_total")]
        assert reasons == (["raised", "Overloaded"] if counted else [])

    run(work())


@pytest.mark.parametrize("counted", [True, False])
def test_what_is_refused_for_want_of_memory_is_counted_once(counted: bool) -> None:
    async def work() -> None:
        graphs, traffic = {role: Doubler(fits=0) for role in ASKED}, Traffic()
        best = dict.fromkeys(graphs, Best(2))
        lanes = Lanes("fake", graphs, lanes=1, best=best, traffic=traffic)
        callers.announce(Caller("a", counted=counted))
        feed = feed_from_arrays({"x": np.arange(7)})
        for _ in range(3):
            with pytest.raises(Overloaded, match="no memory"):
                await lanes.run_all(*(Ask(role, 7, feed, ("y",)) for role in graphs))
        assert traffic.shed.labels("fake", "memory")._value.get() == 3 * counted
        assert gauge(traffic, "shed") == 3 * counted
        await asyncio.to_thread(lanes.close)

    run(work())


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    async def work() -> None:
        graph, traffic = Doubler(), Traffic()
        async with opened(graph, bounds=Bounds(rows=3), traffic=traffic) as lanes:
            graph.hold()
            first = going(ask(lanes, 0, client="a"))
            await graph.arrived()
            waiting = [going(ask(lanes, i, client="a")) for i in range(3)]
            await settled()
            with pytest.raises(Overloaded) as caught:
                await asyncio.create_task(ask(lanes, 9, client="a"))
            assert caught.value.retry_after
            graph.release()
            assert await first == [0]
            assert [await task for task in waiting] == [[0], [2], [4]]
            assert await ask(lanes, *range(50), client="a")  # alone, any request has room
        assert gauge(traffic, "shed") == 1

    run(work())


def test_bytes_are_bounded_as_rows_are() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, bounds=Bounds(nbytes=3 * 16)) as lanes:
            graph.hold()
            first = going(ask(lanes, 0))
            await graph.arrived()
            waiting = going(ask(lanes, 1, 2, client="a"))
            await settled()
            with pytest.raises(Overloaded):
                await asyncio.create_task(ask(lanes, 3, 4, client="a"))
            graph.release()
            assert (await first, await waiting) == ([0], [2, 4])

    run(work())


def test_bytes_of_what_is_ready_count_too() -> None:
    async def work() -> None:
        graph = Doubler()
        options: dict[str, Any] = {"best": {Role.DENSITY: Best(2)}, "bounds": Bounds(nbytes=3 * 16)}
        async with opened(graph, **options) as lanes:
            graph.hold()
            asked = [going(ask(lanes, i, i)) for i in range(2)]
            await graph.arrived()
            await settled()
            assert lanes.ready == 2
            with pytest.raises(Overloaded, match="wait already"):
                await going(ask(lanes, 3, 4, client="a"))
            graph.release()
            assert [await each for each in asked] == [[0, 0], [2, 2]]

    run(work())


@pytest.mark.parametrize("bounds", [Bounds(rows=6), Bounds(nbytes=6 * 16)])
@pytest.mark.parametrize("leaves", [False, True])
def test_in_a_full_queue_the_greediest_client_gives_way(leaves: bool, bounds: Bounds) -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, bounds=bounds) as lanes:
            graph.hold()
            first = going(ask(lanes, 0))
            await graph.arrived()
            greedy = [going(ask(lanes, i, i, client="greedy")) for i in range(3)]
            await settled()
            modest = going(ask(lanes, 7, client="modest"))
            if leaves:  # in the turn in which the newcomer comes, before the queue hears of it
                greedy[2].cancel()
            await settled()
            graph.release()
            assert (await first, await modest) == ([0], [14])
            found = await asyncio.gather(*greedy, return_exceptions=True)
            assert found[:2] == [[0, 0], [2, 2]]
            assert isinstance(found[2], asyncio.CancelledError if leaves else Overloaded)

    run(work())


def test_nobody_in_a_hurry_gives_way_to_bulk() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, bounds=Bounds(rows=6)) as lanes:
            graph.hold()
            first = going(ask(lanes, 0))
            await graph.arrived()
            greedy = [going(ask(lanes, i, i, client="greedy")) for i in range(3)]
            await settled()
            with pytest.raises(Overloaded, match="wait already"):
                await going(ask(lanes, *[7] * 4, client="modest", priority=Priority.BULK))
            modest = going(ask(lanes, 7, client="modest", priority=Priority.BULK))
            await settled()
            graph.release()
            assert await asyncio.gather(first, *greedy) == [[0], [0, 0], [2, 2], [4, 4]]
            assert await modest == [14]  # within its share, so it waits beyond the limit

    run(work())


@pytest.mark.parametrize(
    ("requests", "admitted"),
    [
        ([16], False),  # some of it runs already
        ([4, 4, 4, 4], True),  # as the chunks of a stream
    ],
)
def test_what_was_let_in_or_is_begun_gives_way_to_nobody(
    requests: list[int], admitted: bool
) -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, bounds=Bounds(rows=12)) as lanes:
            graph.hold()
            greedy = [
                going(ask(lanes, *[1] * rows, client="greedy", admitted=admitted))
                for rows in requests
            ]
            await graph.arrived()
            await settled()
            with pytest.raises(Overloaded, match="wait already"):
                await going(ask(lanes, *[7] * 5, client="modest"))
            modest = going(ask(lanes, *[7] * 4, client="modest"))  # its third: a batch is prepared
            await settled()
            with pytest.raises(Overloaded, match="wait already"):
                await going(ask(lanes, 7, client="modest"))
            graph.release()
            assert [await task for task in greedy] == [[2] * rows for rows in requests]
            assert await modest == [14] * 4

    run(work())


def test_the_memory_of_numpy_may_end_too() -> None:
    class Short(Doubler):
        def run(self, feeds: Mapping[str, Array], *more: Any) -> list[Array]:
            if len(feeds["x"]) > 2:
                raise MemoryError("Unable to allocate")
            return super().run(feeds, *more)

    async def work() -> None:
        traffic = Traffic()
        async with opened(Short(), traffic=traffic) as lanes:
            assert await ask(lanes, 1, 2, 3, 4) == [2, 4, 6, 8]
        async with opened(Short(), traffic=traffic, best={Role.DENSITY: Best(8)}) as lanes:
            with pytest.raises(Overloaded, match="no memory for the run, nor for half"):
                await ask(lanes, *range(8))
        assert gauge(traffic, "shed") == 1

    run(work())


def test_no_memory_for_a_whole_answer_refuses_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    join = np.concatenate

    def short(arrays: Sequence[Array], *more: Any) -> Array:
        if sum(map(len, arrays)) == 8:
            raise MemoryError("Unable to allocate")
        return join(arrays, *more)

    async def work() -> None:
        async with opened(Doubler()) as lanes:
            parted, other = going(ask(lanes, *range(8))), going(ask(lanes, *range(9)))
            with pytest.raises(Overloaded, match="no memory to join"):
                await parted
            assert await other == [2 * i for i in range(9)]

    monkeypatch.setattr(np, "concatenate", short)
    run(work())


def test_what_a_failing_queue_has_taken_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with opened(Doubler()) as lanes:
            asyncio.get_running_loop().set_exception_handler(lambda *_: None)
            with monkeypatch.context() as patch:
                patch.setattr(lanes._batchers[Role.DENSITY], "_make_batch", lambda *_, **__: 1 / 0)
                asked = [going(ask(lanes, i)) for i in range(9)]
                for task in asked:
                    with pytest.raises(Unavailable, match="restarted"):
                        await task
            assert await ask(lanes, 1) == [2]

    run(work())


def test_a_run_that_is_stopped_is_no_failed_one() -> None:
    async def work() -> None:
        graph, traffic = Doubler(), Traffic()
        async with opened(graph, traffic=traffic) as lanes:
            graph.hold()
            left = going(ask(lanes, 1))
            await graph.arrived()
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
            while not graph.stopped:
                await asyncio.sleep(0.01)
            graph.release()
            assert await ask(lanes, 2) == [4]
        assert gauge(traffic, "failures") == 0 and gauge(traffic, "dropped") == 1

    run(work())


@pytest.mark.parametrize(("rows", "left"), [(49, [52, 48]), (30, [35, 35]), (1, [51, 48])])
def test_nobody_gives_way_for_who_does_not_fit_in_the_end(rows: int, left: list[int]) -> None:
    async def work() -> None:
        graph, traffic = Doubler(), Traffic()
        options = {"best": {Role.DENSITY: Best(1000)}, "bounds": Bounds(rows=100)}
        async with opened(graph, traffic=traffic, **options) as lanes:
            graph.hold()
            first = going(ask(lanes, 0))
            await graph.arrived()
            asked = [
                [going(ask(lanes, 1, client=c)) for _ in range(n)]
                for c, n in zip("ab", (52, 48), strict=True)
            ]
            await settled()
            newcomer = going(ask(lanes, *range(rows), client="c"))
            await settled()
            fits = left != [52, 48]
            assert newcomer.done() is not fits
            assert [sum(not task.done() for task in tasks) for tasks in asked] == left
            assert gauge(traffic, "shed") == (100 - sum(left) if fits else 1)
            graph.release()
            await asyncio.gather(first, newcomer, *asked[0], *asked[1], return_exceptions=True)
            assert isinstance(newcomer.exception(), type(None) if fits else Overloaded)

    run(work())


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("rows", "soon", "reason"), [(3, False, "queue"), (2, True, "deadline"), (1, False, "share")]
)
def test_what_is_refused_for_now_is_counted_where_that_is_all_of_it(
    rows: int, soon: bool, reason: str, counted: bool
) -> None:
    async def work() -> None:
        graph, traffic = Doubler(), Traffic()
        options = {"best": {Role.DENSITY: Best(4, min_rows=4, pace=10.0)}, "bounds": Bounds(rows=2)}
        async with opened(graph, traffic=traffic, **options) as lanes:
            graph.hold()
            first = going(ask(lanes, 0))
            await graph.arrived()
            waiting = going(ask(lanes, 1, 1, client="a", counted=counted))
            await settled()
            deadline = time.monotonic() + 5 if soon else None
            own = range(rows)
            other = going(ask(lanes, *own, client="b", counted=counted, deadline=deadline))
            await settled()
            count = traffic.shed.labels("fake", reason)._value.get()
            assert (count, gauge(traffic, "shed")) == (counted, counted)
            graph.release()
            found = await asyncio.gather(first, waiting, other, return_exceptions=True)
            assert sum(isinstance(each, Overloaded) for each in found) == 1

    run(work())


def test_nobody_gives_way_for_who_finds_no_room_at_another_graph() -> None:
    async def work() -> None:
        graphs = {Role.DENSITY: Doubler(), Role.CONDITIONAL: Doubler()}
        best, bounds = dict.fromkeys(graphs, Best(1)), Bounds(rows=2)
        lanes = Lanes("fake", graphs, lanes=1, best=best, bounds=bounds)

        async def both(client: str) -> list[int]:
            callers.announce(Caller(client))
            feed = feed_from_arrays({"x": np.arange(1)})
            await lanes.run_all(*(Ask(role, 1, feed, ("y",)) for role in graphs))
            return []

        async def one(client: str, role: Role) -> list[int]:
            callers.announce(Caller(client))
            await lanes.run(role, {"x": np.arange(1)}, ["y"])
            return []

        graphs[Role.DENSITY].hold()
        running = going(one("a", Role.DENSITY))
        await graphs[Role.DENSITY].arrived()
        greedy = [going(one("a", Role.DENSITY)) for _ in range(2)]
        alike = [going(one(client, Role.CONDITIONAL)) for client in "ab"]
        await settled()
        with pytest.raises(Overloaded, match="wait already"):
            await going(both("c"))
        graphs[Role.DENSITY].release()
        await asyncio.gather(running, *greedy, *alike)
        await asyncio.to_thread(lanes.close)

    run(work())


def test_what_was_let_in_is_not_refused_later() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, bounds=Bounds(rows=2)) as lanes:
            callers.announce(Caller("a"))
            assert await lanes.run(Role.DENSITY, {"x": np.arange(1)}, ["y"])
            graph.hold()
            parts = [
                going(drawn)
                for drawn in (ask(lanes, i, i) for i in range(4))  # the same caller's
            ]
            await settled()
            graph.release()
            assert [await part for part in parts] == [[2 * i] * 2 for i in range(4)]

    run(work())


def test_what_the_process_asks_of_itself_is_not_refused() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, bounds=Bounds(rows=1)) as lanes:
            graph.hold()
            asked = [going(ask(lanes, i)) for i in range(3)]
            await graph.arrived()
            asked += [going(ask(lanes, i)) for i in range(3, 9)]
            await settled()
            graph.release()
            assert await asyncio.gather(*asked) == [[2 * i] for i in range(9)]

    run(work())


@pytest.mark.parametrize(
    ("role", "rows", "priority"),
    [
        (Role.DENSITY, BULK_ROWS - 1, Priority.INTERACTIVE),
        (Role.DENSITY, BULK_ROWS, Priority.BULK),
        (Role.SAMPLE, 1, Priority.BULK),
        (Role.GENERATE, 1, Priority.BULK),
    ],
)
def test_drawing_and_large_requests_are_bulk(role: Role, rows: int, priority: Priority) -> None:
    async def work() -> None:
        graph, best = Doubler(), Best(1000, min_rows=1000)
        lanes = Lanes("fake", {role: graph}, lanes=1, best={role: best})
        graph.hold()
        asked = []
        for n in (1, rows):
            feed = feed_from_arrays({"x": np.arange(n)})
            asked.append(asyncio.create_task(lanes.run_all(Ask(role, n, feed, ("y",)))))
            await settled()
        assert lanes._batchers[role].waiting(priority) == rows
        graph.release()
        await asyncio.gather(*asked)
        await asyncio.to_thread(lanes.close)

    run(work())


def test_a_deadline_before_its_turn_is_refused_at_once() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, best={Role.DENSITY: Best(4, pace=10.0)}) as lanes:
            graph.hold()
            first = going(ask(lanes, 0))
            await graph.arrived()
            waiting = going(ask(lanes, 1))
            await settled()
            with pytest.raises(Overloaded, match="longer than the deadline allows") as caught:
                await asyncio.create_task(ask(lanes, 2, client="a", deadline=time.monotonic() + 5))
            assert caught.value.retry_after == pytest.approx(15)  # and half of what runs
            graph.release()
            assert (await first, await waiting) == ([0], [2])

    run(work())


def test_a_flood_is_not_counted_against_the_deadline_of_another_client() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, best={Role.DENSITY: Best(4, pace=1.0)}) as lanes:
            graph.hold()
            first = going(ask(lanes, 0))
            await graph.arrived()
            flood = [going(ask(lanes, i, client="greedy")) for i in range(50)]
            await settled()
            until = time.monotonic() + 20
            with pytest.raises(Overloaded, match="longer than the deadline allows"):
                await going(ask(lanes, 7, client="greedy", deadline=until))
            modest = going(ask(lanes, 7, client="modest", deadline=until))
            await settled()
            graph.release()
            assert (await first, await modest) == ([0], [14])
            assert await asyncio.gather(*flood) == [[2 * i] for i in range(50)]

    run(work())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_deadline_between_its_turn_and_its_answer_is_refused_too(rows: int, count: int) -> None:
    async def work() -> None:
        graph, pace = Doubler(), 10.0
        async with opened(graph, lanes=count, best={Role.DENSITY: Best(4, pace=pace)}) as lanes:
            graph.hold()
            others = []
            for _ in range(count):
                others.append(going(ask(lanes, 0)))
                await graph.arrived()
            others.append(going(ask(lanes, 1)))
            await settled()
            # What runs and what waits, which all lanes share, as they do its own but for the last.
            batch = min(rows, 4)
            shared = (0.5 * count + 1 + rows - batch) / count
            answered = headroom.MAX_MULTIPLE * pace * (shared + batch)
            own, now = range(rows), time.monotonic()
            with pytest.raises(Overloaded, match="longer than the deadline allows"):
                await going(ask(lanes, *own, client="a", deadline=now + answered - 1))
            fine = going(ask(lanes, *own, client="a", deadline=now + answered + 1))
            await settled()
            graph.release()
            assert await asyncio.gather(*others) == [[0]] * count + [[2]]
            assert await fine == [2 * row for row in own]

    run(work())


@pytest.mark.parametrize(
    ("priority", "rows"), [(Priority.INTERACTIVE, 0.5 + 1), (Priority.BULK, 0.5 + 1 + 2)]
)
def test_bulk_is_told_to_come_again_after_all_others(priority: Priority, rows: float) -> None:
    async def work() -> None:
        graph = Doubler()
        best = Best(4, min_rows=4, pace=4.0)
        async with opened(graph, best={Role.DENSITY: best}) as lanes:
            graph.hold()
            others = [going(ask(lanes, 0))]
            await graph.arrived()
            others.append(going(ask(lanes, 1)))
            others.append(going(ask(lanes, 2, 2, client="b", priority=Priority.BULK)))
            await settled()
            until = time.monotonic() + 1
            with pytest.raises(Overloaded) as caught:
                await going(ask(lanes, 3, client="a", deadline=until, priority=priority))
            assert caught.value.retry_after == pytest.approx(4.0 * rows)
            graph.release()
            assert await asyncio.gather(*others) == [[0], [2], [4, 4]]

    run(work())


class Recorder:
    """Stands for a headroom, and keeps what it is told."""

    multiple = 1.0

    def __init__(self) -> None:
        self.answers: list[float] = []
        self.misses: list[float] = []

    def record_answer(self, estimate: float, seconds: float) -> None:
        assert seconds > 0
        self.answers += [estimate] if estimate else []

    def record_miss(self, estimate: float) -> None:
        self.misses.append(estimate)


@pytest.mark.parametrize("priority", Priority)
@pytest.mark.parametrize(
    ("seconds", "held", "leaves", "answers", "misses"),
    [
        (SECONDS, 0.0, False, 1, 0),
        (0.05, 0.1, False, 0, 1),  # dropped from the queue
        (0.05, 0.1, True, 0, 1),  # as gRPC ends it
        (SECONDS, 0.0, True, 0, 0),
    ],
)
def test_an_estimate_is_compared_with_what_came_of_it(
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    held: float,
    leaves: bool,
    answers: int,
    misses: int,
    priority: Priority,
) -> None:
    recorders: list[Recorder] = []

    def made() -> Recorder:
        recorders.append(Recorder())
        return recorders[-1]

    monkeypatch.setattr(batching, "Headroom", made)

    async def work() -> None:
        graph, pace = Doubler(), 0.01
        async with opened(graph, best={Role.DENSITY: Best(1, pace=pace)}) as lanes:
            graph.hold()
            others = [going(ask(lanes, 0, priority=priority))]
            await graph.arrived()
            others.append(going(ask(lanes, 1, priority=priority)))
            await settled()
            until = time.monotonic() + seconds
            last = going(ask(lanes, 2, client="a", deadline=until, priority=priority))
            await asyncio.sleep(held)
            if leaves:
                last.cancel()
            graph.release()
            await asyncio.gather(*others)
            await asyncio.gather(last, return_exceptions=True)
        estimate = pytest.approx(pace * (0.5 + 1 + 1))  # what runs, what waits, and its own
        assert recorders[priority].answers == [estimate] * answers
        assert recorders[priority].misses == [estimate] * misses
        other = recorders[1 - priority]
        assert not other.answers and not other.misses

    run(work())


def test_interactive_goes_first_but_not_for_ever() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, best={Role.DENSITY: Best(1)}) as lanes:
            graph.hold()
            first = going(ask(lanes, 0))
            await graph.arrived()
            bulk = [going(ask(lanes, 1000 + i, client="b", priority=Priority.BULK)) for i in (0, 1)]
            quick = [going(ask(lanes, i, client="q")) for i in range(1, 21)]
            await settled()
            graph.release()
            await asyncio.gather(first, *bulk, *quick)
        order = [row for (row,) in graph.runs[1:]]
        at = [i for i, row in enumerate(order) if row >= 1000]
        # One that runs in the express lane beside bulk may begin after the next bulk does.
        assert at in ([7, 15], [7, 14])

    run(work())


def test_bulk_never_holds_interactive_up() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, lanes=2, best={Role.DENSITY: Best(4)}) as lanes:
            graph.hold()
            bulk = going(ask(lanes, *range(100)))
            await graph.arrived()
            await graph.arrived()
            quick = going(ask(lanes, 7))
            await graph.arrived()  # a third run, while two lanes are held
            assert graph.runs[-1] == [7]
            another = going(ask(lanes, 8))
            await settled()
            assert graph.runs[-1] == [7]  # but not a fourth
            graph.release()
            assert (await quick, await another) == ([14], [16])
            assert await bulk == list(range(0, 200, 2))

    run(work())


def test_a_broken_queue_fails_what_waits_and_is_begun_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        graph, traffic, contexts = Doubler(), Traffic(), []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: contexts.append(context)
        )
        async with opened(graph, traffic=traffic) as lanes:
            graph.hold()
            first = going(ask(lanes, 1))
            await graph.arrived()
            waiting = [going(ask(lanes, i)) for i in range(3)]
            await settled()
            with monkeypatch.context() as patch:
                patch.setattr(FairQueue, "take", broken)
                graph.release()
                assert await first == [2]
                for task in waiting:
                    with pytest.raises(Unavailable):
                        await task
            assert await ask(lanes, 4) == [8]
        assert [str(context["exception"]) for context in contexts] == ["the queue is broken"]
        assert gauge(traffic, "restarts") == 1
        assert gauge(traffic, "waiting") == gauge(traffic, "running") == 0

    run(work())


def broken(*_: Any) -> Any:
    raise RuntimeError("the queue is broken")


def test_lanes_serve_one_loop_after_another() -> None:
    graph = Doubler()
    lanes = Lanes("fake", {Role.DENSITY: graph}, lanes=1, best={Role.DENSITY: Best(4)})

    async def left() -> None:
        graph.hold()
        going(ask(lanes, 1))
        await graph.arrived()
        going(ask(lanes, 2))
        await settled()

    run(left())
    graph.release()
    assert asyncio.run(ask(lanes, 3)) == [6]
    lanes.close()


def test_who_waits_for_company_is_woken_on_the_next_loop_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gathering, "MAX_WAIT", 0.25)
    graph, best = Doubler(), Best(16, min_rows=8, fixed_cost=1.0)
    lanes = Lanes("fake", {Role.DENSITY: graph}, lanes=1, best={Role.DENSITY: best})

    async def left() -> None:
        for i in (1, 2):
            going(ask(lanes, i))
        await settled()
        assert lanes._wake_timer and not graph.runs

    async def work() -> None:
        assert list(await asyncio.gather(ask(lanes, 3), ask(lanes, 4))) == [[6], [8]]

    run(left())
    run(work())
    lanes.close()


def test_a_full_batch_begins_without_the_event_loop() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, best={Role.DENSITY: Best(2)}) as lanes:
            graph.hold()
            asked = [going(ask(lanes, i, i)) for i in range(3)] + [going(ask(lanes, 3))]
            await graph.arrived()
            await settled()
            graph.release()
            graph.await_arrival()  # the event loop does nothing meanwhile
            assert graph.runs == [[0, 0], [1, 1]]
            assert [await each for each in asked] == [[0, 0], [2, 2], [4, 4], [6]]
            assert graph.runs == [[0, 0], [1, 1], [2, 2], [3]]

    run(work())


@pytest.mark.parametrize(
    ("min_rows", "runs"),
    [
        (1, [[1], [2, 2], [3]]),  # half of what there is, for one lane
        (3, [[1], [2, 2, 3]]),  # more may come for a run that costs much whatever its rows
    ],
)
def test_a_lanes_share_is_ready_where_it_is_worth_a_run(
    min_rows: int, runs: list[list[int]]
) -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, best={Role.DENSITY: Best(3, min_rows, pace=1.0)}) as lanes:
            graph.hold()
            first = going(ask(lanes, 1))
            await graph.arrived()
            second = going(ask(lanes, 2, 2))
            await settled()
            assert lanes.ready == (2 if min_rows == 1 else 0)
            third = going(ask(lanes, 3))
            await settled()
            graph.release()
            assert [await each for each in (first, second, third)] == [[2], [4, 4], [6]]
            assert graph.runs == runs

    run(work())


def test_no_share_is_ready_where_the_warm_up_measured_nothing() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, best={Role.DENSITY: Best(4)}) as lanes:
            for i in range(3):  # a pace is learnt, but not what a run costs whatever its rows
                graph.hold()
                asked = going(ask(lanes, i))
                await graph.arrived()
                await asyncio.sleep(0.02)
                graph.release()
                await asked
            graph.hold()
            first = going(ask(lanes, 1))
            await graph.arrived()
            second = going(ask(lanes, 2, 2))
            await settled()
            assert lanes.ready == 0
            graph.release()
            assert [await each for each in (first, second)] == [[2], [4, 4]]

    run(work())


def test_few_callers_keep_all_lanes_busy_and_one_batch_ahead_for_each() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, lanes=2, best={Role.DENSITY: Best(64, pace=1.0)}) as lanes:
            graph.hold()
            first = going(ask(lanes, 0))
            await graph.arrived()
            others = [going(ask(lanes, i)) for i in range(1, 8)]
            await graph.arrived()
            assert list(map(len, graph.runs)) == [1, 4]  # a half of all eight, and not what waits
            await settled()
            assert lanes.ready == 2  # and of that, a quarter of all
            graph.release()
            assert await asyncio.gather(first, *others) == [[2 * i] for i in range(8)]
            assert sorted(map(len, graph.runs)) == [1, 1, 2, 4]

    run(work())


def test_graphs_take_turns_while_full_batches_wait_for_one_of_them() -> None:
    async def work() -> None:
        busy, other = Doubler(), Doubler()
        both = {Role.DENSITY: busy, Role.CONDITIONAL: other}
        lanes = Lanes("fake", both, lanes=1, best=dict.fromkeys(both, Best(2)))

        async def again() -> list[int]:
            while not other.runs:
                await ask(lanes, 1)
            return []

        busy_ones = [going(again()) for _ in range(8)]
        await asyncio.sleep(0.01)
        async with asyncio.timeout(60):  # without turns, it would wait until nobody asks the other
            assert await lanes.run(Role.CONDITIONAL, {"x": np.arange(1)}, ["y"])
        await asyncio.gather(*busy_ones)
        await asyncio.to_thread(lanes.close)
        assert other.runs == [[0]] and len(busy.runs) > 1

    run(work())


def test_what_waits_beside_bulk_is_not_kept_for_the_lane_of_bulk() -> None:
    class Slow(Doubler):
        """Only the run of 1000 waits until `release`."""

        def run(
            self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
        ) -> list[Array]:
            if 1000 in feeds["x"]:
                return super().run(feeds, outputs, stop)
            return [2 * feeds["x"]]

    async def work() -> None:
        graph = Slow()
        async with opened(graph, best={Role.DENSITY: Best(2)}) as lanes:
            graph.hold()
            bulk = going(ask(lanes, 1000, client="bulk", priority=Priority.BULK))
            await graph.arrived()
            assert await ask(lanes, *range(6), client="hurried") == [0, 2, 4, 6, 8, 10]
            graph.release()
            assert await bulk == [2000]

    run(work())


class Gated(Doubler):
    """A graph whose held runs wait until their first row is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.let: set[int] = set()

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        x = feeds["x"]
        self.runs.append(x.tolist())
        self._arrived.release()
        while int(x[0]) not in self.let and not self._gate.wait(0.002):
            pass
        return [2 * x]


@pytest.mark.parametrize(("count", "ended"), [(1, {0, 10}), (2, {0, 1})])
def test_who_is_in_a_hurry_goes_before_bulk_that_is_ready(count: int, ended: set[int]) -> None:
    async def work() -> None:
        graph, every = Gated(), range(count + 1)
        async with opened(graph, lanes=count, best={Role.DENSITY: Best(2)}) as lanes:
            graph.hold()
            bulk = [going(ask(lanes, i, i, client="b", priority=Priority.BULK)) for i in every]
            for _ in range(count):
                await graph.arrived()
            await settled()
            assert lanes.ready == 2
            hurried = [going(ask(lanes, 10 + i, 10 + i, client="h")) for i in range(6)]
            await graph.arrived()
            assert graph.runs[-1] == [10, 10]  # in the express lane
            graph.let |= ended
            await graph.arrived()
            await settled()
            assert graph.runs[-1] == [11, 11]
            assert lanes.ready == 2  # nobody in a hurry is ready behind bulk
            graph.release()
            assert [await each for each in hurried] == [[20 + 2 * i] * 2 for i in range(6)]
            assert [await each for each in bulk] == [[2 * i] * 2 for i in every]

    run(work())


def test_no_lane_takes_bulk_by_itself_once_somebody_in_a_hurry_has_come() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, best={Role.DENSITY: Best(1)}) as lanes:
            graph.hold()
            bulk = [going(ask(lanes, i, client="b", priority=Priority.BULK)) for i in range(3)]
            await graph.arrived()
            await settled()
            assert lanes.ready == 1
            hurried = going(ask(lanes, 10, client="h"))
            await asyncio.sleep(0)  # it waits, and the lanes have not been woken
            graph.release()
            time.sleep(0.1)  # the lane ends, and the event loop does nothing meanwhile
            assert graph.runs == [[0]]
            assert await asyncio.gather(hurried, *bulk) == [[20], [0], [2], [4]]

    run(work())


@pytest.mark.parametrize(("count", "at"), [(2, [0, 8]), (3, [0, 8, 16])])
def test_bulk_that_is_ready_has_an_eighth_too(count: int, at: list[int]) -> None:
    async def work() -> None:
        graph, order = Gated(), list[Priority]()
        async with opened(graph, best={Role.DENSITY: Best(1)}) as lanes:
            graph.hold()
            bulk = going(ask(lanes, *range(count), client="b", priority=Priority.BULK))
            await graph.arrived()
            await settled()
            assert lanes.ready == 1
            hurried = [going(ask(lanes, 10 + i, client="h")) for i in range(20)]
            await settled()
            while lanes._running:  # one after another, in the order in which they began
                batch = next(iter(lanes._running))
                order.append(batch.priority)
                ((member, start, _),) = batch.spans
                graph.let.add(int(member.feed(start, start + 1)["x"][0]))
                while batch in lanes._running:
                    await asyncio.sleep(0.001)
            await asyncio.gather(bulk, *hurried)
        assert [i for i, priority in enumerate(order) if priority is Priority.BULK] == at

    run(work())


def test_a_deadline_counts_what_is_ready() -> None:
    async def work() -> None:
        graph = Doubler()
        async with opened(graph, best={Role.DENSITY: Best(2, pace=1.0)}) as lanes:
            graph.hold()
            asked = [going(ask(lanes, i, i)) for i in range(2)]
            await graph.arrived()
            await settled()
            with pytest.raises(Overloaded, match="deadline"):
                await ask(lanes, 7, client="late", deadline=time.monotonic() + 0.5)
            graph.release()
            assert [await each for each in asked] == [[0, 0], [2, 2]]

    run(work())


def test_a_lane_of_an_earlier_loop_takes_nothing_of_the_next_one() -> None:
    graph = Doubler()
    lanes = Lanes("fake", {Role.DENSITY: graph}, lanes=1, best={Role.DENSITY: Best(2)})
    graph.hold()

    async def left_behind() -> None:
        going(ask(lanes, 1000))
        await graph.arrived()

    async def work() -> None:
        asked = [going(ask(lanes, i, i)) for i in range(3)]
        await graph.arrived()
        await settled()
        graph.release()
        assert [await each for each in asked] == [[0, 0], [2, 2], [4, 4]]

    run(left_behind())
    run(work())
    lanes.close()


def test_a_run_of_nobodys_rows_teaches_no_pace() -> None:
    batcher = Batcher("fake", Doubler(), Best(4, pace=1.0), Bounds(), Traffic(), "density")
    batcher.record_run(0, 1e-5)
    assert batcher.pace == 1.0


@pytest.mark.parametrize("seconds", [(9.0, 1.0), (1.0, 9.0)])
def test_one_run_that_stood_still_begins_no_pace(seconds: tuple[float, float]) -> None:
    batcher = Batcher("fake", Doubler(), Best(4), Bounds(), Traffic(), "density")
    batcher.record_run(2, 2 * seconds[0])
    assert batcher.pace == 0
    batcher.record_run(1, seconds[1])
    assert batcher.pace == 1.0
    batcher.record_run(1, 2.0)
    assert batcher.pace == pytest.approx(1.1)


def test_what_nobody_waits_for_any_more_is_ready_in_vain() -> None:
    async def work() -> None:
        graph, traffic = Doubler(), Traffic()
        async with opened(graph, best={Role.DENSITY: Best(2)}, traffic=traffic) as lanes:
            graph.hold()
            asked = [going(ask(lanes, i, i)) for i in range(3)]
            await graph.arrived()
            await settled()
            assert lanes.ready == 2 and gauge(traffic, "waiting") == 4
            asked[1].cancel()
            await settled()
            assert gauge(traffic, "waiting") == 2
            graph.release()
            assert (await asked[0], await asked[2]) == ([0, 0], [4, 4])
            assert graph.runs == [[0, 0], [2, 2]]
            await settled()
            assert gauge(traffic, "running") == gauge(traffic, "waiting") == lanes.ready == 0

    run(work())


@pytest.mark.parametrize("fails", [1, 2])
def test_a_batch_whose_start_fails_is_told_and_holds_no_lane(
    monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    async def work() -> None:
        graph, traffic, begun = Doubler(), Traffic(), list[int]()
        began = Batcher.record_start

        def failing(batcher: Batcher, batch: Batch) -> None:
            begun.append(batch.rows)
            if len(begun) == fails:
                raise RuntimeError("a fault of the queue's own")
            began(batcher, batch)

        monkeypatch.setattr(Batcher, "record_start", failing)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        async with opened(graph, best={Role.DENSITY: Best(2)}, traffic=traffic) as lanes:
            graph.hold()  # the second is ready, and the lane takes it by itself
            asked = [going(ask(lanes, i, i)) for i in range(fails)]
            if fails == 2:
                await graph.arrived()
                await settled()
                assert lanes.ready == 2
            graph.release()
            with pytest.raises(Unavailable):
                await asked.pop()
            for each in asked:
                assert await each == [0, 0]
            assert await ask(lanes, 7) == [14]
            assert gauge(traffic, "running") == gauge(traffic, "waiting") == 0
            assert gauge(traffic, "restarts") == 1

    run(work())


def test_a_fault_in_choosing_a_batch_is_not_that_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        graph, traffic, asked = Doubler(), Traffic(), list[int]()
        choose = Lanes._take_next

        def failing(lanes: Lanes, free: int) -> Any:
            asked.append(free)
            if len(asked) == 2:
                raise RuntimeError("a fault of the queue's own")
            return choose(lanes, free)

        monkeypatch.setattr(Lanes, "_take_next", failing)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        async with opened(graph, traffic=traffic) as lanes:
            assert await ask(lanes, 1) == [2]
            assert gauge(traffic, "restarts") == 1 and gauge(traffic, "running") == 0

    run(work())


def test_who_has_left_harms_nobody_as_the_queue_is_begun_anew() -> None:
    async def work() -> None:
        graph = Doubler()
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        async with opened(graph) as lanes:
            graph.hold()
            first = going(ask(lanes, 1))
            await graph.arrived()
            leaver, stayer = going(ask(lanes, 2)), going(ask(lanes, 3))
            await settled()
            leaver.cancel()  # the queue has not heard of it yet
            lanes._restart(RuntimeError("a fault of the queue's own"))
            with pytest.raises(Unavailable):
                await stayer
            graph.release()
            assert await first == [2]

    run(work())


def test_a_queue_begun_anew_counts_what_a_lane_has_taken_by_itself() -> None:
    async def work() -> None:
        graph, traffic = Doubler(), Traffic()
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        async with opened(graph, best={Role.DENSITY: Best(2)}, traffic=traffic) as lanes:
            graph.hold()
            asked = [going(ask(lanes, i, i)) for i in range(2)]
            await graph.arrived()
            await settled()
            assert lanes.ready == 2
            graph.release()
            graph.await_arrival()  # the event loop has not heard of it yet
            lanes._restart(RuntimeError("a fault of the queue's own"))
            assert [await each for each in asked] == [[0, 0], [2, 2]]
            assert gauge(traffic, "running") == gauge(traffic, "waiting") == 0
            assert lanes._batchers[Role.DENSITY].rows == 0

    run(work())


def test_closed_lanes_refuse() -> None:
    async def work() -> None:
        graph = Doubler()
        lanes = Lanes("fake", {Role.DENSITY: graph}, lanes=1, best={Role.DENSITY: Best(1)})
        graph.hold()
        running, waiting = going(ask(lanes, 1)), going(ask(lanes, 2))
        await graph.arrived()
        closing = asyncio.create_task(asyncio.to_thread(lanes.close))
        with pytest.raises(Unavailable):
            await waiting
        graph.release()
        await closing
        assert await running == [2]
        with pytest.raises(Unavailable):
            await ask(lanes, 3)

    run(work())


ASKED = (Role.DENSITY, Role.CONDITIONAL, Role.DISCRIMINATE)


@pytest.mark.parametrize("failing", ASKED)
@pytest.mark.parametrize("done", [False, True])
def test_as_soon_as_one_ask_fails_the_others_are_given_up(failing: Role, done: bool) -> None:
    async def work() -> None:
        graphs, traffic = {role: Doubler() for role in ASKED}, Traffic()
        first, *others = (graph for role, graph in graphs.items() if role is not failing)
        best = dict.fromkeys(graphs, Best(4))
        lanes = Lanes("fake", graphs, lanes=3, best=best, traffic=traffic)
        for graph in graphs.values():
            graph.hold()

        def asks(role: Role) -> Ask:
            x = POISON if role is failing else 1
            return Ask(role, 1, lambda start, stop: {"x": np.full(stop - start, x)}, ("y",))

        asked = asyncio.create_task(lanes.run_all(*map(asks, graphs)))
        # All run before one fails: an ask that never began would not be stopped but dropped.
        for graph in graphs.values():
            await graph.arrived()
        if done:
            first.release()
            while len(lanes._running) == len(graphs):
                await asyncio.sleep(0.001)
        else:
            others.append(first)
        graphs[failing].release()
        with pytest.raises(RuntimeError, match="poison"):
            await asked
        while not all(other.stopped for other in others):
            await asyncio.sleep(0.001)
        assert gauge(traffic, "dropped") == 0  # its caller waits
        with pytest.raises(NotAnswered):
            await lanes.run(Role.ENCODE, {"x": np.zeros(1)}, ["y"])
        await asyncio.to_thread(lanes.close)

    run(work())


@pytest.mark.parametrize("stage", ["queue", "run"])
def test_who_leaves_gives_up_all_asks_and_is_counted_once(stage: str) -> None:
    async def work() -> None:
        graphs, traffic = {Role.DENSITY: Doubler(), Role.CONDITIONAL: Doubler()}, Traffic()
        best = dict.fromkeys(graphs, Best(4))
        lanes = Lanes("fake", graphs, lanes=2, best=best, traffic=traffic)
        for graph in graphs.values():
            graph.hold()
        feed = feed_from_arrays({"x": np.arange(1)})

        def both() -> asyncio.Task[Any]:
            asks = (Ask(role, 1, feed, ("y",)) for role in graphs)
            return asyncio.create_task(lanes.run_all(*asks))

        first = both()
        for graph in graphs.values():
            await graph.arrived()
        asked = both() if stage == "queue" else first
        await settled()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert traffic.dropped.labels("fake", stage)._value.get() == gauge(traffic, "dropped") == 1
        if stage == "queue":
            first.cancel()
        while not all(graph.stopped for graph in graphs.values()):
            await asyncio.sleep(0.001)
        await asyncio.to_thread(lanes.close)

    run(work())


@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),  # rows
            st.sampled_from("abc"),
            st.sampled_from(["stays", "stays", "leaves", "raises"]),
            st.booleans(),  # lets others have their turn first
        ),
        max_size=25,
    ),
    st.integers(1, 3),
    st.integers(1, 7),
)
def test_every_request_has_one_outcome_and_its_own_rows(
    requests: list[tuple[int, str, str, bool]], count: int, most: int
) -> None:
    async def work() -> None:
        graph, traffic, tasks = Doubler(), Traffic(), []
        async with opened(
            graph, lanes=count, best={Role.DENSITY: Best(most)}, traffic=traffic
        ) as lanes:
            for i, (rows, client, fate, pause) in enumerate(requests):
                x = [100 * i + row for row in range(rows)]
                x += [POISON] * (fate == "raises")
                tasks.append((going(ask(lanes, *x, client=client)), x, fate))
                if pause:
                    await settled()
                if fate == "leaves":
                    tasks[-1][0].cancel()
            for task, x, fate in tasks:
                (outcome,) = await asyncio.gather(task, return_exceptions=True)
                if fate == "raises":
                    assert isinstance(outcome, RuntimeError)
                elif fate == "stays":
                    assert outcome == [2 * row for row in x]
                else:
                    assert isinstance(outcome, asyncio.CancelledError) or outcome is not None
            assert await ask(lanes, 5) == [10]
        answered = Counter(row for batch in graph.runs for row in batch)
        stay = [row for _, x, fate in tasks if fate == "stays" for row in x]
        assert all(answered[row] >= 1 for row in stay)
        assert gauge(traffic, "waiting") == gauge(traffic, "running") == 0

    run(work())


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 20)), max_size=30),
    st.lists(st.integers(1, 16), min_size=1, max_size=20),
    st.sets(st.integers(0, 29)),
)
def test_turns_lose_no_row_and_give_none_twice(
    members: list[tuple[str, int]], rooms: list[int], removed: set[int]
) -> None:
    queue: FairQueue[Waiting] = FairQueue()
    waiting = [Waiting(client, rows, 3) for client, rows in members]
    for member in waiting:
        queue.add(member)
    gone = [member for i, member in enumerate(waiting) if i in removed]
    for member in gone:
        queue.remove(member)
        queue.remove(member)
    stay = [member for member in waiting if member not in gone]
    assert queue.rows == sum(member.rows for member in stay)
    seen: dict[Waiting, int] = {}
    while queue.rows:
        before = queue.rows
        room = rooms[len(seen) % len(rooms)]
        spans = queue.take(room)
        assert len({member for member, _, _ in spans}) == len(spans)
        taken = sum(stop - start for _, start, stop in spans)
        assert taken == min(room, before)
        for member, start, stop in spans:
            assert start == seen.get(member, 0) < stop <= member.rows
            seen[member] = stop
            earlier = waiting[: waiting.index(member)]  # each client's own come in order
            assert all(m.rows_left == 0 for m in earlier if m.client == member.client and m in stay)
        assert queue.nbytes == 3 * queue.rows
    assert seen == {member: member.rows for member in stay}
    assert not queue.take(5)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=8), st.integers(1, 64))
def test_clients_that_wait_are_served_alike(sizes: list[int], room: int) -> None:
    queue: FairQueue[Waiting] = FairQueue()
    served = dict.fromkeys(map(str, range(len(sizes))), 0)
    for _ in range(40):
        for client, rows in zip(served, sizes, strict=True):
            while queue.client_rows(client) < 200:  # all of them wait, always
                queue.add(Waiting(client, rows, 1))
        for member, start, stop in queue.take(room):
            served[member.client] += stop - start
        assert max(served.values()) - min(served.values()) <= room


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 40)), max_size=30),
    st.tuples(st.sampled_from("abcde"), st.integers(1, 40)),
    st.integers(1, 16),
)
def test_what_runs_before_a_newcomer_is_known_to_a_few_batches(
    members: list[tuple[str, int]], newcomer: tuple[str, int], room: int
) -> None:
    queue: FairQueue[Waiting] = FairQueue()
    for client, rows in members:
        queue.add(Waiting(client, rows, 1))
    last = Waiting(*newcomer, 1)
    expected, before, others = queue.rows_before(*newcomer), 0, len({c for c, _ in members})
    queue.add(last)
    while last.rows_left:
        before += sum(
            stop - start for member, start, stop in queue.take(room) if member is not last
        )
    assert abs(before - expected) <= room * max(1, others)


def test_a_quota_is_spent_and_comes_back() -> None:
    now = 100.0
    quota = Quota(10, 5, lambda: now)
    quota.take("a", 5)
    with pytest.raises(Overloaded, match="quota of 10 a second") as caught:
        quota.take("a", 2)
    assert caught.value.retry_after == pytest.approx(0.2)
    quota.take("b", 5)
    now += 0.2
    quota.take("a", 2)
    now += 10
    quota.take("a", 20)  # more than the bucket holds needs a full one, and leaves a debt
    with pytest.raises(Overloaded) as caught:
        quota.take("a", 1)
    assert caught.value.retry_after == pytest.approx(1.6)
    quota.take("a", 0)  # of no pictures, whoever is in debt may ask
    assert quota.remembered == 1  # b's is full again, and forgotten
    for client in map(str, range(1000)):
        Quota().take(client, HUGE)


def test_nobody_is_told_to_come_again_too_soon_or_too_late() -> None:
    quota = Quota(1000, 1, lambda: 100.0)
    quota.take("a", 1)
    with pytest.raises(Overloaded) as caught:
        quota.take("a", 1)
    assert caught.value.retry_after == MIN_DELAY
    assert [retry_delay(seconds) for seconds in (0.0, 1.0, 100.0)] == [MIN_DELAY, 1.0, MAX_DELAY]


def test_what_is_refused_for_now_costs_no_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic()
    quota = Quota(1e-6, 5, traffic=traffic)
    for refusal in (Overloaded("the queue is full"), Unavailable("the server is ending")):
        with pytest.raises(type(refusal)), quota.charged(5, "m"):
            raise refusal
    with pytest.raises(RunStopped), quota.charged(4, "m"):
        raise RunStopped
    with monkeypatch.context() as patch:
        patch.setattr(callers, "current", lambda: Caller("a", counted=False))
        with pytest.raises(RunStopped), quota.charged(1, "m"):
            raise RunStopped  # it is asked again in parts
    with quota.charged(1, "m"):
        pass
    with pytest.raises(Overloaded, match="quota"), quota.charged(1, "m"):
        raise AssertionError
    assert gauge(traffic, "shed") == 1


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 30)), max_size=50))
def test_no_client_gets_more_than_its_quota(asks: list[tuple[float, int]]) -> None:
    now, granted = 0.0, 0
    quota = Quota(4, 8, lambda: now)
    for pause, rows in asks:
        now += pause
        try:
            quota.take("a", rows)
        except Overloaded as refusal:
            assert refusal.retry_after is not None
            now += refusal.retry_after + 1e-9
            quota.take("a", rows)  # as it was told
        granted += rows
        assert granted <= 4 * now + 8 + 30 + 1e-6


class Timed(Doubler):
    """A graph whose runs take `once` and `each` a row, by a clock of its own."""

    providers = (CPU,)

    def __init__(self, once: float, each: float) -> None:
        super().__init__()
        self.once, self.each, self.now = once, each, 0.0

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        self.now += self.once + self.each * len(feeds["x"])
        return [feeds["x"]]


@pytest.mark.parametrize(
    ("once", "each", "rows", "min_rows"),
    [
        (0.0, 5e-3, 8, 1),  # heavy: what is lost between batches is small soon
        (0.0, 6e-5, 64, 7),  # light: it is not
        (1e-3, 1e-4, 64, 44),  # a run that costs as much as ten rows, whatever it has
        (0.0, 7e-6, 64, 58),
    ],
)
def test_the_best_batch_is_found(
    monkeypatch: pytest.MonkeyPatch, once: float, each: float, rows: int, min_rows: int
) -> None:
    graph = Timed(once, each)
    monkeypatch.setattr("time.thread_time", lambda: graph.now)
    found = tuning.find_best_batch(graph, {"x": np.arange(3)}, ["y"], most=64, step=2, seconds=1.0)
    assert (found.rows, found.min_rows) == (rows, min_rows)
    assert found.pace == pytest.approx(each + once / rows)


@pytest.mark.parametrize(
    ("crowded", "rows", "run"),
    [
        (1.0, 8, 0),  # the more rows the better, or no worse
        (1.2, 8, 4),  # what eight rows work on has no room in the cache
        (1.03, 8, 0),  # near enough: every run costs beside its rows
    ],
)
def test_a_batch_is_run_by_as_many_rows_as_are_quickest(
    monkeypatch: pytest.MonkeyPatch, crowded: float, rows: int, run: int
) -> None:
    class Cached(Timed):
        def run(self, feeds: Any, *more: Any) -> list[Array]:
            self.each = 5e-3 * (crowded if len(feeds["x"]) > 4 else 1)
            return super().run(feeds, *more)

    graph = Cached(0.0, 0.0)
    monkeypatch.setattr("time.thread_time", lambda: graph.now)
    found = tuning.find_best_batch(graph, {"x": np.arange(3)}, ["y"], most=64, step=2, seconds=1.0)
    assert (found.rows, found.rows_per_run) == (rows, run)
    assert found.pace == pytest.approx(5e-3 * (1 if run else crowded))


def test_no_size_wins_by_being_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cold(Timed):
        """The first run of a size takes a seventh more."""

        def run(self, feeds: Any, *more: Any) -> list[Array]:
            rows = len(feeds["x"])
            self.each = (
                5e-3 * (1 + 0.2 * (rows == 1)) * (1 if rows in map(len, self.runs) else 1.15)
            )
            self.runs.append(feeds["x"].tolist())
            return super().run(feeds, *more)

    graph = Cold(0.0, 0.0)
    monkeypatch.setattr("time.thread_time", lambda: graph.now)
    found = tuning.find_best_batch(graph, {"x": np.arange(3)}, ["y"], most=64, step=2, seconds=0.06)
    assert sorted(map(len, graph.runs)) == [1, 1, 2, 4]
    assert (found.rows, found.rows_per_run) == (8, 4)


@pytest.mark.parametrize(
    ("wide", "narrow", "sooner"), [(3e-3, 5e-3, True), (4.5e-3, 5e-3, False), (7.0, 9.0, True)]
)
def test_all_cores_are_taken_only_where_that_is_clearly_sooner(
    monkeypatch: pytest.MonkeyPatch, wide: float, narrow: float, sooner: bool
) -> None:
    graphs = Timed(0.0, wide), Timed(0.0, narrow)
    monkeypatch.setattr("time.perf_counter", lambda: sum(graph.now for graph in graphs))
    sample = {"x": np.arange(3)}
    assert tuning.is_faster_on_all_cores(*graphs, sample, ["y"], seconds=0.1) == sooner
    assert sum(graph.now for graph in graphs) <= max(0.1 + wide + narrow, 2 * (wide + narrow))


def test_a_search_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Timed(0.0, 0.1)
    monkeypatch.setattr("time.thread_time", lambda: graph.now)
    tuning.find_best_batch(graph, {"x": np.arange(3)}, ["y"], most=64, step=2, seconds=0.5)
    assert graph.now <= 0.5 + 1e-9


@pytest.mark.parametrize(("growth", "rows"), [(None, 4), (2.0, 16)])
def test_a_slow_run_that_hardly_grows_with_its_rows_is_tried_with_more(
    monkeypatch: pytest.MonkeyPatch, growth: float | None, rows: int
) -> None:
    graph = Timed(0.04, 2e-3)
    monkeypatch.setattr("time.thread_time", lambda: graph.now)
    sample, spent = {"x": np.arange(3)}, 0.25
    found = tuning.find_best_batch(
        graph, sample, ["y"], most=64, step=4, seconds=spent, growth=growth
    )
    assert found.rows == rows


class Card(Timed):
    """A card: `cold` more is taken by the first run of each size, and there is room for so many."""

    providers = (CUDA,)

    def __init__(self, once: float, each: float, cold: float, room: int) -> None:
        super().__init__(once, each)
        self.cold, self.room = cold, room

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
    ) -> list[Array]:
        rows = feeds["x"].tolist()
        if len(rows) > self.room:
            raise OutOfMemory("no room")
        self.now += self.cold * (rows not in self.runs)
        self.runs.append(rows)
        return super().run(feeds, outputs)


@pytest.mark.parametrize(
    ("once", "each", "cold", "room", "rows"),
    [
        (2e-3, 1e-6, 0.1, 4096, 256),  # what a size builds once is not counted
        (2e-3, 1e-6, 0.1, 100, 64),  # the largest batch that there is room for
        (1e-4, 1e-2, 0.1, 4096, 2),  # a row's time is what counts
    ],
)
def test_a_card_is_tried_once_it_is_warm_and_as_far_as_its_memory_goes(
    monkeypatch: pytest.MonkeyPatch, once: float, each: float, cold: float, room: int, rows: int
) -> None:
    card = Card(once, each, cold, room)
    monkeypatch.setattr("time.perf_counter", lambda: card.now)
    sample = {"x": np.arange(3)}
    found = tuning.find_best_batch(card, sample, ["y"], most=256, step=2, seconds=0.06, growth=1.0)
    assert found.rows == rows
    assert found.pace == pytest.approx(each + once / rows)


def test_a_card_draws_many_at_once_however_long_a_run_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = Card(0.7, 1e-4, 2.0, 4096)
    monkeypatch.setattr("time.perf_counter", lambda: card.now)
    assert warmup._tune_graph(Role.SAMPLE, card, {"sample/x": np.arange(3)}).rows == 256


def test_a_card_without_memory_for_a_row_is_told() -> None:
    with pytest.raises(OutOfMemory):
        tuning.find_best_batch(
            Card(0, 0, 0, 0), {"x": np.arange(3)}, ["y"], most=64, step=2, seconds=0.1
        )


@pytest.mark.parametrize(("slowed", "expected"), [(False, 2), (True, 1)])
def test_fewer_lanes_are_taken_only_where_they_are_faster(slowed: bool, expected: int) -> None:
    lock = threading.Lock()

    class Shared(Doubler):
        inside = 0

        def run(
            self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None
        ) -> list[Array]:
            with lock:
                self.inside += 1
                crowded = self.inside > 1
            time.sleep(0.05 if crowded and slowed else 0.005)
            with lock:
                self.inside -= 1
            return [feeds["x"]]

    found = tuning.find_lane_count(
        Shared(), {"x": np.arange(3)}, ["y"], rows=4, most=2, seconds=0.4
    )
    assert found == expected
