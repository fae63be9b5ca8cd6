"""Recording: what every head and the backbone answer, for rows no head has learned from.

One frozen pass over the rows gives all that calibration and selection need, so that subsets and thresholds
are scored without running the program again (paper, 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from offramp.passes import Backbone, probabilities
from offramp.passes.program import confidence
from offramp.passes.taps import tap
from offramp.runtime.data import Rows

from .capture import bind
from .distill import Head
from .progress import bar
from .stream import batches, check_finite, tensors

_BATCH = 128


@dataclass(frozen=True)
class Recording:
    """Answers for some rows; candidates from shallow to deep."""

    logits: np.ndarray  # [candidates, rows, K] float32, temperature 1; float64 where taken from probabilities
    backbone: np.ndarray  # [rows, K] float32, probabilities
    final: np.ndarray | None = None  # [rows, K] float32, those of an emitted last stage that may answer otherwise

    @property
    def backbone_classes(self) -> np.ndarray:
        """[rows] int64."""
        found: np.ndarray = self.backbone.argmax(1)
        return found

    @property
    def final_classes(self) -> np.ndarray:
        """[rows] int64, what a row is answered that reaches the end."""
        found: np.ndarray = (self.backbone if self.final is None else self.final).argmax(1)
        return found

    def classes(self) -> np.ndarray:
        """[rows, candidates] int64; temperature does not change them."""
        found: np.ndarray = self.logits.argmax(2).T
        return found

    def regret(self) -> np.ndarray:
        """[rows, candidates] float32 in [0, 1]: the backbone's p(its class) - p(the head's class)."""
        return self._lost(self.classes())

    def final_regret(self) -> np.ndarray:
        """[rows] float32 in [0, 1]: the same of what is answered at the end."""
        return self._lost(self.final_classes[:, None])[:, 0]

    def _lost(self, classes: np.ndarray) -> np.ndarray:
        given = np.take_along_axis(self.backbone, classes, 1)
        lost: np.ndarray = np.clip(self.backbone.max(1, keepdims=True) - given, 0, 1)
        return lost

    def confidence(self, temperatures: Sequence[float], metric: str) -> np.ndarray:
        """[rows, candidates] float32, computed as the exit program computes it."""
        columns = [
            confidence(probabilities(torch.from_numpy(logits), "logits", t), metric).float().numpy()
            for logits, t in zip(self.logits, temperatures, strict=True)
        ]
        return np.stack(columns, 1) if columns else np.zeros((len(self.backbone), 0), np.float32)


def record(backbone: Backbone, heads: Sequence[Head], data: Rows, rows: np.ndarray, what: str) -> Recording:
    """Run backbone and heads over `rows` of `data`; `what` names the split on the progress bar."""
    taps = tap(backbone, [h.candidate.name for h in heads])
    scores = np.empty((len(rows), backbone.classes), np.float32)
    logits = np.empty((len(heads), len(rows), backbone.classes), np.float32)
    done = 0
    pieces = list(batches(rows, _BATCH))
    with torch.no_grad():
        for piece in bar(pieces, f"record {what}"):
            answer, *values = taps(*bind(backbone.inputs, tensors(data, piece), backbone.name))
            span = slice(done, done + len(piece))
            given = probabilities(answer, backbone.scores, 1.0)
            check_finite(given, piece, backbone.name)
            scores[span] = given.numpy()
            for index, (head, value) in enumerate(zip(heads, values, strict=True)):
                logits[index, span] = head.module(value).numpy()
            done += len(piece)
    return Recording(logits, scores)


def calibrate(recording: Recording) -> tuple[float, ...]:
    """Temperature per head: the one under which its confidence best predicts agreement with the backbone.

    Temperature scaling (Guo et al. 2017) with the backbone's class in the label's place: least negative
    log-likelihood, searched over log T in [log 0.05, log 20]. Targets are smoothed as Platt (1999) does, by
    1 / (rows + 2): a head that agrees on every row is sure, but no surer than that many rows can tell.
    """
    target = torch.from_numpy(recording.backbone_classes)
    return tuple(_fit_temperature(torch.from_numpy(logits), target) for logits in recording.logits)


def _fit_temperature(logits: torch.Tensor, target: torch.Tensor) -> float:
    smoothing = 1 / (len(target) + 2)

    def loss(log_t: float) -> float:
        scaled = logits.double() / float(np.exp(log_t))
        return float(F.cross_entropy(scaled, target, label_smoothing=smoothing))

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded", options={"xatol": 1e-4})
    return float(np.float32(np.exp(found.x)))
