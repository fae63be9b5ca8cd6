"""Outputs: the scores are found or named, one score becomes two classes, and what is unclear is refused."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import Chain, rows
from torch.export import Dim, export
from torch.utils import _pytree as pytree

from offramp.compiler import capture, load_model
from offramp.passes import Backbone
from offramp.passes.backbone import probabilities
from offramp.runtime.errors import ModelError, UsageError


class Ends(Chain):
    """Scores turned into something else."""

    def __init__(self, turn: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.turn = turn

    def forward(self, x: torch.Tensor) -> Any:
        return self.turn(super().forward(x))


@dataclasses.dataclass
class Plain:
    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden: torch.Tensor


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class ModelOutput(OrderedDict[str, Any]):
    """As in transformers: a dict of the fields that are not None, registered without key paths."""


pytree.register_pytree_node(
    ModelOutput,
    lambda output: (list(output.values()), list(output.keys())),
    lambda values, keys: ModelOutput(zip(keys, values, strict=True)),
    serialized_type_name="tests.ModelOutput",
)


class Unknown:
    """What torch.export cannot take apart, as a cache of keys and values."""


def taken(turn: Callable[[torch.Tensor], Any], **said: Any) -> Backbone:
    torch.manual_seed(0)
    return capture(Ends(turn), {"x": rows(8)}, **said)


def scores(backbone: Backbone) -> torch.Tensor:
    result: torch.Tensor = backbone.graph_module(rows(5, seed=1))
    return result


def chain() -> torch.Tensor:
    """What the scores are before anything is done to them."""
    torch.manual_seed(0)
    result: torch.Tensor = Chain()(rows(5, seed=1))
    return result.detach()


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (lambda s: {"hidden": s + 1, "logits": s}, {}),
        (lambda s: ModelOutput(logits=s, hidden=(s + 1, s + 2)), {}),
        (lambda s: Plain(None, s, s + 1), {}),
        (lambda s: {"logits": s, "cache": Unknown()}, {}),
        (lambda s: (s, s[:, None], s.argmax(1)), {}),
        (lambda s: [s[..., None], s], {}),
        (lambda s: (None, s + 1, s), {"output": 2}),
        (lambda s: (s, s + 1), {"output": "0"}),
        (lambda s: {"logits": s + 1, "aux": s}, {"output": "aux"}),
        (lambda s: {"all": [s + 1, {"last": s}]}, {"output": "all.1.last"}),
        (lambda s: Pair(s + 1, s), {"output": "second"}),
    ],
)
def test_the_scores_are_found_or_named(turn: Callable[[torch.Tensor], Any], said: dict[str, Any]) -> None:
    backbone = taken(turn, **said)
    torch.testing.assert_close(scores(backbone), chain())
    assert (backbone.classes, backbone.scores) == (4, "logits")


def test_what_is_not_the_scores_is_not_computed() -> None:
    backbone = taken(lambda s: {"logits": s, "other": torch.linalg.norm(s, dim=1)})
    assert not [n for n in backbone.graph.nodes if "norm" in str(n.target)]


@pytest.mark.parametrize(
    ("turn", "said", "says"),
    [
        (lambda s: (s, s + 1), {}, r"returns 0 float32 \[batch, 4\], 1 float32 \[batch, 4\]: 2 of them may be"),
        (lambda s: {"a": s[None], "b": s.argmax(1)}, {}, r"a float32 \[1, batch, 4\], b int64 \[batch\]: none of"),
        (lambda s: {"a": s, "b": s}, {"output": "c"}, r"has no output 'c'; it returns a float32 \[batch, 4\], b"),
        (lambda s: (s, s), {"output": 2}, "has no output 2; it returns 0 float32"),
        (lambda s: Unknown(), {}, "returns no tensor at all"),
        (lambda s: {"a": s, "b": s.argmax(1)}, {"output": "b"}, r"returns torch.int64 \[batch\], not one score"),
    ],
)
def test_unclear_outputs_are_listed(turn: Callable[[torch.Tensor], Any], said: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        taken(turn, **said)


def test_a_saved_program_names_its_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Ends(lambda s: ModelOutput(hidden=s + 1, logits=s, aux=s + 2))
    program = export(model.eval(), (rows(4),), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = load_model(str(tmp_path / "model.pt2"))
    torch.testing.assert_close(scores(capture(loaded, {"x": rows(4)})), chain())
    torch.testing.assert_close(scores(capture(loaded, {"x": rows(4)}, output="aux")), chain() + 2)


@pytest.mark.parametrize("shape", [lambda s: s[:, 0], lambda s: s[:, :1], lambda s: s[:, 0].half()])
def test_a_raw_score_becomes_two_classes(shape: Callable[[torch.Tensor], torch.Tensor]) -> None:
    said: list[str] = []
    backbone = taken(shape, say=said.append)
    assert (backbone.classes, backbone.scores) == (2, "logits")
    assert scores(backbone).dtype == torch.float32
    sure = probabilities(scores(backbone), backbone.scores, 1.0)[:, 1]
    torch.testing.assert_close(sure, torch.sigmoid(chain()[:, 0]), atol=1e-3, rtol=0)
    assert len(said) == 1 and "one score per row: taken for two classes" in said[0]


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (lambda s: torch.sigmoid(s[:, :1]), {}),
        (lambda s: torch.sigmoid(s)[:, 0].float(), {}),
        (lambda s: 0.5 + 0.5 * torch.tanh(s[:, 0] / 2), {"scores": "probabilities"}),
    ],
)
def test_a_probability_becomes_two_classes(turn: Callable[[torch.Tensor], Any], said: dict[str, Any]) -> None:
    backbone = taken(turn, **said)
    assert (backbone.classes, backbone.scores) == (2, "probabilities")
    sure = torch.sigmoid(chain()[:, 0])
    torch.testing.assert_close(scores(backbone), torch.stack([1 - sure, sure], 1))


def test_every_value_of_the_rewritten_graph_is_recorded() -> None:
    for turn in (lambda s: s[:, 0].half(), lambda s: torch.sigmoid(s[:, 0])):
        node = taken(turn).score_node
        assert list(node.meta["val"].shape[1:]) == [2]
        assert node.meta["val"].dtype == torch.float32


@pytest.mark.parametrize(
    ("turn", "said", "says"),
    [
        (lambda s: 0.5 + 0.5 * torch.tanh(s[:, 0]), {}, "one score per row that may be a probability or not; say"),
        (lambda s: torch.nn.functional.logsigmoid(s[:, 0]), {}, "that may be a probability or not"),
        (torch.sigmoid, {}, "ends in a sigmoid and its rows do not sum to 1"),
        (lambda s: s * 100, {"scores": "probabilities"}, "these are no probabilities; leave scores out"),
        (lambda s: s[:, 0] * 100, {"scores": "probabilities"}, "these are no probabilities"),
        (lambda s: s.abs() + 1, {"scores": "log_probabilities"}, "these are no log_probabilities"),
        (lambda s: s[:, 0], {"scores": "log_probabilities"}, "say 'probabilities' or 'logits'"),
    ],
)
def test_refused_scores(turn: Callable[[torch.Tensor], Any], said: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        taken(turn, **said)


def test_what_is_said_of_the_scores_holds() -> None:
    assert taken(torch.sigmoid, scores="probabilities").scores == "probabilities"
    assert taken(lambda s: s.softmax(1), scores="logits").scores == "logits"
    with pytest.raises(UsageError, match="no kind of score; choose one of logits"):
        taken(lambda s: s, scores="odds")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=r"holds its weights as torch\.b?float16; .* give model.float\(\)"):
        capture(Chain().to(dtype), {"x": rows(4).to(dtype)})
