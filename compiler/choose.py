"""Choosing: what was recorded -> exits, thresholds, a certificate, in the words of selection and of the passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from offramp.passes import METRICS, ExitPlan, Observer, PlannedExit, Trace, verified
from offramp.runtime.manifest import Certificate
from offramp.runtime.selection import (
    CERTIFIED,
    DISAGREEMENT,
    Costs,
    Records,
    Selection,
    certified,
    evidence,
    select,
)
from offramp.runtime.selection.policies import left_over

from .distill import Head
from .package import Options
from .progress import bar
from .record import Recording


def choose_exits(
    recorded: Mapping[str, Records], price: Costs, options: Options
) -> tuple[Selection, Certificate | None, int]:
    """The exits of the policy asked for, the certificate if it gives one, and how many sets of exits the certification
    rows decided between."""
    if options.tolerance == 0 and options.policy != CERTIFIED:  # that no selection row disagreed promises nothing
        left_over(recorded["select"], 0.0)  # raises where lower precision alone changes answers
        return Selection((), (), options.policy, 0.0, float(price.reach[-1]), 0.0), None, 1
    if options.policy != CERTIFIED:
        return select(options.policy, recorded["select"], price, options.tolerance), None, 1
    found = certified(recorded["select"], recorded["certify"], price, options.tolerance, options.delta, _watched)
    return found.selection, evidence(found), found.sets


def observers(trace: Trace, options: Options) -> tuple[Observer, ...]:
    """Who sees the graph after every pass."""
    return (trace, verified) if options.verify else (trace,)


def _watched(path: Sequence[float]) -> Iterable[float]:
    return bar(path, "choose exits", len(path))


def records(
    recording: Recording, temperatures: Sequence[float], metric: str = METRICS[0], risk: str = DISAGREEMENT
) -> Records:
    """What selection reads of a recording."""
    agrees = recording.classes() == recording.backbone_classes[:, None]
    chance = recording.confidence(temperatures, METRICS[0])  # of all metrics the one that temperatures calibrate
    sure = chance if metric == METRICS[0] else recording.confidence(temperatures, metric)
    if recording.final is None:
        return Records(sure, agrees, chance, recording.regret(), risk)
    final = recording.final_classes != recording.backbone_classes
    lost = recording.final_regret()
    return Records(sure, agrees, chance, recording.regret(), risk, final=final, final_regret=lost)


def exit_plan(
    selection: Selection, heads: Sequence[Head], temperatures: Sequence[float], metric: str = METRICS[0]
) -> ExitPlan:
    """The selection in the words of the passes."""
    exits = tuple(
        PlannedExit(heads[index].candidate.name, temperatures[index], threshold)
        for index, threshold in zip(selection.chosen, selection.thresholds, strict=True)
    )
    return ExitPlan(exits, metric, selection.policy, selection.tolerance)
