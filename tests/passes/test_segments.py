"""Segments: one after the other they are the backbone, whatever rows are left, and each weight is in one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from models import Attention, Chain, Residual, Shared, Sized, captured, rows, sentences
from torch import nn

from offramp.passes import Backbone, Limits, Segment, find_candidates, row_shape, split
from offramp.runtime.errors import PlanError

ALL = Limits(least_left=0.0)


def cuts(backbone: Backbone) -> list[str]:
    return [c.name for c in find_candidates(backbone, limits=ALL).kept]


def run(segments: tuple[Segment, ...], known: dict[str, torch.Tensor], keep: slice | list[int]) -> torch.Tensor:
    """All segments in a row; behind each only the rows in `keep` go on."""
    for segment in segments:
        values = segment.graph_module(*(known[name] for name in segment.inputs))
        known = {**known, **dict(zip(segment.outputs, values, strict=True))}
        scores = known[segment.outputs[0]]
        known = {name: known[name][keep] for name in segment.carries}
    return scores


MODELS = [(Chain, False), (Residual, False), (Sized, False), (Shared, False), (Attention, True)]


@pytest.mark.parametrize(("kind", "text"), MODELS)
def test_in_a_row_they_are_the_backbone(kind: type[nn.Module], text: bool) -> None:
    inputs = sentences(8) if text else {"x": rows(8)}
    backbone = captured(kind, **inputs)
    segments = split(backbone, cuts(backbone))
    assert len(segments) == len(cuts(backbone)) + 1 > 2
    torch.testing.assert_close(run(segments, dict(inputs), slice(None)), backbone.graph_module(*inputs.values()))


@pytest.mark.parametrize(("kind", "text"), [(Sized, False), (Attention, True)])
@pytest.mark.parametrize("keep", [[], [0], [1, 2]])
def test_a_segment_reads_the_size_of_the_batch_it_is_given(kind: type[nn.Module], text: bool, keep: list[int]) -> None:
    """Views with x.size(0) after compaction: none, one and two of three rows go on behind the first cut."""
    inputs = sentences(3) if text else {"x": rows(3)}
    backbone = captured(kind, **inputs)
    segments = split(backbone, cuts(backbone)[:1])
    torch.testing.assert_close(run(segments, dict(inputs), keep), backbone.graph_module(*inputs.values())[keep])


@pytest.mark.parametrize(("kind", "text"), [(Residual, False), (Sized, False), (Attention, True)])
def test_each_parameter_belongs_to_one(kind: type[nn.Module], text: bool) -> None:
    backbone = captured(kind, **(sentences(8) if text else {"x": rows(8)}))
    owners: Counter[str] = Counter()
    for segment in split(backbone, cuts(backbone)):
        owners.update({str(n.target) for n in segment.graph_module.graph.find_nodes(op="get_attr")})
    parameters = {name for name, _ in backbone.graph_module.named_parameters()}
    assert {name: owners[name] for name in parameters} == dict.fromkeys(parameters, 1)


class Averaged(nn.Module):
    """Ends in a mean over as many tokens as came in, when there are half as many left."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(32, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.Conv1d(8, 8, 3, stride=2, padding=1) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = torch.relu(block(x.transpose(1, 2)).transpose(1, 2))
        return self.last(x.sum(1) / ids.shape[1])


@pytest.mark.parametrize("length", [12, 7])
def test_what_has_a_size_that_is_read_behind_a_cut_travels(length: int) -> None:
    ids = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(0))
    backbone = captured(Averaged, ids=ids)
    places = find_candidates(backbone, limits=ALL).kept
    # The first has the size itself, behind the third it is read no more.
    assert [(p.name, p.side_inputs) for p in places[:3]] == [("embedding", ()), ("relu", ("ids",)), ("div", ())]
    known = {"ids": ids[:, :length]}
    expected = backbone.graph_module(known["ids"])
    whole = split(backbone, [place.name for place in places])
    torch.testing.assert_close(run(whole, dict(known), slice(None)), expected)
    torch.testing.assert_close(run(split(backbone, ["relu"]), dict(known), [0, 2]), expected[[0, 2]])


def test_compute_adds_up() -> None:
    backbone = captured(Residual)
    assert [s.flops for s in split(backbone, ["relu", "relu_1"])] == [2 * 6 * 16, 2 * 16 * 16, 2 * 16 * 4]


def test_a_mask_is_computed_once_and_carried_as_long_as_it_is_read() -> None:
    backbone = captured(Attention, **sentences(8))
    first, block = cuts(backbone)[:2]
    segments = split(backbone, [first, block])
    assert segments[0].outputs == (first, "unsqueeze_1")
    assert set(segments[0].carries) == {first, "unsqueeze_1"}
    assert set(segments[1].inputs) == {first, "unsqueeze_1"}
    assert set(segments[1].carries) == {block, "unsqueeze_1"}
    assert segments[2].carries == ()


def test_for_no_rows_nothing_is_computed() -> None:
    """Many a model cannot run on no rows, and none needs to."""
    backbone = captured(Sized)
    for segment in split(backbone, cuts(backbone)[:1]):
        segment.graph_module.register_forward_pre_hook(lambda *_: pytest.fail("no row reaches this segment"))
        values = segment(torch.empty(0, *row_shape(backbone, segment.inputs[0])))
        assert [v.shape for v in values] == [(0, *row_shape(backbone, name)) for name in segment.outputs]


def test_called_on_rows_it_is_its_graph() -> None:
    first, *_ = split(captured(Sized), cuts(captured(Sized))[:1])
    torch.testing.assert_close(first(rows(3)), first.graph_module(rows(3)))


def test_a_stream_that_waits_starts_behind_the_cut() -> None:
    class Towers(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(-x)) + self.second(torch.relu(self.first(x))))

    backbone = captured(Towers)
    segments = split(backbone, ["linear_1", "relu"])
    assert all("neg" in segment.carries for segment in segments[:2])
    assert [s.flops for s in segments] == [2 * 6 * 16, 0.0, 2 * (16 * 16 + 6 * 16 + 16 * 4)]
    torch.testing.assert_close(run(segments, {"x": rows(5)}, slice(None)), backbone.graph_module(rows(5)))


def test_no_cut_is_one_segment() -> None:
    (whole,) = split(captured(Chain), [])
    assert (whole.inputs, whole.carries) == (("x",), ())


def test_refused_cuts() -> None:
    backbone = captured(Chain)
    with pytest.raises(PlanError, match=r"'nowhere' is not a place for an exit in Chain; see `offramp candidates`"):
        split(backbone, ["nowhere"])
    with pytest.raises(PlanError, match="from shallow to deep, not relu_1, relu"):
        split(backbone, ["relu_1", "relu"])


def test_an_input_may_be_called_what_python_calls_something_else() -> None:
    """`input` is the name nn.Sequential gives; fx does not let a node have it."""
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    backbone = captured(layers, anything=rows(8))
    assert [i.name for i in backbone.inputs] == ["input"]
    assert split(backbone, ["relu"])[0].inputs == ("input",)
