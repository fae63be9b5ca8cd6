"""Attention's linear layers become one where they read the same, and what they give stays what it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from models import captured, with_exits
from torch import nn
from torch.nn import functional as F

from offramp.compiler.emit import backbone_model, stage_models
from offramp.compiler.emit.projections import project_together
from offramp.passes import ExitProgram
from offramp.passes.backbone import copy_graph_module

WIDTH, HEADS, TOKENS = 8, 2, 5


class Block(nn.Module):
    """Attention over tokens `[B, T, 8]`; subclasses say how queries, keys and values are made."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return x + self.attended(self.query(x), self.key(x), self.value(x))

    def attended(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts = (part.view(*part.shape[:2], -1, WIDTH // HEADS).transpose(1, 2) for part in (query, key, value))
        grouped = query.shape != key.shape and query.shape[1] == key.shape[1]
        seen = F.scaled_dot_product_attention(*parts, enable_gqa=grouped)
        return seen.transpose(1, 2).reshape(query.shape)


class Biased(Block):
    """As in Whisper, keys have no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)


class Unbiased(Block):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))


class Across(Block):
    """Keys and values of something else."""

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return x + self.attended(self.query(x), self.key(other), self.value(other))


class Normed(Block):
    """Queries and keys are normed and turned before they meet."""

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        query, key = (F.layer_norm(layer(x), (WIDTH,)) for layer in (self.query, self.key))
        turned = [part * 0.5 + torch.cat([-part[..., 4:], part[..., :4]], -1) for part in (query, key)]
        return x + self.attended(*turned, self.value(x))


class Grouped(Block):
    """Fewer heads of keys and values than of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = (nn.Linear(WIDTH, WIDTH // HEADS) for _ in range(2))


class Alike(Block):
    """One layer makes queries and keys."""

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return x + self.attended(self.query(x), self.query(x), self.value(x))


class Alone(Block):
    """Each reads something else."""

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return x + self.attended(self.query(x), self.key(other), self.value(x * other))


class Named(Block):
    """Weights of the module itself."""

    def __init__(self) -> None:
        super().__init__()
        del self.query, self.key, self.value
        self.to_q, self.to_k, self.to_v = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(3))

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return x + self.attended(*(F.linear(x, weight) for weight in (self.to_q, self.to_k, self.to_v)))


class Tokens(nn.Module):
    """Blocks, then the mean over tokens."""

    def __init__(self, *blocks: Block) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(blocks), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, other)
        return self.last(x.mean(1))


JOINED: dict[type[Block], list[str]] = {
    Block: ["layers.0.query_key_value.bias", "layers.0.query_key_value.weight"],
    Biased: ["layers.0.query_key_value.bias", "layers.0.query_key_value.weight"],
    Unbiased: ["layers.0.query_key_value.weight"],
    Across: ["layers.0.key_value.bias", "layers.0.key_value.weight", "layers.0.query.bias", "layers.0.query.weight"],
    Normed: ["layers.0.query_key_value.bias", "layers.0.query_key_value.weight"],
    Grouped: ["layers.0.query_key_value.bias", "layers.0.query_key_value.weight"],
    Alike: ["layers.0.query_query_value.bias", "layers.0.query_query_value.weight"],
    Named: ["layers.0.to_q_to_k_to_v.weight"],
}


def inputs(count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(count, TOKENS, WIDTH, generator=generator) for name in ("x", "other")}


def two_stages() -> ExitProgram:
    """A block in each."""
    backbone = captured(lambda: Tokens(Block(), Block()), **inputs())
    first = next(node for node in backbone.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    return with_exits(backbone, [first.name])


def answered(model: onnx.ModelProto | bytes, given: dict[str, torch.Tensor]) -> np.ndarray:
    proto = model if isinstance(model, bytes) else model.SerializeToString()
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    probabilities: np.ndarray = session.run(
        ["probabilities"], {name: value.numpy() for name, value in given.items() if name in wanted}
    )[0]
    return probabilities


def weights_read(module: torch.fx.GraphModule) -> list[str]:
    return sorted({str(node.target) for node in module.graph.find_nodes(op="get_attr")} - {"last.weight", "last.bias"})


@pytest.mark.parametrize("kind", JOINED, ids=lambda kind: kind.__name__)
def test_layers_that_read_the_same_become_one(kind: Callable[[], Block]) -> None:
    backbone = captured(lambda: Tokens(kind()), **inputs())
    joined = copy_graph_module(backbone.graph_module)
    project_together(joined)
    assert weights_read(joined) == JOINED[kind]
    given = inputs()
    torch.testing.assert_close(joined(*given.values()), backbone.graph_module(*given.values()))


def test_layers_that_read_different_things_stay() -> None:
    module = captured(lambda: Tokens(Alone()), **inputs()).graph_module
    after = copy_graph_module(module)
    project_together(after)
    assert weights_read(after) == weights_read(module)


def test_layers_outside_attention_stay() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.last = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(F.silu(self.gate(x)) * self.up(x))

    module = captured(Gated).graph_module
    after = copy_graph_module(module)
    project_together(after)
    assert weights_read(after) == weights_read(module)


def test_the_module_it_was_made_from_is_as_it_was() -> None:
    module = captured(lambda: Tokens(Block()), **inputs()).graph_module
    before, names = str(module.graph), sorted(module.state_dict())
    project_together(copy_graph_module(module))
    assert (str(module.graph), sorted(module.state_dict())) == (before, names)


def test_layers_that_are_called_twice_have_their_weights_joined_once() -> None:
    block = Block()
    module = captured(lambda: Tokens(block, block), **inputs()).graph_module
    project_together(module)
    assert [name.partition(".query_key_value")[2] for name in weights_read(module)] == [".bias", ".weight"]


@pytest.mark.parametrize("kind", JOINED, ids=lambda kind: kind.__name__)
def test_onnxruntime_answers_the_same(kind: Callable[[], Block]) -> None:
    backbone = captured(lambda: Tokens(kind()), **inputs())
    plain, rewritten = (backbone_model(backbone, rewritten=rewritten).proto for rewritten in (False, True))
    given = inputs(7)
    np.testing.assert_allclose(answered(rewritten, given), answered(plain, given), rtol=1e-5, atol=1e-6)
    products = [
        sum(n.op_type in ("MatMul", "Gemm") for n in onnx.load_from_string(m).graph.node) for m in (plain, rewritten)
    ]
    assert products[1] < products[0]


def test_stages_have_them_under_a_name_that_tells_whose_they_are() -> None:
    program = two_stages()
    names = [{weight.name for weight in model.graph.initializer} for model in stage_models(program)]
    for index, held in enumerate(names):
        place = f"layers.{index}.query_key_value"
        assert {f"{place}.weight.T", f"{place}.bias"} <= held
        assert not any(f"layers.{index}.{one}.weight" in name for name in held for one in ("query", "key", "value"))
    nodes = [
        node.name for model in stage_models(program) for node in model.graph.node if "query_key_value" in node.name
    ]
    assert nodes == [f"layers.{index}.query_key_value/{op}" for index in range(2) for op in ("MatMul", "Add")]


def test_stages_that_are_to_be_converted_keep_them_apart() -> None:
    first, _ = stage_models(two_stages(), rewritten=False)
    assert "layers.0.query.bias" in {weight.name for weight in first.graph.initializer}
