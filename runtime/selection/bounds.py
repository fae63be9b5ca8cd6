"""Risks, and what rows say about them: p-values and upper confidence bounds, exact or conservative.

    disagreement   the exit's class is not the backbone's. Counts of it are binomial: exact tests.
    regret         p(b | x) - p(c | x), p the backbone's probabilities, b its class, c the exit's: the expected drop in
                   accuracy if these probabilities are calibrated. A mean of values in [0, 1]: Hoeffding-Bentkus.

Written out, for a deployment that has numpy alone selects again with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

DISAGREEMENT, REGRET = "disagreement", "regret"
_HALVINGS = 60  # of [0, 1]: to less than a float64 can tell


@dataclass(frozen=True)
class Risk:
    """One kind of risk per row, in [0, 1]."""

    p_value: Callable[[float, int, float], float]  # (summed risk, rows, tolerance): of "its mean exceeds the tolerance"
    assumption: str  # under which the mean is what a person wants to know


def binomial_cdf(successes: int, trials: int, chance: float) -> float:
    """P(Binomial(trials, chance) <= successes)."""
    if successes >= trials or chance <= 0:
        return 1.0
    if chance >= 1 or successes < 0:
        return 0.0
    k = np.arange(successes + 1)
    factorials = np.append(0.0, np.cumsum(np.log(np.arange(1, trials + 1))))
    ways = factorials[trials] - factorials[k] - factorials[trials - k]
    terms = ways + k * math.log(chance) + (trials - k) * math.log1p(-chance)
    largest = terms.max()
    return min(1.0, float(np.exp(largest) * np.exp(terms - largest).sum()))


def binomial_p(observed: float, rows: int, tolerance: float) -> float:
    """Of `rows` independent rows `observed` disagree."""
    return binomial_cdf(round(observed), rows, tolerance)


def mean_p(summed: float, rows: int, tolerance: float) -> float:
    """Hoeffding-Bentkus p-value for a mean of values in [0, 1] (Bates et al. 2021, Proposition 6)."""
    mean = min(1.0, max(0.0, summed / rows))
    if mean >= tolerance:
        return 1.0
    hoeffding = math.exp(-rows * _divergence(mean, tolerance))
    # A sum that rounding put a hair above a whole number is that number.
    bentkus = math.e * binomial_cdf(math.ceil(summed - 1e-9), rows, tolerance)
    return min(1.0, hoeffding, bentkus)


def _divergence(a: float, b: float) -> float:
    """KL between coins, nats."""
    if b >= 1:
        return math.inf
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + (1 - a) * math.log((1 - a) / (1 - b))


RISKS = {
    DISAGREEMENT: Risk(
        binomial_p, "bounds the drop in accuracy, whatever the labels; an answer that differs may be right"
    ),
    REGRET: Risk(mean_p, "the drop in accuracy, if the backbone's probabilities are calibrated on such rows"),
}


def upper_bound(observed: float, rows: int, delta: float, kind: str = DISAGREEMENT) -> float:
    """The largest mean risk that `observed`, summed over `rows` rows, does not reject at level `delta`."""
    p_value = RISKS[kind].p_value
    low, high = min(1.0, observed / rows), 1.0
    if p_value(observed, rows, high) > delta:
        return 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(observed, rows, middle) > delta else (low, middle)
    return high


def rows_needed(tolerance: float, delta: float) -> int:
    """Fewest rows that can certify `tolerance` at `delta`, when none of them shows any risk.

    Raises `UsageError` for a tolerance of 0, which no number of rows certifies.
    """
    if not tolerance > 0:
        raise UsageError(f"a tolerance of {tolerance} is certified by no number of rows; give more than 0")
    return math.ceil(math.log(delta) / math.log1p(-tolerance)) if tolerance < 1 else 1
