"""The joint policy: as good as trying all on its own records, and where chances were recorded good on new rows too."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulations import TOLERANCES, Floats, at_most, cases, cheapest, check, simulated, some_tolerance

from offramp.runtime.selection import (
    POLICIES,
    Costs,
    Records,
    Selection,
    exits_taken,
    expected_cost,
    geometric,
    joint,
    oracle_cost,
    realised_risk,
    select,
)
from offramp.runtime.selection.joint import Ints, _descend, _evaluate, _limit, _Problem, column
from offramp.runtime.selection.policies import EXHAUSTIVE


@pytest.mark.parametrize("candidates", [EXHAUSTIVE, EXHAUSTIVE + 4])
def test_joint_saves_where_candidates_are_many(candidates: int) -> None:
    records, costs = simulated(2000, candidates, seed=3)
    found = {name: select(name, records, costs, 0.01) for name in POLICIES}
    for selection in found.values():
        check(records, costs, selection)
    assert found["joint"].expected_cost < 0.95 * found["geometric"].expected_cost
    assert found["joint"].expected_cost > oracle_cost(records, costs)


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


@settings(max_examples=60)
@given(cases(most_rows=15, most_candidates=3), some_tolerance)
def test_joint_never_claims_less_than_the_optimum(case: tuple[Records, Costs], tolerance: float) -> None:
    # Adjacent float32 confidences cannot be parted, so the optimum may be out of reach here, never beaten.
    records, costs = case
    assert at_most(cheapest(records, costs, tolerance), joint(records, costs, tolerance).expected_cost)


@given(st.integers(1, 500), st.data())
def test_the_limit_is_the_most_whole_rows_within_the_tolerance(rows: int, data: st.DataObject) -> None:
    # 0.29 x 100 is 28.999..., and an ulp below 5/25, times 25, is 5.
    exact = data.draw(st.integers(0, rows)) / rows
    tolerance = data.draw(st.sampled_from([exact, max(0.0, float(np.nextafter(exact, 0.0)))]))
    most = max(count for count in range(rows + 1) if count / rows <= tolerance)
    assert math.floor(_limit(tolerance, rows)) == most
    assert _limit(tolerance, rows) / rows <= tolerance


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


def test_moves_of_two_exits_find_what_single_ones_miss() -> None:
    records, costs = simulated(300, 8, seed=37)
    both, single = joint(records, costs, 0.02), joint(records, costs, 0.02, work=0)
    assert both.expected_cost < 0.98 * single.expected_cost


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


def with_chances(rows: int, candidates: int, seed: int) -> tuple[Records, Costs]:
    """Simulated rows whose chances of agreeing are what many other rows of the same confidence did."""
    records, costs = simulated(rows, candidates, seed)
    others, _ = simulated(20_000, candidates, seed=1)
    chance = np.empty_like(records.confidence)
    for i in range(candidates):
        order = np.argsort(others.confidence[:, i])
        sure, agree = (a.reshape(200, -1).mean(1) for a in (others.confidence[order, i], others.agrees[order, i]))
        chance[:, i] = np.interp(records.confidence[:, i], sure, agree)
    return replace(records, chance=chance), costs


@settings(max_examples=40)
@given(cases(), some_tolerance, st.integers(0, 99))
def test_with_any_chances_it_is_never_dearer_either(case: tuple[Records, Costs], tolerance: float, seed: int) -> None:
    records, costs = case
    chance = np.random.default_rng(seed).random(records.confidence.shape, np.float32)
    told = replace(records, chance=chance)
    found = {name: select(name, told, costs, tolerance) for name in POLICIES}
    check(told, costs, found["joint"])
    assert found["joint"].expected_cost <= min(found["geometric"].expected_cost, found["equal"].expected_cost)


def test_with_chances_it_saves_more_than_the_fixed_split_at_the_risk_of_new_rows() -> None:
    fresh, costs = simulated(50_000, 8, seed=2)

    def on_new_rows(found: Selection) -> tuple[float, float]:
        return realised_risk(fresh, *plan(found)), expected_cost(fresh, costs, *plan(found))

    def plan(found: Selection) -> tuple[tuple[int, ...], tuple[float, ...]]:
        return found.chosen, found.thresholds

    samples = [with_chances(1500, 8, seed)[0] for seed in range(10, 16)]
    asked = (0.004, 0.006, 0.008, 0.01, 0.013)
    curve = [np.mean([on_new_rows(joint(s, costs, t)) for s in samples], axis=0) for t in asked]
    risk, cost = np.mean([on_new_rows(geometric(s, costs, 0.01)) for s in samples], axis=0)
    risks, spent = np.array(curve).T
    assert risks[0] < risk < risks[-1]
    assert np.interp(risk, risks, spent) < 0.99 * cost


def test_with_chances_it_fits_the_rows_less() -> None:
    fresh, costs = simulated(50_000, 8, seed=2)
    excess = []
    for seed in range(10, 16):
        records, _ = with_chances(1500, 8, seed)
        for told in (records, replace(records, chance=None)):
            found = joint(told, costs, 0.01)
            excess.append(realised_risk(fresh, found.chosen, found.thresholds) - found.risk)
    assert np.mean(excess[::2]) < 0.7 * np.mean(excess[1::2])


def test_with_chances_thirty_candidates_and_twenty_thousand_rows() -> None:
    records, costs = with_chances(20_000, 30, seed=9)
    found = joint(records, costs, 0.01)
    assert 0.009 < found.risk <= 0.01
    assert found.expected_cost < 0.95 * geometric(records, costs, 0.01).expected_cost
