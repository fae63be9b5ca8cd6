"""Tests and bounds of risks: the binomial as scipy has it, the mean's no bolder than it may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom

from offramp.runtime.errors import InputError, UsageError
from offramp.runtime.selection import DISAGREEMENT, REGRET, RISKS, Records, upper_bound
from offramp.runtime.selection.bounds import binomial_cdf

chances = st.floats(1e-6, 1 - 1e-6)


@given(st.integers(0, 3000), st.integers(1, 3000), chances)
def test_the_binomial_is_scipys(successes: int, trials: int, chance: float) -> None:
    assert binomial_cdf(successes, trials, chance) == pytest.approx(binom.cdf(successes, trials, chance), abs=1e-9)


@given(st.integers(0, 300), st.integers(1, 3000), st.floats(1e-4, 0.5))
def test_the_bound_on_a_share_is_clopper_and_pearsons(observed: int, rows: int, delta: float) -> None:
    exact = 1.0 if observed >= rows else beta.ppf(1 - delta, observed + 1, rows - observed)
    assert upper_bound(min(observed, rows), rows, delta) == pytest.approx(exact, abs=1e-7)


@given(st.floats(0, 1), st.integers(1, 2000), st.floats(1e-3, 0.5))
def test_a_mean_is_bounded_where_its_test_stops_rejecting(share: float, rows: int, delta: float) -> None:
    bound = upper_bound(share * rows, rows, delta, REGRET)
    assert bound >= share - 1e-9
    p_value = RISKS[REGRET].p_value
    if bound < 1 - 1e-6:
        assert p_value(share * rows, rows, bound + 1e-6) <= delta + 1e-9
    if bound > share + 1e-6:
        assert p_value(share * rows, rows, bound - 1e-6) >= delta - 1e-3


@pytest.mark.parametrize("kind", ["few whole ones", "many small ones", "all alike"])
def test_the_test_of_a_mean_errs_no_more_often_than_it_says(kind: str) -> None:
    """2,000 data sets whose mean is exactly the tolerance: rejecting is an error, at most delta of the time."""
    rng, rows, tolerance, delta = np.random.default_rng(0), 300, 0.05, 0.1
    if kind == "few whole ones":
        drawn = (rng.random((2000, rows)) < tolerance).astype(float)
    elif kind == "many small ones":
        drawn = rng.beta(0.5, 9.5, (2000, rows))
    else:
        drawn = np.full((2000, rows), tolerance)
    wrong = sum(RISKS[REGRET].p_value(float(one.sum()), rows, tolerance) <= delta for one in drawn)
    assert wrong <= binom.ppf(0.999, 2000, delta)
    low = drawn / 10
    assert sum(RISKS[REGRET].p_value(float(one.sum()), rows, tolerance) <= delta for one in low) > 1900


def records(**more: Any) -> Records:
    sure = np.array([[0.9, 0.8], [0.6, 0.7], [0.3, 0.9]], np.float32)
    return Records(sure, np.array([[True, True], [False, True], [False, False]]), **more)


def test_regret_counts_what_a_disagreement_costs() -> None:
    regret = np.array([[0, 0], [0.2, 0], [0.4, 0.9]], np.float32)
    said = records(regret=regret)
    assert np.array_equal(said.risk, (~said.agrees).astype(float))
    by_regret = Records(said.confidence, said.agrees, regret=regret, kind=REGRET)
    assert by_regret.risk == pytest.approx(regret)
    predicted = Records(said.confidence, said.agrees, regret=regret, kind=REGRET, predicted=True)
    assert predicted.risk == pytest.approx((1 - said.confidence) * np.array([0.3, 0.9]), abs=1e-6)
    few = predicted.of(np.array([0, 2])).among((1,))
    assert (few.rows, few.candidates, few.kind, few.predicted) == (2, 1, REGRET, True)


def test_chance_predicts_where_confidence_is_no_probability() -> None:
    chance = np.full((3, 2), 0.75, np.float32)
    said = records(chance=chance)
    assert np.array_equal(Records(said.confidence, said.agrees, chance, predicted=True).risk, np.full((3, 2), 0.25))


def test_refused_records() -> None:
    with pytest.raises(InputError, match="regret is not float32"):
        records(regret=np.zeros((3, 2)))
    with pytest.raises(InputError, match="chance is not float32"):
        records(chance=np.full((3, 2), 1.5, np.float32))
    with pytest.raises(UsageError, match="risk 'fear' does not exist; choose one of disagreement, regret"):
        records(kind="fear")
    with pytest.raises(InputError, match="no regret was recorded"):
        Records(np.zeros((1, 1), np.float32), np.ones((1, 1), bool), kind=REGRET)
    assert set(RISKS) == {DISAGREEMENT, REGRET}
