"""Evaluation: what the program does on rows nothing has touched, by its eager reference run.

Stages of another precision are no longer that program: theirs is what they answered when they ran.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from offramp.passes import ExitProgram, module_flops, row_shape
from offramp.runtime.data import Rows
from offramp.runtime.manifest import Evaluation, ExitEvaluation

from .capture import bind
from .progress import bar
from .stream import batches, tensors

_BATCH = 128


@dataclass(frozen=True)
class Outcome:
    """The program's and every exit's answers for some rows."""

    exits: np.ndarray  # [rows] int64, where each row left
    classes: np.ndarray  # [rows] int64, what it was answered
    all_classes: np.ndarray  # [E, rows] int64, what every exit would have answered, the last stage last
    backbone: np.ndarray  # [rows, K] float32, the probabilities of the backbone that was compiled

    @property
    def backbone_classes(self) -> np.ndarray:
        """[rows] int64."""
        found: np.ndarray = self.backbone.argmax(1)
        return found


def run_program(program: ExitProgram, data: Rows, rows: np.ndarray) -> Outcome:
    """Run the program eagerly over `rows`, and once more with compaction off."""
    exits, classes, every, backbone = [], [], [], []
    for piece in bar(list(batches(rows, _BATCH)), "evaluate"):
        inputs = bind(program.backbone.inputs, tensors(data, piece), program.backbone.name)
        probabilities, index = program(*inputs)
        exits.append(index.numpy())
        classes.append(probabilities.argmax(1).numpy())
        everywhere = program.all_exits(*inputs)
        every.append(everywhere.argmax(2).numpy())
        backbone.append(everywhere[-1].numpy())
    return Outcome(
        np.concatenate(exits), np.concatenate(classes), np.concatenate(every, axis=1), np.concatenate(backbone)
    )


def regret(backbone: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Probabilities `[rows, K]`, classes `[rows]` -> `[rows]` float32 in [0, 1]: p(the backbone's class) - p(class)."""
    given: np.ndarray = backbone.max(1) - backbone[np.arange(len(backbone)), classes]
    return given


def head_costs(program: ExitProgram) -> tuple[int, ...]:
    """FLOPs per row of every head."""
    shapes = [row_shape(program.backbone, planned.cut) for planned in program.plan.exits]
    return tuple(module_flops(h, shape) for h, shape in zip(program.heads, shapes, strict=True))


def evaluate(program: ExitProgram, outcome: Outcome, labels: np.ndarray | None) -> Evaluation:
    """Rates, disagreement with its interval, accuracy where labels `[rows]` are given, FLOPs per row."""
    rows, last = len(outcome.exits), len(program.heads)
    agrees = outcome.all_classes == outcome.backbone_classes
    exits = []
    for index in range(last + 1):
        left = outcome.exits == index
        exits.append(
            ExitEvaluation(
                exit_rate=float(left.mean()),
                agreement=float(agrees[index, left].mean()) if left.any() else None,
                agreement_all=float(agrees[index].mean()),
                accuracy=float((outcome.classes == labels)[left].mean()) if labels is not None and left.any() else None,
            )
        )
    differs = int((outcome.classes != outcome.backbone_classes).sum())
    interval = binomtest(differs, rows).proportion_ci(0.95, method="exact")
    segments = np.cumsum([s.flops for s in program.segments])
    asked = np.array([threshold < np.inf for threshold in program.plan.thresholds], np.float64)
    heads = np.cumsum([*(head_costs(program) * asked), 0])
    first = np.where(agrees.any(0), agrees.argmax(0), last)
    return Evaluation(
        rows=rows,
        exits=tuple(exits),
        disagreement=differs / rows,
        disagreement_interval=(float(interval.low), float(interval.high)),
        regret=float(regret(outcome.backbone, outcome.classes).mean()),
        accuracy_backbone=None if labels is None else float((outcome.backbone_classes == labels).mean()),
        accuracy=None if labels is None else float((outcome.classes == labels).mean()),
        flops_backbone=float(segments[-1]),
        flops=float((segments + heads)[outcome.exits].mean()),
        oracle_flops=float(segments[first].mean()),
    )
