"""Records that never were: simulated rows, anything legal, and slow answers to judge selection by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from offramp.runtime.selection import Costs, Records, Selection

Floats = NDArray[np.float64]
TOLERANCES = (0.0, 0.03, 0.1, 0.29, 1 / 3, float(np.nextafter(0.3, 0.0)), 1.0)
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
