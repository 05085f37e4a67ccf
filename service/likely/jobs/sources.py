"""The input pictures of a job: files in the order of their names, read in parts."""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from likely import levels
from likely.answers import Pixels
from likely.client.values import pixels
from likely.codec import check_levels
from likely.errors import InvalidInput, JobError
from likely.jobs import files
from likely.jobs.columns import (
    Geometry,
    picture_column,
    picture_keys,
    pictures,
    require_fit,
    require_keys,
    require_one,
)

ARRAYS = (".npy", ".npz")
PARQUET = (".parquet", ".pq")
TAR = (".tar",)
KEY = "key"
# Row groups of Parquet files, and arrays, kept in memory: workers read neighbouring shards.
_GROUPS = 2
_ARRAYS = 2
_FOOTERS = 2  # a footer describes all row groups, and is long if there are many

Part = tuple[Pixels, list[str]]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input file.

    Attributes:
        path: path of the file.
        name: its path relative to the input folder, or its file name if it was named itself, with
            "?" for characters that are not UTF-8; used in keys and errors.
        raw: the bytes of that relative path in the file system.
    """

    path: Path
    name: str
    raw: bytes

    @classmethod
    def of(cls, path: Path, name: str) -> InputFile:
        """A file with that relative path."""
        return cls(path, _printable(name), name.encode(errors="surrogateescape"))


class Source(Protocol):
    """The pictures of one file, or of consecutive image files."""

    @property
    def rows(self) -> int:
        """Number of pictures."""

    def read(self, start: int, stop: int) -> Part:
        """Pictures start to stop - 1, uint8 (n, c, h, w), and the key of each."""


@dataclass(frozen=True, slots=True)
class Input:
    """The inputs of a job, as the caller named them.

    Attributes:
        paths: files, and folders of files.
        column: name of the Parquet column with the pictures; None for one of the usual names.
        key: name of the Parquet column with the keys; None for `key`, if there is one.
    """

    paths: tuple[Path, ...]
    column: str | None = None
    key: str | None = None


class Pictures:
    """All pictures of a job, by index; safe to read from several threads.

    Attributes:
        digest: SHA-256 over the names, the order and the contents of all files, hexadecimal.
    """

    def __init__(self, inputs: Input, geometry: Geometry) -> None:
        """Finds the files and reads their headers.

        Raises:
            JobError: there are no pictures, or a file has an unknown suffix.
            InvalidInput: a file's content does not match its suffix, or does not fit the model.
        """
        self._inputs = inputs
        self._geometry = geometry
        input_files = list(_find_files(inputs.paths))
        self._files = input_files
        self._sources = list(_sources(input_files, inputs, geometry))
        self._ends = list(accumulate(source.rows for source in self._sources))
        if not self._ends or not len(self):
            raise JobError(f"no pictures in {', '.join(map(str, inputs.paths))}")

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the column names, and the names, order and contents of all files."""
        total = hashlib.sha256(f"{self._inputs.column}\0{self._inputs.key}\n".encode())
        for file in self._files:
            total.update(file.raw + f"\0{files.digest(file.path)}\n".encode())
        return total.hexdigest()

    def read(self, start: int, stop: int) -> Part:
        """Pictures start to stop - 1, uint8 (n, c, h, w) of levels, and the key of each.

        Raises:
            InvalidInput: a picture cannot be read, or does not fit the model.
        """
        parts: list[Pixels] = [np.empty((0, *self._geometry.shape), np.uint8)]
        keys: list[str] = []
        at = start
        while at < stop:
            which = bisect_right(self._ends, at)
            end = self._ends[which]
            offset = end - self._sources[which].rows
            x, named = self._sources[which].read(at - offset, min(stop, end) - offset)
            levels.check_fit(named[0], x.shape[1:], self._geometry.shape)
            check_levels(x, self._geometry.levels, named)
            parts.append(x)
            keys += named
            at += len(named)
        return np.concatenate(parts), keys


class _Cache(Generic[T]):
    """A small cache of what was read last: not all of a job's inputs need to fit in memory."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[Hashable, T] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, read: Callable[[], T]) -> T:
        with self._lock:
            value = self._held.pop(key, None)
            if value is None:
                while len(self._held) >= self._most:
                    del self._held[next(iter(self._held))]
                value = read()
            self._held[key] = value
            return value


@dataclass(slots=True)
class _Array:
    file: InputFile
    rows: int
    cache: _Cache[npt.NDArray[Any]]

    @classmethod
    def open(cls, file: InputFile, geometry: Geometry, cache: _Cache[npt.NDArray[Any]]) -> _Array:
        shape, kind = levels.header(file.path)
        none = pixels(np.empty((0, *shape[1:]) if shape else (), kind), file.name)
        if shape[0]:
            levels.check_fit(file.name, none.shape[1:], geometry.shape)
        return cls(file, shape[0], cache)

    def read(self, start: int, stop: int) -> Part:
        held = self.cache.get(self.file, self._read)
        x = np.array(held[start:stop])  # a copy: a view would keep the whole array in memory
        keys = [f"{self.file.name}[{i}]" for i in range(start, stop)]
        return pixels(x, self.file.name), keys

    def _read(self) -> npt.NDArray[Any]:
        x = levels.of_array(self.file.path, mapped="r")
        return x if isinstance(x, np.memmap) else pixels(x, self.file.name)


@dataclass(slots=True)
class _Images:
    files: list[InputFile]
    geometry: Geometry

    @property
    def rows(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Part:
        chosen = self.files[start:stop]
        parts = [_image(file.path, file.name, self.geometry) for file in chosen]
        return np.stack(parts), [file.name for file in chosen]


@dataclass(slots=True)
class _Tar:
    """A WebDataset shard: a sample is consecutive members whose names agree up to the first dot."""

    file: InputFile
    geometry: Geometry
    members: list[tuple[str, str, int, int]]  # key, name, offset, size

    @classmethod
    def open(cls, file: InputFile, geometry: Geometry) -> _Tar:
        members: list[tuple[str, str, int, int]] = []
        dotted: dict[str, str] = {}  # by key, names of pictures that have more than one dot
        places: dict[str, tuple[int, int] | None] = {}
        for member in _members(file):
            place = places.get(member.linkname) if member.islnk() else _data_span(member)
            places[member.name] = place
            folder, _, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            suffix = Path(base).suffix.lower()
            if member.isdir() or not stem or suffix not in (*levels.IMAGES, ".npy"):
                continue
            key, name = _printable(f"{folder}/{stem}" if folder else stem), _printable(member.name)
            if f".{ending.lower()}" != suffix:
                dotted[key] = name
            elif place is None:
                problem = "neither a plain file nor a hard link to one before it"
                raise InvalidInput(f"{file.name}:{name}", problem)
            else:
                members.append((key, name, *place))
        keys = [key for key, *_ in members]
        if twice := next((a for a, b in pairwise(keys) if a == b), None):
            raise InvalidInput(file.name, f"sample {twice} has several pictures; expected one")
        sampled = {*keys}
        if lone := next((key for key in dotted if key not in sampled), None):
            problem = f"a name of several dots, and sample {lone} has no picture whose name has one"
            raise InvalidInput(f"{file.name}:{dotted[lone]}", problem)
        return cls(file, geometry, members)

    @property
    def rows(self) -> int:
        return len(self.members)

    def read(self, start: int, stop: int) -> Part:
        parts, keys = [], []
        with self.file.path.open("rb") as archive:
            for key, name, offset, size in self.members[start:stop]:
                archive.seek(offset)
                where, data = f"{self.file.name}:{name}", BytesIO(archive.read(size))
                parts.append(
                    _npy(data, where, self.geometry)
                    if name.lower().endswith(".npy")
                    else _image(data, where, self.geometry)
                )
                keys.append(key)
        return np.stack(parts), keys


@dataclass(slots=True)
class _Parquet:
    file: InputFile
    geometry: Geometry
    column: str
    key: str | None
    ends: list[int]  # for each row group, one past the index of its last row
    cache: _Cache[Part]
    footers: _Cache[pq.FileMetaData]

    @classmethod
    def open(
        cls,
        file: InputFile,
        inputs: Input,
        geometry: Geometry,
        cache: _Cache[Part],
        footers: _Cache[pq.FileMetaData],
    ) -> _Parquet:
        try:
            with pq.ParquetFile(file.path) as opened:
                schema, metadata = opened.schema_arrow, opened.metadata
                ends = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except pa.ArrowInvalid as error:
            raise InvalidInput(file.name, f"no Parquet file: {error}") from error
        key = inputs.key or (KEY if KEY in schema.names else None)
        if key is not None and key not in schema.names:
            raise InvalidInput(file.name, f"no column {key}; there are {', '.join(schema.names)}")
        if key is not None:
            require_one(schema, key, file.name)
            require_keys(schema.field(key), file.name)
        column = picture_column(schema, inputs.column, file.name)
        require_fit(schema.field(column).type, file.name, geometry)
        return cls(file, geometry, column, key, list(accumulate(ends)), cache, footers)

    @property
    def rows(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, stop: int) -> Part:
        parts: list[Pixels] = []
        keys: list[str] = []
        at = start
        while at < stop:
            group = bisect_right(self.ends, at)
            x, named = self.cache.get((self.file, group), partial(self._read_group, group))
            offset = self.ends[group] - len(x)
            here = slice(at - offset, min(stop, self.ends[group]) - offset)
            parts.append(x[here])
            keys += named[here]
            at = min(stop, self.ends[group])
        return np.concatenate(parts), keys

    def _read_group(self, group: int) -> Part:
        wanted = [self.column, *([self.key] if self.key else [])]
        try:
            footer = self.footers.get(self.file, partial(pq.read_metadata, self.file.path))
            with pq.ParquetFile(self.file.path, metadata=footer) as opened:
                table = opened.read_row_group(group, wanted)
        except (pa.ArrowException, OSError) as error:
            raise InvalidInput(self.file.name, f"cannot be read: {error}") from error
        first = self.ends[group] - len(table)
        x = pictures(table[self.column], self.file.name, self.geometry, first)
        rows = [f"{self.file.name}[{first + i}]" for i in range(len(x))]
        return x, picture_keys(table[self.key], rows) if self.key else rows


def require_outside_inputs(inputs: Input, out: Path) -> None:
    """Checks that the job's folder is not in an input folder: its shards would become inputs.

    Args:
        inputs: the job's inputs.
        out: the job's folder, which need not exist.

    Raises:
        JobError: it is in an input folder.
    """
    real = Path(os.path.realpath(out))
    for path in filter(Path.is_dir, inputs.paths):
        looked_at = _folders(path)
        for above in (real, *real.parents):
            within = real.relative_to(above).parts
            if str(above) in looked_at and not any(map(_is_skipped, within)):
                raise JobError(
                    f"the job's folder {out} lies within the input {path}: its shards would be "
                    "read as pictures; name a folder elsewhere"
                )


def _find_files(paths: Sequence[Path]) -> Iterator[InputFile]:
    """The named files, and the files of known types in named folders, in the order of names."""
    known = (*levels.IMAGES, *ARRAYS, *PARQUET, *TAR)
    for path in paths:
        if path.is_dir():
            for file in _walk(path):
                if not file.exists():  # of a folder, such as a disk that is not mounted, as well
                    raise JobError(f"{file} is a link that leads nowhere")
                if file.suffix.lower() in known and file.is_file():
                    yield InputFile.of(file, file.relative_to(path).as_posix())
        elif path.suffix.lower() in known:
            yield InputFile.of(path, path.name)
        else:
            raise JobError(f"{path} is none of {', '.join(known)}")


def _walk(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Yields all files in a folder and its subfolders, in the order of names.

    Links are followed; hidden names and `lost+found` are skipped.

    Raises:
        OSError: a folder cannot be read.
    """
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link leads back to a folder above
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if _is_skipped(path.name):
            continue
        if path.is_dir():
            yield from _walk(path, above | {identity})
        else:
            yield path


def _folders(folder: Path) -> set[str]:
    """The real paths of a folder and of all subfolders that are read, also through links."""
    real_paths: set[str] = set()
    left = [str(folder)]
    while left:
        real = os.path.realpath(left.pop())
        if real not in real_paths:
            real_paths.add(real)
            with os.scandir(real) as entries:
                inside = [entry for entry in entries if not _is_skipped(entry.name)]
            left += [entry.path for entry in inside if entry.is_dir()]
    return real_paths


def _is_skipped(name: str) -> bool:
    """Whether a name is skipped: hidden, or a file system's own folder that only root can read."""
    return name.startswith(".") or name == files.LOST_AND_FOUND


def _printable(name: str) -> str:
    """A name with "?" for every character that is not UTF-8."""
    return name.encode(errors="replace").decode()


def _sources(
    input_files: Sequence[InputFile], inputs: Input, geometry: Geometry
) -> Iterator[Source]:
    images: list[InputFile] = []
    arrays = _Cache[npt.NDArray[Any]](_ARRAYS)
    groups = _Cache[Part](_GROUPS)
    footers = _Cache[pq.FileMetaData](_FOOTERS)
    for file in input_files:
        suffix = file.path.suffix.lower()
        if suffix in levels.IMAGES:
            images.append(file)
            continue
        if images:
            yield _Images(images, geometry)
            images = []
        if suffix in ARRAYS:
            yield _Array.open(file, geometry, arrays)
        elif suffix in TAR:
            yield _Tar.open(file, geometry)
        else:
            yield _Parquet.open(file, inputs, geometry, groups, footers)
    if images:
        yield _Images(images, geometry)


def _members(file: InputFile) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar archive.

    Raises:
        InvalidInput: the file is not a tar archive, or is incomplete. (tarfile takes a broken
            header for the end of the archive.)
    """
    try:
        with file.path.open("rb") as data, tarfile.open(fileobj=data, mode="r:") as archive:
            yield from archive
            data.seek(archive.offset)
            length, rest = 0, False
            while chunk := data.read(1 << 20):  # the rest must be at least one block of zeros
                length, rest = length + len(chunk), rest or any(chunk)
    except tarfile.TarError as error:
        raise InvalidInput(file.name, f"no tar archive: {error}") from error
    if length < tarfile.BLOCKSIZE or rest:
        raise InvalidInput(file.name, "the tar archive is cut off, broken or followed by more")


def _data_span(member: tarfile.TarInfo) -> tuple[int, int] | None:
    """Offset and size of a member's data; None unless it is a plain file that is not sparse."""
    plain = member.isfile() and not member.issparse()
    return (member.offset_data, member.size) if plain else None


def _image(file: Path | BytesIO, name: str, geometry: Geometry) -> Pixels:
    x = levels.of_image(file, name, geometry.shape[0], geometry.levels)
    levels.check_fit(name, x.shape, geometry.shape)
    return x


def _npy(data: BytesIO, name: str, geometry: Geometry) -> Pixels:
    x = pixels(levels.of_array(data, name)[None], name)
    levels.check_fit(name, x.shape[1:], geometry.shape)
    return x.reshape(geometry.shape)
