"""The certificate: a plan whose risk on new rows exceeds the tolerance with probability at most delta.

Exits chosen on a few thousand rows fit those rows: their risk there says too little about new rows. So a path
of plans, from timid to bold, follows from the selection rows alone, and is walked along with the certification
rows, which nothing else has seen. Plan by plan the hypothesis "its risk exceeds the tolerance" is tested
exactly; the path ends at the first plan for which it cannot be rejected at level delta. Testing in a fixed
order and stopping at the first failure spends delta once, however long the path (fixed-sequence testing; for
risk control see Angelopoulos et al., "Learn then Test", 2021).

Assumes that certification rows and new rows are drawn alike and independently. Disagreements of a plan on n
such rows are binomial, so the test is exact: p = P(Binomial(n, tolerance) <= observed). For regret see `bounds`.

Where stages of lower precision change answers of their own (`Records.final`), the plan without exits makes a claim
like any other and is tested first; the risk of every plan is that of exits and precision together.

Refused: a delta outside (0, 1); fewer rows than a plan without any disagreement would need; a tolerance that cannot be
certified for the precision alone (ToleranceError).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import InputError, ToleranceError, UsageError
from .bounds import RISKS, rows_needed, upper_bound
from .policies import joint, left_over
from .records import Costs, Records, Selection, expected_cost, realised_risk

# Shares of the tolerance a plan of the path is chosen for. Beyond 1 the expectation was too gloomy.
PATH = tuple(float(share) for share in np.arange(1, 31) / 20)


@dataclass(frozen=True)
class Certified:
    """The boldest plan that passed, and the evidence."""

    selection: Selection  # expected cost and disagreement on the selection rows
    delta: float
    rows: int  # certification rows
    observed: float  # risk of the plan, summed over them: the rows it answers otherwise than the backbone
    bound: float  # upper confidence bound on the mean risk at level 1 - delta
    sets: int  # of exits on the path: what the certification rows decided between


def check_rows(rows: int, tolerance: float, delta: float) -> None:
    """Raises `InputError` when so many certification rows can certify no plan at all."""
    if 0 < tolerance < 1 and rows < rows_needed(tolerance, delta):
        raise InputError(
            f"{rows} rows cannot certify a tolerance of {tolerance:g} at delta {delta:g}: "
            f"{rows_needed(tolerance, delta)} are needed in the certification split even if none disagrees; "
            "give more data, a larger tolerance, or another policy than certified"
        )


Watch = Callable[[Sequence[float]], Iterable[float]]  # sees the path go by, to show progress


def certified(
    selected: Records, held_out: Records, costs: Costs, tolerance: float, delta: float = 0.05, watch: Watch = iter
) -> Certified:
    """Selection records, certification records -> the boldest plan whose risk is certified.

    The plan without exits is what remains when not even the most timid plan passes; only where stages are of lower
    precision it needs evidence too.
    """
    if not 0 < delta < 1:
        raise UsageError(f"delta {delta} is not a probability; give a number between 0 and 1, such as 0.05")
    if tolerance <= 0:
        return walk((), held_out, costs, tolerance, delta)
    check_rows(held_out.rows, tolerance, delta)
    return walk(tuple(plan_path(selected, costs, tolerance, watch)), held_out, costs, tolerance, delta)


def walk(path: Sequence[Selection], held_out: Records, costs: Costs, tolerance: float, delta: float) -> Certified:
    """The last plan of a path before the first one that fails; the path must not depend on the certification rows."""
    kind, rows = held_out.kind, held_out.rows
    nothing = Selection((), (), "certified", tolerance, float(costs.reach[-1]), 0.0)
    sets = max(1, len({plan.chosen for plan in path}))
    best = Certified(nothing, delta, rows, *_without_exits(held_out, tolerance, delta), sets)
    for selection in path:
        observed = round(realised_risk(held_out, selection.chosen, selection.thresholds) * rows, 6)
        if RISKS[kind].p_value(observed, rows, tolerance) > delta:
            break
        best = Certified(selection, delta, rows, observed, upper_bound(observed, rows, delta, kind), sets)
    return best


def _without_exits(held_out: Records, tolerance: float, delta: float) -> tuple[float, float]:
    """Risk summed over the certification rows, and its bound, when no row leaves early."""
    if held_out.final is None:
        return 0, 0.0
    kind, rows = held_out.kind, held_out.rows
    observed = round(float(held_out.final_risk.sum()), 6)
    if RISKS[kind].p_value(observed, rows, tolerance) > delta:
        raise ToleranceError(
            f"lower precision alone changes {observed / rows:.2%} of the answers ({kind} on {rows} certification "
            f"rows), which cannot certify a tolerance of {tolerance:.4g} at delta {delta:.4g}; raise the tolerance, "
            "give more data, or compile with a finer precision"
        )
    return observed, upper_bound(observed, rows, delta, kind)


def plan_path(selected: Records, costs: Costs, tolerance: float, watch: Watch = iter) -> Iterator[Selection]:
    """Plans from timid to bold, each cheaper than the one before.

    Each is the joint plan under the risk its calibrated confidences predict: predicted on rows the temperature
    was not fitted on, it does not reward a threshold for the luck of these rows, as counting disagreements does.
    """
    predicted = replace(selected, predicted=True)
    least, allowed = math.inf, left_over(selected, tolerance)
    spent = float(selected.final_risk.mean())  # every plan is charged with it
    for share in watch(PATH):
        found = joint(predicted, costs, min(1.0, spent + share * allowed))
        cost = expected_cost(selected, costs, found.chosen, found.thresholds)
        if found.chosen and cost < least:
            least, seen = cost, realised_risk(selected, found.chosen, found.thresholds)
            yield replace(found, policy="certified", tolerance=tolerance, expected_cost=cost, risk=seen)
