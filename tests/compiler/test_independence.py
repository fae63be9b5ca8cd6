"""Row independence at the cuts, and a second dimension that may vary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from models import Attention, Chain, captured, rows, sentences, with_exits
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from offramp.compiler import capture, emit, keep_independent, load_model
from offramp.compiler.independence import difference, permuted_part
from offramp.passes import Candidates, find_candidates
from offramp.runtime.execution import ASK


class Shuffled(Chain):
    """Rows trade places behind the first layer and trade back behind the second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x)).roll(1, 0)
        return self.last(F.relu(self.second(x)).roll(-1, 0))


def test_rows_that_trade_places_and_trade_back_are_refused_in_between() -> None:
    backbone = captured(Shuffled)
    found = find_candidates(backbone)
    kept = keep_independent(backbone, found, [rows(8)])
    assert {c.name for c in kept.kept} < {c.name for c in found.kept}
    dropped = {c.name for c in found.kept} - {c.name for c in kept.kept}
    assert dropped == {r.name for r in kept.refused} - {r.name for r in found.refused}
    assert all("rows beside it" in r.reason for r in kept.refused if r.name in dropped)


class Flattened(nn.Module):
    """Reads the last token of every row out of all rows' tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.last = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + torch.relu(self.mix(x))
        at = torch.arange(ids.shape[0]) * ids.shape[1] + lengths - 1
        return self.last(torch.relu(self.mix(x)).reshape(-1, 8)[at])


class Indexed(Flattened):
    """Reads it row by row."""

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + torch.relu(self.mix(x))
        return self.last(torch.relu(self.mix(x))[torch.arange(ids.shape[0]), lengths - 1])


@pytest.mark.parametrize("kind", [Flattened, Indexed])
def test_what_travels_with_a_row_must_not_depend_on_its_place(kind: type[nn.Module]) -> None:
    given = {"ids": torch.randint(0, 20, (8, 5)), "lengths": torch.randint(1, 6, (8,))}
    backbone = capture(kind(), given, dynamic={"ids": {}})
    found = find_candidates(backbone)
    kept = keep_independent(backbone, found, tuple(given.values()))
    assert found.kept
    if kind is Indexed:
        assert kept == found
        return
    assert [c for c in kept.kept if c.side_inputs] == []
    (refused, *_) = [r for r in kept.refused if r.rule == "independent"]
    assert "which travels with the rows, changes with the rows beside it" in refused.reason


def test_independent_candidates_stay() -> None:
    backbone = captured(Chain)
    found = find_candidates(backbone)
    assert keep_independent(backbone, found, [rows(8)]) == Candidates(found.kept, found.refused)


def test_a_value_that_is_not_a_number_is_no_evidence_of_independence() -> None:
    order = permuted_part(4)
    values = torch.full((4, 2), float("nan"))
    assert not difference(values, values[order], order) <= 1.0


@pytest.fixture(scope="module")
def any_length(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pt2") / "attention.pt2"
    batch, length = Dim("batch"), Dim("length", min=2)
    shapes = {"ids": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    example = sentences(4)
    torch.export.save(torch.export.export(Attention().eval(), (), example, dynamic_shapes=shapes), path)
    return path


@pytest.mark.parametrize("length", [3, 5, 11])
def test_sentences_of_another_length_than_captured_run_in_both_forms(any_length: Path, length: int) -> None:
    backbone = capture(load_model(str(any_length)), sentences(4))
    cuts = [c.name for c in find_candidates(backbone).kept][:1]
    program = with_exits(backbone, cuts, [0.26])
    _, files = emit(program)
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 20, (6, length), generator=generator)
    batch = {"ids": ids, "mask": torch.ones_like(ids)}
    expected, exits = program(*(batch[i.name] for i in backbone.inputs))
    session = ort.InferenceSession(files["model.onnx"], providers=["CPUExecutionProvider"])
    got, left = session.run(["probabilities", "exit"], {name: value.numpy() for name, value in batch.items()})
    np.testing.assert_array_equal(left, exits.numpy())
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)
    stage = ort.InferenceSession(files["stages/0.onnx"], providers=["CPUExecutionProvider"])
    feed = {name: value.numpy() for name, value in batch.items()} | {ASK: np.array(True)}
    answer = stage.run(["probabilities"], {i.name: feed[i.name] for i in stage.get_inputs()})[0]
    np.testing.assert_allclose(answer, program.all_exits(*(batch[i.name] for i in backbone.inputs))[0], atol=1e-4)
