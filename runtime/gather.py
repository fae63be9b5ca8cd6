"""The ONNX model that takes rows of values: compaction, for values that stay on a device.

    rows [n] int64, v0 [B, ...], v1 [B, ...], ...   ->   g0 [n, ...], g1 [n, ...], ...

One `Gather` along dimension 0 per value. The runtime does without the package onnx, and the model is small enough to
be written by hand: of protobuf's wire format it takes numbers (varints) and length-delimited fields alone, with the
field numbers of onnx.proto.

Refused: values that are no tensors of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ArtifactError
from .manifest import TensorSpec

Kind = tuple[str, int]  # ONNX Runtime's word such as "tensor(float)", and the rank; 0: any
ROWS = "rows"
OPSET, IR_VERSION = 17, 8
# onnx.proto's numbers by ONNX Runtime's names
_TYPES = {
    "tensor(float)": 1, "tensor(uint8)": 2, "tensor(int8)": 3, "tensor(uint16)": 4, "tensor(int16)": 5,
    "tensor(int32)": 6, "tensor(int64)": 7, "tensor(bool)": 9, "tensor(float16)": 10, "tensor(double)": 11,
    "tensor(uint32)": 12, "tensor(uint64)": 13, "tensor(bfloat16)": 16,
}  # fmt: skip


def gather_model(kinds: Sequence[Kind]) -> bytes:
    """A model for values of these kinds, one or more."""
    nodes, inputs, outputs = b"", _value(ROWS, ("tensor(int64)", 1)), b""
    for index, kind in enumerate(kinds):
        value, taken = f"v{index}", f"g{index}"
        node = _text(1, value) + _text(1, ROWS) + _text(2, taken) + _text(4, "Gather")  # axis 0 is the default
        nodes += _field(1, node)
        inputs += _value(value, kind)
        outputs += _value(taken, kind, field=12)
    graph = nodes + _text(2, "gather") + inputs + outputs
    opset = _number(2, OPSET)
    return _number(1, IR_VERSION) + _field(7, graph) + _field(8, opset)


def kind_of(spec: TensorSpec) -> Kind:
    """The kind of a model's input."""
    word = {"float32": "float", "float64": "double"}.get(spec.dtype, spec.dtype)
    return f"tensor({word})", len(spec.shape)


def _value(name: str, kind: Kind, field: int = 11) -> bytes:
    """An input or output of the graph, every size of it left open."""
    word, rank = kind
    if word not in _TYPES:
        raise ArtifactError(f"a value of type {word} cannot be compacted on a device; run on CPUExecutionProvider")
    shape = _field(2, rank * _field(1, b""))
    tensor = _number(1, _TYPES[word]) + (shape if rank else b"")
    return _field(field, _text(1, name) + _field(2, _field(1, tensor)))


def _text(field: int, text: str) -> bytes:
    return _field(field, text.encode())


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the least first; the eighth says that more follow."""
    made = bytearray()
    while number > 127:
        made.append(number & 127 | 128)
        number >>= 7
    return bytes((*made, number))
