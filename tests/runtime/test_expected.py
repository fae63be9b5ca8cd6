"""Expected disagreement: calibrated chances, corrected by what was observed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from simulations import cases, simulated

from offramp.runtime.selection import REGRET, Costs, Records
from offramp.runtime.selection.expected import expected_disagreement


def told(confidence: np.ndarray, chance: np.ndarray, agrees: np.ndarray) -> np.ndarray:
    return expected_disagreement(confidence.astype(np.float32), chance.astype(np.float32), agrees)


def drawn(true: np.ndarray, seed: int) -> np.ndarray:
    """Whether each agrees, by its true chance."""
    return np.random.default_rng(seed).random(true.shape) < true


def off(guess: np.ndarray, true: np.ndarray) -> float:
    """Mean distance to the true chance of disagreeing."""
    return float(np.abs(guess - (1 - true)).mean())


@given(cases())
def test_it_is_a_probability_whatever_was_recorded(case: tuple[Records, Costs]) -> None:
    records, _ = case
    values = records.expected_risk
    assert values.shape == records.confidence.shape
    assert np.isfinite(values).all()
    assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.parametrize("agrees", [True, False])
@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_it_moves_towards_what_was_seen_and_stays_finite_at_the_ends(chance: float, agrees: bool) -> None:
    shape = (4000, 2)
    values = told(np.full(shape, chance), np.full(shape, chance), np.full(shape, agrees))
    assert np.isfinite(values).all()
    assert np.ptp(values[:, 0]) == 0, "rows that look alike are told alike"
    assert np.abs(values - (not agrees)).max() <= abs((1 - chance) - (not agrees)) + 1e-6


def test_chances_that_are_right_are_left_about_as_they_are() -> None:
    true = np.random.default_rng(0).beta(8, 1, (3000, 1))
    assert off(told(true, true, drawn(true, 1)), true) < 0.01


def test_chances_that_promise_too_much_where_rows_are_sure_are_bent() -> None:
    true = np.random.default_rng(0).beta(8, 1, (6000, 1))
    odds = true / (1 - true)
    boast = odds**1.6 / (1 + odds**1.6)
    values = told(boast, boast, drawn(true, 1))
    assert off(values, true) < 0.55 * off(1 - boast, true)


def test_a_dip_that_no_curve_follows_is_seen_by_its_neighbours() -> None:
    sure = np.random.default_rng(0).uniform(0.5, 1, (8000, 1))
    true = np.where((sure > 0.8) & (sure < 0.9), sure - 0.2, sure)
    inside = ((sure > 0.8) & (sure < 0.9))[:, 0]
    values = told(sure, sure, drawn(true, 1))
    assert off(values[inside], true[inside]) < 0.6 * off(1 - sure[inside], true[inside])


def test_of_equally_sure_rows_those_that_were_unsure_before_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    before, sure = rng.uniform(0.5, 0.999, (2, 6000))
    logit = np.log(sure / (1 - sure)) + 1.0 * (np.log(before / (1 - before)) - 1.5)
    true = 1 / (1 + np.exp(-logit))
    agrees = np.column_stack([drawn(before, 2), drawn(true, 1)])
    both = np.column_stack([before, sure])
    values = told(both, both, agrees)[:, 1]
    assert off(values, true) < 0.5 * off(1 - sure, true)
    alike = np.abs(sure - 0.9) < 0.02
    assert values[alike & (before < 0.6)].mean() > 1.5 * values[alike & (before > 0.95)].mean()


def test_regret_weighs_it_by_what_one_disagreement_costs() -> None:
    plain, _ = simulated(500, 3, seed=5)
    regret = np.where(plain.agrees, 0, 0.25).astype(np.float32)
    lost = replace(plain, regret=regret, kind=REGRET)
    assert lost.expected_risk == pytest.approx(0.25 * plain.expected_risk)
