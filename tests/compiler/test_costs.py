"""What exits cost in milliseconds: shared out of measured times, and chosen by."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import Chain

from offramp.compiler import Options, Training, compile
from offramp.compiler.costs import shared_out
from offramp.runtime import load, open_artifact
from offramp.runtime.engine import ModelBytes
from offramp.runtime.manifest import StageSpec
from offramp.runtime.stage_times import StageTimes
from offramp.runtime.table import render


def times(plain: float, silent: list[float], heads: list[float], size: int = 4) -> StageTimes:
    """The plain model's time, then every stage's without its head, then the heads' own."""
    column = np.array([plain, *silent])[:, None]
    return StageTimes((size,), column, column + np.array([0.0, *heads, 0.0])[:, None], np.zeros(len(column)))


def test_exits_pay_for_parting_the_backbone_and_for_their_heads() -> None:
    found = shared_out(times(8.0, [4.0, 4.0, 2.0], [1.0, 0.5]))
    assert found.segment == pytest.approx(np.array([3.2, 3.2, 1.6]) / 4), "together what the plain model takes"
    assert found.head == pytest.approx(np.array([2.0, 1.5]) / 4), "2 ms of parting, one each"


def test_stages_that_are_faster_than_the_plain_model_make_no_exit_cheaper_than_its_head() -> None:
    found = shared_out(times(12.0, [4.0, 4.0, 2.0], [1.0, 0.5]))
    assert found.segment.sum() == pytest.approx(3.0)
    assert found.head == pytest.approx(np.array([1.0, 0.5]) / 4)


def test_exits_chosen_by_time_are_served_and_said_to_be(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Chain().eval()
    with torch.no_grad():
        model.last.weight.mul_(20)
    rows = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)
    options = Options(
        policy="joint", tolerance=0.2, cost="time", cost_batch=8, threads=1, batches=(),
        training=Training(epochs=5, batch=32),
    )  # fmt: skip
    made = compile(model, rows, tmp_path / "a", options=options)
    assert made.measured.chosen_by == "batch 8, 1 threads"
    assert "exits chosen to save time at batch 8, 1 threads" in render(made)
    with load(tmp_path / "a", threads=1) as session:
        assert session.run(rows[:9]).classes.shape == (9,)


def test_exits_whose_parting_costs_more_than_they_save_are_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dear(stages: tuple[object, ...], *_: object) -> StageTimes:
        count = len(stages) - 1
        return times(1.0, [1.0] * count, [0.0] * (count - 1), 8)

    monkeypatch.setattr(importlib.import_module("offramp.compiler.costs"), "time_stages", dear)
    torch.manual_seed(0)
    rows = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)
    quick = Training(epochs=2, batch=32)
    exits = {}
    for cost in ("time", "flops"):
        options = Options(policy="joint", tolerance=1.0, cost=cost, cost_batch=8, batches=(), training=quick)
        exits[cost] = len(compile(Chain().eval(), rows, tmp_path / cost, options=options).exits)
    assert exits["flops"] > exits["time"] == 1


def test_exits_are_measured_against_an_artifact_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def timed(stages: Sequence[StageSpec], model: Callable[[str], ModelBytes], *_: object) -> StageTimes:
        seen.append((stages[0], model(stages[0].file)))
        count = len(stages) - 1
        return times(1.0, [1.0] * count, [0.0] * (count - 1), 8)

    monkeypatch.setattr(importlib.import_module("offramp.compiler.costs"), "time_stages", timed)
    torch.manual_seed(0)
    rows = np.random.default_rng(0).standard_normal((400, 6)).astype(np.float32)
    options = Options(
        policy="joint", tolerance=1.0, cost="time", cost_batch=8, batches=(), training=Training(epochs=2, batch=32)
    )
    assert len(compile(Chain().eval(), rows, tmp_path / "a", options=options).exits) == 1, "the model's own answer"
    ((spec, model),) = seen
    made = open_artifact(tmp_path / "a").model("stages/0.onnx")
    assert onnx.load_from_string(model.proto).graph == onnx.load_from_string(made.proto).graph
    assert (spec.inputs, spec.carries) == (("x",), ("x",))
