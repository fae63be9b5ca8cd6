"""Protobuf's wire format, as much of it as ONNX models need: the runtime does without the packages onnx and protobuf.

A message is fields one behind the other, each a number and a kind, then its content. Numbers (varints) and contents
with their length in front are written; of other kinds the ends are found. Where a field of onnx.proto is meant, its
number there is given.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _EIGHT, _LONG, _FOUR = 0, 1, 2, 5  # kinds


def field(number: int, content: bytes) -> bytes:
    """A field whose content is a message, a text or raw bytes."""
    return varint(number << 3 | _LONG) + varint(len(content)) + content


def text(number: int, content: str) -> bytes:
    return field(number, content.encode())


def whole_number(number: int, content: int) -> bytes:
    return varint(number << 3 | _VARINT) + varint(content)


def varint(number: int) -> bytes:
    """Seven bits a byte, the least first; the eighth says that more follow."""
    made = bytearray()
    while number > 127:
        made.append(number & 127 | 128)
        number >>= 7
    return bytes((*made, number))


def fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Every field's number, its content without the length in front, and the whole field.

    Raises `ValueError` for what is no message.
    """
    at = 0
    while at < len(message):
        start = at
        key, at = _read_varint(message, at)
        length, at = _length(message, at, key & 7)
        if at + length > len(message):
            raise ValueError("a field goes beyond the end")
        yield key >> 3, message[at : at + length], message[start : at + length]
        at += length


def _length(message: memoryview, at: int, kind: int) -> tuple[int, int]:
    """Bytes of a field's content, and where it starts."""
    if kind == _LONG:
        return _read_varint(message, at)
    if kind == _VARINT:
        return _read_varint(message, at)[1] - at, at
    if kind in (_EIGHT, _FOUR):
        return (8 if kind == _EIGHT else 4), at
    raise ValueError(f"there is no field of kind {kind}")


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number, and where what follows it starts."""
    number = shift = 0
    while at < len(message):
        byte = message[at]
        number, shift, at = number | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return number, at
    raise ValueError("a number goes beyond the end")
