"""The manifest of a job's folder: the request, and the shards that are done."""

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
MEASURED_FOLDER = ".measured"
FORMAT = 1
# The manifest is not rewritten for this many times the duration of its last write.
WRITE_PAUSE_FACTOR = 20
MODEL, LABEL = EXTRA_ENTRIES = ("model", "label")  # entries of the manifest beside the request


@dataclass(frozen=True, slots=True)
class Record:
    """The manifest's entry for a shard that is done.

    Attributes:
        file: name of the file.
        rows: number of pictures.
        bytes: size of the file.
        sha256: digest of the file, hexadecimal.
        counts: number of pictures by decision, and the like (`tables.counts`).
    """

    file: str
    rows: int
    bytes: int
    sha256: str
    counts: Mapping[str, int] = field(default_factory=dict)


class Ledger:
    """The manifest of a job's folder, locked for one process; a context manager.

    A shard counts once the manifest lists it with its digest. The manifest is written as a whole;
    if it is long, several shards are added at a time. A job that needs all pictures
    (`Judgement.has_two_rounds`) has two rounds of shards: measured ones, and final ones made from
    them.
    """

    def __init__(
        self,
        folder: Path,
        request: Request,
        extra_entries: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Creates or resumes the folder; listed shards whose digest does not match are dropped.

        Args:
            folder: the job's folder; empty, absent, or begun for the same request.
            request: the job's request.
            extra_entries: the manifest's entries beside the request (`extra_entries`). A resumed
                job keeps those that its manifest already has.

        Raises:
            JobError: the folder contains something else, or another process works on it.
            OSError: the folder cannot be written.
        """
        self.folder = folder
        self.request = request
        self._is_written, self._next_write = True, 0.0
        self._lock = _lock_folder(folder)
        try:
            manifest = _read(folder)
            if manifest is not None:
                request.require_same(manifest["request"])
            self._extra_entries = {
                key: entry
                for key, entry in (manifest or extra_entries).items()
                if key in EXTRA_ENTRIES
            }
            self._clear()
            self.summary: dict[str, Any] | None = (manifest or {}).get("summary")
            self._measured = self._intact_shards(manifest, "measured", True)
            self._done = self._intact_shards(manifest, "shards", False)
            if len(self._done) < request.shards:
                self.summary = None
            elif self.summary is not None:
                self._remove_measured_shards()
            if self._manifest() != manifest:  # the manifest of a finished job stays untouched
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
                with suppress(OSError) if error else nullcontext():  # the first error is raised
                    self._write()
            if error:
                with suppress(OSError):
                    self._clear()
        finally:
            os.close(self._lock)

    def path(self, shard: int, measured: bool = False) -> Path:
        """The path of a shard."""
        return shard_path(self.folder, self.request, shard, measured)

    def missing(self, measured: bool = False) -> list[int]:
        """The shards that are not done, in order."""
        done = self._measured if measured else self._done
        return [shard for shard in range(self.request.shards) if shard not in done]

    def add(self, shard: int, record: Record, measured: bool = False) -> None:
        """Records a shard as done; the manifest lists it at once or, if it is long, later.

        Raises:
            JobError: the shard's file is not in the folder, because a worker sees another one.
        """
        path = self.path(shard, measured)
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise JobError(
                f"a worker has written {path}, but it is not there: "
                "workers on other machines must see the job's folder under the same path"
            )
        (self._measured if measured else self._done)[shard] = record
        self._is_written = False
        if time.monotonic() >= self._next_write:
            self._write()

    def add_summary(self, **found: Any) -> dict[str, Any]:
        """Adds the summary of the finished job to the manifest and returns it.

        Args:
            found: further entries, which do not follow from the counts of the shards.
        """
        counts: Counter[str] = Counter()
        for record in self._done.values():
            counts.update(record.counts)
        totals = {name: counts[name] for name in sorted(counts)}
        self.summary = {"pictures": self.request.task.total, **totals, **found}
        self._measured = {}
        self._write()
        self._remove_measured_shards()
        return self.summary

    def _clear(self) -> None:
        for folder in (self.folder, self.folder / MEASURED_FOLDER):
            files.remove_temporary_files(folder)

    def _remove_measured_shards(self) -> None:
        """Removes the measured shards, which are no longer needed."""
        shutil.rmtree(self.folder / MEASURED_FOLDER, ignore_errors=True)

    def _write(self) -> None:
        began = time.monotonic()
        files.write(self.folder / MANIFEST, json.dumps(self._manifest(), indent=1).encode() + b"\n")
        ended = time.monotonic()
        self._is_written, self._next_write = True, ended + WRITE_PAUSE_FACTOR * (ended - began)

    def _manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "request": self.request.as_dict(),
            **self._extra_entries,
        }
        if self._measured:
            manifest["measured"] = _records(self._measured)
        manifest["shards"] = _records(self._done)
        if self.summary is not None:
            manifest["summary"] = self.summary
        return manifest

    def _intact_shards(
        self, manifest: dict[str, Any] | None, key: str, measured: bool
    ) -> dict[int, Record]:
        """The listed shards whose files exist and match their digests, by number."""
        named = {Record(**entry).file: Record(**entry) for entry in (manifest or {}).get(key, [])}
        records = {}
        for shard in range(self.request.shards if named else 0):
            path = self.path(shard, measured)
            record = named.get(path.name)
            if record and path.is_file() and files.digest(path) == record.sha256:
                records[shard] = record
        return records


@dataclass(frozen=True, slots=True)
class JobModel:
    """The model of a job that has begun in a folder.

    Attributes:
        model: name of the model.
        version: version of the model.
        label: the label by which the version was requested, `stable` or `canary`; None if it was
            not requested by one.
        finished_info: if the job is done, the model's description as far as the manifest contains
            it, to check the request without opening the model; else, or if too little is there,
            None.
    """

    model: str
    version: str
    label: str | None
    finished_info: ModelInfo | None


def job_model(folder: Path) -> JobModel | None:
    """The model of the job in a folder; None if there is no job.

    Raises:
        JobError: the folder contains something else.
        OSError: the folder cannot be read.
    """
    manifest = _read(folder) if folder.exists() else None
    request = manifest["request"] if manifest else None
    if not manifest or not isinstance(request, dict):
        return None
    name, version = request.get("model"), request.get("version")
    if not isinstance(name, str) or not isinstance(version, str):
        return None
    return JobModel(
        name,
        version,
        manifest.get(LABEL),
        _parse_model_info(manifest) if "summary" in manifest else None,
    )


def extra_entries(info: ModelInfo, label: str | None) -> dict[str, Any]:
    """The manifest's entries beside the request.

    Args:
        info: description of the model that the job begins with.
        label: the label by which its version was requested; None if it was not.
    """
    model = {"shape": list(info.shape), "levels": info.levels, "labels": list(info.labels)}
    return {MODEL: model, **({LABEL: label} if label else {})}


def _parse_model_info(manifest: dict[str, Any]) -> ModelInfo | None:
    try:
        request, model = manifest["request"], manifest[MODEL]
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
            finest_alpha=0.0,  # the finished job's alpha was valid
            default_alpha=request["task"].get("alpha") or ALPHA,
            posterior_temperature=1.0,
            execution_providers=(),
            limits=Limits(0, 0, 0, 0),
            digest=request["digest"],
            discriminative=True,
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def shard_path(folder: Path, request: Request, shard: int, measured: bool) -> Path:
    """The path of a shard; measured shards are in a hidden folder until the job is finished."""
    form = Format.PARQUET if measured else request.format
    return (folder / MEASURED_FOLDER if measured else folder) / f"part-{shard:05d}{form.suffix}"


def _records(done: Mapping[int, Record]) -> list[dict[str, Any]]:
    return [asdict(done[shard]) for shard in sorted(done)]


def _lock_folder(folder: Path) -> int:
    """Creates the folder if necessary and locks it until the handle or the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise JobError(f"another process works on {folder}") from error
    except OSError:
        pass  # a file system without locks: there, only the schedule keeps jobs apart
    return handle


def _read(folder: Path) -> dict[str, Any] | None:
    """The content of the folder's manifest; None if the folder is empty."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        strange = sorted(
            path.name
            for path in folder.iterdir()
            if not path.name.endswith(files.PART) and path.name != files.LOST_AND_FOUND
        )
        if strange:
            raise JobError(
                f"{folder} holds {strange[0]} and no {MANIFEST}: name an empty folder"
            ) from None
        return None
    except ValueError as error:
        raise JobError(f"{path} is no manifest of a job: {error}") from error
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or "request" not in manifest
    ):
        raise JobError(f"{path} is no manifest of a job in format {FORMAT}")
    return manifest
