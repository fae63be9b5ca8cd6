"""The certificate: exact, spent once, and kept on simulated data with known risk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from offramp.runtime.errors import InputError, UsageError
from offramp.runtime.selection import (
    REGRET,
    Costs,
    Records,
    certified,
    disagreement,
    exits_taken,
    plan_path,
    realised_risk,
    rows_needed,
    upper_bound,
    walk,
)

COSTS = Costs(np.array([0.3, 0.3, 0.4]), np.array([0.01, 0.01]))
TOLERANCE, DELTA = 0.05, 0.2


def population(rows: int, seed: int) -> Records:
    """Two candidates, confidences that are right about the agreement they promise, the deeper one surer."""
    generator = np.random.default_rng(seed)
    ease = generator.beta(2, 1, rows)
    confidence = np.stack([ease, np.minimum(1, ease + 0.2)], 1).astype(np.float32)
    return Records(confidence, generator.random((rows, 2)) < confidence)


@given(st.integers(0, 40), st.integers(1, 400), st.floats(0.01, 0.5), st.floats(0.01, 0.3))
def test_the_test_passes_exactly_when_the_bound_is_within_the_tolerance(
    observed: int, rows: int, tolerance: float, delta: float
) -> None:
    bound = upper_bound(min(observed, rows), rows, delta)
    if abs(bound - tolerance) > 1e-9:
        assert (binom.cdf(min(observed, rows), rows, tolerance) <= delta) == (bound < tolerance)


def test_as_many_rows_as_the_design_says_certify_one_percent() -> None:
    assert rows_needed(0.01, 0.05) == 299
    with pytest.raises(UsageError, match="certified by no number of rows"):
        rows_needed(0.0, 0.05)
    assert upper_bound(0, 299, 0.05) <= 0.01 < upper_bound(0, 298, 0.05)


def test_the_path_goes_from_timid_to_bold() -> None:
    selected = population(2000, 1)
    path = list(plan_path(selected, COSTS, TOLERANCE))
    assert len(path) > 5
    costs = [plan.expected_cost for plan in path]
    assert costs == sorted(costs, reverse=True)
    left = [int((exits_taken(selected, p.chosen, p.thresholds) < len(p.chosen)).sum()) for p in path]
    assert left[0] < left[-1]


def test_the_plan_found_is_the_last_of_the_path_before_the_first_that_fails() -> None:
    selected, held_out = population(2000, 1), population(1000, 2)
    found = certified(selected, held_out, COSTS, TOLERANCE, DELTA)
    bounds = []
    for plan in plan_path(selected, COSTS, TOLERANCE):
        observed = round(disagreement(held_out, plan.chosen, plan.thresholds) * held_out.rows)
        bounds.append((upper_bound(observed, held_out.rows, DELTA), plan))
    passed = next(i for i, (bound, _) in enumerate(bounds) if bound > TOLERANCE)
    assert passed > 0
    assert found.selection == bounds[passed - 1][1]
    assert found.bound == bounds[passed - 1][0] <= TOLERANCE
    assert found.rows == 1000


def test_the_promise_is_kept_on_simulated_data() -> None:
    """Of 500 certificates at delta, no more than delta are wrong, within binomial error; a joint plan's are more."""
    truth = population(200_000, 99)
    selected = population(1500, 3)
    path = list(plan_path(selected, COSTS, TOLERANCE))
    risks = [disagreement(truth, p.chosen, p.thresholds) for p in path]
    broken = 0
    for seed in range(500):
        found = walk(path, population(500, 1000 + seed), COSTS, TOLERANCE, DELTA).selection
        broken += bool(found.chosen) and risks[path.index(found)] > TOLERANCE
    assert broken <= binom.ppf(0.999, 500, DELTA)
    assert max(risks) > TOLERANCE  # else nothing could have been broken


def test_the_promise_is_kept_on_regret() -> None:
    """The same for a risk that is a mean: 500 certificates, and plans bold enough to break it."""

    def costly(rows: int, seed: int) -> Records:
        said = population(rows, seed)
        lost = np.random.default_rng(seed).beta(2, 1, said.agrees.shape).astype(np.float32)
        return replace(said, regret=np.where(said.agrees, np.float32(0), lost), kind=REGRET)

    truth = costly(200_000, 99)
    path = list(plan_path(costly(1500, 3), COSTS, TOLERANCE))
    risks = [realised_risk(truth, p.chosen, p.thresholds) for p in path]
    found = [walk(path, costly(500, 1000 + seed), COSTS, TOLERANCE, DELTA) for seed in range(500)]
    broken = sum(bool(f.selection.chosen) and risks[path.index(f.selection)] > TOLERANCE for f in found)
    assert broken <= binom.ppf(0.999, 500, DELTA)
    assert max(risks) > TOLERANCE
    assert sum(bool(f.selection.chosen) for f in found) > 250, "nor is it kept by promising nothing"
    assert all(f.bound <= TOLERANCE for f in found if f.selection.chosen)


def test_a_hopeless_case_gets_no_exits() -> None:
    generator = np.random.default_rng(0)
    confidence = np.full((500, 2), 0.99, np.float32) - generator.random((500, 2)).astype(np.float32) / 100
    hopeless = Records(confidence, np.zeros((500, 2), np.bool_))
    found = certified(hopeless, hopeless, COSTS, TOLERANCE, DELTA)
    assert found.selection.chosen == ()
    assert (found.observed, found.bound) == (0, 0.0)


def test_tolerance_zero_is_the_backbone_and_needs_no_rows() -> None:
    found = certified(population(50, 0), population(5, 1), COSTS, 0.0)
    assert found.selection.chosen == ()
    assert found.selection.expected_cost == pytest.approx(1.0)


def test_too_few_rows_are_refused_with_the_number_needed() -> None:
    with pytest.raises(
        InputError, match=r"298 rows cannot certify a tolerance of 0\.01 at delta 0\.05: 299 are needed"
    ):
        certified(population(100, 0), population(298, 1), COSTS, 0.01)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, float("nan")])
def test_refused_deltas(delta: float) -> None:
    with pytest.raises(UsageError, match="is not a probability"):
        certified(population(100, 0), population(100, 1), COSTS, 0.1, delta)
