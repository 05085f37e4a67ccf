"""A strict parser of protocol buffers: field by field, without building messages.

A library's parser is lenient: it drops unknown fields, merges repeated messages, and
lets the last of two values win. Two parsers can then read one file differently. This
parser refuses such messages instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

# A varint holds 64 bits in at most ten bytes.
_LONGEST_VARINT = 10
_VARINT_LIMIT = 1 << 64

Value: TypeAlias = int | memoryview
Values: TypeAlias = dict[str, list[Value]]


class WireError(ValueError):
    """The bytes are not a message of the expected type."""


class Kind(IntEnum):
    """The wire type of a value, by the format's numbers."""

    VARINT = 0
    FIXED64 = 1
    BYTES = 2
    FIXED32 = 5


@dataclass(frozen=True, slots=True)
class Field:
    """A field that a message may have.

    Attributes:
        name: the field's name.
        kinds: the wire types that it may have.
        repeated: whether it may occur more than once.
    """

    name: str
    kinds: tuple[Kind, ...]
    repeated: bool = False


Schema: TypeAlias = Mapping[int, Field]


class Reader:
    """Reads messages with at most `most_fields` fields and packed numbers in all.

    The limit bounds the time, because many tiny fields take longest.
    """

    def __init__(self, most_fields: int) -> None:
        self._items_left = most_fields

    def read_message(self, data: memoryview, schema: Schema, what: str) -> Values:
        """The values of a message's fields, by name, in the order of the file.

        Args:
            data: the message's bytes.
            schema: the fields that it may have.
            what: the message's type, for errors.

        Raises:
            WireError: the bytes are malformed; a field is not in the schema, has another wire
                type or occurs too often; or there are more fields than this reader accepts.
        """
        fields: Values = {}
        for number, kind, value in self._read_fields(data, what):
            field = schema.get(number)
            if field is None or kind not in field.kinds:
                raise WireError(f"{what} holds field {number}, kind {kind}, which is not allowed")
            values = fields.setdefault(field.name, [])
            if values and not field.repeated:
                raise WireError(f"{what} holds {field.name} twice")
            values.append(value)
        return fields

    def _read_fields(self, data: memoryview, what: str) -> Iterator[tuple[int, int, Value]]:
        at, end = 0, len(data)
        while at < end:
            self._count_item()
            tag, at = read_varint(data, at)
            number, kind = tag >> 3, tag & 7
            if kind == Kind.VARINT:
                value, at = read_varint(data, at)
                yield number, kind, value
                continue
            if kind == Kind.BYTES:
                size, at = read_varint(data, at)
            elif kind == Kind.FIXED32:
                size = 4
            elif kind == Kind.FIXED64:
                size = 8
            else:
                raise WireError(f"{what} holds field {number} of kind {kind}, which does not exist")
            if size > end - at:
                raise WireError(f"{what} ends within field {number}")
            yield number, kind, data[at : at + size]
            at += size

    def read_varints(self, data: memoryview) -> Iterator[int]:
        """Yields the packed numbers of a field.

        Raises:
            WireError: the bytes are malformed, or there are more fields and numbers than this
                reader accepts.
        """
        at = 0
        while at < len(data):
            self._count_item()
            value, at = read_varint(data, at)
            yield value

    def _count_item(self) -> None:
        self._items_left -= 1
        if self._items_left < 0:
            raise WireError("there are too many fields, or numbers in them")


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """The varint at an offset, from 0 to 2**64 - 1, and the offset after it.

    Raises:
        WireError: the bytes end within the number, or it has more than 64 bits.
    """
    value = 0
    for shift in range(_LONGEST_VARINT):
        if at >= len(data):
            raise WireError("the bytes end within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            if value >= _VARINT_LIMIT:
                break
            return value, at
    raise WireError("a number has more than 64 bits")
