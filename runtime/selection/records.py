"""What selection works on: what candidates said of some rows, what compute costs, and what a plan makes of both.

A row leaves at the first chosen exit with confidence >= threshold, else at the backbone. It costs the
segments up to there and the head of every chosen exit it passed, its own included. Its risk is that of the
exit it left at. The backbone has none, unless its stages were emitted in a lower precision: then their own answers may
differ from those of the model that was compiled, and `final` says for which rows. Numpy alone: a deployment selects
again with it.

Refused: records or costs that are empty, of the wrong shape or type, not finite or out of range (InputError).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, UsageError
from .bounds import DISAGREEMENT, REGRET, RISKS
from .expected import expected_disagreement
from .joint import Floats, Ints


@dataclass(frozen=True, eq=False)
class Records:
    """What each candidate said about each row of a split. Candidates from shallow to deep."""

    confidence: NDArray[np.float32]  # [rows, candidates] in [0, 1]
    agrees: NDArray[np.bool_]  # [rows, candidates] the exit's class is the backbone's
    chance: NDArray[np.float32] | None = None  # [rows, candidates] calibrated, of agreeing; None: the confidence
    regret: NDArray[np.float32] | None = None  # [rows, candidates] the backbone's p(its class) - p(the exit's class)
    kind: str = DISAGREEMENT  # of risk
    predicted: bool = False  # take the risk that `chance` predicts in place of the one observed
    final: NDArray[np.bool_] | None = None  # [rows] the last stage answers otherwise than the model; None: never
    final_regret: NDArray[np.float32] | None = None  # [rows] the model's p(its class) - p(the last stage's class)

    def __post_init__(self) -> None:
        conf, agrees = self.confidence, self.agrees
        if conf.ndim != 2 or 0 in conf.shape:
            raise InputError(f"records: confidence is {list(conf.shape)}; give [rows, candidates], neither of them 0")
        if agrees.shape != conf.shape:
            raise InputError(f"records: agrees is {list(agrees.shape)}, confidence {list(conf.shape)}; make them alike")
        if conf.dtype != np.float32 or agrees.dtype != np.bool_:
            raise InputError(f"records: confidence is {conf.dtype}, agrees {agrees.dtype}; cast to float32 and bool")
        if not ((conf >= 0) & (conf <= 1)).all():
            raise InputError("records: a confidence is outside [0, 1] or not a number; record probabilities")
        for name, more in (("chance", self.chance), ("regret", self.regret)):
            if more is None:
                continue
            if more.shape != conf.shape or more.dtype != np.float32 or not ((more >= 0) & (more <= 1)).all():
                raise InputError(
                    f"records: {name} is not float32 {list(conf.shape)} in [0, 1]; record it as confidence"
                )
        self._check_final()
        if self.kind not in RISKS:
            raise UsageError(f"risk {self.kind!r} does not exist; choose one of {', '.join(RISKS)}")
        if self.kind == REGRET and self.regret is None:
            raise InputError("records: no regret was recorded; compile the model again")

    def _check_final(self) -> None:
        if (self.final is None) != (self.final_regret is None):
            raise InputError("records: of final and final_regret one is missing; give both or neither")
        if self.final is None or self.final_regret is None:
            return
        lost = self.final_regret
        if self.final.shape != (self.rows,) or self.final.dtype != np.bool_:
            raise InputError(f"records: final is {self.final.dtype} {list(self.final.shape)}; give bool [{self.rows}]")
        if lost.shape != (self.rows,) or lost.dtype != np.float32 or not ((lost >= 0) & (lost <= 1)).all():
            raise InputError(f"records: final_regret is not float32 [{self.rows}] in [0, 1]; record it as regret")

    @property
    def rows(self) -> int:
        return int(self.confidence.shape[0])

    @property
    def candidates(self) -> int:
        return int(self.confidence.shape[1])

    def among(self, chosen: Sequence[int]) -> Records:
        """What some of the candidates said."""
        return self._taken(np.ix_(np.arange(self.rows), np.array(chosen, np.intp)))

    def of(self, rows: Ints) -> Records:
        """What was said of some of the rows."""
        return self._taken(np.ix_(rows, np.arange(self.candidates)))

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """All that was recorded, by name."""
        named = {
            "confidence": self.confidence, "agrees": self.agrees, "chance": self.chance, "regret": self.regret,
            "final": self.final, "final_regret": self.final_regret,
        }  # fmt: skip
        return {name: values for name, values in named.items() if values is not None}

    def _taken(self, part: tuple[NDArray[np.intp], ...]) -> Records:
        return replace(
            self,
            confidence=self.confidence[part],
            agrees=self.agrees[part],
            chance=None if self.chance is None else self.chance[part],
            regret=None if self.regret is None else self.regret[part],
            final=None if self.final is None else self.final[part[0][:, 0]],
            final_regret=None if self.final_regret is None else self.final_regret[part[0][:, 0]],
        )

    @property
    def risk(self) -> Floats:
        """[rows, candidates] in [0, 1]: what answering that row at that exit risks."""
        if self.predicted:
            chance = self.confidence if self.chance is None else self.chance
            return (1.0 - chance.astype(np.float64)) * self._regret_of_one()
        if self.kind == REGRET and self.regret is not None:
            return self.regret.astype(np.float64)
        return (~self.agrees).astype(np.float64)

    @property
    def expected_risk(self) -> Floats:
        """[rows, candidates] in [0, 1]: `risk` in expectation, by recorded chances and by what all rows showed."""
        chance = self.confidence if self.chance is None else self.chance
        return expected_disagreement(self.confidence, chance, self.agrees) * self._regret_of_one()

    @property
    def final_risk(self) -> Floats:
        """[rows] in [0, 1]: what a row risks that no exit answers. Observed always: nothing predicts it."""
        if self.final is None or self.final_regret is None:
            return np.zeros(self.rows)
        return (self.final_regret if self.kind == REGRET else self.final).astype(np.float64)

    def _regret_of_one(self) -> Floats:
        """[candidates] what one disagreement costs in the mean; 1 where the risk is disagreement itself."""
        if self.kind != REGRET or self.regret is None:
            return np.ones(self.candidates)
        wrong = (~self.agrees).sum(0)
        summed = self.regret.astype(np.float64).sum(0)
        return np.where(wrong > 0, summed / np.maximum(wrong, 1), 1.0)


@dataclass(frozen=True, eq=False)
class Costs:
    """Compute per row, in FLOPs or milliseconds: any one unit."""

    segment: Floats  # [candidates + 1] from the candidate before (or the input) to this one; last: to the output
    head: Floats  # [candidates]

    def __post_init__(self) -> None:
        for name, values in (("segment", self.segment), ("head", self.head)):
            if values.ndim != 1 or values.dtype != np.float64:
                raise InputError(f"costs: {name} is {values.dtype} {list(values.shape)}; give a float64 vector")
            if not (np.isfinite(values) & (values >= 0)).all():
                raise InputError(f"costs: {name} has a negative or non-finite entry; measure it again")
        if len(self.segment) != len(self.head) + 1:
            raise InputError(f"costs: {len(self.segment)} segments for {len(self.head)} heads; give one segment more")

    @property
    def reach(self) -> Floats:
        """[candidates + 1] backbone compute from the input to each candidate, last to the output."""
        return np.cumsum(self.segment)

    def among(self, chosen: Sequence[int]) -> Costs:
        """With some of the candidates only: the segments between them join."""
        reach = np.append(self.reach[list(chosen)], self.reach[-1])
        return Costs(np.diff(reach, prepend=0.0), self.head[list(chosen)])


@dataclass(frozen=True)
class Selection:
    """Which candidates become exits. No exits at all is a legal answer."""

    chosen: tuple[int, ...]  # candidate indices, ascending
    thresholds: tuple[float, ...]  # one each, float32 values
    policy: str
    tolerance: float
    expected_cost: float  # per row, in the unit of the costs, on the records
    risk: float  # mean over rows, on the records: the share that disagrees, unless the risk is another


def exits_taken(records: Records, chosen: Sequence[int], thresholds: Sequence[float]) -> Ints:
    """-> [rows] position in `chosen` of the exit each row leaves at; len(chosen) for the backbone."""
    taken = np.full(records.rows, len(chosen), np.int64)
    for position in range(len(chosen) - 1, -1, -1):
        taken[records.confidence[:, chosen[position]] >= np.float32(thresholds[position])] = position
    return taken


def expected_cost(records: Records, costs: Costs, chosen: Sequence[int], thresholds: Sequence[float]) -> float:
    """Mean compute of a row, in the unit of `costs`."""
    leaving = np.bincount(exits_taken(records, chosen, thresholds), minlength=len(chosen) + 1)
    heads = np.cumsum(np.append(0.0, costs.head[list(chosen)]))
    spent = costs.reach[[*chosen, -1]] + np.append(heads[1:], heads[-1])
    return float(leaving @ spent) / records.rows


def realised_risk(records: Records, chosen: Sequence[int], thresholds: Sequence[float]) -> float:
    """Mean risk over all rows, the backbone's answers having none but that of their precision."""
    taken = exits_taken(records, chosen, thresholds)
    left = np.flatnonzero(taken < len(chosen))
    early = float(records.risk[left, np.asarray(chosen, np.int64)[taken[left]]].sum())
    return (early + float(records.final_risk[taken == len(chosen)].sum())) / records.rows


def disagreement(records: Records, chosen: Sequence[int], thresholds: Sequence[float]) -> float:
    """Share of all rows that are answered otherwise than by the model that was compiled."""
    return realised_risk(replace(records, kind=DISAGREEMENT, predicted=False), chosen, thresholds)


def oracle_cost(records: Records, costs: Costs) -> float:
    """Mean compute if each row left at the first candidate that agrees and heads were free: the floor."""
    first = np.where(records.agrees.any(axis=1), records.agrees.argmax(axis=1), records.candidates)
    return float(np.bincount(first, minlength=records.candidates + 1) @ costs.reach) / records.rows
