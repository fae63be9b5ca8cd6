"""Trials: one proposed head of one candidate each, learning beside all others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from offramp.passes import METRICS, Backbone, Candidate, confidence, probabilities, row_shape
from offramp.runtime.errors import UsageError

from ..heads import LEARNING_RATE, HeadConfig, configure, default_head, families_for, head_flops
from ..learner import Learner
from ..stream import Observed
from .engine import Proposal
from .objective import worth

METRIC = METRICS[0]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a head said of the selection rows."""

    confidence: np.ndarray  # [rows] float32
    agrees: np.ndarray  # [rows] bool

    def state(self) -> dict[str, torch.Tensor]:
        """For `torch.save`; `Answers(**{k: t.numpy() ...})` is the way back."""
        return {"confidence": torch.from_numpy(self.confidence), "agrees": torch.from_numpy(self.agrees)}


@dataclass(eq=False)
class Trial:
    """A head on trial. `proposal` is None for the candidate's default head, which every other must beat."""

    candidate: int
    config: HeadConfig
    rate: float
    proposal: Proposal | None
    learner: Learner = field(repr=False)
    after: float  # share of the backbone's compute behind the candidate
    price: float  # the head's own share
    scores: dict[int, float] = field(default_factory=dict)  # by epochs it had learned for; see `objective.worth`
    answers: Answers | None = field(default=None, repr=False)  # when it was last scored

    @property
    def epochs(self) -> int:
        """It had learned for when it was last scored."""
        return max(self.scores, default=0)

    @property
    def score(self) -> float:
        """The last one; 0 before the first."""
        return self.scores.get(self.epochs, 0.0)

    def record(self) -> dict[str, Any]:
        """What is told of it: plain values."""
        return {
            "candidate": self.candidate,
            "family": self.config.family,
            "settings": dict(self.config.settings),
            "rate": self.rate,
            "default": self.proposal is None,
            "scores": dict(self.scores),
        }


@dataclass(frozen=True, eq=False)
class Place:
    """A candidate as the search sees it."""

    index: int
    candidate: Candidate
    shape: tuple[int, ...]  # of one row of its value
    families: tuple[str, ...]  # that read it, the default one first
    total: float  # FLOPs per row of the whole backbone
    classes: int

    @property
    def varies(self) -> bool:
        """Whether a size other than the batch is free."""
        return any(isinstance(size, str) for size in self.candidate.shape[1:])

    def config(self, family: str, proposal: Proposal | None) -> HeadConfig:
        """The head of a family that was proposed for this place; the default one for None."""
        if proposal is None:
            return default_head(self.shape, self.classes, self.total)
        return configure(family, self.shape, self.classes, self.total, proposal.choices, varies=self.varies)

    def price(self, config: HeadConfig) -> float:
        """The head's share of the backbone's compute."""
        return head_flops(config, self.shape, self.classes) / self.total if self.total else 0.0


def places(backbone: Backbone, candidates: Sequence[Candidate]) -> list[Place]:
    """Every candidate with what its heads need to know."""
    found = []
    for index, candidate in enumerate(candidates):
        shape = row_shape(backbone, candidate.name)
        total = candidate.flops_before + candidate.flops_after
        found.append(Place(index, candidate, shape, families_for(shape), total, backbone.classes))
    return found


def learning_rate(proposal: Proposal | None, usual: float) -> float:
    """The proposal's own, if it has one. Raises `UsageError` where that is none."""
    if proposal is None:
        return usual
    rate = proposal.choices.get(LEARNING_RATE, usual)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise UsageError(f"search space, {LEARNING_RATE}: {rate!r} is no learning rate; give numbers above 0")
    return float(rate)


def score(trials: Sequence[Trial], observed: Iterable[Observed], tolerance: float, epochs: int) -> None:
    """In place: what every trial is worth after `epochs`, on some rows which none has learned from."""
    sure: dict[int, list[np.ndarray]] = {id(t): [] for t in trials}
    agrees: dict[int, list[np.ndarray]] = {id(t): [] for t in trials}
    for trial in trials:
        trial.learner.module.eval()
    with torch.no_grad():
        for batch in observed:
            classes = batch.target.argmax(1).cpu()
            for trial in trials:
                logits = trial.learner.module(batch.values[trial.candidate]).cpu()
                sure[id(trial)].append(confidence(probabilities(logits, "logits", 1.0), METRIC).numpy())
                agrees[id(trial)].append((logits.argmax(1) == classes).numpy())
            batch.values.clear()
    for trial in trials:
        said = Answers(np.concatenate(sure[id(trial)]), np.concatenate(agrees[id(trial)]))
        trial.answers = said
        trial.scores[epochs] = worth(said.confidence, said.agrees, trial.after, trial.price, tolerance)


def better_half(trials: Sequence[Trial]) -> list[Trial]:
    """Of every candidate's trials the better half, in their order, and its default head, which the others are
    held against."""
    kept: set[int] = set()
    for candidate in {t.candidate for t in trials}:
        proposed = [t for t in trials if t.candidate == candidate and t.proposal is not None]
        ranked = sorted(proposed, key=lambda t: -t.score)
        kept.update(id(t) for t in ranked[: (len(ranked) + 1) // 2])
    return [t for t in trials if t.proposal is None or id(t) in kept]
