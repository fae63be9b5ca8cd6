"""The ONNX model that takes rows of values: compaction, for values that stay on a device.

    rows [n] int64, v0 [B, ...], v1 [B, ...], ...   ->   g0 [n, ...], g1 [n, ...], ...

One `Gather` along dimension 0 per value, written by hand (see `wire`) with the field numbers of onnx.proto.

Refused: values that are no tensors of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from .errors import ArtifactError
from .manifest import TensorSpec
from .wire import field, text, whole_number

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
        node = text(1, value) + text(1, ROWS) + text(2, taken) + text(4, "Gather")  # axis 0 is the default
        nodes += field(1, node)
        inputs += _value(value, kind)
        outputs += _value(taken, kind, at=12)
    graph = nodes + text(2, "gather") + inputs + outputs
    opset = whole_number(2, OPSET)
    return whole_number(1, IR_VERSION) + field(7, graph) + field(8, opset)


def kind_of(spec: TensorSpec) -> Kind:
    """The kind of a model's input."""
    word = {"float32": "float", "float64": "double"}.get(spec.dtype, spec.dtype)
    return f"tensor({word})", len(spec.shape)


def _value(name: str, kind: Kind, at: int = 11) -> bytes:
    """An input or output of the graph, every size of it left open."""
    word, rank = kind
    if word not in _TYPES:
        raise ArtifactError(f"a value of type {word} cannot be compacted on a device; run on CPUExecutionProvider")
    shape = field(2, rank * field(1, b""))
    tensor = whole_number(1, _TYPES[word]) + (shape if rank else b"")
    return field(at, text(1, name) + field(2, field(1, tensor)))
