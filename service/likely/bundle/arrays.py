"""Archives of arrays (.npz), read without trust: numbers alone, and no more than they claim."""

from __future__ import annotations

import errno
import math
import struct
import sys
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from likely.errors import BundleError, OutOfMemory

MOST_ARRAYS = 256
LARGEST = 1 << 30
_ENDING = ".npy"
_NUMBERS = "biuf"
_STORED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_ENCRYPTED = 1
# What zipfile and numpy raise at bytes that are no archive of arrays, as fuzzing found.
_BROKEN = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
_SOUGHT = {errno.EINVAL, errno.EOVERFLOW}  # of places that an archive names and no file has


def read(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an archive by name; truth values, whole and floating-point numbers.

    Raises:
        BundleError: it is no archive, or holds what is no array of numbers (a pickle, say),
            or more than MOST_ARRAYS or LARGEST bytes; its reason is `arrays`. Or it cannot be
            read, and its reason is `unreadable`.
        OutOfMemory: there is no memory for them.
    """
    outer = sys.exception()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check(entries)
            return {
                entry.filename.removesuffix(_ENDING): _array(archive, entry) for entry in entries
            }
    except MemoryError as error:
        raise OutOfMemory(f"no memory for the arrays of {path}") from error
    except _BROKEN as error:
        if unread := _unread(error, outer):
            raise BundleError.unreadable(path, unread) from error
        said = f"{type(error).__name__}: {error}"[:200]
        raise BundleError(f"{path} is no archive of arrays", "arrays", said) from error


def _unread(error: BaseException | None, outer: BaseException | None) -> OSError | None:
    """What the system said, where it could not read the file; zipfile hides some of it.

    Args:
        error: what came of it.
        outer: what was being handled before, and tells nothing of this file.
    """
    while error and error is not outer:
        if isinstance(error, OSError) and error.errno and error.errno not in _SOUGHT:
            return error
        error = error.__context__
    return None


def _check(entries: list[zipfile.ZipInfo]) -> None:
    """Returns if all can be read into memory: none is unpacked to a path."""
    if len(entries) > MOST_ARRAYS or len({entry.filename for entry in entries}) < len(entries):
        raise ValueError(f"it has more than {MOST_ARRAYS} entries, or two of one name")
    for entry in entries:
        if not entry.filename.endswith(_ENDING) or ".." in entry.filename:
            raise ValueError(f"the entry {entry.filename[:80]!r} is no array")
        if entry.compress_type not in _STORED or entry.flag_bits & _ENCRYPTED:
            raise ValueError(f"the entry {entry.filename[:80]!r} is packed in another way")
    if (size := sum(entry.file_size for entry in entries)) > LARGEST:
        raise ValueError(f"its arrays have {size} bytes; at most {LARGEST} are read")


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> npt.NDArray[Any]:
    with archive.open(entry) as file:
        shape, fortran, dtype = _header(file)
        if dtype.kind not in _NUMBERS:  # before a byte of it is read: objects are pickles
            raise ValueError(f"{entry.filename[:80]!r} holds {dtype}, not numbers")
        size = math.prod(shape) * dtype.itemsize
        # The archive's own size, not the header's claim, decides what is read.
        data = file.read(entry.file_size)
    if len(data) != size:
        raise ValueError(f"{entry.filename[:80]!r} claims {size} bytes and has {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").copy()


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"an array is of version {version}")
    with warnings.catch_warnings(action="ignore"):
        try:
            shape, fortran, dtype = readers[version](file)
        except MemoryError as error:  # as Python's parser says of what is nested too deep
            raise ValueError("an array's header cannot be read") from error
    if any(length < 0 for length in shape):
        raise ValueError("an array has a negative length")
    return shape, fortran, dtype
