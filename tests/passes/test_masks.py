"""What a mask says of every query alike travels as one row, and what is always true is no part of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import Attention, captured, sentences, with_exits
from torch import nn

from offramp.compiler.emit import backbone_model, stage_models
from offramp.passes import Backbone, analyse, find_candidates

aten = torch.ops.aten
Queries = Callable[[torch.Tensor], torch.Tensor]  # positions [T] -> whether they may ask, [T]


class Asked(Attention):
    """Keys are those of the mask, queries those whose positions may ask."""

    def __init__(self, may_ask: Queries, spread: bool = True) -> None:
        super().__init__()
        self.may_ask, self.spread = may_ask, spread

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1]) + 0
        allowed = self.may_ask(positions)[None, None, :, None] & mask.bool()[:, None, None, :]
        if self.spread:
            allowed = allowed.expand(ids.shape[0], -1, ids.shape[1], ids.shape[1])
        return self.last(self.attended(ids, allowed).mean(1))


def ands(backbone: Backbone) -> int:
    return sum(node.target is aten.__and__.Tensor for node in backbone.graph.nodes)


ALWAYS: dict[str, Queries] = {
    "not negative": lambda at: at >= 0,
    "above minus one": lambda at: at > -1,
    "counted from two": lambda at: torch.arange(2, len(at) + 2) + 1 >= 3,
    "ones": lambda at: torch.ones_like(at, dtype=torch.bool),
    "ones and not negative": lambda at: at.new_ones(len(at), dtype=torch.bool) & (at >= 0),
}
SOMETIMES: dict[str, Queries] = {
    "from one on": lambda at: at >= 1,
    "positive": lambda at: at > 0,
    "taken down": lambda at: at + -1 >= 0,
    "counted from below": lambda at: torch.arange(-1, len(at) - 1) >= 0,
    "few": lambda at: at < 3,
    "every second": lambda at: (at % 2).bool(),
    "negative multiples": lambda at: at * -1 >= 0,
}


def left_of(model: Asked) -> int:
    """How many `and`s its backbone has, which answers as the model does."""
    backbone = captured(model, **sentences(8))
    given = sentences(6, seed=1)
    torch.testing.assert_close(backbone.graph_module(*given.values()), model(**given), rtol=0, atol=0)
    return ands(backbone)


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("queries", ALWAYS)
def test_what_is_always_true_is_left_out(queries: str, spread: bool) -> None:
    assert left_of(Asked(ALWAYS[queries], spread)) == 0


@pytest.mark.parametrize("queries", SOMETIMES)
def test_what_is_not_always_true_stays(queries: str) -> None:
    assert left_of(Asked(SOMETIMES[queries])) == 1


def test_a_size_that_nobody_asked_for_is_asked_of_the_side_that_has_it() -> None:
    class Squares(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            asked, there = torch.ones_like(ids, dtype=torch.bool)[:, :, None], (ids > 3)[:, None, :]
            return (asked & there).sum(1)[:, :4].float()

    ids = sentences(8)["ids"]
    backbone = captured(Squares, ids=ids)
    assert ands(backbone) == 0
    longer = torch.randint(0, 20, (3, 9), generator=torch.Generator().manual_seed(1))
    for given in (ids, longer):
        torch.testing.assert_close(backbone.graph_module(given), Squares()(given))


def test_masks_of_one_shape_are_one() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :3] * ((x > 0) & torch.ones_like(x, dtype=torch.bool) & (x < 9))[:, :3]

    backbone = captured(Twice)
    assert ands(backbone) == 1
    assert aten.expand.default not in [node.target for node in backbone.graph.nodes]
    x = torch.linspace(-10, 10, 12).reshape(2, 6)
    torch.testing.assert_close(backbone.graph_module(x), Twice()(x))


def test_a_mask_that_is_the_same_for_all_queries_travels_as_one_row() -> None:
    backbone = captured(Asked(ALWAYS["not negative"]), **sentences(8))
    places = [place for place in find_candidates(backbone).kept if place.side_inputs]
    assert places
    assert {place.side_bytes for place in places} == {5}, "a boolean a token"
    held = captured(Asked(SOMETIMES["from one on"]), **sentences(8))
    assert {place.side_bytes for place in find_candidates(held).kept if place.side_inputs} == {5 * 5}


@pytest.mark.parametrize("queries", [ALWAYS["not negative"], SOMETIMES["from one on"]])
def test_stages_answer_as_the_model_does(queries: Queries) -> None:
    model = Asked(queries)
    backbone = captured(model, **sentences(8))
    # Eight rows of seven tokens, where five were captured; one leaves nothing to attend to.
    ids = torch.randint(0, 20, (8, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.randint(0, 2, (8, 7), generator=torch.Generator().manual_seed(2))
    mask[3] = 0
    expected = torch.softmax(model(ids, mask), 1).detach().numpy()
    plain = onnxruntime.InferenceSession(backbone_model(backbone).proto, providers=["CPUExecutionProvider"])
    found = plain.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)

    cuts = [node.name for node in analyse(backbone).dominators if node.target is aten.add.Tensor]
    live = {"ids": ids.numpy(), "mask": mask.numpy()}
    rows = np.arange(8)
    for stage in stage_models(with_exits(backbone, cuts)):
        names = [value.name for value in stage.graph.output]
        session = onnxruntime.InferenceSession(stage.SerializeToString(), providers=["CPUExecutionProvider"])
        made = dict(zip(names, session.run(names, {i.name: live[i.name] for i in stage.graph.input}), strict=True))
        live = {name: value[1:] for name, value in (live | made).items()}
        rows = rows[1:]
    np.testing.assert_allclose(live["probabilities"], expected[rows], atol=1e-6)


def test_attention_looks_at_the_mask_before_it_was_spread_and_does_not_spread_it() -> None:
    sizes: dict[str, set[int]] = {}
    spread: dict[str, bool] = {}
    for name, queries in (("one", ALWAYS["not negative"]), ("each", SOMETIMES["from one on"])):
        backbone = captured(Asked(queries), **sentences(8))
        model = onnx.shape_inference.infer_shapes(onnx.load_from_string(backbone_model(backbone).proto))
        shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
        products = [node for node in model.graph.node if node.op_type == "ReduceMax"]
        sizes[name] = {shapes[node.input[0]][2].dim_value for node in products}
        spread[name] = any(node.op_type == "Expand" for node in model.graph.node)
    assert sizes["one"] == {1}
    assert not spread["one"]
    assert sizes["each"] != {1}
