"""The exit plan: where a backbone gets exits and when a row takes one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from offramp.runtime.errors import PlanError

METRICS = ("max_probability", "margin", "entropy")


@dataclass(frozen=True)
class PlannedExit:
    """One exit, at the cut of a candidate."""

    cut: str  # the candidate's name
    temperature: float  # divides the head's logits, > 0
    threshold: float  # a row leaves with confidence >= threshold, compared in float32; inf: never

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise PlanError(f"exit at {self.cut}: temperature {self.temperature} is not a positive number")
        if math.isnan(self.threshold):
            raise PlanError(f"exit at {self.cut}: threshold is not a number")


@dataclass(frozen=True)
class ExitPlan:
    """Exits from shallow to deep."""

    exits: tuple[PlannedExit, ...]
    metric: str = "max_probability"
    policy: str = "manual"
    tolerance: float = math.nan

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise PlanError(f"confidence metric {self.metric!r} is unknown; use one of {', '.join(METRICS)}")
        cuts = [e.cut for e in self.exits]
        if len(set(cuts)) != len(cuts):
            raise PlanError(f"a cut carries two exits: {', '.join(cuts)}; give each cut one")

    @property
    def thresholds(self) -> tuple[float, ...]:
        return tuple(e.threshold for e in self.exits)
