"""The dial: plans for the tolerances that a deployment may turn to, over the exits an artifact has.

The exits are those chosen for the tolerance asked for. For every other tolerance of the dial thresholds are chosen anew
among them, by the same policy and on the same rows; an exit that does not pay there never answers. Under the policy
`certified` each plan gets a certificate of its own, where the certification rows are enough for one: each holds with
probability 1 - delta for itself, not all of them at once.

Which exits the artifact has was decided by those same certification rows, but only among the plans of a path that the
selection rows alone drew. So the tests over these exits are made at delta over the number of sets of exits on that
path: whichever of them was taken, delta bounds the whole (union bound).

Where stages of lower precision alone break a tolerance, there is no plan for it: a deployment that asks for it gets
what the last stage answers, the most faithful answers the artifact has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..errors import ToleranceError
from ..manifest import Certificate, Plan
from .bounds import rows_needed
from .certify import PATH, Certified, certified, walk
from .policies import joint, left_over, select
from .records import Costs, Records, Selection, realised_risk

TOLERANCES = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05)
CERTIFIED, PREDICTED = "certified", "predicted"


def evidence(found: Certified) -> Certificate:
    """The certificate as the manifest writes it."""
    return Certificate(found.delta, found.rows, found.observed, found.bound)


def dial(
    chosen: Selection, certificate: Certificate | None, recorded: Mapping[str, Records], costs: Costs,
    tolerances: Sequence[float], policy: str, delta: float, sets: int,
) -> tuple[Plan, ...]:  # fmt: skip
    """Plans by rising tolerance, `chosen` among them; none but it when it has no exits.

    `sets` is how many sets of exits the certification rows decided between, 1 where they decided nothing.
    """
    own = Plan(chosen.tolerance, policy, _stored(chosen.thresholds), certificate)
    if not chosen.chosen:
        return (own,)
    merged = {part: kept.among(chosen.chosen) for part, kept in recorded.items()}
    others = [t for t in tolerances if t != chosen.tolerance]
    turned = plans_over(merged, costs.among(chosen.chosen), others, policy, delta, sets)
    return tuple(sorted((own, *turned), key=lambda plan: plan.tolerance))


def plans_over(
    recorded: Mapping[str, Records], costs: Costs, tolerances: Iterable[float], policy: str, delta: float, sets: int,
    needed: float | None = None,
) -> tuple[Plan, ...]:  # fmt: skip
    """A plan for each tolerance, over exits that are the records' candidates; `sets` as for `dial`.

    None for one that lower precision alone breaks; where it is the tolerance `needed`, `ToleranceError` says so.
    """
    plans = []
    for tolerance in tolerances:
        try:
            plans.append(_plan(recorded, costs, tolerance, policy, delta, sets))
        except ToleranceError:
            if tolerance == needed:
                raise
    return tuple(plans)


def plan_without_exits(
    recorded: Mapping[str, Records], costs: Costs, tolerance: float, policy: str, delta: float, exits: int
) -> Plan:
    """The plan under which none of so many exits answers. Raises `ToleranceError` as `plans_over` does."""
    left_over(recorded["select"], tolerance)
    certificate = None
    if policy == CERTIFIED and recorded["certify"].final is not None:
        certificate = evidence(walk((), recorded["certify"], costs, tolerance, delta))
    return Plan(tolerance, policy, (None,) * exits, certificate)


def _plan(
    recorded: Mapping[str, Records], costs: Costs, tolerance: float, policy: str, delta: float, sets: int
) -> Plan:
    kept, held_out = recorded["select"], recorded["certify"]
    certificate, name = None, policy
    if policy != CERTIFIED:
        found = select(policy, kept, costs, tolerance)
    elif held_out.rows >= rows_needed(tolerance, delta / sets):
        proved = certified(kept, held_out, costs, tolerance, delta / sets)
        found, certificate = proved.selection, replace(evidence(proved), delta=delta)
    else:
        found, name = _predicted(kept, costs, tolerance), PREDICTED
    thresholds = np.full(len(costs.head), math.inf)
    thresholds[list(found.chosen)] = found.thresholds
    return Plan(tolerance, name, _stored(thresholds), certificate)


def _predicted(kept: Records, costs: Costs, tolerance: float) -> Selection:
    """Where rows are too few for a test: by predicted risk, as bold as keeps to the tolerance as observed too."""
    allowed, spent = left_over(kept, tolerance), float(kept.final_risk.mean())
    for share in (share for share in reversed(PATH) if share <= 1):
        found = joint(replace(kept, predicted=True), costs, min(1.0, spent + share * allowed))
        if realised_risk(kept, found.chosen, found.thresholds) <= tolerance:
            return found
    return Selection((), (), PREDICTED, tolerance, float(costs.reach[-1]), spent)


def _stored(thresholds: Sequence[float] | np.ndarray) -> tuple[float | None, ...]:
    return tuple(None if math.isinf(t) and t > 0 else float(t) for t in thresholds)
