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


def normed_sum() -> bytes:
    """`[batch, length, 8]` twice, added and normed: what stands at the end of a transformer's block."""
    shape = ["batch", "length", WIDTH]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale", "shift"], ["normed"], axis=-1),
    ]
    weights = {"scale": np.ones(WIDTH, np.float32), "shift": np.zeros(WIDTH, np.float32)}
    graph = helper.make_graph(
        nodes,
        "block",
        inputs,
        [helper.make_tensor_value_info("normed", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("ours", [True, False])
def test_a_sum_and_its_norm_stay_two_operators_in_our_sessions(tmp_path: Path, ours: bool) -> None:
    options = session_options(ort, 1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    if ours:
        started(ort, normed_sum(), options, [CPU])
    else:
        ort.InferenceSession(normed_sum(), options, providers=[CPU])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators == (["Add", "LayerNormalization"] if ours else ["SkipLayerNormalization"])
