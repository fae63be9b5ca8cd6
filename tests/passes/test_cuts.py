"""Cuts: what determines the output, what must travel with it, and what goes round a node that is none."""

from __future__ import annotations

import pytest
import torch
from models import Attention, Bypass, Chain, Residual, Sized, Tuples, captured, rows, sentences
from torch import nn
from torch.nn import functional as F

from offramp.passes import Cut, ValueGraph, analyse, split
from offramp.runtime.errors import PlanError


def names(values: ValueGraph) -> list[str]:
    return [node.name for node in values.dominators]


def cut_at(values: ValueGraph, name: str) -> Cut:
    return values.cut(next(node for node in values.dominators if node.name == name))


def test_in_a_chain_every_node_is_a_cut() -> None:
    assert names(analyse(captured(Chain))) == ["linear", "relu", "linear_1", "relu_1", "linear_2"]


def test_a_shortcut_goes_round_what_it_shortens() -> None:
    values = analyse(captured(Residual))
    assert "linear_1" not in names(values)
    assert {"relu", "relu_1"} <= set(names(values))
    inner = next(node for node in values.graph if getattr(node, "name", "") == "linear_1")
    around, joins = values.bypass(inner)
    assert around is not None
    assert (around.name, joins.target) == ("relu", torch.ops.aten.add.Tensor)


def test_a_dense_connection_is_named() -> None:
    values = analyse(captured(Bypass))
    inner = next(node for node in values.graph if getattr(node, "name", "") == "relu_1")
    around, joins = values.bypass(inner)
    assert around is not None
    assert (around.name, joins.target) == ("relu", torch.ops.aten.cat.default)


def test_tuples_are_passed_through() -> None:
    """Batch norm and split are dominators themselves; what each yields in two parts is not."""
    found = names(analyse(captured(Tuples)))
    assert "_native_batch_norm_legit_no_training" in found
    assert any(name.startswith(("split", "chunk")) for name in found)
    assert "sigmoid" not in found


def test_sizes_do_not_break_cuts() -> None:
    found = names(analyse(captured(Sized)))
    assert {"linear", "linear_1", "linear_2"} <= set(found)


def test_a_mask_travels_with_every_block() -> None:
    """Spread over heads it is cheap, parameterless and made from an input alone: a side input, not a second path."""
    values = analyse(captured(Attention, **sentences(8)))
    found = names(values)
    assert "embedding" in found
    first = cut_at(values, "embedding")
    assert [node.target for node in first.side_inputs] == [torch.ops.aten.unsqueeze.default]
    assert first.side_bytes == 5 * 4
    assert first.stuck == ()
    last = cut_at(values, found[-1])
    assert (last.side_inputs, last.side_bytes) == ((), 0)


class Sideways(Chain):
    """The second input scales the second layer, which works on [B, 16] or, turned, on [16, B]."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned

    def forward(self, x: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        x = self.second(F.relu(self.first(x)))
        return self.last(F.relu((x.t() * side.t()).t() if self.turned else x * side))


def test_a_side_value_that_is_not_batch_first_is_made_again_from_one_that_is() -> None:
    values = analyse(captured(Sideways(turned=True), x=rows(8), side=rows(8)[:, :1]))
    cut = cut_at(values, "relu")
    assert [node.op for node in cut.side_inputs] == ["placeholder"]
    assert not cut.stuck


def test_two_inputs_used_before_a_cut_do_not_travel() -> None:
    values = analyse(captured(Sideways(turned=False), x=rows(8), side=rows(8)[:, :1]))
    assert [node.name for node in cut_at(values, "relu").side_inputs] == ["side"]
    assert cut_at(values, "relu_1").side_inputs == ()


def test_a_parallel_branch_with_weights_is_no_side_value() -> None:
    class Twin(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(F.relu(self.first(x)) + torch.tanh(self.first(x)))

    found = names(analyse(captured(Twin)))
    assert found[0].startswith("add")


def test_normalising_the_input_is_no_cut() -> None:
    """Mean and deviation are constants, not parameters: nothing has been computed that an exit could read."""

    class Normalised(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.ones(6), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward((x - self.mean) / 2)

    assert names(analyse(captured(Normalised)))[0] == "linear"


def test_compute_is_counted_up_to_each_cut() -> None:
    values = analyse(captured(Residual))
    spent = {node.name: values.flops_until(node) for node in values.dominators}
    assert spent["linear"] == 2 * 6 * 16
    assert spent["relu_1"] == 2 * 6 * 16 + 2 * 16 * 16
    assert spent["linear_2"] == values.total_flops()


def test_segment_of_puts_a_branch_before_the_cut_it_feeds() -> None:
    values = analyse(captured(Residual))
    cut = next(node for node in values.dominators if node.name == "relu_1")
    segment = {node.name: index for node, index in values.segment_of([cut]).items()}
    assert segment["linear_1"] == 0
    assert segment["linear_2"] == 1


def test_only_dominators_can_be_cut() -> None:
    with pytest.raises(PlanError, match=r"linear_1.*not a place for an exit"):
        split(captured(Residual), ["linear_1"])


def test_a_whole_model_of_side_values_has_no_cut() -> None:
    class Free(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) * 2

    assert names(analyse(captured(Free))) == []
