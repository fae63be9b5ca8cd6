"""Shapes that are constants once a size that stays is written as one; the same values."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from offramp.compiler.emit.reshapes import keep_sizes
from offramp.compiler.emit.translate import Example, to_onnx


class Heads(nn.Module):
    """[B, L, 24] to four heads and back, as attention does; then shapes that move a size or multiply two."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(24, 24)

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = values
        rows, length, _ = x.shape
        query = self.query(x).view(rows, length, 4, 6).transpose(1, 2)
        back = (query @ query.transpose(2, 3) @ query).transpose(1, 2).reshape(rows, length, 24)
        moved = x.transpose(0, 1).reshape(rows, length, 24)
        flat = x.reshape(rows, length * 24).sum(1)
        return back, moved, flat


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (7, 2), (0, 3)])
def test_sizes_that_stay_are_constants_and_values_are_the_same(size: tuple[int, int]) -> None:
    module = Heads().eval()
    model = to_onnx(module, (Example("x", torch.zeros(3, 5, 24), (1,)),), ("back", "moved", "flat"))
    constant = {weight.name for weight in model.graph.initializer}
    fixed = {node.name: node.input[1] in constant for node in model.graph.node if node.op_type == "Reshape"}
    of = {node.output[0]: node for node in model.graph.node}
    assert of["back"].input[1] in constant
    assert of["moved"].input[1] not in constant
    assert Counter(fixed.values())[True] >= 2
    x = torch.rand(*size, 24)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = module(x)
    for given, wanted in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
        np.testing.assert_allclose(given, wanted.numpy(), rtol=1e-4, atol=1e-5)


def chain(parts: dict[str, list[int] | tuple[str, int]], argument: list[int | str]) -> onnx.ModelProto:
    """A `Reshape` of `x`, whose shape is a `Concat` of constants and of sizes of `x` or `other`."""
    nodes, weights = [], []
    for name, part in parts.items():
        if isinstance(part, list):
            weights.append(numpy_helper.from_array(np.array(part, np.int64), name))
        else:
            nodes.append(helper.make_node("Shape", [part[0]], [name], start=part[1], end=part[1] + 1))
    nodes.append(helper.make_node("Concat", list(parts), ["shape"], axis=0))
    nodes.append(helper.make_node("Reshape", ["x", "shape"], ["y"], allowzero=1))
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, argument),
        helper.make_tensor_value_info("other", TensorProto.FLOAT, ["batch", "length"]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "chain", inputs, [output], weights))


@pytest.mark.parametrize(
    ("parts", "argument", "shape"),
    [
        ({"b": ("x", 0), "c": [4, 6]}, ["batch", 24], [0, 4, 6]),
        ({"b": ("other", 0), "l": ("other", 1), "c": [-1]}, ["batch", "length", 4, 6], [0, 0, -1]),
        ({"b": ("other", 1), "c": [4, 6]}, ["batch", 24], None),  # another size
        ({"c": [4], "b": ("x", 0), "d": [6]}, ["batch", 24], None),  # at another place
        ({"b": ("x", 0), "c": [0]}, ["batch", 0], None),  # no elements
        ({"b": ("x", 0), "l": ("other", 1)}, ["batch"], None),  # more sizes than the argument has
        ({"b": ("x", 0), "c": [4, 6]}, [None, 24], None),  # not declared
    ],
)
def test_a_shape_is_constant_only_where_its_sizes_are_the_argument_s_own(
    parts: dict[str, list[int] | tuple[str, int]], argument: list[int | str], shape: list[int] | None
) -> None:
    model = chain(parts, argument)
    keep_sizes(model)
    reshape = model.graph.node[-1]
    if shape is None:
        assert reshape.input[1] == "shape"
        assert [attribute.i for attribute in reshape.attribute] == [1]
        return
    (weight,) = model.graph.initializer
    assert reshape.input[1] == weight.name
    assert numpy_helper.to_array(weight).tolist() == shape
    assert not reshape.attribute
    assert len(model.graph.node) == 1
