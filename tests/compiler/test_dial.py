"""The dial: plans over the exits an artifact has, each within its tolerance, certified where there are rows enough."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import QUICK, Compiled

from offramp.compiler import Costs, Records, select
from offramp.runtime import Session, load
from offramp.runtime.manifest import Plan
from offramp.runtime.selection import (
    CERTIFIED,
    PREDICTED,
    TOLERANCES,
    certified,
    dial,
    disagreement,
    evidence,
    exits_taken,
    expected_cost,
    joint,
    plan_path,
    plans_over,
    rows_needed,
    upper_bound,
)

COSTS = Costs(np.array([2.0, 3.0, 1.0, 4.0]), np.array([0.6, 0.5, 0.4]))  # heads so dear that not all exits pay


def records(rows: int, seed: int) -> Records:
    """Three exits whose confidence is the chance that they agree."""
    rng = np.random.default_rng(seed)
    sure = 1 - rng.random((rows, 3)) ** np.array([2.0, 3.0, 5.0])
    return Records(sure.astype(np.float32), rng.random((rows, 3)) < sure)


def plans(policy: str, rows: int = 2000, seed: int = 0) -> tuple[tuple[int, ...], tuple[Plan, ...], dict[str, Records]]:
    recorded = {"select": records(rows, seed), "certify": records(rows, seed + 1)}
    if policy == "certified":
        found = certified(recorded["select"], recorded["certify"], COSTS, 0.02)
        chosen, certificate, sets = found.selection, evidence(found), found.sets
    else:
        chosen, certificate, sets = select(policy, recorded["select"], COSTS, 0.02), None, 1
    return chosen.chosen, dial(chosen, certificate, recorded, COSTS, TOLERANCES, policy, 0.05, sets), recorded


def limits(plan: Plan) -> tuple[float, ...]:
    return tuple(math.inf if t is None else t for t in plan.thresholds)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(["joint", "equal", "geometric"]))
def test_every_plan_keeps_to_its_tolerance_on_the_rows_it_was_chosen_on(seed: int, policy: str) -> None:
    chosen, made, recorded = plans(policy, 400, seed)
    kept = recorded["select"].among(chosen)
    everyone = tuple(range(len(chosen)))
    assert [p.tolerance for p in made] == (sorted({*TOLERANCES, 0.02}) if chosen else [0.02])
    for plan in made:
        assert (plan.policy, plan.certificate, len(plan.thresholds)) == (policy, None, len(chosen))
        assert disagreement(kept, everyone, limits(plan)) <= plan.tolerance


def test_certificates_are_the_plans_own_and_absent_where_rows_are_too_few() -> None:
    chosen, made, recorded = plans("certified", 500)
    assert chosen, "else there is nothing to turn"
    held_out = recorded["certify"].among(chosen)
    sets = len({plan.chosen for plan in plan_path(recorded["select"], COSTS, 0.02)})
    assert sets > 1, "else the certification rows decide nothing about the exits"
    for plan in made:
        level = 0.05 if plan.tolerance == 0.02 else 0.05 / sets
        if rows_needed(plan.tolerance, level) > 500:
            assert (plan.certificate, plan.policy) == (None, "predicted")
            continue
        assert plan.certificate is not None
        assert plan.certificate.delta == 0.05
        observed = round(disagreement(held_out, range(len(chosen)), limits(plan)) * 500)
        assert plan.certificate.observed == observed
        if any(t is not None for t in plan.thresholds):
            assert plan.certificate.bound == upper_bound(observed, 500, level) <= plan.tolerance
    assert {plan.policy for plan in made} == {"certified", "predicted"}


def test_a_plan_over_some_exits_costs_what_it_costs_over_all() -> None:
    kept = records(300, 3)
    for chosen in [(0,), (2,), (0, 2), (0, 1, 2)]:
        thresholds = (0.7,) * len(chosen)
        own, price = kept.among(chosen), COSTS.among(chosen)
        positions = tuple(range(len(chosen)))
        assert np.array_equal(exits_taken(own, positions, thresholds), exits_taken(kept, chosen, thresholds))
        assert expected_cost(own, price, positions, thresholds) == pytest.approx(
            expected_cost(kept, COSTS, chosen, thresholds)
        )


def test_nothing_to_turn_without_exits() -> None:
    kept = records(50, 0)
    never = Records(kept.confidence, np.zeros_like(kept.agrees))
    none = select("joint", never, COSTS, 0.01)
    assert none.chosen == ()
    made = dial(none, None, {"select": never, "certify": never}, COSTS, TOLERANCES, "joint", 0.05, 1)
    assert [p.tolerance for p in made] == [0.01]


def flops_spent(session: Session, images: np.ndarray, tolerance: float) -> float:
    """Per row, heads asked included: a bolder plan may well let rows go deeper on the average, for less."""
    exits, asked = session.manifest.exits, [*np.isfinite(session.manifest.thresholds(tolerance)), False]
    each = np.cumsum([e.segment_flops + e.head_flops * one for e, one in zip(exits, asked, strict=True)])
    return float(each[session.run(images, tolerance=tolerance).exits].mean())


def test_an_artifact_turns_from_the_backbone_to_bolder_plans(compiled: Compiled) -> None:
    images = compiled.digits.images
    with load(compiled.path, threads=1) as session:
        assert [p.tolerance for p in session.manifest.plans] == sorted({*TOLERANCES, QUICK.tolerance})
        assert session.plan is not None
        assert session.plan.tolerance == QUICK.tolerance
        assert set(session.run(images, tolerance=0).exits) == {session.exits - 1}, "the backbone's own answers"
        spent = [flops_spent(session, images, tolerance) for tolerance in (0.0, 0.01, 0.05)]
        assert spent[0] > spent[1] >= spent[2]


def test_a_predicted_plan_keeps_to_the_tolerance_on_its_own_rows_where_heads_are_too_sure() -> None:
    rng = np.random.default_rng(0)
    sure = rng.random((400, 2), dtype=np.float32)
    agrees = rng.random((400, 2)) < sure * 0.9  # they agree less often than they say
    kept = Records(sure, agrees)
    few = {"select": kept, "certify": kept.of(np.arange(20)), "test": kept}
    costs = Costs(np.array([0.2, 0.3, 0.5]), np.array([0.01, 0.01]))
    (plan,) = plans_over(few, costs, [0.03], CERTIFIED, 0.05, 1)
    assert plan.policy == PREDICTED
    assert disagreement(kept, (0, 1), plan.limits) <= 0.03
    bold = joint(replace(kept, predicted=True), costs, 0.03)
    assert disagreement(kept, bold.chosen, bold.thresholds) > 0.03, "what it would be by prediction alone"
