"""What a head is worth: the compute an exit of it alone would save at the tolerance, its own price included.

And what the best heads are worth beside each other: most of a dozen places never become an exit, because a neighbour
does the same, so that training all of them to the end is time for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offramp.runtime.selection import Costs, Records, Selection, column, joint

AROUND = (0.5, 1.0, 2.0)  # times the tolerance: one alone hangs on the few rows next to its threshold


def worth(
    confidence: NDArray[np.float32], agrees: NDArray[np.bool_], after: float, price: float, tolerance: float
) -> float:
    """Expected share of the backbone's compute that an exit saves, mean over tolerances around the one asked for.

    `confidence` [rows] and `agrees` [rows] of one head; `after`, the share of the compute that lies behind it, is
    saved by the rows that may leave (Eq. 3: as many of the most confident as keep disagreement within the tolerance);
    `price`, the head's own share, is paid by all.
    """
    return float(np.mean(saved_at(confidence, agrees, after, price, [a * tolerance for a in AROUND])))


def saved_at(
    confidence: NDArray[np.float32], agrees: NDArray[np.bool_], after: float, price: float, tolerances: Sequence[float]
) -> list[float]:
    """The same for each of some tolerances; never less than 0, for an exit that costs more is left out."""
    entry = column(confidence, (~agrees).astype(np.float64))
    return [max(0.0, entry.longest(t) / len(confidence) * after - price) for t in tolerances]


def shortlist(records: Records, costs: Costs, tolerance: float, limit: int) -> tuple[int, ...]:
    """The `limit` candidates that together save most, mean over tolerances around the one asked for; ascending.

    From all of them those are left out first that no plan takes, the shallowest before the others: without them the
    same plans are as good. Then, one after the other, the one whose absence costs least.
    """
    kept = tuple(range(records.candidates))
    while len(kept) > limit:
        plans = _plans(records.among(kept), costs.among(kept), tolerance)
        taken = {kept[place] for plan in plans for place in plan.chosen}
        idle = [one for one in kept if one not in taken][: len(kept) - limit]
        if idle:
            kept = tuple(one for one in kept if one not in idle)
            continue
        fewer = [tuple(other for other in kept if other != left_out) for left_out in kept]
        kept = min(fewer, key=lambda some: _spent(records.among(some), costs.among(some), tolerance))
    return kept


def _plans(records: Records, costs: Costs, tolerance: float) -> list[Selection]:
    return [joint(records, costs, min(1.0, a * tolerance), work=0) for a in AROUND]


def _spent(records: Records, costs: Costs, tolerance: float) -> float:
    return float(np.mean([plan.expected_cost for plan in _plans(records, costs, tolerance)]))
