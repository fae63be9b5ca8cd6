"""Fields that are written are read again, and what is no message is said to be none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from offramp.runtime.wire import field, fields, varint, whole_number

NUMBERS = st.integers(1, 2**29 - 1)


@given(st.lists(st.tuples(NUMBERS, st.binary(max_size=300) | st.integers(0, 2**64 - 1))))
def test_what_is_written_is_read_again(given_: list[tuple[int, bytes | int]]) -> None:
    written = [field(n, c) if isinstance(c, bytes) else whole_number(n, c) for n, c in given_]
    read = list(fields(memoryview(b"".join(written))))
    assert [number for number, _, _ in read] == [number for number, _ in given_]
    assert [bytes(whole) for _, _, whole in read] == written
    for (_, content), (_, found, _) in zip(given_, read, strict=True):
        assert bytes(found) == (content if isinstance(content, bytes) else varint(content))


def test_fields_of_every_kind_are_found_as_protobuf_writes_them() -> None:
    tensor = TensorProto(name="t", dims=[3], double_data=[1.5], float_data=[2.5], raw_data=b"abc", data_type=1)
    found = [(number, bytes(content)) for number, content, _ in fields(memoryview(tensor.SerializeToString()))]
    assert sorted(number for number, _ in found) == [1, 2, 4, 8, 9, 10]
    assert dict(found)[8] == b"t"
    assert dict(found)[9] == b"abc"


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        (b"\x0a", "a number goes beyond the end"),
        (b"\x0a\x80", "a number goes beyond the end"),
        (b"\x0a\x02a", "a field goes beyond the end"),
        (b"\x09abc", "a field goes beyond the end"),
        (b"\x0dabc", "a field goes beyond the end"),
        (b"\x0b", "no field of kind 3"),
    ],
)
def test_what_is_no_message_is_said(spoilt: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        list(fields(memoryview(field(1, b"before") + spoilt)))
