"""Exit selection: from recorded confidences and agreements to a subset of exits and their thresholds.

The risk is disagreement with the backbone, as no label is available: the paper's bound F <= HR x (1 - CA), Eq. 3, on
the drop in accuracy; or regret, see `bounds`.

Policies: `geometric` (the paper's: exit n gets tolerance / 2^n by Eq. 3, the subset by the score of Eq. 4),
`equal` (the same budget for each exit) and `joint` (subset and thresholds together, see `joint.py`). All keep
the tolerance on the rows they were selected on, and on no others: that is what the certificate is for.

The least cost that keeps the tolerance on some rows is had by fitting them: thresholds that end just before a
disagreement, exits that happened to be lucky. On new rows such a plan saves less than `geometric` does at the same
realised risk (measured, see the README). So where calibrated chances were recorded `joint` orders plans by expected
risk, see `expected.py`, and takes the boldest whose observed risk is within the tolerance. Should `geometric` or
`equal` be cheaper, for they have found a gap between disagreements, it fits the rows as much as it takes to be so too.

Where stages of lower precision change answers of their own (`Records.final`), every row is charged with that, those
that leave before the end too: exits get what is left of the tolerance. That is a little less than they could have.

Refused: a tolerance outside [0, 1] and an unknown policy (UsageError); costs of other candidates (InputError); a
tolerance that lower precision alone breaks (ToleranceError).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, ToleranceError, UsageError
from .joint import WORK, Column, Ints, boldest, column, search
from .records import Costs, Records, Selection, exits_taken, expected_cost, realised_risk

EXHAUSTIVE = 12  # candidates up to which every subset is scored
_TRUST = (1.0, 0.95, 0.85, 0.65, 0.35)  # shares of the risk told that are expected, the rest observed; tried in turn


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


def joint(records: Records, costs: Costs, tolerance: float, *, work: float = WORK) -> Selection:
    """Subset and thresholds chosen together; on these records never dearer than `geometric` or `equal`.

    Without recorded chances the cheapest plan for these very rows that the search finds; `work` bounds its last and
    finest moves, see `search`.
    """
    return _checked("joint", records, costs, tolerance, functools.partial(_joint, work=work))


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


def left_over(records: Records, tolerance: float) -> float:
    """What exits may risk within the tolerance, the precision's own risk on these rows taken off.

    Raises `ToleranceError` when nothing is left.
    """
    spent = float(records.final_risk.mean())
    if spent > tolerance:
        raise ToleranceError(
            f"lower precision alone changes {spent:.2%} of the answers ({records.kind} on {records.rows} rows), more "
            f"than the tolerance of {tolerance:.4g}; raise the tolerance, or compile with a finer precision"
        )
    return tolerance - spent


def _geometric(records: Records, costs: Costs, columns: tuple[Column, ...], tolerance: float) -> Ints:
    return _within(records, costs, columns, tolerance, lambda budget, n, _size: budget / 2**n)


def _equal(records: Records, costs: Costs, columns: tuple[Column, ...], tolerance: float) -> Ints:
    return _within(records, costs, columns, tolerance, lambda budget, _n, size: budget / size)


def _joint(records: Records, costs: Costs, columns: tuple[Column, ...], tolerance: float, *, work: float) -> Ints:
    def price(cuts: Ints) -> float:
        plan = _plan(columns, cuts)
        return expected_cost(records, costs, *plan) if realised_risk(records, *plan) <= tolerance else math.inf

    if records.predicted:
        return _trimmed(boldest(columns, records.risk, records.risk, costs.segment, costs.head, tolerance), price)
    plans = [policy(records, costs, columns, tolerance) for policy in (_geometric, _equal)]
    if records.chance is None:
        plans.append(search(columns, records.risk, costs.segment, costs.head, tolerance, plans, work))
        return _trimmed(min(plans, key=price), price)
    least, expected = min(map(price, plans)), records.expected_risk
    for trust in _TRUST:
        told = trust * expected + (1 - trust) * records.risk
        bold = _trimmed(boldest(columns, told, records.risk, costs.segment, costs.head, tolerance), price)
        if price(bold) <= least:
            return bold
    return _trimmed(min(plans, key=price), price)


def _trimmed(cuts: Ints, price: Callable[[Ints], float]) -> Ints:
    """Without exits that do not pay: `boldest` and `search` round costs, an exit may have paid only there."""
    for i in np.flatnonzero(cuts):
        without = np.where(np.arange(len(cuts)) == i, 0, cuts)
        cuts = min(without, cuts, key=price)
    return cuts


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
    exits, allowed = replace(records, final=None, final_regret=None), left_over(records, tolerance)
    risk = records.risk
    columns = tuple(column(records.confidence[:, i], risk[:, i]) for i in range(records.candidates))
    free = costs.reach[-1] == 0  # a backbone that costs nothing leaves nothing to save
    chosen, thresholds = ((), ()) if free else _plan(columns, find(exits, costs, columns, allowed))
    return Selection(
        chosen,
        thresholds,
        policy,
        float(tolerance),
        expected_cost(records, costs, chosen, thresholds),
        realised_risk(records, chosen, thresholds),
    )


Budget = Callable[[float, int, int], float]  # (tolerance, n, exits in the subset) -> budget of the n-th, from 1


def _within(records: Records, costs: Costs, columns: tuple[Column, ...], tolerance: float, budget: Budget) -> Ints:
    """The best subset's cuts. Budgets that exceed the tolerance by rounding are drawn in by an ulp."""
    asked = tolerance
    while True:
        cuts = _best_subset(records, costs, columns, functools.partial(budget, asked))
        if realised_risk(records, *_plan(columns, cuts)) <= tolerance:
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
