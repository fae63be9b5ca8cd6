"""Shortcuts of convolutional stages: in blocks where a sum needs them so, and the same answers to the bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from models import captured
from torch import nn
from torch.nn import functional as F

from offramp.compiler.emit import backbone_model, stage_models
from offramp.compiler.emit.layout import in_blocks
from offramp.passes import Backbone, ExitPlan, ExitProgram, PlannedExit, build_program

SIZE = 8


class Block(nn.Module):
    """Two convolutions and a shortcut, which may come out of a padding."""

    def __init__(self, entering: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(entering, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.more = nn.BatchNorm2d(width), width - entering

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.second(F.relu(self.norm(self.first(x))))
        return F.relu(found + (F.pad(x, (0, 0, 0, 0, 0, self.more)) if self.more else x))


class Maps(nn.Module):
    """A stem and three blocks."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width, width), Block(width, width), Block(width, wider), Block(wider, wider))
        self.last = nn.Linear(wider, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def backbone_of(model: nn.Module) -> Backbone:
    torch.manual_seed(0)
    return captured(model.eval(), x=torch.rand(4, 3, SIZE, SIZE))


def program_of(width: int, wider: int) -> ExitProgram:
    """One exit behind the stem."""
    backbone = backbone_of(Maps(width, wider))
    cut = next(node.name for node in backbone.graph.nodes if node.target == torch.ops.aten.relu.default)
    heads = {cut: nn.Sequential(nn.Flatten(), nn.Linear(width * SIZE * SIZE, 4))}
    return build_program(backbone, ExitPlan((PlannedExit(cut, 1.0, 0.5),)), heads)


def pools(model: onnx.ModelProto) -> list[str]:
    return [node.input[0] for node in model.graph.node if node.op_type == "AveragePool"]


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, feed)
    return found


def test_only_shortcuts_that_are_not_in_blocks_are_brought_in() -> None:
    first, second = stage_models(program_of(16, 32))
    assert pools(first) == []
    (shortcut,) = pools(second)
    assert shortcut == second.graph.input[0].name, "what the stage before made"
    readers = Counter(name for node in second.graph.node for name in node.input)
    assert readers[shortcut] == 1, "all others read it from behind the mean"


@pytest.mark.parametrize(("width", "wider"), [(8, 8), (24, 24), (20, 24)])
def test_maps_that_fill_no_blocks_are_left_alone(width: int, wider: int) -> None:
    assert [pools(model) for model in stage_models(program_of(width, wider))] == [[], []]


def test_stages_that_will_be_converted_are_left_alone() -> None:
    assert [pools(model) for model in stage_models(program_of(16, 32), rewritten=False)] == [[], []]


def test_the_same_answers_as_without() -> None:
    program = program_of(16, 32)
    rows = {"x": torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).numpy()}
    expected = program.all_exits(torch.from_numpy(rows["x"])).detach().numpy()
    for blocks in (True, False):
        first, second = stage_models(program, rewritten=blocks)
        cut, early, _ = run(first, rows)
        late, _ = run(second, {second.graph.input[0].name: cut})
        np.testing.assert_allclose(np.stack([early, late]), expected, atol=1e-6)


def test_the_whole_model_may_be_laid_out_so_too() -> None:
    backbone = backbone_of(Maps(16, 32))
    rows = {"x": torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).numpy()}
    plain, laid = (onnx.load_from_string(backbone_model(backbone, rewritten=blocks).proto) for blocks in (False, True))
    assert pools(plain) == []
    assert pools(laid) == [], "no stage came before"
    assert [node.op_type for model in (plain, laid) for node in model.graph.node].count("Pad") == 1
    np.testing.assert_allclose(run(laid, rows)[0], run(plain, rows)[0], atol=1e-6)


class Bordered(nn.Module):
    """A smaller map as the shortcut, with a border around it."""

    def __init__(self, border: float) -> None:
        super().__init__()
        self.border = border
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        small = F.max_pool2d(x, 2) - 3.0
        return self.last(F.relu(self.second(x) + F.pad(small, (2, 2, 2, 2), value=self.border)).mean((2, 3)))


@pytest.mark.parametrize("border", [0.0, 1.5])
def test_a_border_is_not_merged_into_the_mean_behind_it(border: float) -> None:
    model = Bordered(border)
    laid = onnx.load_from_string(backbone_model(backbone_of(model), rewritten=True).proto)
    assert len(pools(laid)) == 1
    rows = torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.softmax(model(rows), 1).numpy()
    np.testing.assert_allclose(run(laid, {"x": rows.numpy()})[0], expected, atol=1e-6)


class OtherSums(nn.Module):
    """Sums of maps that are not two maps of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.convolution(x)
        found = found + found
        found = found + found.mean((2, 3), keepdim=True)
        found = torch.add(found, F.pad(found, (1, 1, 1, 1))[:, :, 1:-1, 1:-1], alpha=2)
        return self.last((found + 1.0).mean((2, 3)))


def test_other_sums_are_left_alone() -> None:
    backbone = backbone_of(OtherSums())
    before = [node.target for node in backbone.graph.nodes]
    assert [node.target for node in in_blocks(backbone.graph_module).graph.nodes] == before


def test_a_shortcut_that_is_handed_on_is_handed_on_as_it_came() -> None:
    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.convolution(x) + x, x

    x = torch.randn(2, 16, SIZE, SIZE)
    module = torch.export.export(Passing(), (x,)).run_decompositions({}).module()
    assert isinstance(module, torch.fx.GraphModule)
    laid = in_blocks(module)
    output = next(iter(reversed(laid.graph.nodes)))
    assert output.args[0][1].op == "placeholder"
    assert sum(node.target == torch.ops.aten.avg_pool2d.default for node in laid.graph.nodes) == 1
    torch.testing.assert_close(laid(x), module(x), rtol=0, atol=0)


def test_onnxruntime_makes_every_sum_a_part_of_its_convolution(tmp_path: Path) -> None:
    left = []
    for blocks in (True, False):
        _, second = stage_models(program_of(16, 32), rewritten=blocks)
        options = ort.SessionOptions()
        options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimised.onnx")
        ort.InferenceSession(second.SerializeToString(), options, providers=["CPUExecutionProvider"])
        left.append(Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node))
    with_means, without = left
    if "ReorderInput" not in without:
        pytest.skip("ONNX Runtime computes no convolution in blocks on this processor")
    assert without["Add"] == 4
    assert with_means["Add"] == with_means["Relu"] == 0
    assert with_means["ReorderInput"] < without["ReorderInput"]
