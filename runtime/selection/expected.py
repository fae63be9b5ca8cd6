"""How likely an exit's answer differs from the backbone's, row by row: calibrated chances, corrected by what was seen.

Few rows disagree, so counting them says little of the places where a threshold may lie, and a plan that is best by
counts is best for those very rows. Chances are smooth, but one temperature an exit cannot bend them, and they know
nothing of the exits before: of two rows that are equally sure here, the one that was unsure there is wrong more often,
and it is the one that arrives. Two corrections, each shrunk towards what it corrects:

`_fitted`   logistic regression of disagreeing, from the logit of the chance on: on that logit itself, on the highest
            of those before, and on the one right before. Its level is all but held (`_LEVEL`): heads that were searched
            were scored on these very rows, which flatters them; how risks compare is flattered less.
`_nearby`   disagreements counted over those expected, among rows of like confidence that reach over `_NEAR` expected
            ones to either side, as a gamma-Poisson estimate with `_PRIOR` of both seen beforehand.

Both were tried on six sets of heads over 20 splits of their rows (`benchmarks.thresholds` shows the outcome); either
alone, other strengths and further features were as good within the noise or worse.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .joint import Floats

_SLOPE, _LEVEL = 10.0, 300.0  # precisions of the coefficients' normal priors, for features of unit variance
_NEAR, _PRIOR = 6.0, 30.0  # disagreements
_CERTAIN = 1e-6  # chances are kept that far from 0 and 1
_STEPS, _HALVINGS, _SETTLED = 30, 20, 1e-7


def expected_disagreement(
    confidence: NDArray[np.float32], chance: NDArray[np.float32], agrees: NDArray[np.bool_]
) -> Floats:
    """[rows, candidates] each, candidates from shallow to deep -> the same in [0, 1]."""
    clipped = np.clip(chance.astype(np.float64), _CERTAIN, 1 - _CERTAIN)
    sure = np.log(clipped) - np.log1p(-clipped)
    highest = np.maximum.accumulate(sure, axis=1)
    told = np.empty_like(sure)
    for i in range(sure.shape[1]):
        before = [highest[:, i - 1], sure[:, i - 1]] if i else []
        wrong = (~agrees[:, i]).astype(np.float64)
        fitted = _fitted(-sure[:, i], np.column_stack([sure[:, i], *before]), wrong)
        told[:, i] = _nearby(confidence[:, i], fitted, wrong)
    return told


def _fitted(offset: Floats, features: Floats, wrong: Floats) -> Floats:
    """[rows] logits and [rows, features] -> [rows] probabilities: the mode under the priors, by damped Newton steps."""
    spread = features.std(0)
    scaled = (features - features.mean(0)) / np.where(spread > 0, spread, 1.0)
    design = np.column_stack([np.ones(len(offset)), scaled])
    prior = np.array([_LEVEL, *[_SLOPE] * features.shape[1]])
    weights = np.zeros(len(prior))

    def loss(weights: Floats) -> float:
        logits = offset + design @ weights
        return float(np.logaddexp(0, logits).sum() - wrong @ logits + 0.5 * prior @ weights**2)

    now = loss(weights)
    for _ in range(_STEPS):
        told = _sigmoid(offset + design @ weights)
        slope = design.T @ (told - wrong) + prior * weights
        bend = design.T @ (design * (told * (1 - told))[:, None]) + np.diag(prior)
        step = np.linalg.solve(bend, slope)
        for _ in range(_HALVINGS):
            if (after := loss(weights - step)) <= now:
                break
            step /= 2
        else:
            break
        weights, now = weights - step, after
        if np.abs(step).max() < _SETTLED:
            break
    return _sigmoid(offset + design @ weights)


def _nearby(confidence: NDArray[np.float32], told: Floats, wrong: Floats) -> Floats:
    """[rows] each: `told`, times what was seen over what was expected around each row's confidence."""
    order = np.argsort(-confidence, kind="stable")
    down = -confidence[order]
    first, last = (np.searchsorted(down, down, side=side) for side in ("left", "right"))  # of rows as sure as each
    expected, seen = (np.append(0.0, np.cumsum(values[order])) for values in (told, wrong))
    middle = (expected[first] + expected[last]) / 2
    low = first[np.searchsorted(expected[1:], middle - _NEAR, side="right").clip(0, len(down) - 1)]
    high = last[(np.searchsorted(expected, middle + _NEAR, side="right") - 2).clip(0)]
    ratio = (seen[high] - seen[low] + _PRIOR) / (expected[high] - expected[low] + _PRIOR)
    corrected = np.empty_like(told)
    corrected[order] = np.minimum(told[order] * ratio, 1.0)
    return corrected


def _sigmoid(logits: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -logits))
