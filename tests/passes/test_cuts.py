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


class Towers(nn.Module):
    """Two streams that meet late; the second is the smaller one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8))
        self.narrow, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.narrow(x)) + self.wide(x))


def test_the_smaller_of_two_streams_waits() -> None:
    """It is no side value, for it has weights: it runs behind the last cut of the other, from the input."""
    values = analyse(captured(Towers))
    *stream, meet, last = names(values)
    assert (stream, last) == (["linear_1", "relu", "linear_2"], "linear_3")
    assert [n.name for n in cut_at(values, "relu").side_inputs] == ["x"]
    assert cut_at(values, meet).side_inputs == ()
    waiting = next(n for n in values.graph if getattr(n, "name", "") == "tanh")
    around, joins = values.bypass(waiting)
    assert around is not None
    assert (around.name, joins.name) == ("linear_2", meet)


def test_streams_that_meet_at_once_are_one() -> None:
    """As the features of a recommender: none of them alone is worth a head."""

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.user, self.item = nn.Embedding(20, 8), nn.Embedding(20, 8)
            self.rest = nn.Sequential(nn.Linear(80, 64), nn.ReLU(), nn.Linear(64, 4))

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.rest(torch.cat([self.user(ids).flatten(1), self.item(mask).flatten(1)], 1))

    assert names(analyse(captured(Features, **sentences(8))))[0] == "cat"


def test_what_a_waiting_stream_made_passes_no_cut() -> None:
    """A bias made of the second input with weights, read before and behind the first block's end."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Linear(6, 16)
            self.blocks, self.last = nn.ModuleList(nn.Linear(n, 16) for n in (6, 16, 16)), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
            bias, stem = torch.tanh(self.bias(side)), F.relu(self.blocks[0](x))
            return self.last(F.relu(self.blocks[2](F.relu(self.blocks[1](stem) + bias)) * bias))

    backbone = captured(Biased, x=rows(8), side=rows(8, 1))
    found = names(analyse(backbone))
    assert found[:2] == ["linear_1", "relu"], "the stem, before the bias is read"
    assert not any(name.startswith("add") for name in found), "the end of the first block"
    assert len(split(backbone, found[:-1])) == len(found)


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
