"""Emitted stages at work, with every head asked and no row leaving: what selection wants to know of all rows.

Refused: an answer that is not a number, by which a value beyond float16's range shows (ModelError).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offramp.runtime.data import Rows
from offramp.runtime.engine import EngineSession, ModelBytes
from offramp.runtime.errors import ModelError
from offramp.runtime.execution import ASK, CONFIDENCE, PROBABILITIES
from offramp.runtime.manifest import StageSpec

from .progress import bar
from .stream import batches

_BATCH = 128
_CPU = ["CPUExecutionProvider"]

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Answered:
    """What every stage answered to some rows."""

    probabilities: np.ndarray  # [E, rows, K] float32
    confidence: np.ndarray  # [E, rows] float32

    @property
    def classes(self) -> np.ndarray:
        """[E, rows] int64."""
        found: np.ndarray = self.probabilities.argmax(2)
        return found


class Stages:
    """The first stages of a program, one after the other; as many as there are models."""

    def __init__(self, specs: Sequence[StageSpec], models: Sequence[ModelBytes]) -> None:
        self.specs = specs[: len(models)]
        self.sessions = [EngineSession(m, s.file, _CPU, None, strict=True) for m, s in zip(models, specs, strict=False)]

    def run(self, batch: Batch) -> tuple[Batch, list[tuple[np.ndarray, np.ndarray]]]:
        """A batch by input name -> the values that go on behind them; probabilities [b, K] and confidence [b] each."""
        live, answers = batch, []
        for spec, session in zip(self.specs, self.sessions, strict=True):
            feed = {name: np.array(True) if name == ASK else live[name] for name in session.inputs}
            *values, probabilities, confidence = session.run([*spec.outputs, PROBABILITIES, CONFIDENCE], feed)
            answers.append((probabilities, confidence))
            known = {**live, **dict(zip(spec.outputs, values, strict=True))}
            live = {name: known[name] for name in spec.carries}
        return live, answers

    def answer(self, data: Rows, rows: np.ndarray, what: str) -> Answered:
        """Over `rows` of `data`; `what` names them on the progress bar."""
        parts = [self.run(data.take(piece))[1] for piece in bar(list(batches(rows, _BATCH)), f"run {what}")]
        probabilities, confidence = (
            np.stack([np.concatenate([part[stage][of] for part in parts]) for stage in range(len(self.specs))])
            for of in (0, 1)
        )
        for spec, said in zip(self.specs, probabilities, strict=True):
            if not np.isfinite(said).all():
                lost = int((~np.isfinite(said).all(1)).sum())
                raise ModelError(
                    f"{spec.file} answers {lost} of {len(rows)} rows with what is not a number, as values beyond "
                    "float16's largest, 65,504, make it; compile with precision int8 or fp32"
                )
        return Answered(probabilities, confidence)
