"""The protobuf wire format, walked without a schema: (field number, wire type, value) of one message."""

from __future__ import annotations

from collections.abc import Iterator

from trainguard.scan.source import Source

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FIELDS = 2_000_000


class BadProtobuf(Exception):
    """Not a message."""


def fields(source: Source, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field, wire type, value or offset, length) of the message in [start, end). Raises BadProtobuf."""
    position, count = start, 0
    while position < end:
        count += 1
        if count > FIELDS:
            raise BadProtobuf(f"more than {FIELDS} fields")
        head = source.read(position, min(20, end - position))
        key, used = varint(head, 0)
        number, kind = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise BadProtobuf(f"field number {number}")
        if kind == VARINT:
            value, used = varint(head, used)
            yield number, kind, value, 0
            position += used
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
            yield number, kind, position + used, size
            position += used + size
        elif kind == BYTES:
            size, used = varint(head, used)
            yield number, kind, position + used, size
            position += used + size
        else:
            raise BadProtobuf(f"wire type {kind}")
        if position > end:
            raise BadProtobuf("a field runs past the end")


def varint(data: bytes, position: int) -> tuple[int, int]:
    """(value, position behind it) of a varint. Raises BadProtobuf when it is cut or longer than 10 bytes."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise BadProtobuf("ends inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise BadProtobuf("a number of more than 10 bytes")
