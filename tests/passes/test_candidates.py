"""Candidates: every filter refuses what it is for, with its reason, and components are what a person calls one."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from models import Attention, Bypass, Chain, Residual, Sized, Tuples, captured, rows, sentences
from torch import nn
from torch.nn import functional as F

from offramp.passes import FILTERS, Backbone, Candidates, Limits, find_candidates
from offramp.passes.candidates import first_level_components
from offramp.passes.cuts import analyse

ALL = Limits(least_left=0.0)


def reasons(found: Candidates) -> dict[str, str]:
    return {refusal.name: refusal.reason for refusal in found.refused}


def kept(found: Candidates) -> list[str]:
    return [candidate.name for candidate in found.kept]


def test_every_node_is_kept_or_refused_once() -> None:
    backbone = captured(Residual)
    found = find_candidates(backbone)
    considered = [n.name for n in backbone.graph.nodes if n.op == "call_function"]
    assert sorted([*kept(found), *reasons(found)]) == sorted(considered)


def test_a_candidate_says_where_it_is_and_what_it_saves() -> None:
    (candidate,) = (c for c in find_candidates(captured(Chain)).kept if c.name == "relu")
    assert candidate.shape == ("batch", 16)
    assert candidate.side_inputs == ()
    assert candidate.flops_before == 2 * 6 * 16
    assert candidate.flops_after == 2 * 16 * 16 + 2 * 16 * 4


def test_refused_not_a_single_dominator() -> None:
    found = reasons(find_candidates(captured(Bypass)))
    assert found["relu_1"] == "not a single dominator: relu goes round it to cat"


def test_refused_several_tensors() -> None:
    found = reasons(find_candidates(captured(Tuples)))
    assert found["_native_batch_norm_legit_no_training"] == "holds several tensors; a head reads one"


def test_refused_rows_that_are_not_rows_of_the_batch() -> None:
    """Rows times tokens in dimension 0: a token cannot leave without its row."""
    backbone = captured(Sized)
    values = {n.name: n.meta["val"] for n in backbone.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    tokens = [name for name, value in values.items() if value.dim() and str(value.shape[0]).startswith("3*")]
    found = reasons(find_candidates(backbone))
    assert tokens
    for name in tokens:
        assert found[name].endswith("not the batch: rows cannot be dropped here")


def test_refused_dtype_and_rank() -> None:
    class Odd(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.first(x)).double()
            return self.last(self.second(x.float()).reshape(-1, 2, 2, 2, 2).abs().reshape(-1, 16))

    found = reasons(find_candidates(captured(Odd), limits=ALL))
    assert any(reason == "holds torch.float64; heads read float32" for reason in found.values())
    assert any(reason.startswith("rank 5: heads read") for reason in found.values())


def test_refused_batch_norm_and_dropout() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(F.relu(self.norm(self.first(x))))

    found = reasons(find_candidates(captured(Normed)))
    assert found["getitem"] == "batch norm: only rescales its input at inference"


class Bottleneck(nn.Module):
    """As in MobileNet: the last thing in it is a batch norm, and not every one has a shortcut."""

    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.body = nn.Sequential(
            nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


def test_a_batch_norm_that_ends_a_component_is_its_boundary() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), Bottleneck(False), Bottleneck(True), Bottleneck(False), nn.Linear(16, 4))
    found = find_candidates(captured(model), limits=ALL)
    places = {candidate.place for candidate in found.kept}
    assert {"0", "1.body.4", "2", "3.body.4", "4"} == places
    inner = [r.reason for r in found.refused if r.place.endswith("body.1")]
    assert "batch norm: only rescales its input at inference" in inner


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.two(F.relu(self.one(x))))


class Blocks(nn.Module):
    """A stem and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.blocks = nn.Sequential(Block(), Block())
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.blocks(F.relu(self.stem(x))))


class Wrapper(nn.Module):
    """As people wrap a model to fix its signature."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Blocks()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Listed(Blocks):
    """The blocks in a ModuleList, inside a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([Block(), Block()])
        del self.blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        for block in self.encoder.layers:
            x = block(x)
        return self.last(x)


def test_refused_inside_a_component() -> None:
    found = find_candidates(captured(Blocks))
    inner = {r.reason for r in found.refused if r.place == "blocks.0" or r.place.startswith("blocks.0.")}
    assert "inside blocks.0: not at the boundary of a first-level component" in inner
    assert [c.place for c in found.kept] == ["relu", "blocks.0", "blocks.1"]


@pytest.mark.parametrize("kind", [Blocks, Wrapper, Listed])
def test_components_are_the_blocks_however_they_are_wrapped(kind: Callable[[], nn.Module]) -> None:
    found = first_level_components(analyse(captured(kind)))
    assert any(path.endswith("0") for path in found)
    assert any(path.endswith("1") for path in found)
    assert not any(path.endswith("one") for path in found)
    ends = [c for c in find_candidates(captured(kind), limits=ALL).kept if c.flops_before == 1216.0]
    assert len(ends) == 1  # stem 192, two layers of 512


class Halves(nn.Module):
    """A block of two parts, each a module of modules, of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.two(self.one(x))


class Stage(nn.Module):
    """As in Swin: all there is to it is a list of blocks; none has half of the model's compute."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Halves(), Halves())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def test_a_stage_of_blocks_is_looked_into_and_a_block_is_not() -> None:
    torch.manual_seed(0)
    found = first_level_components(
        analyse(captured(nn.Sequential(nn.Linear(6, 16), Stage(), Stage(), nn.Linear(16, 4))))
    )
    assert {"1.blocks.0", "1.blocks.1", "2.blocks.0", "2.blocks.1"} <= found
    assert not any(path.endswith("one") for path in found)


def test_a_nested_sequential_is_looked_into() -> None:
    layers = [nn.Linear(6, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 4)]
    assert kept(find_candidates(captured(nn.Sequential(*layers)), limits=ALL)) == ["linear", "relu", "linear_2"]


def test_refused_side_inputs_over_the_bound() -> None:
    backbone = captured(Attention, **sentences(8))
    bound = find_candidates(backbone, limits=Limits(least_left=0.0, side_bytes=19))
    assert re.fullmatch(r"side inputs \w+ take 20 bytes a row, over the bound of 19", reasons(bound)["embedding"])
    assert find_candidates(backbone, limits=Limits(least_left=0.0, side_bytes=20)).kept[0].side_bytes == 20


class Scaled(Chain):
    def forward(self, x: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(self.second(F.relu(self.first(x))) * side))


def test_refused_side_input_that_cannot_travel() -> None:
    backbone = captured(Scaled(), x=rows(8), side=rows(8)[:, :1])
    (side,) = (n for n in backbone.graph.nodes if n.name == "side")
    side.meta["val"] = side.meta["val"][:1]
    found = reasons(find_candidates(backbone))
    assert found["relu"] == "side is read behind it and its dimension 0 is not the batch"


def test_refused_too_little_left() -> None:
    found = reasons(find_candidates(captured(Chain)))
    assert found["linear_2"] == "only 0.0% of the compute is left behind it"
    found = reasons(find_candidates(captured(Chain), limits=Limits(least_left=0.9)))
    assert found["relu"] == "only 76.9% of the compute is left behind it"


def test_refused_duplicates_for_the_cheaper_or_the_later() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 4, 3), nn.Linear(4, 4)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.last(F.relu(self.conv(image)).mean((2, 3)))

    found = find_candidates(captured(Pooled(), image=torch.randn(4, 1, 8, 8)), limits=ALL)
    assert kept(found) == ["mean", "linear"]
    assert reasons(found)["relu"] == "duplicate of its neighbour mean: no compute lies between them"
    chain = find_candidates(captured(Chain))
    assert reasons(chain)["linear"] == "duplicate of its neighbour relu: no compute lies between them"


def test_filters_are_a_persons_own_to_choose() -> None:
    def shallow(node: torch.fx.Node, context: object) -> str | None:
        return "too shallow" if node.name.startswith("linear") and not node.name.endswith("1") else None

    backbone: Backbone = captured(Chain)
    found = find_candidates(backbone, filters=(*FILTERS, shallow), limits=ALL)
    assert reasons(found)["linear"] == "too shallow"
    assert kept(found) == ["relu", "relu_1"]
