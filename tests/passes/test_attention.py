"""Masks of booleans become numbers once, and attention under them answers as before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import Attention, captured, sentences, with_exits

from offramp.compiler.emit import stage_models
from offramp.compiler.precision import FP16, INT8, converted
from offramp.passes import Backbone, NumberMasks, analyse, find_candidates
from offramp.runtime.data import ArrayRows

aten = torch.ops.aten


class Masked(Attention):
    """Keys are those of the mask, whatever `spread` makes of it before attention reads it."""

    def __init__(self, spread: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.last(self.attended(ids, self.spread(mask.bool()[:, None, None, :])).mean(1))


class Read(Masked):
    """The mask is read by more than attention."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = mask.bool()[:, None, None, :]
        return self.last((self.attended(ids, seen) * seen[:, 0, 0, :, None]).mean(1))


class Causal(Masked):
    """Every query has keys of its own."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = ids.shape[1]
        before = torch.ones(tokens, tokens, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
        return self.last(self.attended(ids, before).mean(1))


def spread_over_queries(mask: torch.Tensor) -> torch.Tensor:
    return mask.expand(-1, -1, mask.shape[-1], -1)


def rows() -> dict[str, torch.Tensor]:
    """Sentences of seven tokens, of which the fourth has none to attend to."""
    ids = torch.randint(0, 20, (8, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.randint(0, 2, (8, 7), generator=torch.Generator().manual_seed(2))
    mask[3] = 0
    return {"ids": ids, "mask": mask}


MODELS: dict[str, Callable[[], Attention]] = {
    "as it is": lambda: Masked(lambda mask: mask),
    "spread": lambda: Masked(spread_over_queries),
    "read by others": lambda: Read(lambda mask: mask),
}


def targets(backbone: Backbone) -> Counter[object]:
    return Counter(node.target for node in backbone.graph.nodes)


@pytest.mark.parametrize("name", MODELS)
def test_attention_answers_as_before(name: str) -> None:
    model = MODELS[name]()
    backbone = captured(model, **sentences(8))
    numbered = NumberMasks()(backbone).subject
    for given in (sentences(6, seed=1), rows()):
        torch.testing.assert_close(numbered.graph_module(*given.values()), model(**given), rtol=1e-6, atol=1e-6)
    before, after = targets(backbone), targets(numbered)
    assert after[aten.amax.default] - before[aten.amax.default] == 1, "one for both layers"
    assert after[aten.expand.default] == 0
    attention = aten.scaled_dot_product_attention.default
    assert after[attention] == before[attention] == 2


def test_names_stay_with_what_has_their_value() -> None:
    backbone = captured(MODELS["as it is"], **sentences(8))
    numbered = NumberMasks()(backbone).subject
    assert [n.name for n in analyse(backbone).dominators] == [n.name for n in analyse(numbered).dominators]
    given = rows()
    values = []
    for module in (backbone.graph_module, numbered.graph_module):
        seen: dict[str, torch.Tensor] = {}

        class Noted(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node, seen: dict[str, torch.Tensor] = seen) -> object:
                seen[n.name] = super().run_node(n)
                return seen[n.name]

        Noted(module).run(*given.values())
        values.append(seen)
    for name in ("scaled_dot_product_attention", "scaled_dot_product_attention_1"):
        torch.testing.assert_close(values[1][name], values[0][name], rtol=1e-6, atol=1e-6)


def test_a_mask_may_be_an_input() -> None:
    class Given(Masked):
        def forward(self, allowed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return self.last(self.attended(ids, allowed).mean(1))

    def given(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"allowed": mask.bool()[:, None, None, :], "ids": ids}

    model = Given(lambda mask: mask)
    numbered = NumberMasks()(captured(model, **given(**sentences(8)))).subject
    assert [node.op for node in numbered.graph.nodes if node.op != "get_attr"][:2] == ["placeholder"] * 2
    other = given(**sentences(6, seed=1))
    torch.testing.assert_close(numbered.graph_module(*other.values()), model(**other), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [lambda: Causal(lambda mask: mask), Attention], ids=["each query", "numbers"])
def test_other_masks_stay(kind: Callable[[], Attention]) -> None:
    backbone = captured(kind(), **sentences(8))
    result = NumberMasks()(backbone)
    assert not result.modified
    assert result.subject is backbone


def test_stages_read_numbers_and_make_none() -> None:
    model = MODELS["spread"]()
    backbone = captured(model, **sentences(8))
    cuts = [node.name for node in analyse(backbone).dominators if node.target is aten.add.Tensor]
    program = with_exits(backbone, cuts)
    first, *others = program.segments
    numbers = [name for name in first.carries if name.endswith(("_added", "_some"))]
    assert len(numbers) == 2
    read = [node for segment in others for node in segment.graph_module.graph.find_nodes(op="placeholder")]
    assert {node.meta["val"].dtype for node in read} == {torch.float32}, "the mask itself stays behind"
    stages = stage_models(program)
    assert all({*numbers} <= {*segment.inputs} for segment in others[:-1])
    for stage in stages[1:]:
        kinds = {node.op_type for node in stage.graph.node if not node.name.startswith(("exits", "output"))}
        assert not kinds & {"Cast", "Sub", "ReduceMax", "Where"}
    np.testing.assert_allclose(answered(stages), expected(model), atol=1e-6)


@pytest.mark.parametrize(("precision", "by"), [(FP16, 1e-3), (INT8, 0.02)])
def test_converted_stages_answer_for_sentences_with_nothing_to_attend_to(precision: str, by: float) -> None:
    model = MODELS["as it is"]()
    backbone = captured(model, **sentences(8))
    cuts = [node.name for node in analyse(backbone).dominators if node.target is aten.add.Tensor]
    program = with_exits(backbone, cuts)
    data = ArrayRows({name: value.numpy() for name, value in sentences(32).items()})
    stages = converted(program, stage_models(program, rewritten=False), data, np.arange(32), precision)
    np.testing.assert_allclose(answered(stages), expected(model), atol=by)


def expected(model: Attention) -> np.ndarray:
    probabilities: np.ndarray = torch.softmax(model(**rows()), 1).detach().numpy()
    return probabilities


def answered(stages: Sequence[onnx.ModelProto]) -> np.ndarray:
    """What stages make of `rows`, all of which go through to the end."""
    given = {name: value.numpy() for name, value in rows().items()}
    for stage in stages:
        session = onnxruntime.InferenceSession(stage.SerializeToString(), providers=["CPUExecutionProvider"])
        names = [value.name for value in stage.graph.output]
        found = session.run(names, {value.name: given[value.name] for value in stage.graph.input})
        given |= dict(zip(names, found, strict=True))
    return given["probabilities"]


def test_candidates_are_told_what_the_mask_itself_takes() -> None:
    kept = find_candidates(captured(MODELS["as it is"], **sentences(8))).kept
    assert {place.side_bytes for place in kept if place.side_inputs} == {5}
