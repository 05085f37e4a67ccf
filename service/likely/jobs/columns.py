"""Pictures in a column of a Parquet file: tensors, lists of levels, raw bytes, or image files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from likely import levels
from likely.answers import Pixels
from likely.client.values import pixels
from likely.errors import InvalidInput

USUAL = ("image", "images", "x", "picture", "pixels")


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a model's pictures are like.

    Attributes:
        shape: (c, h, w).
        levels: every value lies in [0, levels).
    """

    shape: tuple[int, int, int]
    levels: int


def chosen(form: pa.Schema, column: str | None, name: str) -> str:
    """The column that holds the pictures: the one asked for, else one of the usual names.

    Args:
        form: of the file.
        column: the one asked for.
        name: what to call the file.

    Raises:
        InvalidInput: there is no such column.
    """
    wanted = USUAL if column is None else (column,)
    found = next((each for each in wanted if each in form.names), None)
    if found is None:
        raise InvalidInput(
            name, f"no column {' or '.join(wanted)}; there are {', '.join(form.names)}"
        )
    return found


def pictures(column: pa.ChunkedArray, name: str, geometry: Geometry) -> Pixels:
    """The pictures of a column, uint8 (n, c, h, w) of levels.

    Bytes of exactly a picture's size are levels in raster order, channel by channel; all
    others are image files (as are those in a struct's field `bytes`).

    Raises:
        InvalidInput: they are no pictures, or do not fit the model.
    """
    if column.null_count:
        raise InvalidInput(name, f"{column.null_count} rows of the pictures' column are empty")
    parts = [_chunk(chunk, name, geometry) for chunk in column.chunks if len(chunk)]
    return np.concatenate([np.empty((0, *geometry.shape), np.uint8), *parts])


def _chunk(array: pa.Array, name: str, geometry: Geometry) -> Pixels:
    kind = array.type
    if isinstance(array, pa.FixedShapeTensorArray):
        return pixels(array.to_numpy_ndarray())
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        array = array.field("bytes")
        kind = array.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _is_fixed(kind):
        return _of_bytes(array.to_pylist(), name, geometry)
    n = len(array)
    while pa.types.is_nested(kind) and not pa.types.is_struct(kind):
        array = array.flatten()
        kind = array.type
    size = int(np.prod(geometry.shape))
    if not pa.types.is_integer(kind) or array.null_count or len(array) != n * size:
        told = f"{kind} a picture, {len(array) / max(n, 1):g} of them; {size} levels are asked"
        raise InvalidInput(name, told)
    return pixels(np.asarray(array).reshape(n, *geometry.shape))


def _of_bytes(values: Sequence[bytes], name: str, geometry: Geometry) -> Pixels:
    size = int(np.prod(geometry.shape))
    if all(len(value) == size for value in values):
        return np.frombuffer(b"".join(values), np.uint8).reshape(-1, *geometry.shape)
    found = np.empty((len(values), *geometry.shape), np.uint8)
    for row, value in enumerate(values):
        told = f"{name}[{row}]"
        x = levels.of_image(io.BytesIO(value), told, geometry.shape[0], geometry.levels)
        levels.check_fit(told, x.shape, geometry.shape)
        found[row] = x
    return found


def _is_fixed(kind: Any) -> bool:
    return bool(pa.types.is_fixed_size_binary(kind))


def check_levels(x: npt.NDArray[Any], keys: Sequence[str], geometry: Geometry) -> None:
    """Returns if every level is the model's.

    Raises:
        InvalidInput: one is not; names its picture.
    """
    if x.size and x.max() >= geometry.levels:
        row = int(np.argmax((x >= geometry.levels).any((1, 2, 3))))
        raise InvalidInput(keys[row], f"level {x[row].max()} is not in [0, {geometry.levels})")
