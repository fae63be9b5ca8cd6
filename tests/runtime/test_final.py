"""Last stages of lower precision: their own changed answers count in every risk, promise and refusal."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from offramp.runtime.errors import InputError, ToleranceError
from offramp.runtime.selection import (
    POLICIES,
    REGRET,
    Costs,
    Records,
    certified,
    disagreement,
    plan_path,
    plan_without_exits,
    plans_over,
    realised_risk,
    select,
    upper_bound,
    walk,
)

COSTS = Costs(np.array([0.3, 0.3, 0.4]), np.array([0.01, 0.01]))
TOLERANCE, DELTA = 0.05, 0.2


def population(rows: int, seed: int, changed: float) -> Records:
    """Two candidates, confidences that are right about the agreement they promise; `changed` of the rows at the end."""
    generator = np.random.default_rng(seed)
    ease = generator.beta(2, 1, rows)
    confidence = np.stack([ease, np.minimum(1, ease + 0.2)], 1).astype(np.float32)
    agrees = generator.random((rows, 2)) < confidence
    final = generator.random(rows) < changed
    lost = np.where(final, generator.random(rows), 0).astype(np.float32)
    regret = np.where(agrees, 0, generator.random((rows, 2))).astype(np.float32)
    return Records(confidence, agrees, regret=regret, final=final, final_regret=lost)


HAND = Records(
    np.array([[0.9], [0.8], [0.2], [0.1]], np.float32),
    np.array([[True], [False], [True], [True]]),
    regret=np.array([[0.0], [0.25], [0.0], [0.0]], np.float32),
    final=np.array([True, False, True, False]),
    final_regret=np.array([0.5, 0.0, 0.125, 0.0], np.float32),
)


def test_rows_that_reach_the_end_count_and_rows_that_left_before_it_do_not() -> None:
    assert disagreement(HAND, (), ()) == 0.5
    assert disagreement(HAND, (0,), (0.85,)) == 0.25, "row 0 left early and agrees, row 2 is changed at the end"
    assert disagreement(HAND, (0,), (0.5,)) == 0.5, "row 1 left early and disagrees"
    assert disagreement(HAND, (0,), (0.0,)) == 0.25
    assert realised_risk(replace(HAND, kind=REGRET), (0,), (0.5,)) == pytest.approx((0.25 + 0.125) / 4)
    assert realised_risk(replace(HAND, predicted=True), (), ()) == 0.5, "nothing predicts it: it is observed"


def test_parts_of_records_keep_their_own_rows() -> None:
    some = HAND.of(np.array([2, 1]))
    assert some.final is not None
    assert some.final.tolist() == [True, False]
    assert some.final_risk.tolist() == [1.0, 0.0]
    assert HAND.among([0]).final_risk.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert {"final", "final_regret"} <= HAND.arrays().keys()


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from(list(POLICIES)), st.sampled_from(["disagreement", "regret"]))
def test_policies_keep_exits_and_precision_together_within_the_tolerance(seed: int, policy: str, kind: str) -> None:
    kept = replace(population(300, seed, 0.02), kind=kind)
    alone = realised_risk(kept, (), ())
    for tolerance in (0.01, 0.03, 0.1):
        if alone > tolerance:
            with pytest.raises(ToleranceError, match=r"lower precision alone changes .* raise the tolerance"):
                select(policy, kept, COSTS, tolerance)
            continue
        found = select(policy, kept, COSTS, tolerance)
        assert found.risk == realised_risk(kept, found.chosen, found.thresholds) <= tolerance + 1e-12
        exact = select(policy, replace(kept, final=None, final_regret=None), COSTS, tolerance - alone)
        assert (found.chosen, found.thresholds) == (exact.chosen, exact.thresholds)


def test_a_certificate_is_of_exits_and_precision_together() -> None:
    selected, held_out = population(2000, 1, 0.01), population(1000, 2, 0.01)
    found = certified(selected, held_out, COSTS, TOLERANCE, DELTA)
    chosen = found.selection
    assert chosen.chosen
    counted = round(disagreement(held_out, chosen.chosen, chosen.thresholds) * 1000)
    assert (
        found.observed
        == counted
        > round(disagreement(replace(held_out, final=None, final_regret=None), chosen.chosen, chosen.thresholds) * 1000)
    )
    assert found.bound == upper_bound(counted, 1000, DELTA) <= TOLERANCE


def test_without_exits_the_precision_wants_evidence_of_its_own() -> None:
    held_out = population(1000, 2, 0.01)
    changed = int(held_out.final_risk.sum())
    found = walk((), held_out, COSTS, TOLERANCE, DELTA)
    assert (found.selection.chosen, found.observed) == ((), changed)
    assert found.bound == upper_bound(changed, 1000, DELTA) <= TOLERANCE
    with pytest.raises(
        ToleranceError, match=r"on 1000 certification rows\), which cannot certify a tolerance of 0.005"
    ):
        walk((), held_out, COSTS, 0.005, DELTA)
    with pytest.raises(ToleranceError):
        certified(population(500, 1, 0.0), held_out, COSTS, 0.005, DELTA)
    with pytest.raises(ToleranceError):
        certified(population(500, 1, 0.2), population(1000, 2, 0.0), COSTS, TOLERANCE, DELTA)


def test_the_promise_is_kept_on_simulated_data() -> None:
    """Of 500 certificates at delta no more than delta are wrong, those without exits among them."""
    path = list(plan_path(population(600, 3, 0.01), COSTS, TOLERANCE))
    for changed in (0.01, 0.055):
        truth = population(200_000, 99, changed)
        broken = 0
        for seed in range(500):
            try:
                found = walk(path, population(500, 1000 + seed, changed), COSTS, TOLERANCE, DELTA).selection
            except ToleranceError:
                continue
            broken += disagreement(truth, found.chosen, found.thresholds) > TOLERANCE
        assert broken <= binom.ppf(0.999, 500, DELTA), changed


def test_tolerances_that_the_precision_breaks_have_no_plan() -> None:
    recorded = {"select": population(1000, 1, 0.02), "certify": population(1000, 2, 0.02)}
    asked = (0.0025, 0.01, 0.05, 0.1, 1.0)
    for policy in ("joint", "certified"):
        plans = plans_over(recorded, COSTS, asked, policy, DELTA, 1)
        assert [plan.tolerance for plan in plans] == [0.05, 0.1, 1.0]
        with pytest.raises(ToleranceError):
            plans_over(recorded, COSTS, asked, policy, DELTA, 1, needed=0.01)
    assert all(plan.certificate is not None and plan.certificate.bound <= plan.tolerance for plan in plans)


def test_a_plan_without_exits_is_certified_where_it_claims_anything() -> None:
    recorded = {"select": population(1000, 1, 0.02), "certify": population(1000, 2, 0.02)}
    plan = plan_without_exits(recorded, COSTS, TOLERANCE, "certified", DELTA, 2)
    assert plan.limits == (math.inf, math.inf)
    assert plan.certificate is not None
    assert plan.certificate.observed == recorded["certify"].final_risk.sum()
    assert plan_without_exits(recorded, COSTS, TOLERANCE, "joint", DELTA, 2).certificate is None
    exact = {part: replace(kept, final=None, final_regret=None) for part, kept in recorded.items()}
    assert plan_without_exits(exact, COSTS, 0.001, "certified", DELTA, 2).certificate is None
    with pytest.raises(ToleranceError):
        plan_without_exits(recorded, COSTS, 0.001, "joint", DELTA, 2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"final_regret": None}, "one is missing"),
        ({"final": np.zeros(3, np.bool_)}, r"final is bool \[3\]; give bool \[4\]"),
        ({"final": np.zeros(4, np.float32)}, "final is float32"),
        ({"final_regret": np.full(4, 2, np.float32)}, r"final_regret is not float32 \[4\]"),
    ],
)
def test_malformed_records_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        replace(HAND, **settings)  # type: ignore[arg-type]
