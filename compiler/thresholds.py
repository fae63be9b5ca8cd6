"""Exit selection: from recorded confidences and agreements to a subset of exits and their thresholds.

A row leaves at the first chosen exit with confidence >= threshold, else at the backbone. It costs the
segments up to there and the head of every chosen exit it passed, its own included. Its risk is that of the
exit it left at; the backbone has none. The risk is disagreement with the backbone, as no label is available:
the paper's bound F <= HR x (1 - CA), Eq. 3, on the drop in accuracy.

Policies: `geometric` (the paper's: exit n gets tolerance / 2^n by Eq. 3, the subset by the score of Eq. 4),
`equal` (the same budget for each exit) and `joint` (subset and thresholds together, see `joint.py`). All keep
the tolerance on the rows they were selected on, and on no others: that is what the certificate is for.

Refused: a tolerance outside [0, 1] and an unknown policy (UsageError); records or costs that are empty, of
the wrong shape or type, not finite or out of range (InputError).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.errors import InputError, UsageError

from .joint import Column, Floats, Ints, column, search

EXHAUSTIVE = 12  # candidates up to which every subset is scored


@dataclass(frozen=True, eq=False)
class Records:
    """What each candidate said about each row of a split. Candidates from shallow to deep."""

    confidence: NDArray[np.float32]  # [rows, candidates] in [0, 1]
    agrees: NDArray[np.bool_]  # [rows, candidates] the exit's class is the backbone's
    predicted: bool = False  # take the risk the calibrated confidence predicts in place of the one observed

    def __post_init__(self) -> None:
        conf, agrees = self.confidence, self.agrees
        if conf.ndim != 2 or 0 in conf.shape:
            raise InputError(f"records: confidence is {list(conf.shape)}; give [rows, candidates], neither of them 0")
        if agrees.shape != conf.shape:
            raise InputError(f"records: agrees is {list(agrees.shape)}, confidence {list(conf.shape)}; make them alike")
        if conf.dtype != np.float32 or agrees.dtype != np.bool_:
            raise InputError(f"records: confidence is {conf.dtype}, agrees {agrees.dtype}; cast to float32 and bool")
        if not ((conf >= 0) & (conf <= 1)).all():
            raise InputError("records: a confidence is outside [0, 1] or not a number; record probabilities")

    @property
    def rows(self) -> int:
        return int(self.confidence.shape[0])

    @property
    def candidates(self) -> int:
        return int(self.confidence.shape[1])

    def among(self, chosen: Sequence[int]) -> Records:
        """What some of the candidates said."""
        columns = list(chosen)
        return replace(
            self,
            confidence=np.ascontiguousarray(self.confidence[:, columns]),
            agrees=np.ascontiguousarray(self.agrees[:, columns]),
        )

    @property
    def risk(self) -> Floats:
        """[rows, candidates] in [0, 1]: what answering that row at that exit risks."""
        return 1.0 - self.confidence.astype(np.float64) if self.predicted else (~self.agrees).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Costs:
    """Compute per row, in FLOPs or milliseconds: any one unit."""

    segment: Floats  # [candidates + 1] from the candidate before (or the input) to this one; last: to the output
    head: Floats  # [candidates]

    def __post_init__(self) -> None:
        for name, values in (("segment", self.segment), ("head", self.head)):
            if values.ndim != 1 or values.dtype != np.float64:
                raise InputError(f"costs: {name} is {values.dtype} {list(values.shape)}; give a float64 vector")
            if not (np.isfinite(values) & (values >= 0)).all():
                raise InputError(f"costs: {name} has a negative or non-finite entry; measure it again")
        if len(self.segment) != len(self.head) + 1:
            raise InputError(f"costs: {len(self.segment)} segments for {len(self.head)} heads; give one segment more")

    @property
    def reach(self) -> Floats:
        """[candidates + 1] backbone compute from the input to each candidate, last to the output."""
        return np.cumsum(self.segment)

    def among(self, chosen: Sequence[int]) -> Costs:
        """With some of the candidates only: the segments between them join."""
        reach = np.append(self.reach[list(chosen)], self.reach[-1])
        return Costs(np.diff(reach, prepend=0.0), self.head[list(chosen)])


@dataclass(frozen=True)
class Selection:
    """Which candidates become exits. No exits at all is a legal answer."""

    chosen: tuple[int, ...]  # candidate indices, ascending
    thresholds: tuple[float, ...]  # one each, float32 values
    policy: str
    tolerance: float
    expected_cost: float  # per row, in the unit of the costs, on the records
    disagreement: float  # share of rows, on the records


def exits_taken(records: Records, chosen: Sequence[int], thresholds: Sequence[float]) -> Ints:
    """-> [rows] position in `chosen` of the exit each row leaves at; len(chosen) for the backbone."""
    taken = np.full(records.rows, len(chosen), np.int64)
    for position in range(len(chosen) - 1, -1, -1):
        taken[records.confidence[:, chosen[position]] >= np.float32(thresholds[position])] = position
    return taken


def expected_cost(records: Records, costs: Costs, chosen: Sequence[int], thresholds: Sequence[float]) -> float:
    """Mean compute of a row, in the unit of `costs`."""
    leaving = np.bincount(exits_taken(records, chosen, thresholds), minlength=len(chosen) + 1)
    heads = np.cumsum(np.append(0.0, costs.head[list(chosen)]))
    spent = costs.reach[[*chosen, -1]] + np.append(heads[1:], heads[-1])
    return float(leaving @ spent) / records.rows


def disagreement(records: Records, chosen: Sequence[int], thresholds: Sequence[float]) -> float:
    """Mean risk over all rows, the backbone's answers having none: the share whose exit does not agree."""
    taken = exits_taken(records, chosen, thresholds)
    left = np.flatnonzero(taken < len(chosen))
    return float(records.risk[left, np.asarray(chosen, np.int64)[taken[left]]].sum()) / records.rows


def oracle_cost(records: Records, costs: Costs) -> float:
    """Mean compute if each row left at the first candidate that agrees and heads were free: the floor."""
    first = np.where(records.agrees.any(axis=1), records.agrees.argmax(axis=1), records.candidates)
    return float(np.bincount(first, minlength=records.candidates + 1) @ costs.reach) / records.rows


def equation_3_threshold(confidence: NDArray[np.float32], agrees: NDArray[np.bool_], budget: float) -> float:
    """[rows], [rows] -> the smallest threshold with P(confidence >= threshold and not agrees) <= budget.

    It lies midway between neighbouring confidences, never on one: another backend reproduces a confidence
    only to about 1e-6. Equal confidences go together. inf when no row may leave; a little below the smallest
    confidence when all may. Refused: a budget outside [0, 1].
    """
    if not 0 <= budget <= 1:
        raise UsageError(f"budget {budget} is not a share of the rows; give a number from 0 to 1")
    records = Records(confidence[:, None], agrees[:, None])
    entry = column(records.confidence[:, 0], records.risk[:, 0])
    return entry.threshold(entry.longest(budget))


def equation_4_score(records: Records, costs: Costs, chosen: Sequence[int], thresholds: Sequence[float]) -> float:
    """K = sum over exits of |hits| (C2 - C1) - |misses| C1: compute saved on all rows against no exits.

    C1 is the head's compute, C2 that of the backbone behind it; hits and misses are counted among the rows
    that arrive at the exit.
    """
    leaving = np.bincount(exits_taken(records, chosen, thresholds), minlength=len(chosen) + 1)
    hits, misses = leaving[:-1], records.rows - np.cumsum(leaving[:-1])
    fallback, head = costs.reach[-1] - costs.reach[list(chosen)], costs.head[list(chosen)]
    return float((hits * (fallback - head) - misses * head).sum())


def geometric(records: Records, costs: Costs, tolerance: float) -> Selection:
    """The paper's policy: exit n of the subset gets tolerance / 2^n by Eq. 3, the best subset by Eq. 4."""
    return _checked("geometric", records, costs, tolerance, _geometric)


def equal(records: Records, costs: Costs, tolerance: float) -> Selection:
    """Every exit of the subset gets the same budget by Eq. 3, the best subset by Eq. 4."""
    return _checked("equal", records, costs, tolerance, _equal)


def joint(records: Records, costs: Costs, tolerance: float) -> Selection:
    """Subset and thresholds chosen together; on these records never dearer than `geometric` or `equal`."""
    return _checked("joint", records, costs, tolerance, _joint)


POLICIES: dict[str, Callable[[Records, Costs, float], Selection]] = {
    "geometric": geometric,
    "equal": equal,
    "joint": joint,
}


def select(policy: str, records: Records, costs: Costs, tolerance: float) -> Selection:
    """Run the policy of that name."""
    if policy not in POLICIES:
        raise UsageError(f"policy {policy!r} does not exist; choose one of {', '.join(POLICIES)}")
    return POLICIES[policy](records, costs, tolerance)


def _geometric(records: Records, costs: Costs, columns: tuple[Column, ...], tolerance: float) -> Ints:
    return _within(records, costs, columns, tolerance, lambda budget, n, _size: budget / 2**n)


def _equal(records: Records, costs: Costs, columns: tuple[Column, ...], tolerance: float) -> Ints:
    return _within(records, costs, columns, tolerance, lambda budget, _n, size: budget / size)


def _joint(records: Records, costs: Costs, columns: tuple[Column, ...], tolerance: float) -> Ints:
    plans = [policy(records, costs, columns, tolerance) for policy in (_geometric, _equal)]
    plans.append(search(columns, records.risk, costs.segment, costs.head, tolerance, plans))

    def price(cuts: Ints) -> float:
        plan = _plan(columns, cuts)
        return expected_cost(records, costs, *plan) if disagreement(records, *plan) <= tolerance else math.inf

    best = min(plans, key=price)
    for i in np.flatnonzero(best):  # the search rounds costs: an exit may have paid only there
        without = np.where(np.arange(len(best)) == i, 0, best)
        best = min(without, best, key=price)
    return best


def _plan(columns: tuple[Column, ...], cuts: Ints) -> tuple[tuple[int, ...], tuple[float, ...]]:
    chosen = tuple(int(i) for i in np.flatnonzero(cuts))
    return chosen, tuple(columns[i].threshold(int(cuts[i])) for i in chosen)


def _checked(
    policy: str,
    records: Records,
    costs: Costs,
    tolerance: float,
    find: Callable[[Records, Costs, tuple[Column, ...], float], Ints],
) -> Selection:
    if not 0 <= tolerance <= 1:  # nor not a number
        raise UsageError(f"tolerance {tolerance} is not a share of the rows; give a number from 0 to 1")
    if len(costs.head) != records.candidates:
        raise InputError(
            f"costs: {len(costs.head)} heads for {records.candidates} recorded candidates; cost the same ones"
        )
    risk = records.risk
    columns = tuple(column(records.confidence[:, i], risk[:, i]) for i in range(records.candidates))
    free = costs.reach[-1] == 0  # a backbone that costs nothing leaves nothing to save
    chosen, thresholds = ((), ()) if free else _plan(columns, find(records, costs, columns, tolerance))
    return Selection(
        chosen,
        thresholds,
        policy,
        float(tolerance),
        expected_cost(records, costs, chosen, thresholds),
        disagreement(records, chosen, thresholds),
    )


Budget = Callable[[float, int, int], float]  # (tolerance, n, exits in the subset) -> budget of the n-th, from 1


def _within(records: Records, costs: Costs, columns: tuple[Column, ...], tolerance: float, budget: Budget) -> Ints:
    """The best subset's cuts. Budgets that exceed the tolerance by rounding are drawn in by an ulp."""
    asked = tolerance
    while True:
        cuts = _best_subset(records, costs, columns, functools.partial(budget, asked))
        if disagreement(records, *_plan(columns, cuts)) <= tolerance:
            return cuts
        asked = float(np.nextafter(asked, 0.0))


def _best_subset(
    records: Records, costs: Costs, columns: tuple[Column, ...], budget: Callable[[int, int], float]
) -> Ints:
    """Cuts [candidates] of the subset with the highest K; of equals, the one with fewer exits.

    Sets of rows are Python integers, a bit each: the rows behind an exit are one and-not, their number one
    bit count, so a subset is scored on 100,000 rows in microseconds.
    """
    fallback = costs.reach[-1] - costs.reach
    everyone = (1 << records.rows) - 1 << -records.rows % 8  # packbits pads its last byte on the low side
    cut_of: dict[tuple[int, float], int] = {}
    stay_of: dict[tuple[int, int], int] = {}

    def cut(i: int, allowed: float) -> int:
        if (i, allowed) not in cut_of:
            cut_of[i, allowed] = columns[i].longest(allowed)
        return cut_of[i, allowed]

    def stays(i: int, length: int) -> int:
        if (i, length) not in stay_of:
            stay = np.ones(records.rows, np.bool_)
            stay[columns[i].order[:length]] = False
            stay_of[i, length] = int.from_bytes(np.packbits(stay).tobytes(), "big")
        return stay_of[i, length]

    @functools.cache
    def score(subset: tuple[int, ...]) -> float:
        here, total = everyone, 0.0
        for n, i in enumerate(subset, 1):
            behind = here & stays(i, cut(i, budget(n, len(subset))))
            misses = behind.bit_count()
            hits = here.bit_count() - misses
            total += hits * (fallback[i] - costs.head[i]) - misses * costs.head[i]
            here = behind
        return total

    subset = (_every_subset if records.candidates <= EXHAUSTIVE else _grow)(records.candidates, score)
    cuts = np.zeros(records.candidates, np.int64)
    for n, i in enumerate(subset, 1):
        cuts[i] = cut(i, budget(n, len(subset)))
    return cuts


Score = Callable[[tuple[int, ...]], float]


def _every_subset(candidates: int, score: Score) -> tuple[int, ...]:
    subsets = (s for size in range(candidates + 1) for s in itertools.combinations(range(candidates), size))
    return max(subsets, key=score)


def _grow(candidates: int, score: Score) -> tuple[int, ...]:
    """Add, remove or swap one exit, whichever helps most, until nothing does."""
    subset: tuple[int, ...] = ()
    while True:
        others = [i for i in range(candidates) if i not in subset]
        without = [tuple(j for j in subset if j != i) for i in subset]
        grown = [tuple(sorted((*kept, i))) for kept in (subset, *without) for i in others]
        best = max((subset, *without, *grown), key=score)
        if score(best) <= score(subset):
            return subset
        subset = best
