"""Exit selection: every policy keeps its promise on its records."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from simulations import Floats, at_most, cases, check, simulated, slow, some_tolerance

from offramp.runtime.errors import InputError, UsageError
from offramp.runtime.selection import (
    POLICIES,
    Costs,
    Records,
    disagreement,
    equal,
    equation_3_threshold,
    equation_4_score,
    exits_taken,
    expected_cost,
    joint,
    oracle_cost,
    select,
)


@given(cases(), st.data())
def test_evaluation_equals_a_row_at_a_time(case: tuple[Records, Costs], data: st.DataObject) -> None:
    records, costs = case
    chosen = sorted(data.draw(st.sets(st.integers(0, records.candidates - 1))))
    grid = [*records.confidence.ravel().tolist(), 0.25, 0.5, math.inf]
    thresholds = [data.draw(st.sampled_from(grid)) for _ in chosen]
    expected = slow(records, costs, chosen, thresholds)
    assert exits_taken(records, chosen, thresholds).tolist() == expected.taken
    assert expected_cost(records, costs, chosen, thresholds) == pytest.approx(expected.cost, rel=1e-9)
    assert disagreement(records, chosen, thresholds) == expected.risk
    saved = (costs.segment.sum() - expected_cost(records, costs, chosen, thresholds)) * records.rows
    score = equation_4_score(records, costs, chosen, thresholds)
    assert score == pytest.approx(saved, rel=1e-9, abs=1e-9 * expected.cost * records.rows)


def test_evaluation_by_hand() -> None:
    confidence = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.4], [0.7, 0.9]], np.float32)
    agrees = np.array([[True, True], [True, False], [False, False], [False, True]])
    records, costs = Records(confidence, agrees), Costs(np.array([1.0, 2.0, 4.0]), np.array([0.5, 0.25]))
    assert exits_taken(records, (0, 1), (0.6, 0.5)).tolist() == [0, 1, 2, 0]
    assert disagreement(records, (0, 1), (0.6, 0.5)) == 0.5
    assert expected_cost(records, costs, (0, 1), (0.6, 0.5)) == (1.5 + 3.75 + 7.75 + 1.5) / 4
    assert equation_4_score(records, costs, (0, 1), (0.6, 0.5)) == 28 - 14.5
    assert oracle_cost(records, costs) == (1 + 1 + 7 + 3) / 4


@given(cases())
def test_no_plan_beats_the_oracle(case: tuple[Records, Costs]) -> None:
    records, costs = case
    reach = np.cumsum(costs.segment)
    best = [next((reach[i] for i, yes in enumerate(row) if yes), reach[-1]) for row in records.agrees]
    assert oracle_cost(records, costs) == pytest.approx(np.mean(best), rel=1e-9)
    assert at_most(oracle_cost(records, costs), joint(records, costs, 0.0).expected_cost)


@given(cases(most_candidates=1), some_tolerance)
def test_equation_3_equals_brute_force(case: tuple[Records, Costs], budget: float) -> None:
    confidence, agrees = case[0].confidence[:, 0], case[0].agrees[:, 0]
    threshold = equation_3_threshold(confidence, agrees, budget)
    assert threshold == math.inf or float(np.float32(threshold)) == threshold
    assert np.float32(threshold) not in confidence
    leaving = confidence >= np.float32(threshold)
    assert (leaving & ~agrees).sum() / len(agrees) <= budget
    values = np.unique(confidence)
    for lower, upper in zip([-math.inf, *values.tolist()], values.tolist(), strict=False):
        parted = np.float32((max(lower, -1.0) + upper) / 2)
        if lower < parted < upper and parted < threshold and not np.array_equal(leaving, confidence >= parted):
            assert ((confidence >= parted) & ~agrees).sum() / len(agrees) > budget


def test_equation_3_by_hand() -> None:
    confidence = np.array([0.5, 0.75, 0.25, 1.0], np.float32)
    agrees = np.array([False, True, True, True])
    assert equation_3_threshold(confidence, agrees, 0.0) == 0.625
    assert equation_3_threshold(confidence, agrees, 0.24) == 0.625
    assert 0.24 < equation_3_threshold(confidence, agrees, 0.25) < 0.25 - 1e-4
    assert equation_3_threshold(confidence, ~agrees, 0.0) == math.inf
    tied = np.array([0.75, 0.75, 0.25], np.float32)
    assert equation_3_threshold(tied, np.array([True, False, True]), 0.0) == math.inf


@given(cases(), some_tolerance)
def test_every_policy_keeps_the_tolerance_and_joint_is_never_dearer(
    case: tuple[Records, Costs], tolerance: float
) -> None:
    records, costs = case
    found = {name: select(name, records, costs, tolerance) for name in POLICIES}
    for name, selection in found.items():
        assert (selection.policy, selection.tolerance) == (name, tolerance)
        check(records, costs, selection)
    assert found["joint"].expected_cost <= min(found["geometric"].expected_cost, found["equal"].expected_cost)


def subset_scores(records: Records, costs: Costs, tolerance: float, share: str) -> float:
    """The best K of Eq. 4 over all subsets with the thresholds of Eq. 3, from the public functions alone."""
    best = 0.0
    for bits in range(2**records.candidates):
        chosen = [i for i in range(records.candidates) if bits >> i & 1]
        thresholds = [
            equation_3_threshold(
                records.confidence[:, i],
                records.agrees[:, i],
                tolerance / (2**n if share == "geometric" else len(chosen)),
            )
            for n, i in enumerate(chosen, 1)
        ]
        best = max(best, equation_4_score(records, costs, chosen, thresholds))
    return best


@settings(max_examples=40)
@given(cases(), st.sampled_from([0.0, 0.05, 0.2, 0.5]), st.sampled_from(["geometric", "equal"]))
def test_the_budgeted_policies_take_the_best_subset(case: tuple[Records, Costs], tolerance: float, name: str) -> None:
    records, costs = case
    found = select(name, records, costs, tolerance)
    score = equation_4_score(records, costs, found.chosen, found.thresholds)
    best = subset_scores(records, costs, tolerance, name)
    assert score == pytest.approx(best, rel=1e-9, abs=1e-9 * costs.segment.sum() * records.rows)
    for n, (i, threshold) in enumerate(zip(found.chosen, found.thresholds, strict=True), 1):
        budget = tolerance / (2**n if name == "geometric" else len(found.chosen))
        assert threshold == equation_3_threshold(records.confidence[:, i], records.agrees[:, i], budget)


@pytest.mark.parametrize("tolerance", [0.002, 0.01, 0.05])
@pytest.mark.parametrize("name", ["geometric", "equal"])
def test_growing_a_subset_comes_close_to_trying_all(
    name: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, costs = simulated(2000, 9, seed=5)
    exact = select(name, records, costs, tolerance)
    monkeypatch.setattr("offramp.runtime.selection.policies.EXHAUSTIVE", 0)
    grown = select(name, records, costs, tolerance)
    assert exact.expected_cost <= grown.expected_cost <= 1.01 * exact.expected_cost
    assert exact.expected_cost < costs.segment.sum()


@given(cases(), some_tolerance, st.integers(0, 99))
def test_the_order_of_the_rows_is_irrelevant(case: tuple[Records, Costs], tolerance: float, seed: int) -> None:
    records, costs = case
    shuffle = np.random.default_rng(seed).permutation(records.rows)
    shuffled = Records(records.confidence[shuffle], records.agrees[shuffle])
    for name in POLICIES:
        assert select(name, shuffled, costs, tolerance) == select(name, records, costs, tolerance)


@pytest.mark.parametrize("name", POLICIES)
def test_the_unit_of_the_costs_is_irrelevant(name: str) -> None:
    records, costs = simulated(500, 6, seed=8)
    found = select(name, records, costs, 0.02)
    flops = select(name, records, Costs(costs.segment * 2.0**30, costs.head * 2.0**30), 0.02)
    assert (flops.chosen, flops.thresholds) == (found.chosen, found.thresholds)
    assert flops.expected_cost == pytest.approx(found.expected_cost * 2.0**30)


@pytest.mark.parametrize("name", POLICIES)
def test_all_agree_leaves_at_the_first_exit(name: str) -> None:
    records, costs = simulated(50, 3, seed=1)
    found = select(name, Records(records.confidence, np.ones((50, 3), np.bool_)), costs, 0.0)
    assert found.chosen == (0,)
    assert found.thresholds[0] < records.confidence[:, 0].min()
    assert found.expected_cost == pytest.approx(costs.segment[0] + costs.head[0])


@pytest.mark.parametrize("name", POLICIES)
def test_none_agree_gives_no_exits(name: str) -> None:
    records, costs = simulated(50, 3, seed=1)
    found = select(name, Records(records.confidence, np.zeros((50, 3), np.bool_)), costs, 0.019)
    assert (found.chosen, found.thresholds, found.risk) == ((), (), 0.0)
    assert found.expected_cost == pytest.approx(costs.segment.sum())


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("agrees", [True, False])
def test_one_row(name: str, agrees: bool) -> None:
    records = Records(np.array([[0.5]], np.float32), np.array([[agrees]]))
    costs = Costs(np.array([1.0, 9.0]), np.array([0.5]))
    assert select(name, records, costs, 0.0).chosen == ((0,) if agrees else ())
    assert select(name, records, costs, 1.0).expected_cost == (1.5 if agrees or name != "geometric" else 10.0)


@pytest.mark.parametrize("name", POLICIES)
def test_zero_tolerance_still_lets_the_sure_rows_go(name: str) -> None:
    records, costs = simulated(400, 5, seed=2)
    found = select(name, records, costs, 0.0)
    assert found.risk == 0.0
    assert found.chosen
    assert found.expected_cost < costs.segment.sum()


@pytest.mark.parametrize("name", POLICIES)
@given(st.integers(0, 999), some_tolerance)
@settings(max_examples=15)
def test_a_head_dearer_than_what_it_saves_is_never_chosen(name: str, seed: int, tolerance: float) -> None:
    records, costs = simulated(60, 4, seed)
    behind = costs.segment.sum() - np.cumsum(costs.segment)
    head = costs.head.copy()
    head[1] = 1.001 * behind[1]
    assert 1 not in select(name, records, Costs(costs.segment, head), tolerance).chosen


def test_budgets_that_only_sum_to_the_tolerance_by_rounding_stay_within_it() -> None:
    # An ulp below 3/12, divided by 3, rounds to 1/12: each exit may lose one row of 12, but not all three.
    own = np.arange(12)[:, None] % 3 == np.arange(3)
    confidence = np.where(own, 0.9, 0.1).astype(np.float32)
    agrees = own & (np.arange(12)[:, None] >= 3)
    records, costs = Records(confidence, agrees), Costs(np.array([1.0, 1.0, 1.0, 7.0]), np.full(3, 0.01))
    below = float(np.nextafter(0.25, 0.0))
    assert below < 3 * (1 / 12)
    assert below / 3 >= 1 / 12
    full = equal(records, costs, 0.25)
    assert (full.chosen, full.risk) == ((0, 1, 2), 0.25)
    for name in POLICIES:
        assert select(name, records, costs, below).risk <= below
    assert joint(records, costs, below).risk == 2 / 12


def test_a_backbone_that_costs_nothing_gets_no_exits() -> None:
    records, costs = simulated(20, 2, seed=0)
    with np.errstate(all="raise"):
        for name in POLICIES:
            assert select(name, records, Costs(np.zeros(3), costs.head), 0.5).chosen == ()


@pytest.mark.parametrize("tolerance", [-0.01, 1.01, math.nan, math.inf])
def test_a_tolerance_outside_the_unit_interval_is_refused(tolerance: float) -> None:
    records, costs = simulated(10, 2, seed=0)
    for name in POLICIES:
        with pytest.raises(UsageError, match=r"tolerance .* from 0 to 1"):
            select(name, records, costs, tolerance)
    with pytest.raises(UsageError, match="budget"):
        equation_3_threshold(records.confidence[:, 0], records.agrees[:, 0], tolerance)


def test_an_unknown_policy_is_refused_with_the_names() -> None:
    records, costs = simulated(10, 2, seed=0)
    with pytest.raises(UsageError, match="'best' does not exist; choose one of geometric, equal, joint"):
        select("best", records, costs, 0.1)


@pytest.mark.parametrize(
    ("confidence", "agrees", "said"),
    [
        (np.zeros((0, 2), np.float32), np.zeros((0, 2), np.bool_), "neither of them 0"),
        (np.zeros((2, 0), np.float32), np.zeros((2, 0), np.bool_), "neither of them 0"),
        (np.zeros(2, np.float32), np.zeros(2, np.bool_), r"\[rows, candidates\]"),
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.bool_), "make them alike"),
        (np.zeros((2, 3)), np.zeros((2, 3), np.bool_), "cast to float32"),
        (np.zeros((2, 3), np.float32), np.zeros((2, 3)), "bool"),
        (np.full((2, 3), 1.5, np.float32), np.zeros((2, 3), np.bool_), "outside"),
        (np.full((2, 3), np.nan, np.float32), np.zeros((2, 3), np.bool_), "not a number"),
    ],
)
def test_records_that_cannot_be_are_refused(
    confidence: NDArray[np.float32], agrees: NDArray[np.bool_], said: str
) -> None:
    with pytest.raises(InputError, match=said) as refusal:
        Records(confidence, agrees)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("segment", "head", "said"),
    [
        (np.ones(3), np.ones(3), "one segment more"),
        (np.ones((3, 1)), np.ones(2), "vector"),
        (np.ones(3, np.int64), np.ones(2), "int64"),
        (np.array([1, -1, 1.0]), np.ones(2), "segment has a negative"),
        (np.ones(3), np.array([1, np.inf]), "head has a negative or non-finite"),
    ],
)
def test_costs_that_cannot_be_are_refused(segment: Floats, head: Floats, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Costs(segment, head)


def test_costs_of_other_candidates_are_refused() -> None:
    records, _ = simulated(10, 2, seed=0)
    with pytest.raises(InputError, match="3 heads for 2 recorded candidates"):
        joint(records, Costs(np.ones(4), np.ones(3)), 0.1)
