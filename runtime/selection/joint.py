"""The joint search: which exits, and how many of the most confident rows leave at each, in one optimisation.

A threshold matters only through the rows it lets go, so a plan is written as `cuts` [candidates] int64:
candidate i answers the cuts[i] rows it is most confident about (of those that reach it), 0 leaves it out.
Wanted is the least expected cost with the total risk of the answered rows within a limit.

The method is coordinate descent on cost + λ·risk. With every other exit fixed, the best cut of exit i is the
best prefix of its rows by descending confidence: answering row r there gains

    (cost of continuing - cost here) + λ (risk on continuing - risk here),

the head is paid by every row that arrives, and both are one cumulative sum. λ is bisected until the limit
binds. A Lagrangian only finds plans on the lower hull, so the leftover budget is then spent by moves that
hold the limit themselves: re-cut one exit, or disturb one exit and re-cut another.

Everything is deterministic. Costs are rounded to integers and risks up to multiples of 2^-20, so the sums are
exact in float64 and the order of the rows cannot decide between two plans. Nothing is refused here:
`policies.py` checks what a person passes in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BELOW = 1e-3  # how far under the smallest confidence the threshold of an exit that answers everything lies
_COST_UNITS = 2**26  # integer cost of the whole backbone
_RISK_UNITS = 2**20
_EXACT = 2**52  # float64 integers stay exact below this
_BISECTIONS = 12
_SWEEPS = 12
_ALLOWED = (1.0, 0.95, 0.85, 0.7, 0.5)  # shares of what should be allowed that are tried in turn
WORK = 1.2e8  # (rows + overhead) x candidates that the pair moves may scan: a clock that repeats itself
_OVERHEAD = 2000  # rows that a numpy call's fixed price is worth


@dataclass(frozen=True, eq=False)
class Column:
    """The rows of one candidate by descending confidence, and the places where a threshold can part them."""

    order: NDArray[np.intp]  # [rows] row at each position
    next_end: Ints  # [rows] the shortest such prefix that takes in each position
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
    down = confidence[order].astype(np.float64)
    middle = ((down[:-1] + down[1:]) / 2).astype(np.float32).astype(np.float64)
    parted = np.flatnonzero((middle < down[:-1]) & (middle > down[1:]))
    ends = np.append(parted + 1, len(order)).astype(np.int64)
    thresholds = np.append(middle[parted], np.float64(np.float32(down[-1] - BELOW)))
    next_end = np.repeat(ends, np.diff(ends, prepend=0))
    return Column(order, next_end, ends, thresholds, np.cumsum(risk[order])[ends - 1])


@dataclass(frozen=True, eq=False)
class _Problem:
    columns: tuple[Column, ...]
    risk: Floats  # [candidates, rows] multiples of 2^-20
    reach: Floats  # [candidates + 1] integer cost of the backbone up to each candidate, last to the output
    head: Floats  # [candidates] integer cost
    limit: float  # most total risk, a multiple of 2^-20

    @property
    def rows(self) -> int:
        return int(self.risk.shape[1])


@dataclass(frozen=True)
class _Move:
    cost: float  # of the whole plan once exit `exit` is cut at `cut`
    exit: int
    cut: int


def search(
    columns: tuple[Column, ...],
    risk: Floats,
    segment: Floats,
    head: Floats,
    tolerance: float,
    starts: Iterable[Ints],
    work: float,
) -> Ints:
    """The cheapest cuts [candidates] found with total risk / rows <= tolerance.

    risk [rows, candidates] in [0, 1], segment [candidates + 1] and head [candidates] in any one unit; starts:
    further plans to descend from and, where they keep the tolerance, to beat; work: what the pair moves may scan, in
    (rows + overhead) x candidates.
    """
    problem, rows = _problem(columns, risk, segment, head, tolerance), len(risk)
    nothing, everything = _ends(problem)
    starts = (everything, nothing, *starts)
    plans = [*starts, _descend(problem, everything, 0.0)]
    low, high, steps = 0.0, float(np.log2(_EXACT / rows)), _BISECTIONS
    for start in starts:
        sides, at = _bisect(problem, start, low, high, steps)
        plans += sides
        if start is everything:  # the limit binds at nearly the same λ from every start
            low, high, steps = at - 1, at + 1, _BISECTIONS // 2
    found: dict[bytes, tuple[float, Ints]] = {}
    for cuts in {cuts.tobytes(): cuts for cuts in plans}.values():
        filled = _fill(problem, cuts)
        if filled is not None:
            found[filled.tobytes()] = (_evaluate(problem, filled)[0], filled)
    ranked = sorted(found.items(), key=lambda item: (item[1][0], item[0]))
    best_cost, best = ranked[0][1]
    for _, (_, filled) in ranked[:3]:
        cuts, work = _exchange(problem, filled, work)
        cost = _evaluate(problem, cuts)[0]
        if cost < best_cost:
            best_cost, best = cost, cuts
    return best


def boldest(
    columns: tuple[Column, ...],
    risk: Floats,
    observed: Floats,
    segment: Floats,
    head: Floats,
    tolerance: float,
) -> Ints:
    """Of the plans that are best for cost + λ·risk the boldest whose `observed` risk is within the tolerance.

    `risk` and `observed` [rows, candidates] in [0, 1], the rest as for `search`. Such plans lie on the lower hull, and
    where heads are dear two neighbours there may be far apart: from both sides of the limit exits are cut anew, one
    after the other, until what is allowed is spent.
    """
    told, seen = (_problem(columns, values, segment, head, tolerance) for values in (risk, observed))
    nothing, everything = _ends(told)
    plans = [nothing]
    low, high = 0.0, float(np.log2(_EXACT / len(risk)))
    for start, steps in ((everything, _BISECTIONS), (nothing, _BISECTIONS // 2)):
        sides, at = _bisect(told, start, low, high, steps, seen)
        plans += sides
        low, high = at - 1, at + 1
    plans += [filled for cuts in plans if (filled := _spent(told, seen, cuts)) is not None]
    return min((cuts for cuts in plans if _within(seen, cuts)), key=lambda cuts: _evaluate(seen, cuts)[0])


def _spent(told: _Problem, seen: _Problem, cuts: Ints) -> Ints | None:
    """The plan filled up, or brought down, to as much of the told risk as the seen one allows, as far as it tells."""
    now, found = _evaluate(told, cuts)[1], _evaluate(seen, cuts)[1]
    allowed = seen.limit * (now / found if now and found else 1.0)
    for share in _ALLOWED:
        limit = float(np.floor(share * allowed * _RISK_UNITS) / _RISK_UNITS)
        filled = _fill(replace(told, limit=limit), cuts)
        if filled is not None and _within(seen, filled):
            return filled
    return None


def _within(problem: _Problem, cuts: Ints) -> bool:
    return _evaluate(problem, cuts)[1] <= problem.limit


def _problem(columns: tuple[Column, ...], risk: Floats, segment: Floats, head: Floats, tolerance: float) -> _Problem:
    total = float(segment.sum())
    return _Problem(
        columns,
        np.ascontiguousarray(np.ceil(risk.T * _RISK_UNITS) / _RISK_UNITS),
        np.rint(np.cumsum(segment) / total * _COST_UNITS),
        np.rint(np.minimum(head / total, 2.0) * _COST_UNITS),  # dearer than the backbone is never chosen
        _limit(tolerance, len(risk)),
    )


def _ends(problem: _Problem) -> tuple[Ints, Ints]:
    """No exit answers, every exit answers everything."""
    candidates = len(problem.columns)
    return np.zeros(candidates, np.int64), np.full(candidates, problem.rows, np.int64)


def _limit(tolerance: float, rows: int) -> float:
    """The largest multiple of 2^-20 whose quotient by `rows` is within the tolerance, near whole numbers too.

    0.29 x 100 is 28.999... though 29 / 100 <= 0.29, and other products round up to a whole number too many.
    """
    limit = np.floor(tolerance * rows * _RISK_UNITS) / _RISK_UNITS
    whole = np.rint(limit)
    if whole / rows <= tolerance:
        return float(max(limit, whole))
    return float(min(limit, whole - 1 / _RISK_UNITS))


def _first_exit(problem: _Problem, cuts: Ints) -> NDArray[np.int16]:
    """[rows] candidate at which each row leaves, `candidates` for the backbone."""
    first = np.full(problem.rows, len(cuts), np.int16)
    for i in range(len(cuts) - 1, -1, -1):
        if cuts[i]:
            first[problem.columns[i].order[: cuts[i]]] = i
    return first


def _evaluate(problem: _Problem, cuts: Ints, first: NDArray[np.int16] | None = None) -> tuple[float, float]:
    """Total cost and total risk over the rows."""
    first = _first_exit(problem, cuts) if first is None else first
    heads = np.cumsum(np.where(cuts > 0, problem.head, 0.0))
    spent = problem.reach + np.append(heads, heads[-1])
    cost = float(np.bincount(first, minlength=len(cuts) + 1) @ spent)
    left = np.flatnonzero(first < len(cuts))
    return cost, float(problem.risk[first[left], left].sum())


def _arrivals(entry: Column, arrives: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp], Ints]:
    """Arriving rows by descending confidence, then the places among them where a threshold fits and its cuts.

    places [k]: the prefix places[k] + 1 of those rows leaves when the cut is cuts[k].
    """
    positions = np.flatnonzero(arrives[entry.order])
    cuts = entry.next_end[positions]
    places = np.flatnonzero(cuts <= np.append(positions[1:], len(arrives)))
    return entry.order[positions], places, cuts[places]


def _descend(problem: _Problem, cuts: Ints, weight: float) -> Ints:
    """Sweep the exits from deep to shallow until none changes its cut, for one λ = weight."""
    cuts = cuts.copy()
    for _ in range(_SWEEPS):
        first = _first_exit(problem, cuts)
        onward = np.full(problem.rows, problem.reach[-1])  # cost + λ·risk of a row that is not answered here
        changed = False
        for i in range(len(cuts) - 1, -1, -1):
            entry, here, head = problem.columns[i], problem.reach[i], problem.head[i]
            # Shallower exits have not moved yet in this sweep, so `first` still tells who arrives.
            rows, places, ends = _arrivals(entry, first >= i)
            cut = 0
            if len(rows):
                gain = np.cumsum(onward[rows] - (here + weight * problem.risk[i, rows]))[places]
                best = int(np.argmax(gain))
                cut = int(ends[best]) if gain[best] > head * len(rows) else 0
            changed |= cut != cuts[i]
            cuts[i] = cut
            if cut:
                leaving = entry.order[:cut]
                onward[leaving] = here + weight * problem.risk[i, leaving]
                onward += head
        if not changed:
            break
    return cuts


def _bisect(
    problem: _Problem, start: Ints, low: float, high: float, steps: int, held: _Problem | None = None
) -> tuple[list[Ints], float]:
    """Plans on both sides of the λ = 2^x at which the limit starts to bind, low <= x <= high, and that x.

    The limit is that of the problem itself, or of the one `held` to.
    """
    within = beyond = None
    cuts = start
    for _ in range(steps):
        middle = (low + high) / 2
        cuts = _descend(problem, cuts, float(np.rint(2.0**middle)))
        if _evaluate(held or problem, cuts)[1] <= problem.limit:
            within, high = cuts, middle
        else:
            beyond, low = cuts, middle
    return [cuts for cuts in (within, beyond) if cuts is not None], (low + high) / 2


def _moves(problem: _Problem, cuts: Ints, kept: int = -1) -> Iterator[_Move]:
    """For each exit but `kept`: the cheapest cut that holds the limit while the others stay, if any does."""
    first = _first_exit(problem, cuts)
    cost_now, risk_now = _evaluate(problem, cuts, first)
    cost_on = np.full(problem.rows, problem.reach[-1])
    risk_on = np.zeros(problem.rows)
    for i in range(len(cuts) - 1, -1, -1):
        entry, here, head = problem.columns[i], problem.reach[i], problem.head[i]
        rows, places, ends = _arrivals(entry, first >= i)
        if i != kept and len(rows):
            saved = np.cumsum(cost_on[rows] - here)
            added = np.cumsum(problem.risk[i, rows] - risk_on[rows])
            cost_out, risk_out = cost_now, risk_now  # of the plan without this exit
            if cuts[i]:
                cost_out -= head * len(rows)
                if answered := int(np.count_nonzero(first == i)):
                    cost_out, risk_out = cost_out + saved[answered - 1], risk_out - added[answered - 1]
            costs = np.append(cost_out, cost_out + head * len(rows) - saved[places])
            held = np.append(risk_out, risk_out + added[places]) <= problem.limit
            if held.any():
                choice = int(np.argmin(np.where(held, costs, np.inf)))
                yield _Move(float(costs[choice]), i, int(ends[choice - 1]) if choice else 0)
        if cuts[i]:
            leaving = entry.order[: cuts[i]]
            cost_on[leaving] = here
            cost_on += head
            risk_on[leaving] = problem.risk[i, leaving]


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
    """Disturb one exit, answer with the best cut of another; until no pair helps or the work is used up."""
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
        rows, places, ends = _arrivals(entry, first >= i)
        lost = np.cumsum(problem.risk[i, rows])[places]
        corners = ends[np.diff(lost, append=np.inf) > 0]  # between two errors only the longest prefix is worth it
        at = int(np.searchsorted(corners, cut))
        steps = [2**k for k in range(len(corners).bit_length())]
        near = (at + sign * step for step in steps for sign in (-1, 1))
        tried = {0, *(int(corners[place]) for place in near if 0 <= place < len(corners))}
        yield from ((i, other) for other in sorted(tried - {cut}))
