"""Evidence: all that the report shows, from the answers recorded on the test rows.

Nothing was trained, calibrated or chosen on these rows. Every plan of the dial is judged by the records, as
selection judges plans; the time it takes was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from offramp.passes import METRICS
from offramp.runtime.manifest import Manifest, Plan
from offramp.runtime.selection import (
    DISAGREEMENT,
    REGRET,
    Costs,
    Records,
    exits_taken,
    expected_cost,
    realised_risk,
)

from .judged import Categories, Curves, Reliability, auroc, categories, curves, reliability
from .record import Recording


@dataclass(frozen=True, eq=False)
class Judged:
    """One candidate on all test rows, whether it became an exit or not."""

    place: str
    exit: int | None  # its index among the exits; None: not chosen
    depth: float  # share of the backbone's compute spent when it is reached
    temperature: float
    agreement: float  # with the backbone, were every row answered here
    auroc: float | None  # of its confidence, for "will it agree?"
    before: Reliability  # of its largest probability at temperature 1
    after: Reliability  # at its own temperature
    curves: Curves


@dataclass(frozen=True)
class Point:
    """One plan of the dial on the test rows."""

    plan: Plan
    saved: float  # share of the backbone's FLOPs
    disagreement: float
    regret: float
    drop: float | None  # of accuracy, if there are labels; negative where it rose
    saved_time: tuple[float, ...]  # [timings] share of the backbone's time


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the report is drawn from. Candidates from shallow to deep."""

    manifest: Manifest
    places: Sequence[str]  # [candidates]
    chosen: Sequence[int]  # candidates that became exits, ascending
    temperatures: Sequence[float]  # [candidates]
    test: Recording  # what all candidates and the backbone answered
    records: Records  # the same, as selection reads it
    costs: Costs  # FLOPs per row
    labels: np.ndarray | None  # [rows] int64
    ratios: Sequence[Sequence[float]]  # [timings][plans] of the artifact's time to the backbone's

    @cached_property
    def candidates(self) -> tuple[Judged, ...]:
        """Every candidate, judged by itself."""
        metric = METRICS[0]  # the one that temperatures calibrate
        plain = self.test.confidence([1.0] * len(self.places), metric)
        calibrated = self.test.confidence(self.temperatures, metric)
        classes, backbone = self.test.classes(), self.test.backbone_classes
        before = None if self.labels is None else backbone == self.labels
        total = max(float(self.costs.reach[-1]), 1e-9)
        found = []
        for index, place in enumerate(self.places):
            agrees, sure = self.records.agrees[:, index], self.records.confidence[:, index]
            right = None if self.labels is None else classes[:, index] == self.labels
            found.append(
                Judged(
                    place=place,
                    exit=list(self.chosen).index(index) if index in self.chosen else None,
                    depth=float(self.costs.reach[index]) / total,
                    temperature=self.temperatures[index],
                    agreement=float(agrees.mean()),
                    auroc=auroc(sure, agrees),
                    before=reliability(plain[:, index], agrees),
                    after=reliability(calibrated[:, index], agrees),
                    curves=curves(sure, agrees, right, before),
                )
            )
        return tuple(found)

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """Every plan of the dial, by rising tolerance."""
        return tuple(self._point(index, plan) for index, plan in enumerate(self.manifest.plans))

    @property
    def default(self) -> Point:
        """The plan that runs unless another is asked for."""
        return self.points[self.manifest.default_plan]

    @cached_property
    def categories(self) -> tuple[Categories, ...] | None:
        """The rows that leave at every exit under the default plan, by who is right; None without labels."""
        if self.labels is None:
            return None
        taken, given = self._answers(self.default.plan)
        backbone = self.test.backbone_classes
        left = [taken == index for index in range(len(self.chosen))]
        return tuple(categories(given[at], backbone[at], self.labels[at]) for at in left)

    @cached_property
    def disagreeing(self) -> tuple[tuple[int, int], ...]:
        """Rows that leave at every exit under the default plan, and those of them that disagree."""
        taken, given = self._answers(self.default.plan)
        differs = given != self.test.backbone_classes
        return tuple((int((taken == i).sum()), int(differs[taken == i].sum())) for i in range(len(self.chosen)))

    def _answers(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """-> the exit each test row leaves at [rows], the backbone last, and the class it is given [rows]."""
        taken = exits_taken(self.records, self.chosen, plan.limits)
        columns = np.column_stack([self.test.classes()[:, list(self.chosen)], self.test.final_classes])
        return taken, columns[np.arange(len(taken)), taken]

    def _point(self, index: int, plan: Plan) -> Point:
        asked = [(c, t) for c, t in zip(self.chosen, plan.thresholds, strict=True) if t is not None]
        where, limits = [c for c, _ in asked], [t for _, t in asked]
        plain = replace(self.records, predicted=False)
        given = self._answers(plan)[1]
        drop = None
        if self.labels is not None:
            drop = float((self.test.backbone_classes == self.labels).mean() - (given == self.labels).mean())
        total = float(self.costs.reach[-1])
        return Point(
            plan=plan,
            saved=1 - expected_cost(self.records, self.costs, where, limits) / total if total else 0.0,
            disagreement=realised_risk(replace(plain, kind=DISAGREEMENT), where, limits),
            regret=realised_risk(replace(plain, kind=REGRET), where, limits),
            drop=drop,
            saved_time=self._saved_time(index),
        )

    def _saved_time(self, index: int) -> tuple[float, ...]:
        """Of one plan, by batch size; that of the default plan was measured in more rounds."""
        timings = self.manifest.measured.timings
        if index == self.manifest.default_plan:
            return tuple(1 - timing.ratio for timing in timings)
        return tuple(1 - of_plans[index] for of_plans in self.ratios)
