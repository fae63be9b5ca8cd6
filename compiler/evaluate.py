"""Evaluation: what the program does on rows nothing has touched, by its eager reference run."""

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
    all_classes: np.ndarray  # [E, rows] int64, what every exit would have answered

    @property
    def backbone_classes(self) -> np.ndarray:
        """[rows] int64."""
        last: np.ndarray = self.all_classes[-1]
        return last


def run_program(program: ExitProgram, data: Rows, rows: np.ndarray) -> Outcome:
    """Run the program eagerly over `rows`, and once more with compaction off."""
    exits, classes, every = [], [], []
    for piece in bar(list(batches(rows, _BATCH)), "evaluate"):
        inputs = bind(program.backbone.inputs, tensors(data, piece), program.backbone.name)
        probabilities, index = program(*inputs)
        exits.append(index.numpy())
        classes.append(probabilities.argmax(1).numpy())
        every.append(program.all_exits(*inputs).argmax(2).numpy())
    return Outcome(np.concatenate(exits), np.concatenate(classes), np.concatenate(every, axis=1))


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
    heads = np.cumsum([*head_costs(program), 0])
    first = np.where(agrees.any(0), agrees.argmax(0), last)
    return Evaluation(
        rows=rows,
        exits=tuple(exits),
        disagreement=differs / rows,
        disagreement_interval=(float(interval.low), float(interval.high)),
        accuracy_backbone=None if labels is None else float((outcome.backbone_classes == labels).mean()),
        accuracy=None if labels is None else float((outcome.classes == labels).mean()),
        flops_backbone=float(segments[-1]),
        flops=float((segments + heads)[outcome.exits].mean()),
        oracle_flops=float(segments[first].mean()),
    )
