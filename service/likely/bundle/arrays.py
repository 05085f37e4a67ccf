"""Reads untrusted archives of arrays (.npz): only numbers, and only bounded sizes."""

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
MOST_BYTES = 1 << 30
_ENDING = ".npy"
_NUMBERS = "biuf"
_COMPRESSIONS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_ENCRYPTED = 1
# What zipfile and numpy raise for bytes that are no archive of arrays, as fuzzing found.
_MALFORMED_ERRORS = (
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
_SEEK_ERRNOS = {errno.EINVAL, errno.EOVERFLOW}  # from offsets in an archive that no file can have


def read(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an archive by name: Booleans, integers and floating-point numbers.

    Raises:
        BundleError: with reason `arrays`, the file is no archive, or contains something other
            than arrays of numbers (such as a pickle), more than `MOST_ARRAYS` arrays or more than
            `MOST_BYTES` bytes. With reason `unreadable`, it cannot be read.
        OutOfMemory: there is no memory for the arrays.
    """
    outer = sys.exception()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(entries)
            return {
                entry.filename.removesuffix(_ENDING): _read_array(archive, entry)
                for entry in entries
            }
    except MemoryError as error:
        raise OutOfMemory(f"no memory for the arrays of {path}") from error
    except _MALFORMED_ERRORS as error:
        if read_error := _find_read_error(error, outer):
            raise BundleError.unreadable(path, read_error) from error
        detail = f"{type(error).__name__}: {error}"[:200]
        raise BundleError(f"{path} is no archive of arrays", "arrays", detail) from error


def _find_read_error(error: BaseException | None, outer: BaseException | None) -> OSError | None:
    """The system's error, if the file could not be read; zipfile may hide it behind its own.

    Args:
        error: the error that was raised.
        outer: an error that was being handled before, which does not concern this file.
    """
    while error and error is not outer:
        if isinstance(error, OSError) and error.errno and error.errno not in _SEEK_ERRNOS:
            return error
        error = error.__context__
    return None


def _check_entries(entries: list[zipfile.ZipInfo]) -> None:
    """Checks that all entries may be read into memory; none is ever unpacked to a path.

    Raises:
        ValueError: one may not.
    """
    if len(entries) > MOST_ARRAYS or len({entry.filename for entry in entries}) < len(entries):
        raise ValueError(f"it has more than {MOST_ARRAYS} entries, or two of one name")
    for entry in entries:
        if not entry.filename.endswith(_ENDING) or ".." in entry.filename:
            raise ValueError(f"the entry {entry.filename[:80]!r} is no array")
        if entry.compress_type not in _COMPRESSIONS or entry.flag_bits & _ENCRYPTED:
            raise ValueError(f"the entry {entry.filename[:80]!r} is packed in another way")
    if (size := sum(entry.file_size for entry in entries)) > MOST_BYTES:
        raise ValueError(f"its arrays have {size} bytes; at most {MOST_BYTES} are read")


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> npt.NDArray[Any]:
    with archive.open(entry) as file:
        shape, fortran, dtype = _read_header(file)
        if dtype.kind not in _NUMBERS:  # checked before reading: objects are pickles
            raise ValueError(f"{entry.filename[:80]!r} holds {dtype}, not numbers")
        size = math.prod(shape) * dtype.itemsize
        # Read by the size in the archive, which was checked, not by the header's claim.
        data = file.read(entry.file_size)
    if len(data) != size:
        raise ValueError(f"{entry.filename[:80]!r} claims {size} bytes and has {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").copy()


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
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
        except MemoryError as error:  # Python's parser, if it is nested too deeply
            raise ValueError("an array's header cannot be read") from error
    if any(length < 0 for length in shape):
        raise ValueError("an array has a negative length")
    return shape, fortran, dtype
