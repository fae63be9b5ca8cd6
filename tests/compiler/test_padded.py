"""Shortcuts of slices and channels of zeros: convolutions where that is cheaper, and the same maps to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from models import captured
from torch import nn
from torch.nn import functional as F

from offramp.compiler.emit import backbone_model
from offramp.compiler.emit.padded import padded_as_convolutions
from offramp.passes.backbone import copy_graph_module

SIZE = 10
aten = torch.ops.aten
Made = Callable[[torch.Tensor], torch.Tensor]

PADDED: dict[str, tuple[Made, list[int]]] = {
    "as CIFAR's ResNets": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)), [2, 2]),
    "in front": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 16, 0)), [2, 2]),
    "behind, whole": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 32)), [1, 1]),
    "one direction": (lambda x: F.pad(x[:, :, :, ::3], (0, 0, 0, 0, 16, 16)), [1, 3]),
    "twice": (lambda x: F.pad(x[:, :, ::2, ::2][:, :, ::2], (0, 0, 0, 0, 8, 8)), [4, 2]),
    "sliced from behind": (lambda x: F.pad(x[:, :, 1:][:, :, ::2], (0, 0, 0, 0, 8, 8)), [2, 1]),
}
OTHERS: dict[str, Made] = {
    "borders": lambda x: F.pad(x[:, :, ::2, ::2], (1, 1, 0, 0, 8, 8)),
    "ones": lambda x: F.pad(x, (0, 0, 0, 0, 8, 8), value=1.0),
    "reflected": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "fewer channels": lambda x: F.pad(x, (0, 0, 0, 0, 16, -16)),
    "no blocks": lambda x: F.pad(x, (0, 0, 0, 0, 4, 4)),
    "rows": lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)),
    "too many": lambda x: F.pad(torch.cat([x] * 8, 1), (0, 0, 0, 0, 0, 128)),
    "doubles": lambda x: F.pad(x.double(), (0, 0, 0, 0, 8, 8)),
}


class Maps(nn.Module):
    """A map `[B, 16, H, W]`, and what a test makes of it."""

    def __init__(self, make: Made) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.make(F.relu(x))


def rows() -> torch.Tensor:
    return torch.randn(3, 16, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def graph_of(make: Made) -> torch.fx.GraphModule:
    module = torch.export.export(Maps(make), (rows(),)).run_decompositions({}).module()
    assert isinstance(module, torch.fx.GraphModule)
    return copy_graph_module(module)


@pytest.mark.parametrize(("make", "strides"), PADDED.values(), ids=PADDED)
def test_the_same_map_to_the_bit(make: Made, strides: list[int]) -> None:
    module = graph_of(make)
    padded_as_convolutions(module)
    module.graph.lint()
    (convolution,) = module.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    assert convolution.args[3] == strides
    assert not module.graph.find_nodes(op="call_function", target=aten.pad.default)
    assert convolution.meta["val"].shape == make(rows()).shape
    torch.testing.assert_close(module(rows())[0], make(F.relu(rows())), rtol=0, atol=0)


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_paddings_are_left_alone(make: Made) -> None:
    module = graph_of(make)
    before = str(module.graph)
    padded_as_convolutions(module)
    assert str(module.graph) == before


class Block(nn.Module):
    """The first of a layer: half the pixels, twice the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = nn.Conv2d(16, 32, 3, 2, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        return self.last(F.relu(self.second(F.relu(self.first(x))) + shortcut).mean((2, 3)))


def test_onnxruntime_computes_them_in_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = captured(Block().eval(), x=torch.rand(4, 3, SIZE, SIZE))
    feed = {"x": torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).numpy()}
    said, left = [], []
    for blocks in (False, True):
        options = ort.SessionOptions()
        options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimised.onnx")
        model = backbone_model(backbone, rewritten=blocks).proto
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        said.append(session.run(None, feed)[0])
        left.append(Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node))
    np.testing.assert_allclose(*said, atol=1e-6)
    plain, laid = left
    assert (plain["Pad"], laid["Pad"], laid["Slice"]) == (1, 0, 0)
    if "ReorderOutput" not in plain:
        pytest.skip("ONNX Runtime computes no convolution in blocks on this processor")
    assert plain["ReorderOutput"] > laid["ReorderOutput"] == 1
    assert laid["ReorderInput"] == 0
