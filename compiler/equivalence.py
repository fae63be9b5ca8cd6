"""Equivalence: an emitted form against the eager run, row by row.

Every backend must leave at the same exit, with probabilities within 1e-4; rows whose confidence at an exit
they pass lies within 1e-5 of its threshold may differ and are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from offramp.passes import ExitProgram, confidence
from offramp.runtime import Answers
from offramp.runtime.errors import ModelError

NEAR = 1e-5
CLOSE = 1e-4


class Answering(Protocol):
    """What is compared: a session of the runtime."""

    def run(self, batch: Mapping[str, np.ndarray], *, thresholds: tuple[float, ...]) -> Answers: ...


@dataclass(frozen=True)
class Equivalence:
    """The outcome of one comparison."""

    rows: int
    near: int  # rows within `NEAR` of a threshold
    other_exit: int  # of the rest, rows that left elsewhere
    difference: float  # of the rest that left at the same exit, the largest in any probability

    @property
    def holds(self) -> bool:
        return not self.other_exit and self.difference <= CLOSE


@dataclass(frozen=True, eq=False)
class Expected:
    """What the eager run answers to one batch under a program's thresholds."""

    thresholds: tuple[float, ...]
    batch: Mapping[str, np.ndarray] = field(repr=False)
    probabilities: np.ndarray = field(repr=False)  # [B, K]
    exits: np.ndarray = field(repr=False)  # [B]
    near: np.ndarray = field(repr=False)  # [B] bool: rounding may decide where the row leaves

    def against(self, session: Answering) -> Equivalence:
        """Run the same batch through an emitted form."""
        got = session.run(self.batch, thresholds=self.thresholds)
        same = (got.exits == self.exits) & ~self.near
        difference = np.abs(got.probabilities - self.probabilities)[same].max(initial=0.0)
        other = int((got.exits != self.exits)[~self.near].sum())
        return Equivalence(len(self.exits), int(self.near.sum()), other, float(difference))


def expect(program: ExitProgram, batch: Mapping[str, np.ndarray]) -> Expected:
    """The eager run of one batch, arrays by input name."""
    inputs = tuple(torch.from_numpy(batch[i.name]) for i in program.backbone.inputs)
    probabilities, exits = (value.numpy() for value in program(*inputs))
    near = np.zeros(len(exits), bool)
    if program.plan.exits:
        for index, answer in enumerate(program.all_exits(*inputs)[:-1]):
            sure = confidence(answer, program.plan.metric).numpy()
            near |= (np.abs(sure - program.plan.thresholds[index]) <= NEAR) & (exits >= index)
    return Expected(program.plan.thresholds, batch, probabilities, exits, near)


def compare(program: ExitProgram, session: Answering, batch: Mapping[str, np.ndarray]) -> Equivalence:
    """Run one batch by name through both, under the program's thresholds."""
    return expect(program, batch).against(session)


def require(found: Equivalence, what: str) -> None:
    """Raises `ModelError` when the emitted form `what` does not give the eager run's answers."""
    if not found.holds:
        raise ModelError(
            f"{what} does not give the model's answers: of {found.rows} rows {found.other_exit} leave elsewhere, "
            f"probabilities differ by up to {found.difference:.1e}; please report the model, nothing was written"
        )
