"""The joint search: which exits, and how many of the most confident rows leave at each, in one optimisation.

A threshold matters only through the rows it lets go, so a plan is written as `cuts` [candidates] int64:
candidate i answers the cuts[i] rows it is most confident about (of those that reach it), 0 leaves it out.
Wanted is the least expected cost with the total risk of the answered rows within a limit.

The method is coordinate descent on cost + λ·risk. With every other exit fixed, the best cut of exit i is the
best prefix of its rows by descending confidence: answering row r there gains

    (cost of continuing - cost here) + λ (risk on continuing - risk here),

the head is paid by every row that arrives, and both are one cumulative sum. λ is bisected until the limit
binds. A Lagrangian only finds plans on the lower hull, so the leftover budget is then spent by moves that hold
the limit themselves: re-cut one exit, or disturb one exit and re-cut another.

Everything is deterministic. Costs are rounded to integers and risks up to multiples of 2^-20, so the sums are
exact in float64 and the order of the rows cannot decide between two plans. Not refused here: anything; the
callers in `thresholds.py` check what a person passes in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BELOW = 1e-3  # how far under the smallest confidence the threshold of an exit that answers everything lies
_COST_UNITS = 2**26  # integer cost of the whole backbone
_RISK_UNITS = 2**20
_EXACT = 2**52  # float64 integers stay exact below this
_BISECTIONS = 14
_SWEEPS = 12
_WORK = 1.2e8  # (rows + overhead) x candidates the moves may scan; bounds the time, not the clock, so repeatable
_OVERHEAD = 2000  # rows that a numpy call's fixed price is worth


@dataclass(frozen=True, eq=False)
class Column:
    """The rows of one candidate by descending confidence, and the places where a threshold can part them."""

    order: NDArray[np.intp]  # [rows] row at each position
    rank: NDArray[np.int32]  # [rows] position of each row
    ends: Ints  # [places] prefix lengths a float32 threshold can cut off, ascending; the last is all rows
    thresholds: Floats  # [places] float32 values, none of them a recorded confidence
    lost: Floats  # [places] summed risk of that prefix, every row counted as reaching this exit

    def threshold(self, cut: int) -> float:
        """The threshold that lets exactly the first `cut` rows go; inf for none."""
        return float(self.thresholds[np.searchsorted(self.ends, cut)]) if cut else float("inf")

    def longest(self, budget: float) -> int:
        """The longest prefix whose risk, as a share of all rows, is within `budget`."""
        place = int(np.searchsorted(self.lost / len(self.order), budget, side="right"))
        return int(self.ends[place - 1]) if place else 0


def column(confidence: NDArray[np.float32], risk: Floats) -> Column:
    """[rows] confidences and [rows] risks of one candidate, sorted once for every later question.

    Rows of equal confidence go together, and so do neighbours with no float32 strictly between them.
    """
    order = np.argsort(-confidence)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    down = confidence[order].astype(np.float64)
    middle = ((down[:-1] + down[1:]) / 2).astype(np.float32).astype(np.float64)
    parted = np.flatnonzero((middle < down[:-1]) & (middle > down[1:]))
    ends = np.append(parted + 1, len(order)).astype(np.int64)
    thresholds = np.append(middle[parted], np.float64(np.float32(down[-1] - BELOW)))
    return Column(order, rank, ends, thresholds, np.cumsum(risk[order])[ends - 1])


@dataclass(frozen=True, eq=False)
class _Problem:
    columns: tuple[Column, ...]
    risk: Floats  # [candidates, rows] multiples of 2^-20
    sorted_risk: Floats  # [candidates, rows] the same in each candidate's own order
    reach: Floats  # [candidates + 1] integer cost of the backbone up to each candidate, last to the output
    head: Floats  # [candidates] integer cost
    limit: float  # most total risk, a multiple of 2^-20

    @property
    def rows(self) -> int:
        return self.risk.shape[1]


@dataclass(frozen=True, eq=False)
class _Move:
    cost: float
    exit: int
    cut: int


def search(
    columns: tuple[Column, ...],
    risk: Floats,
    segment: Floats,
    head: Floats,
    tolerance: float,
    starts: Iterable[Ints],
) -> Ints:
    """The cheapest cuts [candidates] found with total risk / rows <= tolerance.

    risk [rows, candidates] in [0, 1], segment [candidates + 1] and head [candidates] in any one unit; starts:
    further plans to descend from and, where they keep the tolerance, to beat.
    """
    total = float(segment.sum())
    up = np.ascontiguousarray(np.ceil(risk.T * _RISK_UNITS) / _RISK_UNITS)
    rows = len(risk)
    limit = np.floor(tolerance * rows * _RISK_UNITS) / _RISK_UNITS
    if (np.floor(limit) + 1) / rows <= tolerance:  # 0.29 * 100 is 28.999...
        limit = np.floor(limit) + 1
    problem = _Problem(
        columns,
        up,
        np.stack([line[entry.order] for line, entry in zip(up, columns, strict=True)]),
        np.rint(np.cumsum(segment) / total * _COST_UNITS),
        np.rint(np.minimum(head / total, 2.0) * _COST_UNITS),  # dearer than the backbone is never chosen
        float(limit),
    )
    nothing = np.zeros(len(columns), np.int64)
    everything = np.full(len(columns), rows, np.int64)
    found: dict[bytes, tuple[float, Ints]] = {}
    for start in (nothing, everything, *starts):
        for cuts in (start, *_bisect(problem, start)):
            repaired = _fill(problem, cuts)
            if repaired is not None:
                found[repaired.tobytes()] = (_evaluate(problem, repaired)[0], repaired)
    ranked = sorted(found.items(), key=lambda item: (item[1][0], item[0]))
    best_cost, best = ranked[0][1]
    work = _WORK
    for _, (_, cuts) in ranked[:3]:
        cuts, work = _exchange(problem, cuts, work)
        cost = _evaluate(problem, cuts)[0]
        if cost < best_cost:
            best_cost, best = cost, cuts
    return best


def _first_exit(problem: _Problem, cuts: Ints) -> NDArray[np.int16]:
    """[rows] candidate at which each row leaves, `candidates` for the backbone."""
    first = np.full(problem.rows, len(cuts), np.int16)
    for i in range(len(cuts) - 1, -1, -1):
        if cuts[i]:
            first[problem.columns[i].rank < cuts[i]] = i
    return first


def _evaluate(problem: _Problem, cuts: Ints) -> tuple[float, float]:
    """Total cost and total risk over the rows."""
    first = _first_exit(problem, cuts)
    heads = np.cumsum(np.where(cuts > 0, problem.head, 0.0))
    spent = problem.reach + np.append(heads, heads[-1])
    cost = float(np.bincount(first, minlength=len(cuts) + 1) @ spent)
    left = np.flatnonzero(first < len(cuts))
    return cost, float(problem.risk[first[left], left].sum())


def _descend(problem: _Problem, cuts: Ints, weight: float) -> Ints:
    """Sweep the exits from deep to shallow until none changes its cut, for one λ = weight."""
    cuts = cuts.copy()
    for _ in range(_SWEEPS):
        first = _first_exit(problem, cuts)
        onward = np.full(problem.rows, problem.reach[-1])  # cost + λ·risk of a row that is not answered here
        changed = False
        for i in range(len(cuts) - 1, -1, -1):
            entry, here, head = problem.columns[i], problem.reach[i], problem.head[i]
            arrives = first >= i  # shallower exits have not moved yet in this sweep
            gain = np.where(arrives, onward - here, 0.0)[entry.order]
            gain -= weight * (problem.sorted_risk[i] * arrives[entry.order])
            summed = np.cumsum(gain)[entry.ends - 1]
            place = int(np.argmax(summed))
            cut = int(entry.ends[place]) if summed[place] > head * np.count_nonzero(arrives) else 0
            changed |= cut != cuts[i]
            cuts[i] = cut
            if cut:
                onward = np.where(entry.rank < cut, here + weight * problem.risk[i], onward) + head
        if not changed:
            break
    return cuts


def _bisect(problem: _Problem, start: Ints) -> list[Ints]:
    """Plans on both sides of the λ at which the limit starts to bind, descending from `start`."""
    cuts = _descend(problem, start, 0.0)
    if _evaluate(problem, cuts)[1] <= problem.limit:
        return [cuts]
    low, high = 0.0, np.log2(_EXACT / problem.rows)  # λ = 2^x - 1
    within, beyond = None, cuts
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        cuts = _descend(problem, start, float(np.rint(2**middle - 1)))
        if _evaluate(problem, cuts)[1] <= problem.limit:
            within, high = cuts, middle
        else:
            beyond, low = cuts, middle
    return [beyond] if within is None else [within, beyond]


def _moves(problem: _Problem, cuts: Ints, kept: int = -1) -> Iterator[_Move]:
    """For each exit but `kept`: the cheapest cut that holds the limit while all others stay, if there is one."""
    first = _first_exit(problem, cuts)
    cost_now, risk_now = _evaluate(problem, cuts)
    cost_on = np.full(problem.rows, problem.reach[-1])
    risk_on = np.zeros(problem.rows)
    for i in range(len(cuts) - 1, -1, -1):
        entry, here, head = problem.columns[i], problem.reach[i], problem.head[i]
        if i != kept:
            arrives = (first >= i)[entry.order]
            saved = np.cumsum(np.where(arrives, (cost_on - here)[entry.order], 0.0))[entry.ends - 1]
            added = np.cumsum(np.where(arrives, problem.sorted_risk[i] - risk_on[entry.order], 0.0))
            costs = np.append(0.0, head * np.count_nonzero(arrives) - saved)  # against leaving it out
            risks = np.append(0.0, added[entry.ends - 1])
            place = int(np.searchsorted(entry.ends, cuts[i])) + 1 if cuts[i] else 0
            held = risk_now - risks[place] + risks <= problem.limit
            if held.any():
                choice = int(np.argmin(np.where(held, costs, np.inf)))
                cut = int(entry.ends[choice - 1]) if choice else 0
                yield _Move(float(cost_now - costs[place] + costs[choice]), i, cut)
        if cuts[i]:
            leaves = entry.rank < cuts[i]
            cost_on = np.where(leaves, here, cost_on) + head
            risk_on = np.where(leaves, problem.risk[i], risk_on)


def _best(moves: Iterable[_Move]) -> _Move | None:
    return min(moves, key=lambda move: (move.cost, move.exit), default=None)


def _apply(cuts: Ints, exit_: int, cut: int) -> Ints:
    changed = cuts.copy()
    changed[exit_] = cut
    return changed


def _fill(problem: _Problem, cuts: Ints) -> Ints | None:
    """Re-cut one exit at a time, the best first, until none gets cheaper; None if the limit is out of reach.

    A plan beyond the limit is brought within it first by the one move that costs least.
    """
    cost, risk = _evaluate(problem, cuts)
    if risk > problem.limit:
        cost = np.inf
    while (move := _best(_moves(problem, cuts))) is not None and move.cost < cost:
        cuts, cost = _apply(cuts, move.exit, move.cut), move.cost
    return None if np.isinf(cost) else cuts


def _exchange(problem: _Problem, cuts: Ints, work: float) -> tuple[Ints, float]:
    """Disturb one exit, answer with the best cut of another; repeat until no pair helps or the work is used."""
    cost = _evaluate(problem, cuts)[0]
    price = (problem.rows + _OVERHEAD) * len(cuts)
    improved = True
    while improved and work > 0:
        improved = False
        for i, cut in _disturbances(problem, cuts):
            work -= price
            if work <= 0:
                break
            changed = _apply(cuts, i, cut)
            move = _best(_moves(problem, changed, kept=i))
            if move is not None and move.cost < cost:
                filled = _fill(problem, _apply(changed, move.exit, move.cut))
                if filled is not None:
                    cuts, cost, improved = filled, _evaluate(problem, filled)[0], True
                    break
    return cuts, work


def _disturbances(problem: _Problem, cuts: Ints) -> Iterator[tuple[int, int]]:
    """(exit, another cut): left out, then 1, 2, 4, ... steps of risk up and down from where it is."""
    first = _first_exit(problem, cuts)
    for i, cut in enumerate(cuts.tolist()):
        entry = problem.columns[i]
        arrives = (first >= i)[entry.order]
        lost = np.cumsum(problem.sorted_risk[i] * arrives)[entry.ends - 1]
        # Between two errors nothing but the longest prefix is worth trying.
        corners = entry.ends[np.append(np.flatnonzero(np.diff(lost)), len(lost) - 1)]
        at = int(np.searchsorted(corners, cut))
        steps = [2**k for k in range(max(1, int(len(corners)).bit_length()))]
        tried = {0} if cut else set()
        for step in steps:
            tried |= {int(corners[p]) for p in (at - step, at + step) if 0 <= p < len(corners)}
        yield from ((i, other) for other in sorted(tried - {cut}))

