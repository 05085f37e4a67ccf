"""Runs a job: makes the missing shards, with threads or on Ray, then finishes the job."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

from likely.jobs.finishing import finish
from likely.jobs.ledger import Ledger, Record, extra_entries
from likely.jobs.making import Advance, Maker, Plan
from likely.jobs.requests import Judgement

WORKERS = 2  # one reads and writes files while the other one's pictures are computed
Made = tuple[int, Record]
Bar = Callable[[int, int], AbstractContextManager[Advance]]
Workers = Callable[[list[int], Advance], Generator[Made, None, None]]


def run(
    plan: Plan, maker: Maker, workers: Workers, bar: Bar, label: str | None = None
) -> dict[str, Any]:
    """Runs a job until its folder contains all shards; returns its summary.

    Shards that exist are not made again. A job that ended in any way is therefore resumed by
    running it again, and a finished job only returns its summary.

    Args:
        plan: the job's plan.
        maker: makes shards in this process, and has the model's description.
        workers: makes the shards with the given numbers.
        bar: opens a progress bar, given the number of all pictures and of those that are done.
        label: the label by which the version was requested; None if it was not.

    Raises:
        JobError: the folder contains something else.
        LikelyError: a shard could not be made; finished shards are kept.
        OSError: a file cannot be read or written.
    """
    request = plan.request
    has_two_rounds = isinstance(request.task, Judgement) and request.task.has_two_rounds
    with Ledger(plan.folder, request, extra_entries(maker.info, label)) as ledger:
        if ledger.summary is not None:
            return ledger.summary
        missing = ledger.missing(measured=has_two_rounds) if ledger.missing() else []
        left = sum(stop - start for start, stop in map(request.span, missing))
        with (
            bar(request.task.total, request.task.total - left) as advance,
            closing(workers(missing, advance)) as made,
        ):
            for shard, record in made:
                ledger.add(shard, record, measured=has_two_rounds)
        return ledger.add_summary(**(finish(ledger, maker.info) if has_two_rounds else {}))


def threads(maker: Maker, count: int = WORKERS) -> Workers:
    """Workers that are threads of this process; if one fails, the others end soon."""

    def make_shards(missing: list[int], advance: Advance) -> Generator[Made, None, None]:
        with ThreadPoolExecutor(count) as pool:
            waiting: dict[Future[Record], int] = {}
            left = iter(missing)
            try:
                while True:
                    for shard in left:
                        waiting[pool.submit(maker.make, shard, advance)] = shard
                        if len(waiting) >= count:
                            break
                    if not waiting:
                        return
                    for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                        yield waiting.pop(done), done.result()
            except BaseException:
                maker.stop()
                raise
            finally:
                pool.shutdown(cancel_futures=True)

    return make_shards


def unseen(total: int, done: int) -> AbstractContextManager[Advance]:  # noqa: ARG001
    """A progress bar that shows nothing."""
    return nullcontext(lambda _: None)
