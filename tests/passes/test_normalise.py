"""The passes that bring a captured graph into form, and the contract every pass is held to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from models import Attention, Chain, captured, rows, sentences
from torch import fx, nn

from offramp.compiler.emit import backbone_model
from offramp.passes import (
    NORMALISATION,
    Backbone,
    Pass,
    PassResult,
    RemoveAssertions,
    RemoveIdentities,
    ReshapeViews,
    node_flops,
    normalise,
)
from offramp.runtime.errors import PassError

aten = torch.ops.aten


def with_node(backbone: Backbone, target: Any, *more: object) -> Backbone:
    """The backbone with `target(scores, *more)` behind its scores."""
    graph = fx.Graph()
    scores = graph.graph_copy(backbone.graph, {})
    made = graph.call_function(target, (scores, *more))
    made.meta["val"] = target(scores.meta["val"], *more)
    graph.output(made)
    return replace(backbone, graph_module=fx.GraphModule(backbone.graph_module, graph))


def targets(backbone: Backbone) -> list[object]:
    return [node.target for node in backbone.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("target", "more"),
    [(aten.dropout.default, (0.5, False)), (aten.clone.default, ()), (aten.detach.default, ())],
)
def test_identities_are_dropped(target: object, more: tuple[object, ...]) -> None:
    plain = captured(Chain)
    result = RemoveIdentities()(with_node(plain, target, *more))
    assert result.modified
    assert targets(result.subject) == targets(plain)
    assert torch.equal(result.subject.graph_module(rows(3)), plain.graph_module(rows(3)))


def test_dropout_in_training_mode_is_no_identity() -> None:
    result = RemoveIdentities().call(with_node(captured(Chain), aten.dropout.default, 0.5, True))
    assert not result.modified
    assert targets(result.subject)[-1] == aten.dropout.default


def test_assertions_are_dropped() -> None:
    plain = captured(Chain)
    graph = fx.Graph()
    scores = graph.graph_copy(plain.graph, {})
    graph.call_function(torch._assert, (True, "never"))
    graph.output(scores)
    checked = replace(plain, graph_module=fx.GraphModule(plain.graph_module, graph))
    result = RemoveAssertions()(checked)
    assert result.modified
    assert targets(result.subject) == targets(plain)
    assert torch._assert in targets(checked), "a pass must not change its argument"


@pytest.mark.parametrize("view", [aten.view.default, aten._unsafe_view.default])
def test_views_become_reshapes(view: Any) -> None:
    plain = captured(Chain)
    result = ReshapeViews()(with_node(plain, view, [-1, 4]))
    assert result.modified
    assert targets(result.subject)[-1] == aten.reshape.default
    assert torch.equal(result.subject.graph_module(rows(3)), plain.graph_module(rows(3)))


def test_attention_answers_batches_its_views_were_not_traced_for() -> None:
    """For no rows, and for one, torch picks another attention kernel with other strides."""
    backbone = captured(Attention, **sentences(8))
    for count in (0, 1, 3):
        assert backbone.graph_module(*sentences(count).values()).shape == (count, 4)


class Windows(nn.Module):
    """As in Swin, rows are cut into windows: what tracing wrote down is a contiguous clone and a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = x.reshape(x.size(0), 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(x.size(0), 4, 4, 4)
        return self.last(self.mix(windows).mean((1, 2)))


def test_views_of_a_clone_that_is_gone() -> None:
    images = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    backbone = captured(Windows, x=images)
    assert aten.clone.default not in targets(backbone)
    assert node_flops(backbone.graph_module, backbone.batch_symbol)
    torch.manual_seed(0)
    torch.testing.assert_close(backbone.graph_module(images), Windows()(images))


def test_a_normal_graph_is_left_alone() -> None:
    backbone = captured(Chain)
    assert normalise(backbone) is backbone
    for step in NORMALISATION:
        assert not step(backbone).modified


class Squeezed(nn.Module):
    """A column of scores is squeezed, as PLBart does with its first decoder token."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.last = nn.Linear(6, 1), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x) + self.score(x).squeeze()[:, None]


class SqueezesScores(nn.Module):
    """Squeezes what is one, what is not, and from behind."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x[:, None].squeeze(1).squeeze(-1)).unsqueeze(2).squeeze(-1).squeeze(1)


def test_a_squeeze_of_what_is_not_one_is_none() -> None:
    backbone = captured(SqueezesScores, x=rows(3))
    assert not {aten.squeeze.default, aten.squeeze.dim} & {*targets(backbone)}
    model = onnxruntime.InferenceSession(backbone_model(backbone).proto, providers=["CPUExecutionProvider"])
    for size in (1, 3):
        x = rows(3)[:size]
        expected = backbone.graph_module(x).softmax(1).numpy()
        assert expected.shape == (size, 4)
        np.testing.assert_allclose(model.run(["probabilities"], {"x": x.numpy()})[0], expected, atol=1e-6)


def test_a_batch_of_one_row_is_not_squeezed_away() -> None:
    backbone = captured(Squeezed)
    assert aten.squeeze.default not in targets(backbone)
    x = rows(5)
    torch.testing.assert_close(backbone.graph_module(x[:1]), backbone.graph_module(x)[:1])


class Picky(Pass[Backbone, Backbone]):
    """Breaks whichever promise it is told to."""

    def __init__(self, broken: str) -> None:
        self.broken = broken

    def requires(self, subject: Backbone) -> list[str]:
        return ["the moon is not full"] if self.broken == "requires" else []

    def call(self, subject: Backbone) -> PassResult[Backbone]:
        if self.broken == "identity":
            return PassResult(replace(subject, name="another"), modified=False)
        return PassResult(subject, modified=False)

    def ensures(self, subject: Backbone) -> list[str]:
        return ["a node is blue"] if self.broken == "ensures" else []


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("requires", "Picky cannot run here: the moon is not full"),
        ("ensures", r"Picky broke its contract \(a bug in the pass\): a node is blue"),
        ("identity", "Picky says it changed nothing but returned another subject"),
    ],
)
def test_a_broken_promise_is_found_at_its_own_door(broken: str, says: str) -> None:
    with pytest.raises(PassError, match=says):
        Picky(broken)(captured(nn.Sequential(nn.Linear(6, 4)), x=rows(4)))


def test_a_kept_promise_passes_through() -> None:
    backbone = captured(Chain)
    assert Picky("")(backbone).subject is backbone
