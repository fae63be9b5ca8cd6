"""A stage's model whose head is always asked.

The bool that a stage reads to know whether its head is asked becomes a constant of its graph. ONNX Runtime then puts
the head in the place of the `If` around it, and the model is what CUDA graphs can be captured of: one without control
flow. The compiler's file stays as it is; its bytes are changed on the way into ONNX Runtime, with `wire`.

    graph.input        without the one called `ASK`
    graph.initializer  one more, called `ASK`: true
"""

from __future__ import annotations

from .engine import ModelBytes
from .errors import ArtifactError
from .execution import ASK
from .wire import field, fields, text, whole_number

# onnx.proto's numbers
_GRAPH = 7  # of a model
_INITIALIZER, _INPUT = 5, 11  # of a graph
_NAME = 1  # of an input
_TYPE, _TENSOR_NAME, _RAW, _BOOL = 2, 8, 9, 9  # of a tensor: its type, its name, its bytes; and the type


def always_asked(model: ModelBytes, name: str) -> ModelBytes:
    """The same model; one that does not ask whether to is returned as it is.

    Raises `ArtifactError` for bytes that are no model; `name` is what it calls them.
    """
    try:
        proto = b"".join(
            field(_GRAPH, _answering(content)) if number == _GRAPH else bytes(whole)
            for number, content, whole in fields(memoryview(model.proto))
        )
    except ValueError as error:
        raise ArtifactError(f"{name}: is no ONNX model ({error}); compile the model again") from error
    return ModelBytes(proto, model.external)


def _answering(graph: memoryview) -> bytes:
    asks = False
    kept = []
    for number, content, whole in fields(graph):
        if number == _INPUT and _name_of(content) == ASK:
            asks = True
        else:
            kept.append(whole)
    yes = whole_number(_TYPE, _BOOL) + text(_TENSOR_NAME, ASK) + field(_RAW, b"\x01")
    return b"".join([*kept, field(_INITIALIZER, yes)] if asks else kept)


def _name_of(value: memoryview) -> str:
    return next((bytes(content).decode() for number, content, _ in fields(value) if number == _NAME), "")
