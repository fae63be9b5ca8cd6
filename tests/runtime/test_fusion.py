"""What ONNX Runtime makes of a model on its own, and is kept from where it does not pay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from offramp.runtime.process import CPU, session_options, started

WIDTH = 8
SHAPE: list[str | int | None] = ["batch", "length", WIDTH]


def block(last: str) -> bytes:
    """What ends a part of a transformer's block: a residual sum that is normed, or a bias and its GELU."""
    norm = last == "LayerNormalization"
    weights = {"scale": np.ones(WIDTH, np.float32), "shift": np.zeros(WIDTH, np.float32)}
    nodes = [
        helper.make_node("Add", ["x", "y" if norm else "shift"], ["sum"]),
        helper.make_node(last, ["sum", "scale", "shift"] if norm else ["sum"], ["end"]),
    ]
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in ("x", "y")],
        [helper.make_tensor_value_info("end", TensorProto.FLOAT, SHAPE)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(("last", "fused"), [("LayerNormalization", "SkipLayerNormalization"), ("Gelu", "BiasGelu")])
@pytest.mark.parametrize("ours", [True, False])
def test_a_sum_and_what_is_made_of_it_stay_two_operators_in_our_sessions(
    tmp_path: Path, ours: bool, last: str, fused: str
) -> None:
    options = session_options(ort, 1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    if ours:
        started(ort, block(last), options, [CPU])
    else:
        ort.InferenceSession(block(last), options, providers=[CPU])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators == (["Add", last] if ours else [fused])
