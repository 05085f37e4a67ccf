"""Reads pictures from a Parquet column: tensors, lists of levels, bytes of levels, image files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from likely import levels
from likely.answers import Pixels
from likely.client.values import pixels
from likely.errors import InvalidInput

USUAL_COLUMNS = ("image", "images", "x", "picture", "pixels")
NO_LEVEL = "some of its levels are empty"
_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape and levels of a model's pictures.

    Attributes:
        shape: (c, h, w).
        levels: number of levels; every value is in [0, levels).
    """

    shape: tuple[int, int, int]
    levels: int


def picture_column(schema: pa.Schema, column: str | None, name: str) -> str:
    """The name of the column with the pictures: the requested one, or the first usual one.

    Args:
        schema: schema of the file.
        column: name of the requested column; None for one of `USUAL_COLUMNS`.
        name: name of the file in errors.

    Raises:
        InvalidInput: there is no such column, or more than one of that name.
    """
    wanted = USUAL_COLUMNS if column is None else (column,)
    chosen = next((candidate for candidate in wanted if candidate in schema.names), None)
    if chosen is None:
        raise InvalidInput(
            name, f"no column {' or '.join(wanted)}; there are {', '.join(schema.names)}"
        )
    require_one(schema, chosen, name)
    return chosen


def require_one(schema: pa.Schema, column: str, name: str) -> None:
    """Checks that a file has at most one column of that name.

    Raises:
        InvalidInput: it has several.
    """
    if schema.names.count(column) > 1:
        raise InvalidInput(name, f"several columns {column}; expected one")


def require_fit(kind: pa.DataType, name: str, geometry: Geometry) -> None:
    """Checks that a column can contain the model's pictures, as far as its type tells.

    Args:
        kind: type of the column.
        name: name of the file in errors.
        geometry: the model's.

    Raises:
        InvalidInput: its tensors have another shape.
    """
    if isinstance(kind, pa.FixedShapeTensorType):
        shape = [kind.shape[axis] for axis in _order(kind, geometry)]
        levels.check_fit(name, _with_channel(shape), geometry.shape)


def require_keys(column: pa.Field, name: str) -> None:
    """Checks that a column can contain the keys of pictures.

    Args:
        column: the column's field in the schema.
        name: name of the file in errors.

    Raises:
        InvalidInput: its rows are lists or structs.
    """
    kind = column.type
    plain = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    if pa.types.is_nested(plain):
        raise InvalidInput(name, f"column {column.name} is of {kind}; a key is a text or a number")


def picture_keys(keys: pa.ChunkedArray, otherwise: Sequence[str]) -> list[str]:
    """The key of each picture: its value in the column `keys`, or in `otherwise` if null."""
    named = zip(keys.to_pylist(), otherwise, strict=True)
    return [other if key is None else _text(key) for key, other in named]


def _text(key: Any) -> str:
    return key.decode(errors="replace") if isinstance(key, bytes) else str(key)


def _order(kind: pa.FixedShapeTensorType, geometry: Geometry) -> list[int]:
    """The position of each axis of a tensor in its storage.

    By Arrow's specification, axis i of a picture is axis permutation[i] of the stored array.
    pyarrow writes the inverse permutation, and cannot read either if they differ. The model's
    shape tells which of the two is meant.
    """
    order = list(kind.permutation or range(len(kind.shape)))
    inverse = [order.index(axis) for axis in range(len(order))]
    for axes in (order, inverse):
        if _with_channel([kind.shape[axis] for axis in axes]) == geometry.shape:
            return axes
    return order


def _with_channel(shape: Sequence[int]) -> tuple[int, ...]:
    return (1, *shape) if len(shape) == 2 else tuple(shape)


def pictures(column: pa.ChunkedArray, name: str, geometry: Geometry, first: int = 0) -> Pixels:
    """The pictures of a column as levels, uint8 (n, c, h, w).

    A value of exactly c·h·w bytes contains levels in raster order, channel by channel, unless it
    begins like an image file and its type does not fix the length. All other byte values are
    image files; so are those in the field `bytes` of a struct. Lists are nested as (c, h, w), as
    (h, w) for one channel, or flat.

    Args:
        column: the column of a file, or a part of it.
        name: name of the file in errors.
        geometry: the model's.
        first: index in the file of the column's first row.

    Raises:
        InvalidInput: the values are not pictures, or do not fit the model.
    """
    if column.null_count:
        raise InvalidInput(name, f"{column.null_count} rows of the pictures' column are empty")
    parts = [np.empty((0, *geometry.shape), np.uint8)]
    for chunk in column.chunks:
        if len(chunk):
            parts.append(_chunk(chunk, name, geometry, first))
        first += len(chunk)
    return np.concatenate(parts)


def _chunk(array: pa.Array, name: str, geometry: Geometry, first: int) -> Pixels:
    kind = array.type
    require_fit(kind, name, geometry)
    if isinstance(array, pa.FixedShapeTensorArray):
        flat = array.storage.flatten()
        if flat.null_count:
            row = _first_true(flat.is_null()) * len(array) // len(flat)
            raise InvalidInput(f"{name}[{first + row}]", NO_LEVEL)
        stored = np.asarray(flat).reshape(len(array), *kind.shape)
        turned = stored.transpose(0, *(axis + 1 for axis in _order(kind, geometry)))
        return pixels(turned, name)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        array = array.field("bytes")
        kind = array.type
        if array.null_count:
            raise InvalidInput(
                f"{name}[{first + _first_true(array.is_null())}]", "its bytes are empty"
            )
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _is_fixed(kind):
        size = int(np.prod(geometry.shape))
        if _is_fixed(kind) and kind.byte_width == size:  # not image files, whose lengths differ
            return _of_levels(array.to_pylist(), geometry)
        return _of_bytes(array.to_pylist(), name, geometry, first)
    return _of_lists(array, name, geometry, first)


def _of_lists(rows: pa.Array, name: str, geometry: Geometry, first: int) -> Pixels:
    """Pictures from lists of levels; every list must have the length of its axis."""
    array, depth = rows, 0
    lengths, size = geometry.shape, int(np.prod(geometry.shape))
    inner = rows.type
    while _is_list(inner):
        inner, depth = inner.value_type, depth + 1
    if not depth or not pa.types.is_integer(inner):
        raise InvalidInput(name, f"{inner}; expected integers, in lists of {size} levels")
    asked = {1: (size,), 3: lengths, **({2: lengths[1:]} if lengths[0] == 1 else {})}.get(depth)
    if asked is None:
        may = "2, 1" if lengths[0] == 1 else "2"
        problem = f"levels in lists within {depth - 1} other lists; {may} or none are expected"
        raise InvalidInput(name, f"{problem}: {_format_shape(lengths)}, or {size} in one list")
    lists = 1  # number of lists per picture at this depth
    for length in asked:
        # A null counts as a wrong length: flatten() would skip it.
        actual_lengths = np.asarray(pc.fill_null(pc.list_value_length(array), -1))
        if (wrong := actual_lengths != length).any():
            at = int(np.argmax(wrong))
            row = at // lists
            where = f"{name}[{first + row}]"
            raise _wrong_length_error(
                where, rows[row].as_py(), int(actual_lengths[at]), length, depth, geometry
            )
        array = array.flatten()
        lists *= length
    if array.null_count:
        row = _first_true(array.is_null()) // size
        raise InvalidInput(f"{name}[{first + row}]", NO_LEVEL)
    return pixels(np.asarray(array).reshape(-1, *lengths), name)


def _wrong_length_error(
    where: str, row: Any, actual: int, asked: int, depth: int, geometry: Geometry
) -> InvalidInput:
    """The error for a row of which one list has another length than expected."""
    if actual < 0:
        return InvalidInput(where, "one of its lists is empty")
    if depth == 1:
        return InvalidInput(where, f"a list of {actual}; expected {asked} levels")
    try:
        shape = np.shape(row)
        if len(shape) == depth:
            levels.check_fit(where, shape if depth == 3 else (1, *shape), geometry.shape)
    except InvalidInput as error:
        return error
    except ValueError:
        pass  # ragged
    shown = f"{_format_shape(geometry.shape)} (channels x rows x columns)"
    return InvalidInput(where, f"a list of {actual}; expected one of {asked}: {shown}")


def _of_bytes(values: Sequence[bytes], name: str, geometry: Geometry, first: int) -> Pixels:
    size = int(np.prod(geometry.shape))
    bare = [len(value) == size and not _is_image(value) for value in values]
    if all(bare):
        return _of_levels(values, geometry)
    images = np.empty((len(values), *geometry.shape), np.uint8)
    for row, value in enumerate(values):
        if bare[row]:
            images[row] = np.frombuffer(value, np.uint8).reshape(geometry.shape)
            continue
        where = f"{name}[{first + row}]"
        x = levels.of_image(io.BytesIO(value), where, geometry.shape[0], geometry.levels)
        levels.check_fit(where, x.shape, geometry.shape)
        images[row] = x
    return images


def _of_levels(values: Sequence[bytes], geometry: Geometry) -> Pixels:
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, *geometry.shape)


def _is_image(value: bytes) -> bool:
    """Whether bytes begin like an image file, in a way that levels hardly do by chance."""
    if value.startswith(b"BM"):
        return value[2:6] == len(value).to_bytes(4, "little")
    return value.startswith(_MAGIC) or (value[:4] == b"RIFF" and value[8:12] == b"WEBP")


def _is_list(kind: Any) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _first_true(flags: pa.Array) -> int:
    """The index of the first true value."""
    return int(np.argmax(np.asarray(flags)))


def _format_shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _is_fixed(kind: Any) -> bool:
    return bool(pa.types.is_fixed_size_binary(kind))
