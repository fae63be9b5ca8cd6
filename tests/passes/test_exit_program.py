"""The exit program's eager run, against rows taken one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import INF, Attention, Chain, Residual, Shared, Sized, captured, rows, sentences, with_exits
from torch import nn

from offramp.passes import (
    ExitPlan,
    ExitProgram,
    Limits,
    PlannedExit,
    build_program,
    exit_if,
    find_candidates,
    gather,
    violations,
)
from offramp.passes import confidence as confidence_of
from offramp.runtime.errors import PassError, PlanError


@pytest.fixture(scope="module")
def programs() -> dict[str, ExitProgram]:
    return {
        "residual": with_exits(captured(Residual), ["relu", "relu_1"]),
        "sized": _at_candidates(Sized),
        "shared": _at_candidates(Shared),
        "attention": _at_candidates(Attention),
    }


def _at_candidates(kind: type[nn.Module]) -> ExitProgram:
    backbone = captured(kind, **(sentences(8) if kind is Attention else {"x": rows(8)}))
    return with_exits(backbone, [c.name for c in find_candidates(backbone, limits=Limits(least_left=0.0)).kept[:2]])


def inputs_of(name: str, count: int) -> tuple[torch.Tensor, ...]:
    return tuple(sentences(count, seed=1).values()) if name == "attention" else (rows(count, seed=1),)


def one_by_one(program: ExitProgram, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, list[int]]:
    """Row after row through all exits; the first that is confident enough answers."""
    answers, exits = [torch.zeros(0, 4)], []
    limits = [*map(np.float32, program.plan.thresholds), np.float32(-INF)]
    for row in range(len(inputs[0])):
        every = program.all_exits(*(value[row : row + 1] for value in inputs))[:, 0]
        taken = next(e for e, limit in enumerate(limits) if every[e].max().numpy() >= limit)
        answers.append(every[taken : taken + 1])
        exits.append(taken)
    return torch.cat(answers), exits


thresholds = st.sampled_from([-INF, 0.0, 0.3, 0.4, 0.5, 0.7, 1.0, 1.1, INF])


@pytest.mark.parametrize("name", ["residual", "sized", "shared", "attention"])
@settings(max_examples=25)
@given(first=thresholds, second=thresholds, count=st.integers(0, 9))
def test_the_eager_run_is_rows_one_by_one(
    programs: dict[str, ExitProgram], name: str, first: float, second: float, count: int
) -> None:
    program = programs[name].with_thresholds([first, second])
    inputs = inputs_of(name, count)
    probabilities, exits = program(*inputs)
    expected, taken = one_by_one(program, inputs)
    assert exits.dtype == torch.int64
    assert exits.tolist() == taken
    torch.testing.assert_close(probabilities, expected)


@pytest.mark.parametrize(("limit", "exit"), [(-INF, 0), (INF, 2)])
def test_all_at_once_or_none(programs: dict[str, ExitProgram], limit: float, exit: int) -> None:
    program = programs["residual"].with_thresholds([limit, limit])
    assert program(rows(5))[1].tolist() == [exit] * 5


def test_none_leaving_is_the_backbone(programs: dict[str, ExitProgram]) -> None:
    program = programs["residual"].with_thresholds([INF, INF])
    expected = torch.softmax(program.backbone.graph_module(rows(5)), 1)
    torch.testing.assert_close(program(rows(5))[0], expected)


def test_a_threshold_is_compared_in_float32() -> None:
    """0.7 is no float32: the nearest lies below it, so a confidence of just that must still leave."""
    sure = torch.tensor([0.7, 0.6])
    assert float(sure[0]) < 0.7
    assert exit_if(sure, 0.7, ())[1].tolist() == [1]


def test_not_a_number_never_leaves() -> None:
    (live,), stay = exit_if(torch.tensor([float("nan"), 0.9, 0.1]), 0.5, (torch.arange(3),))
    assert stay.tolist() == live.tolist() == [0, 2]
    assert exit_if(torch.tensor([float("nan")]), -INF, ())[1].tolist() == [0]


@given(st.lists(st.floats(0, 1, width=32), max_size=9), st.floats(0, 1))
def test_compaction_keeps_order_and_every_live_value(sure: list[float], limit: float) -> None:
    values = torch.arange(len(sure))
    (left, doubled), stay = exit_if(torch.tensor(sure), limit, (values, torch.stack([values, values], 1)))
    assert stay.tolist() == [i for i, c in enumerate(sure) if not np.float32(c) >= np.float32(limit)]
    assert torch.equal(left, stay)
    assert torch.equal(doubled[:, 1], stay)


def test_gather_undoes_compaction() -> None:
    """Rows 1 and 3 of four pass exit 0; of those two, row 3 passes exit 1."""
    answers = [torch.full((4, 2), 0.0), torch.full((2, 2), 1.0), torch.full((1, 2), 2.0)]
    result, index = gather(answers, [torch.tensor([1, 3]), torch.tensor([1])])
    assert index.tolist() == [0, 1, 0, 2]
    assert result[:, 0].tolist() == [0.0, 1.0, 0.0, 2.0]


def test_with_thresholds_changes_nothing_else(programs: dict[str, ExitProgram]) -> None:
    program = programs["residual"]
    other = program.with_thresholds(list(np.array([0.1, 0.9])))
    assert other.plan.thresholds == (0.1, 0.9)
    assert program.plan.thresholds == (0.3, 0.3)
    assert other.segments is program.segments
    assert len(other(rows(4))[1]) == 4
    with pytest.raises(PlanError, match="1 thresholds for 2 exits; give one each"):
        program.with_thresholds([0.5])


def test_no_exit_at_all_is_a_program() -> None:
    program = with_exits(captured(Chain), [])
    assert program(rows(3))[1].tolist() == [0, 0, 0]
    assert program.all_exits(rows(3)).shape == (1, 3, 4)
    assert violations(program) == []


def test_all_exits_do_not_compact(programs: dict[str, ExitProgram]) -> None:
    every = programs["residual"].all_exits(rows(5))
    assert every.shape == (3, 5, 4)
    torch.testing.assert_close(every.sum(2), torch.ones(3, 5))


def test_a_head_must_be_given_for_each_exit() -> None:
    plan = ExitPlan((PlannedExit("relu", 1.0, 0.5),))
    with pytest.raises(PassError, match="InsertExits cannot run here: no head given for relu"):
        build_program(captured(Chain), plan, {})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PlannedExit("relu", 0.0, 0.5), "temperature 0.0 is not a positive number"),
        (lambda: PlannedExit("relu", 1.0, float("nan")), "threshold is not a number"),
        (
            lambda: ExitPlan((), metric="luck"),
            "metric 'luck' is unknown; use one of max_probability, margin, entropy",
        ),
        (lambda: ExitPlan((PlannedExit("relu", 1.0, 0.5),) * 2), "a cut carries two exits: relu, relu"),
        (lambda: confidence_of(torch.ones(1, 2), "luck"), "confidence metric 'luck' is unknown"),
    ],
)
def test_refused_plans(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(PlanError, match=says):
        make()
