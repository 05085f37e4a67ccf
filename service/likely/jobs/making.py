"""One shard from beginning to end: read, ask, encode, write."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from likely.answers import Classifications, Scores, joined
from likely.errors import JobError
from likely.jobs import files, shards, tables
from likely.jobs.backends import Backend, Opener
from likely.jobs.columns import Geometry
from likely.jobs.ledger import Record, place
from likely.jobs.requests import Format, Generation, Judgement, Request
from likely.jobs.sources import Input, Pictures

BATCH = 512
Advance = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a worker needs to make shards of a job; goes to other processes.

    Attributes:
        request: the job's.
        folder: where the shards go; a worker elsewhere must see the same one.
        opener: what comes by a backend.
        given: the pictures to look at, if any.
        batch: pictures that the backend is asked about at once; the output does not depend
            on it.
    """

    request: Request
    folder: Path
    opener: Opener
    given: Input | None = None
    batch: int = BATCH


class Maker:
    """Makes shards; from several threads at once.

    Attributes:
        info: of the model that answers.
    """

    def __init__(self, plan: Plan, backend: Backend, pictures: Pictures | None) -> None:
        """A maker over what is open already.

        Args:
            plan: of the job.
            backend: what answers.
            pictures: what is looked at, if anything is.
        """
        self._plan = plan
        self._backend = backend
        self._pictures = pictures
        task = plan.request.task
        self._stopped = threading.Event()
        self._later = isinstance(task, Judgement) and task.finished_later
        self.info = backend.info
        self._schema = tables.schema(plan.request, backend.info, measured=self._later)

    @classmethod
    def opened(cls, plan: Plan) -> Maker:
        """A maker with a backend of its own.

        Raises:
            JobError: it is not of the version that the job began with.
            LikelyError: there is none.
        """
        backend, request = plan.opener.open(), plan.request
        info = backend.info
        here = info.name, info.version, info.digest
        if here != (request.model, request.version, request.digest):
            backend.close()
            raise JobError(
                f"a worker has {info.name}@{info.version} with the digest {info.digest[:12]}, and "
                f"the job began with {request.model}@{request.version}, {request.digest[:12]}"
            )
        geometry = Geometry(info.shape, info.levels)
        return cls(plan, backend, Pictures(plan.given, geometry) if plan.given else None)

    def make(self, shard: int, advance: Advance) -> Record:
        """Writes a shard; gives what the ledger shall say of it.

        Args:
            shard: its number.
            advance: is told of every so many pictures.

        Raises:
            LikelyError: the backend does not answer, or a picture does not fit; or all shall end.
            OSError: it cannot be read or written.
        """
        request = self._plan.request
        start, stop = request.span(shard)
        if isinstance(request.task, Generation):
            table = self._drawn(request.task, start, stop, advance)
        else:
            table = self._judged(request.task, start, stop, advance)
        path = place(self._plan.folder, request, shard, self._later)
        form = Format.PARQUET if self._later else request.format
        return write(path, table, form, self._backend.info.levels)

    def stop(self) -> None:
        """Lets the shards that are being made fail soon, as those that are begun afterwards."""
        self._stopped.set()
        self._backend.stop()

    def _drawn(self, task: Generation, start: int, stop: int, advance: Advance) -> pa.Table:
        parts = []
        for label, first, count in task.between(start, stop):
            for at in range(first, first + count, self._plan.batch):
                self._go_on()
                n = min(self._plan.batch, first + count - at)
                parts.append(self._backend.generate(label, at, n, task))
                advance(n)
        return tables.drawn(parts, start, self._schema)

    def _judged(self, task: Judgement, start: int, stop: int, advance: Advance) -> pa.Table:
        assert self._pictures is not None
        x, keys = self._pictures.read(start, stop)
        ask = self._backend.score if task.kind == "score" else self._backend.classify
        parts: list[Scores | Classifications] = []
        for at in range(0, len(x), self._plan.batch):
            self._go_on()
            parts.append(ask(x[at : at + self._plan.batch], task))
            advance(min(self._plan.batch, len(x) - at))
        return tables.judged(joined(parts), start, keys, self._schema)  # type: ignore[type-var]

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise JobError("the job ends")


def write(path: Path, table: pa.Table, form: Format, levels: int) -> Record:
    """Writes a table as a shard; gives what the ledger shall say of it.

    Raises:
        OSError: it cannot be written.
    """
    data = shards.encoded(table, form, levels)
    path.parent.mkdir(exist_ok=True)
    files.write(path, data)
    digest = hashlib.sha256(data).hexdigest()
    return Record(path.name, len(table), len(data), digest, tables.counts(table))
