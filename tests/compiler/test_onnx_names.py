"""What a person sees who opens an emitted file in a viewer: module paths, the weights' own names, the manifest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from models import Attention, Compiled, Shared, captured, rows, sentences, with_exits
from torch import nn
from torch.nn import functional as F

from offramp.compiler import emit
from offramp.passes import Limits, find_candidates


class Block(nn.Module):
    """A convolution with a batch norm that has something to fold."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.bn1.running_mean = torch.rand(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn1(self.conv1(x)))


class Normed(nn.Module):
    """Two layers of such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(Block(1), Block(4))
        self.layer2 = nn.Sequential(Block(4), Block(4))
        self.classify = nn.Linear(4, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classify(self.layer2(self.layer1(image)).mean((2, 3)))


def files(kind: type, **inputs: torch.Tensor) -> dict[str, onnx.ModelProto]:
    backbone = captured(kind, **inputs)
    found = find_candidates(backbone, limits=Limits(least_left=0.0)).kept[:1]
    program = with_exits(backbone, [c.name for c in found], [0.4])
    return {name: onnx.load_from_string(data) for name, data in emit(program)[1].items()}


@pytest.fixture(scope="module")
def normed() -> dict[str, onnx.ModelProto]:
    return files(Normed, image=torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)))


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for graph in graphs(model.graph) for node in graph.node]


def weights(model: onnx.ModelProto) -> list[str]:
    return [tensor.name for graph in graphs(model.graph) for tensor in graph.initializer]


def test_nodes_are_called_by_module_path_and_operator(normed: dict[str, onnx.ModelProto]) -> None:
    stages = [normed["stages/0.onnx"], normed["stages/1.onnx"]]
    names = [node.name for model in stages for node in nodes(model)]
    for path in ("layer1.0", "layer1.1", "layer2.0", "layer2.1"):
        assert f"{path}.conv1/Conv" in names, "a folded batch norm leaves the convolution its name"
        assert f"{path}/Relu" in names
    assert names[-3:] == ["classify/Gemm", "output/Softmax", "output/ReduceMax"]
    assert "exits.0.head.classify/Gemm" in names
    assert "exits.0/Softmax" in names
    assert not any("segment" in name or "node_" in name for name in names)


def test_sizes_are_called_as_the_graph_that_asks_for_them() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.last = nn.Embedding(20, 8), nn.Linear(8, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            places = torch.arange(ids.shape[1]) / ids.shape[1]
            return self.last(self.embed(ids).relu().mul(places[:, None]).sum(1))

    model = files(Counted, ids=sentences(8)["ids"])["stages/0.onnx"]
    shapes = [node.name for node in model.graph.node if node.op_type == "Shape"]
    assert shapes == ["exits.0/Shape"]


def test_weights_are_called_as_in_the_state_dict(normed: dict[str, onnx.ModelProto]) -> None:
    names = [*weights(normed["stages/0.onnx"]), *weights(normed["stages/1.onnx"])]
    for path in ("layer1.0", "layer1.1", "layer2.0", "layer2.1"):
        assert f"{path}.conv1.weight" in names
        assert f"{path}.conv1.bias" in names, "what the folded batch norm adds"
    assert "classify.weight" in names
    assert "exits.0.head.classify.bias" in names
    assert not any(name.startswith("val_") for name in names)


def test_the_single_file_keeps_the_stages_names(normed: dict[str, onnx.ModelProto]) -> None:
    whole = normed["model.onnx"]
    staged = [normed["stages/0.onnx"], normed["stages/1.onnx"]]
    assert {node.name for model in staged for node in nodes(model)} <= {node.name for node in nodes(whole)}
    assert {name for model in staged for name in weights(model)} <= set(weights(whole))


def test_a_weight_the_exporter_transposed_is_known_again() -> None:
    made = files(Attention, **sentences(8))
    names = [name for file in ("stages/0.onnx", "stages/1.onnx") for name in weights(made[file])]
    assert {"embed.weight", "mix.0.weight.T", "mix.0.bias", "mix.1.weight.T", "last.weight"} <= set(names)


@pytest.mark.parametrize(("kind", "inputs"), [(Attention, sentences(8)), (Shared, {"x": rows(8)})])
def test_no_name_is_given_twice(kind: type, inputs: dict[str, torch.Tensor]) -> None:
    for model in files(kind, **inputs).values():
        names = [node.name for node in nodes(model)]
        assert len(set(names)) == len(names)
        made = [*weights(model), *(value for node in nodes(model) for value in node.output)]
        assert len(set(made)) == len(made)


def test_every_file_passes_strict_shape_inference(normed: dict[str, onnx.ModelProto]) -> None:
    for model in normed.values():
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        shapes = {v.name: v.type.tensor_type for graph in graphs(inferred.graph) for v in graph.value_info}
        for node in nodes(inferred):
            if node.op_type in ("Conv", "Gemm", "Relu", "Softmax") and node.output[0] in shapes:
                assert shapes[node.output[0]].HasField("shape")
    branch = next(g for g in graphs(inferred_whole(normed["model.onnx"])) if g.name == "stage_1/branch")
    known = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in branch.value_info}
    assert known["layer2.1.conv1/Conv"][1:] == [4, 6, 6], "inside the branch too"


def inferred_whole(model: onnx.ModelProto) -> onnx.GraphProto:
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph


def read_manifest(path: Path) -> dict[str, object]:
    """What an artifact's ONNX file says of itself: all a deployment without offramp needs to know."""
    session = ort.InferenceSession(path)
    return dict(json.loads(session.get_modelmeta().custom_metadata_map["offramp.manifest"]))


def test_every_file_carries_the_manifest(compiled: Compiled) -> None:
    expected = json.loads(json.dumps(dataclasses.asdict(compiled.manifest)))
    later = {"stages", "evaluation", "files", "measured"}
    for name in compiled.manifest.files:
        if name.endswith(".onnx"):
            found = read_manifest(compiled.path / name)
            assert found == {key: value for key, value in expected.items() if key not in later}
    assert found["backbone"]["fingerprint"] == compiled.manifest.backbone.fingerprint  # type: ignore[index]


def test_a_stage_says_which_it_is(compiled: Compiled) -> None:
    for index, spec in enumerate(compiled.manifest.stages):
        notes = {p.key: p.value for p in onnx.load(compiled.path / spec.file).metadata_props}
        stage = json.loads(notes["offramp.stage"])
        assert (stage.pop("index"), stage.pop("count")) == (index, len(compiled.manifest.stages))
        assert stage == json.loads(json.dumps(dataclasses.asdict(spec)))
    whole = {p.key for p in onnx.load(compiled.path / "model.onnx").metadata_props}
    assert whole == {"offramp.manifest"}


def test_the_names_of_a_compiled_artifact(compiled: Compiled) -> None:
    """The demo's network, through the whole of `compile`."""
    names = {node.name for node in nodes(onnx.load(compiled.path / "model.onnx"))}
    assert {"stem/Conv", "blocks.0.conv1/Conv", "blocks.5.conv2/Conv", "classify/Gemm"} <= names
    assert any(name.startswith("exits.0.head.features.") and name.endswith("/Conv") for name in names)
    assert np.mean([name.startswith("stage_") for name in names]) < 0.5, "most of the file is the model"
