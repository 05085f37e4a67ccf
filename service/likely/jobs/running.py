"""A job from beginning to end: what is missing is made, by threads or by Ray, then finished."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

from likely.jobs.finishing import finish
from likely.jobs.ledger import Ledger, Record, beside
from likely.jobs.making import Advance, Maker, Plan
from likely.jobs.requests import Judgement

WORKERS = 2  # one writes and reads while the other's pictures are looked at
Made = tuple[int, Record]
Bar = Callable[[int, int], AbstractContextManager[Advance]]
Workers = Callable[[list[int], Advance], Generator[Made, None, None]]


def run(
    plan: Plan, maker: Maker, workers: Workers, bar: Bar, label: str | None = None
) -> dict[str, Any]:
    """What came of the job; its folder holds all shards.

    A shard that is there is not made again, so that a job which was ended in whatever way is
    resumed by asking for it once more, and one that is done says what came of it.

    Args:
        plan: of the job.
        maker: of its shards, in this process.
        workers: who makes the shards of these numbers.
        bar: shows progress, given the pictures of the job and those that are done.
        label: what the version was asked for by, if by one.

    Raises:
        JobError: the folder holds something else.
        LikelyError: a shard could not be made; those that were are kept.
        OSError: something cannot be read or written.
    """
    request = plan.request
    later = isinstance(request.task, Judgement) and request.task.finished_later
    with Ledger(plan.folder, request, beside(maker.info, label)) as ledger:
        if ledger.summary is not None:
            return ledger.summary
        missing = ledger.missing(measured=later) if ledger.missing() else []
        left = sum(stop - start for start, stop in map(request.span, missing))
        with (
            bar(request.task.total, request.task.total - left) as advance,
            closing(workers(missing, advance)) as made,
        ):
            for shard, record in made:
                ledger.add(shard, record, measured=later)
        return ledger.end(**(finish(ledger, maker.info) if later else {}))


def threads(maker: Maker, count: int = WORKERS) -> Workers:
    """Workers that are threads of this process; once one has failed, the others end soon."""

    def made(missing: list[int], advance: Advance) -> Generator[Made, None, None]:
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

    return made


def unseen(total: int, done: int) -> AbstractContextManager[Advance]:  # noqa: ARG001
    """A bar that nobody sees."""
    return nullcontext(lambda _: None)
