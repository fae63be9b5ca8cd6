"""Exit selection: every policy keeps its promise on its records, and `joint` is as good as trying all."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from offramp.runtime.errors import InputError, UsageError
from offramp.runtime.selection import (
    POLICIES,
    Costs,
    Records,
    Selection,
    disagreement,
    equal,
    equation_3_threshold,
    equation_4_score,
    exits_taken,
    expected_cost,
    geometric,
    joint,
    oracle_cost,
    select,
)
from offramp.runtime.selection.joint import Ints, _descend, _evaluate, _limit, _Problem, column
from offramp.runtime.selection.policies import EXHAUSTIVE

Floats = NDArray[np.float64]
TOLERANCES = (0.0, 0.03, 0.1, 0.29, 1 / 3, float(np.nextafter(0.3, 0.0)), 1.0)
steady = settings(deadline=None)  # the time of one example says nothing on a busy machine
some_tolerance = st.sampled_from(TOLERANCES)


def simulated(rows: int, candidates: int, seed: int, head: float = 0.02, digits: int = 9) -> tuple[Records, Costs]:
    """Rows share a difficulty over all exits, deeper exits agree more, confidence follows agreement."""
    rng = np.random.default_rng(seed)
    depth = np.linspace(-0.5, 2.2, candidates)
    ease = depth - rng.normal(size=(rows, 1)) + 0.6 * rng.normal(size=(rows, candidates))
    agrees = rng.random((rows, candidates)) < 1 / (1 + np.exp(-2.2 * ease - 0.8))
    logit = 2 * ease + 0.8 * rng.normal(size=(rows, candidates)) + 1.2 * (agrees - 0.5)
    confidence = np.round(1 / (1 + np.exp(-logit)), digits).astype(np.float32)
    segment = rng.uniform(0.5, 1.5, candidates + 1)
    return Records(confidence, agrees), Costs(segment / segment.sum(), head * rng.uniform(0.5, 1.5, candidates))


@st.composite
def cases(draw: st.DrawFn, most_rows: int = 40, most_candidates: int = 4) -> tuple[Records, Costs]:
    """Anything legal: ties, zeros and ones, neighbouring float32 values, free and ruinous heads."""
    rows, candidates = draw(st.integers(1, most_rows)), draw(st.integers(1, most_candidates))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["any", "ties", "edges", "simulated"]))
    if kind == "simulated":
        return simulated(rows, candidates, seed)
    confidence = rng.random((rows, candidates), np.float32)
    if kind == "ties":
        confidence = np.round(confidence, 1)
    elif kind == "edges":
        close = np.array([0, 1e-45, 0.5, 0.5 + 2**-24, 0.5 + 2**-23, 1], np.float32)
        confidence = rng.choice(close, (rows, candidates))
    agrees = rng.random((rows, candidates)) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    scale = draw(st.sampled_from([1e-6, 1.0, 1e12]))
    segment = scale * rng.integers(0, 5, candidates + 1).astype(np.float64)
    return Records(confidence, agrees), Costs(segment, scale * rng.choice([0.0, 0.01, 0.3, 20.0], candidates))


@dataclass(frozen=True)
class Slow:
    """The semantics a row at a time, written without looking at the code under test."""

    taken: list[int]
    cost: float
    risk: float


def slow(records: Records, costs: Costs, chosen: Sequence[int], thresholds: Sequence[float]) -> Slow:
    taken, cost, wrong = [], 0.0, 0
    for row in range(len(records.confidence)):
        depth, exit_ = 0, len(chosen)
        for position, candidate in enumerate(chosen):
            cost += sum(costs.segment[depth : candidate + 1]) + costs.head[candidate]
            depth = candidate + 1
            if records.confidence[row, candidate] >= thresholds[position]:
                exit_ = position
                wrong += not records.agrees[row, candidate]
                break
        else:
            cost += sum(costs.segment[depth:])
        taken.append(exit_)
    return Slow(taken, cost / len(taken), wrong / len(taken))


def cheapest(records: Records, costs: Costs, tolerance: float) -> float:
    """The least expected cost of any subset with any thresholds, by trying them all."""
    rows, candidates = records.confidence.shape
    reach = np.cumsum(costs.segment)
    best = math.inf

    def deeper(i: int, here: NDArray[np.intp], cost: float, wrong: int) -> None:
        nonlocal best
        if cost >= best or wrong / rows > tolerance:
            return
        if i == candidates:
            best = min(best, cost + len(here) * reach[-1])
            return
        deeper(i + 1, here, cost, wrong)
        for value in np.unique(records.confidence[here, i]):
            go = here[records.confidence[here, i] >= value]
            stay = here[records.confidence[here, i] < value]
            paid = len(here) * costs.head[i] + len(go) * reach[i]
            deeper(i + 1, stay, cost + paid, wrong + int((~records.agrees[go, i]).sum()))

    deeper(0, np.arange(rows), 0.0, 0)
    return float(best / rows)


def at_most(cost: float, bound: float) -> bool:
    return cost <= bound * (1 + 1e-12)


def check(records: Records, costs: Costs, found: Selection) -> None:
    """What holds of any selection on its own records."""
    expected = slow(records, costs, found.chosen, found.thresholds)
    assert found.risk == expected.risk <= found.tolerance
    assert found.expected_cost == pytest.approx(expected.cost, rel=1e-9)
    assert list(found.chosen) == sorted(set(found.chosen))
    assert len(found.thresholds) == len(found.chosen)
    for candidate, threshold in zip(found.chosen, found.thresholds, strict=True):
        assert math.isfinite(threshold)  # an exit that lets nobody go is only a cost
        assert float(np.float32(threshold)) == threshold
        assert np.float32(threshold) not in records.confidence[:, candidate]
    assert at_most(found.expected_cost, costs.segment.sum())


@steady
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


@steady
@given(cases())
def test_no_plan_beats_the_oracle(case: tuple[Records, Costs]) -> None:
    records, costs = case
    reach = np.cumsum(costs.segment)
    best = [next((reach[i] for i, yes in enumerate(row) if yes), reach[-1]) for row in records.agrees]
    assert oracle_cost(records, costs) == pytest.approx(np.mean(best), rel=1e-9)
    assert at_most(oracle_cost(records, costs), joint(records, costs, 0.0).expected_cost)


@steady
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


@steady
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


@pytest.mark.parametrize("candidates", [EXHAUSTIVE, EXHAUSTIVE + 4])
def test_joint_saves_where_candidates_are_many(candidates: int) -> None:
    records, costs = simulated(2000, candidates, seed=3)
    found = {name: select(name, records, costs, 0.01) for name in POLICIES}
    for selection in found.values():
        check(records, costs, selection)
    assert found["joint"].expected_cost < 0.95 * found["geometric"].expected_cost
    assert found["joint"].expected_cost > oracle_cost(records, costs)


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


@settings(max_examples=40, deadline=None)
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


def test_joint_finds_the_optimum_of_small_records() -> None:
    gaps = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        rows, candidates = int(rng.integers(5, 41)), int(rng.integers(1, 4))
        records, costs = simulated(rows, candidates, seed, head=0.04, digits=1 if seed % 3 == 0 else 9)
        tolerance = TOLERANCES[seed % 5]
        gaps.append(joint(records, costs, tolerance).expected_cost / cheapest(records, costs, tolerance) - 1)
    assert min(gaps) >= -1e-12
    assert max(gaps) <= 0.01
    assert float(np.mean(np.array(gaps) < 1e-9)) >= 0.99


@settings(max_examples=60, deadline=None)
@given(cases(most_rows=15, most_candidates=3), some_tolerance)
def test_joint_never_claims_less_than_the_optimum(case: tuple[Records, Costs], tolerance: float) -> None:
    # Adjacent float32 confidences cannot be parted, so the optimum may be out of reach here, never beaten.
    records, costs = case
    assert at_most(cheapest(records, costs, tolerance), joint(records, costs, tolerance).expected_cost)


@steady
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
@settings(max_examples=15, deadline=None)
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


@steady
@given(st.integers(1, 500), st.data())
def test_the_limit_is_the_most_whole_rows_within_the_tolerance(rows: int, data: st.DataObject) -> None:
    # 0.29 x 100 is 28.999..., and an ulp below 5/25, times 25, is 5.
    exact = data.draw(st.integers(0, rows)) / rows
    tolerance = data.draw(st.sampled_from([exact, max(0.0, float(np.nextafter(exact, 0.0)))]))
    most = max(count for count in range(rows + 1) if count / rows <= tolerance)
    assert math.floor(_limit(tolerance, rows)) == most
    assert _limit(tolerance, rows) / rows <= tolerance


@steady
@given(cases(), st.integers(0, 2**24))
def test_a_descent_ends_where_no_single_cut_helps(case: tuple[Records, Costs], weight: int) -> None:
    records, costs = case
    columns = tuple(column(records.confidence[:, i], records.risk[:, i]) for i in range(records.candidates))
    whole = 2**20 / max(costs.reach[-1], 1e-9)
    risk = np.ascontiguousarray(records.risk.T)
    problem = _Problem(columns, risk, np.rint(whole * costs.reach), np.rint(whole * costs.head), 0.0)

    def price(cuts: Ints) -> float:
        cost, wrong = _evaluate(problem, cuts)
        return cost + weight * wrong

    for start in (0, records.rows):
        end = _descend(problem, np.full(records.candidates, start), float(weight))
        for i, entry in enumerate(columns):
            for cut in (0, *entry.ends.tolist()):
                assert price(end) <= price(np.where(np.arange(records.candidates) == i, cut, end))


def test_moves_of_two_exits_find_what_single_ones_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    records, costs = simulated(300, 8, seed=37)
    both = joint(records, costs, 0.02).expected_cost
    # The package exports a function of the module's name, so the module is asked for by its own.
    monkeypatch.setattr(importlib.import_module("offramp.runtime.selection.policies"), "WORK", 0.0)
    assert both < 0.98 * joint(records, costs, 0.02).expected_cost


def test_joint_spends_what_the_fixed_split_cannot() -> None:
    # One exit may use the whole tolerance; the geometric split gives the first one only half of it.
    confidence = np.linspace(1, 0.1, 10, dtype=np.float32)[:, None]
    records = Records(confidence, np.arange(10)[:, None] != 4)
    costs = Costs(np.array([1.0, 9.0]), np.array([0.1]))
    assert geometric(records, costs, 0.1).expected_cost == pytest.approx(0.1 + 0.4 * 1 + 0.6 * 10)
    assert joint(records, costs, 0.1).expected_cost == pytest.approx(1.1)


def test_a_risk_between_zero_and_one_is_kept_too() -> None:
    class Graded(Records):
        @property
        def risk(self) -> Floats:
            return np.where(self.agrees, 0.0, 0.3 + 0.1 * self.confidence).astype(np.float64)

    plain, costs = simulated(300, 4, seed=4)
    graded = Graded(plain.confidence, plain.agrees)
    found = {name: select(name, graded, costs, 0.02) for name in POLICIES}
    for selection in found.values():
        taken = exits_taken(graded, selection.chosen, selection.thresholds)
        risk = [graded.risk[r, selection.chosen[e]] for r, e in enumerate(taken) if e < len(selection.chosen)]
        assert 0.0 < sum(risk) / 300 <= 0.02
        assert selection.risk == pytest.approx(sum(risk) / 300)
    assert found["joint"].expected_cost <= min(found["geometric"].expected_cost, found["equal"].expected_cost)
    assert found["joint"].expected_cost < joint(plain, costs, 0.02).expected_cost


def test_thirty_candidates_and_twenty_thousand_rows() -> None:
    records, costs = simulated(20_000, 30, seed=9)
    found, plain = joint(records, costs, 0.01), geometric(records, costs, 0.01)
    taken = exits_taken(records, found.chosen, found.thresholds)
    left = np.flatnonzero(taken < len(found.chosen))
    wrong = ~records.agrees[left, np.asarray(found.chosen)[taken[left]]]
    assert found.risk == wrong.sum() / 20_000 <= 0.01
    assert oracle_cost(records, costs) < found.expected_cost < 0.9 * plain.expected_cost
    for candidate, threshold in zip(found.chosen, found.thresholds, strict=True):
        assert np.float32(threshold) not in records.confidence[:, candidate]


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
