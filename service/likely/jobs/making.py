"""Makes one shard: read the pictures, ask the backend, encode the answers, write the file."""

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
from likely.jobs.ledger import Record, shard_path
from likely.jobs.requests import Format, Generation, Judgement, Request
from likely.jobs.sources import Input, Pictures

BATCH = 512
Advance = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a worker needs to make shards of a job; can be sent to other processes.

    Attributes:
        request: the job's request.
        folder: folder of the shards; workers on other machines must see the same one.
        opener: opens a backend.
        inputs: the job's input pictures; None for a job that draws.
        batch: number of pictures in one call of the backend; does not affect the output.
    """

    request: Request
    folder: Path
    opener: Opener
    inputs: Input | None = None
    batch: int = BATCH


class Maker:
    """Makes shards; safe to use from several threads.

    Attributes:
        info: description of the backend's model.
    """

    def __init__(self, plan: Plan, backend: Backend, pictures: Pictures | None) -> None:
        """A maker with a backend that is already open.

        Args:
            plan: the job's plan.
            backend: answers the requests.
            pictures: the job's input pictures; None for a job that draws.
        """
        self._plan = plan
        self._backend = backend
        self._pictures = pictures
        task = plan.request.task
        self._stopped = threading.Event()
        self._has_two_rounds = isinstance(task, Judgement) and task.has_two_rounds
        self.info = backend.info
        self._schema = tables.shard_schema(
            plan.request, backend.info, measured=self._has_two_rounds
        )

    @classmethod
    def open(cls, plan: Plan) -> Maker:
        """A maker that opens its own backend.

        Raises:
            JobError: the backend has another version or bundle than the job began with.
            LikelyError: the backend cannot be opened.
        """
        backend, request = plan.opener.open(), plan.request
        info = backend.info
        here = info.name, info.version, info.digest
        try:
            if here != (request.model, request.version, request.digest):
                raise JobError(
                    f"a worker has {info.name}@{info.version} with the digest {info.digest[:12]}, "
                    f"and the job began with {request.model}@{request.version}, "
                    f"{request.digest[:12]}"
                )
            geometry = Geometry(info.shape, info.levels)
            return cls(plan, backend, Pictures(plan.inputs, geometry) if plan.inputs else None)
        except BaseException:
            backend.close()
            raise

    def make(self, shard: int, advance: Advance) -> Record:
        """Makes and writes a shard; returns its record for the ledger.

        Args:
            shard: number of the shard.
            advance: called after each batch with its number of pictures.

        Raises:
            LikelyError: the backend fails, a picture does not fit the model, or `stop` was called.
            OSError: a file cannot be read or written.
        """
        request = self._plan.request
        start, stop = request.span(shard)
        if isinstance(request.task, Generation):
            table = self._drawn(request.task, start, stop, advance)
        else:
            table = self._judged(request.task, start, stop, advance)
        path = shard_path(self._plan.folder, request, shard, self._has_two_rounds)
        if self._has_two_rounds:
            path.parent.mkdir(exist_ok=True)
        form = Format.PARQUET if self._has_two_rounds else request.format
        return write_shard(path, table, form, self._backend.info.levels)

    def stop(self) -> None:
        """Makes current and later calls of `make` fail soon."""
        self._stopped.set()
        self._backend.stop()

    def _drawn(self, task: Generation, start: int, stop: int, advance: Advance) -> pa.Table:
        parts = []
        for label, first, count in task.between(start, stop):
            for at in range(first, first + count, self._plan.batch):
                self._check_not_stopped()
                n = min(self._plan.batch, first + count - at)
                parts.append(self._backend.generate(label, at, n, task))
                advance(n)
        return tables.draws_table(parts, start, self._schema)

    def _judged(self, task: Judgement, start: int, stop: int, advance: Advance) -> pa.Table:
        assert self._pictures is not None
        x, keys = self._pictures.read(start, stop)
        ask = self._backend.score if task.kind == "score" else self._backend.classify
        parts: list[Scores | Classifications] = []
        for at in range(0, len(x), self._plan.batch):
            self._check_not_stopped()
            parts.append(ask(x[at : at + self._plan.batch], task))
            advance(min(self._plan.batch, len(x) - at))
        return tables.judgements_table(joined(parts), start, keys, self._schema)  # type: ignore[type-var]

    def _check_not_stopped(self) -> None:
        if self._stopped.is_set():
            raise JobError("the job ends")


def write_shard(path: Path, table: pa.Table, form: Format, levels: int) -> Record:
    """Writes a table as a shard; returns its record for the ledger.

    Raises:
        OSError: the file cannot be written.
    """
    data = shards.encode(table, form, levels)
    files.write(path, data)
    digest = hashlib.sha256(data).hexdigest()
    return Record(path.name, len(table), len(data), digest, tables.counts(table))
