"""Rows that are watched to the last exit, so that the record is not of hard rows alone.

They are drawn, and their places taken, when their request is accepted: were a place taken only once a row is answered,
a full background would drop rows that left early, and none of those that reached the end by themselves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from ..selection.bounds import REGRET
from .requests import Request, Spoken
from .work import Observer, Recorder, Sample

_log = logging.getLogger(__name__)


class Watching:
    """What of a recorder's wishes there is room for: `bound` rows at a time. Its methods need the engine's lock,
    `chosen` apart.
    """

    def __init__(self, recorder: Recorder | None, observer: Observer, bound: int) -> None:
        self._recorder, self._observer = recorder, observer
        self.free = bound
        self._unplaced = 0  # rows nobody has been told of

    def chosen(self, model: str, rows: int) -> np.ndarray:
        """[rows] bool: those the recorder would like to see; none where it fails."""
        nobody = np.zeros(rows, bool)
        if self._recorder is None or not rows:
            return nobody
        try:
            chosen: np.ndarray = nobody | self._recorder.chosen(model, rows)
            return chosen
        except Exception:  # noqa: BLE001  # logged; a request is not refused for the record's sake
            _log.exception("the recorder failed to choose rows")
            return nobody

    def reserve(self, chosen: np.ndarray) -> np.ndarray:
        """[rows] bool: the chosen ones that find a place; the first come first."""
        given: np.ndarray = chosen & (np.cumsum(chosen) <= self.free)
        self.free -= int(np.count_nonzero(given))
        self._unplaced += int(np.count_nonzero(chosen & ~given))
        return given

    def leave(self, request: Request, rows: np.ndarray) -> None:
        """These rows are not watched any more, if they were."""
        left = rows[request.watched[rows]]
        request.watched[left] = False
        self.free += len(left)

    def finish(
        self, request: Request, rows: np.ndarray, probabilities: np.ndarray, after: list[Callable[[], None]]
    ) -> None:
        """The last exit has spoken for answered rows [n], [n, K]; what is to be told goes to `after`."""
        here = np.flatnonzero(request.watched[rows])
        spoken, recorder = request.spoken, self._recorder
        if spoken is None or recorder is None:
            return
        # Told here, for a row that found no place has others before it that come this way.
        if self._unplaced:
            after.append(partial(self._observer.unplaced, self._unplaced))
            self._unplaced = 0
        now, planned = time.time(), _as_planned(request, spoken, rows)
        for place in here:
            row = int(rows[place])
            exit, early = int(spoken.exit[row]), spoken.probabilities[row].copy()
            final = probabilities[place].copy()
            sample = Sample(request.model, request.hosted.digest, request.row(row), exit, early, final, now)
            agrees = bool(early.argmax() == final.argmax())
            risk = _risk(request.hosted.manifest.risk, early, final) if planned[place] else None
            after.append(partial(recorder.record, sample))
            after.append(partial(self._observer.watched, request.model, exit, agrees, risk))
        self.leave(request, rows[here])


def _as_planned(request: Request, spoken: Spoken, rows: np.ndarray) -> np.ndarray:
    """[n] bool: of answered rows [n], those that left where the default plan lets them."""
    limits, exits = request.limits[rows], spoken.exit[rows]
    plain = np.array(request.hosted.manifest.thresholds(None), np.float32)
    passed = np.append(plain, np.float32(-np.inf))[exits]  # the last exit answers whatever its confidence
    planned: np.ndarray = (limits == plain).all(axis=1) & (spoken.confidence[rows] >= passed)
    return planned


def _risk(kind: str, early: np.ndarray, final: np.ndarray) -> float:
    """Of one answer, by the backbone's probabilities [K]; see `selection.bounds`."""
    given, best = early.argmax(), final.argmax()
    return float(final[best] - final[given]) if kind == REGRET else float(given != best)
