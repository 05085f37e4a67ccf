"""Conversion of callers' arguments (arrays, numbers, labels, enumerations) to message fields."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from likely.answers import Pixels
from likely.errors import InvalidInput

M = TypeVar("M")
E = TypeVar("E", bound=IntEnum)
Label: TypeAlias = int | str


def pixels(images: npt.ArrayLike, name: str = "images") -> Pixels:
    """Pictures as uint8 (n, c, h, w).

    Args:
        images: (n, c, h, w), or (n, h, w) for one channel; any integer type, values in 0 to 255.
        name: name of the argument in errors.

    Raises:
        InvalidInput: the array has another number of axes, another type, or a value outside 0 to
            255.
    """
    x = array(name, images)
    if x.ndim not in (3, 4):
        raise InvalidInput(name, f"shape {x.shape}; expected (n, c, h, w) or (n, h, w)")
    if not np.issubdtype(x.dtype, np.integer):
        how = ": multiply by the top level and round" if x.dtype.kind == "f" else ""
        raise InvalidInput(name, f"type {x.dtype}; expected integers from 0 to 255{how}")
    if x.dtype != np.uint8 and x.size and (x.min() < 0 or x.max() > 255):
        raise InvalidInput(name, f"values {x.min()} to {x.max()}; expected 0 to 255")
    return x.astype(np.uint8, copy=False).reshape(x.shape if x.ndim == 4 else _one_channel(x.shape))


def index_of(label: Label | None, names: Sequence[str], field: str = "label") -> int | None:
    """The index of a label given by name or index, which may also be written as text.

    Raises:
        InvalidInput: no label has that name, or it is neither a name nor an index.
    """
    if isinstance(label, bool):
        raise InvalidInput(field, f"{label} is a bool, which is no label")
    if not isinstance(label, str):
        return label
    if label in names:
        return names.index(label)
    if label.removeprefix("-").isdecimal():
        with suppress(ValueError):  # Python parses no number of thousands of digits
            return int(label)
    raise InvalidInput(field, f"{reprlib.repr(label)} is none of {', '.join(names) or 'none'}")


def to_int(field: str, value: Any) -> int:
    """The number as an int.

    Raises:
        InvalidInput: it is not an integer.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise InvalidInput(field, f"{value!r} is no whole number") from None


def enum_member(field: str, kind: type[E], given: E | str) -> E:
    """The member of an enumeration, given as a member or by its name.

    Raises:
        InvalidInput: there is no such member.
    """
    try:
        return kind[given.upper()] if isinstance(given, str) else kind(given)
    except (KeyError, ValueError):
        names = ", ".join(member.name.lower() for member in kind)
        raise InvalidInput(field, f"{given!r} is none of {names}") from None


def build_message(kind: Callable[..., M], **fields: Any) -> M:
    """A message with these fields.

    Raises:
        InvalidInput: a value has a type or size that the message cannot hold.
    """
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise _unsendable(kind, fields, error) from error


def _unsendable(kind: Any, fields: dict[str, Any], error: Exception) -> InvalidInput:
    """The error that names the field whose value the message cannot hold."""
    for name, value in fields.items():
        try:
            kind(**{name: value})
        except (TypeError, ValueError) as field_error:
            field = kind.DESCRIPTOR.fields_by_name[name]
            bits = {field.TYPE_INT32: 31, field.TYPE_INT64: 63}.get(field.type)
            if isinstance(value, int) and not isinstance(value, bool) and bits:
                return InvalidInput(name, f"{_digits(value)} is not in [-2**{bits}, 2**{bits})")
            return InvalidInput(name, f"{reprlib.repr(value)} cannot be sent: {field_error}")
    return InvalidInput("", f"a value cannot be sent: {error}")


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # Python formats no number of thousands of digits
        return f"a number of {value.bit_length()} bits"


def array(field: str, values: npt.ArrayLike, dtype: Any = None) -> npt.NDArray[Any]:
    """The values as an array.

    Raises:
        InvalidInput: they cannot be converted to an array, or not to one of that type.
    """
    try:
        return np.asarray(values, dtype=dtype)
    except (TypeError, ValueError) as error:
        asked = "an array" if dtype is None else np.dtype(dtype)
        raise InvalidInput(field, f"not to be read as {asked}: {error}") from error


def _one_channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    n, h, w = shape
    return n, 1, h, w
