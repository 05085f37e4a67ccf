"""A job's folder: which request it is for, and which of its shards are done."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from likely.answers import Limits, ModelInfo
from likely.errors import JobError
from likely.jobs import files
from likely.jobs.requests import ALPHA, Format, Request

MANIFEST = "manifest.json"
STAGE = ".measured"
FORMAT = 1
PAUSE = 20  # times what it took to write the manifest pass before it is written for one more shard
MODEL, LABEL = BESIDE = ("model", "label")  # of the manifest, beside the request


@dataclass(frozen=True, slots=True)
class Record:
    """A shard that is done.

    Attributes:
        file: its name.
        rows: pictures in it.
        bytes: its size.
        sha256: its digest.
        counts: of what was decided, by name.
    """

    file: str
    rows: int
    bytes: int
    sha256: str
    counts: Mapping[str, int] = field(default_factory=dict)


class Ledger:
    """The manifest of a job's folder, held for one process; a context manager.

    A shard counts once the manifest names it with its digest; where there are many, several are
    named at once, for the whole manifest is written each time. A job that is finished later
    has two rounds of shards: what was measured, and what comes of it.
    """

    def __init__(
        self, folder: Path, request: Request, beside: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """The folder, made or resumed; shards that are not as they were recorded are forgotten.

        Args:
            folder: to hold the shards; empty, absent, or begun for the same request.
            request: the job's.
            beside: what the manifest tells beside it of how the job began; of a job that is
                resumed, what it has told from the beginning stands.

        Raises:
            JobError: it holds something else, or another process works on it.
            OSError: it cannot be written.
        """
        self.folder = folder
        self.request = request
        self._is_written, self._due = True, 0.0
        self._lock = _locked(folder)
        try:
            told = _read(folder)
            if told is not None:
                request.require(told["request"])
            self._beside = {key: each for key, each in (told or beside).items() if key in BESIDE}
            self._clear()
            self.summary: dict[str, Any] | None = (told or {}).get("summary")
            self._measured = self._whole(told, "measured", True)
            self._done = self._whole(told, "shards", False)
            if len(self._done) < request.shards:
                self.summary = None
            elif self.summary is not None:
                self._forget()
            if self._told() != told:  # one that is done stays untouched
                self._write()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if not self._is_written:
                with suppress(OSError) if error else nullcontext():  # what broke the job is told
                    self._write()
            if error:
                with suppress(OSError):
                    self._clear()
        finally:
            os.close(self._lock)

    def path(self, shard: int, measured: bool = False) -> Path:
        """Where a shard lies."""
        return place(self.folder, self.request, shard, measured)

    def missing(self, measured: bool = False) -> list[int]:
        """The shards that are not done, in order."""
        done = self._measured if measured else self._done
        return [shard for shard in range(self.request.shards) if shard not in done]

    def add(self, shard: int, record: Record, measured: bool = False) -> None:
        """Counts a shard as done; the manifest names it soon, and at the latest at the end."""
        (self._measured if measured else self._done)[shard] = record
        self._is_written = False
        if time.monotonic() >= self._due:
            self._write()

    def end(self, **found: Any) -> dict[str, Any]:
        """What came of the job, all its shards being done; the manifest tells it from now on.

        Args:
            found: what the shards' own counts do not tell.
        """
        counts: Counter[str] = Counter()
        for record in self._done.values():
            counts.update(record.counts)
        told = {name: counts[name] for name in sorted(counts)}
        self.summary = {"pictures": self.request.task.total, **told, **found}
        self._measured = {}
        self._write()
        self._forget()
        return self.summary

    def _clear(self) -> None:
        for folder in (self.folder, self.folder / STAGE):
            files.clear(folder)

    def _forget(self) -> None:
        """Frees the room of what was measured, once nothing is to come of it."""
        shutil.rmtree(self.folder / STAGE, ignore_errors=True)

    def _write(self) -> None:
        began = time.monotonic()
        files.write(self.folder / MANIFEST, json.dumps(self._told(), indent=1).encode() + b"\n")
        ended = time.monotonic()
        self._is_written, self._due = True, ended + PAUSE * (ended - began)

    def _told(self) -> dict[str, Any]:
        told: dict[str, Any] = {"format": FORMAT, "request": self.request.told(), **self._beside}
        if self._measured:
            told["measured"] = _records(self._measured)
        told["shards"] = _records(self._done)
        if self.summary is not None:
            told["summary"] = self.summary
        return told

    def _whole(self, told: dict[str, Any] | None, key: str, measured: bool) -> dict[int, Record]:
        """The recorded shards that lie there, byte for byte."""
        named = {Record(**entry).file: Record(**entry) for entry in (told or {}).get(key, [])}
        found = {}
        for shard in range(self.request.shards if named else 0):
            path = self.path(shard, measured)
            record = named.get(path.name)
            if record and path.is_file() and files.digest(path) == record.sha256:
                found[shard] = record
        return found


@dataclass(frozen=True, slots=True)
class Begun:
    """How the job of a folder began.

    Attributes:
        model: the name of the model that it began with.
        version: its version.
        label: what it was asked for by, `stable` or `canary`; None where by none.
        done: what the job's request can be compared by, without the model: what its manifest
            tells of it; None where the job is not done, or the manifest tells too little.
    """

    model: str
    version: str
    label: str | None
    done: ModelInfo | None


def begun(folder: Path) -> Begun | None:
    """How the folder's job began; None where there is no job.

    Raises:
        JobError: the folder holds something else.
        OSError: it cannot be read.
    """
    told = _read(folder) if folder.exists() else None
    request = told["request"] if told else None
    if not told or not isinstance(request, dict):
        return None
    name, version = request.get("model"), request.get("version")
    if not isinstance(name, str) or not isinstance(version, str):
        return None
    return Begun(name, version, told.get(LABEL), _info(told) if "summary" in told else None)


def beside(info: ModelInfo, label: str | None) -> dict[str, Any]:
    """What a manifest tells beside the request.

    Args:
        info: of the model that the job begins with.
        label: what its version was asked for by, if by one.
    """
    model = {"shape": list(info.shape), "levels": info.levels, "labels": list(info.labels)}
    return {MODEL: model, **({LABEL: label} if label else {})}


def _info(told: dict[str, Any]) -> ModelInfo | None:
    try:
        request, model = told["request"], told[MODEL]
        c, h, w = map(int, model["shape"])
        return ModelInfo(
            name=request["model"],
            version=request["version"],
            description="",
            shape=(c, h, w),
            levels=int(model["levels"]),
            labels=tuple(map(str, model["labels"])),
            priors=(),
            methods=(),
            density_kind=None,
            conditional_kind=None,
            importance_samples=0,
            latent_dimensions=0,
            calibration_size=0,
            finest_alpha=0.0,  # what was done could be promised
            default_alpha=request["task"].get("alpha") or ALPHA,
            posterior_temperature=1.0,
            execution_providers=(),
            limits=Limits(0, 0, 0, 0),
            digest=request["digest"],
            discriminative=True,
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def place(folder: Path, request: Request, shard: int, measured: bool) -> Path:
    """Where a shard of a job lies; what was measured lies apart until the job is finished."""
    form = Format.PARQUET if measured else request.format
    return (folder / STAGE if measured else folder) / f"part-{shard:05d}{form.suffix}"


def _records(done: Mapping[int, Record]) -> list[dict[str, Any]]:
    return [asdict(done[shard]) for shard in sorted(done)]


def _locked(folder: Path) -> int:
    """A lock on the folder, which ends with this process; made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise JobError(f"another process works on {folder}") from error
    except OSError:
        pass  # a file system without locks: only the schedule keeps jobs apart there
    return handle


def _read(folder: Path) -> dict[str, Any] | None:
    """What the folder's manifest tells; None where it is empty."""
    path = folder / MANIFEST
    try:
        told = json.loads(path.read_bytes())
    except FileNotFoundError:
        strange = sorted(p.name for p in folder.iterdir() if not p.name.endswith(files.PART))
        if strange:
            raise JobError(
                f"{folder} holds {strange[0]} and no {MANIFEST}: name an empty folder"
            ) from None
        return None
    except ValueError as error:
        raise JobError(f"{path} is no manifest of a job: {error}") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT or "request" not in told:
        raise JobError(f"{path} is no manifest of a job in format {FORMAT}")
    return told
