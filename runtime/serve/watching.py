"""Rows that are watched to the last exit, so that the record is not of hard rows alone.

They are drawn, and their places taken, when their request is accepted: were a place taken only once a row is answered,
a full background would drop rows that left early, and none of those that reached the end by themselves. For the same
reason nothing that was placed has to go again when clients need room: watched rows have a room of their own, a share
of what the inputs of a model's rows may take, and what finds no place in it is not watched.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np

from ..selection.bounds import REGRET
from .requests import Request, Spoken
from .work import Observer, Recorder, Sample

_log = logging.getLogger(__name__)
_SHARE = 4  # watched rows have a quarter of the bytes that waiting ones have, on top of them


class Watching:
    """What of a recorder's wishes there is room for: `bound` rows at a time, whose inputs have at most a share of
    `queue_bytes` for each model. Its methods need the engine's lock, `chosen` and `places` apart.
    """

    def __init__(self, recorder: Recorder | None, observer: Observer, bound: int, queue_bytes: int) -> None:
        self._recorder, self._observer = recorder, observer
        self.free = bound
        self.bytes: Counter[str] = Counter()  # of the inputs that are kept, by model
        self._most = queue_bytes // _SHARE

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

    def places(self, model: str, row_bytes: int) -> int:
        """For how many more rows there is room."""
        left = self._most - self.bytes[model]
        return min(self.free, left // row_bytes) if row_bytes else self.free

    def reserve(self, request: Request) -> int:
        """Watch those of the rows chosen that find a place, the first ones first, and keep their inputs alone.

        Returns how many found none.
        """
        chosen = request.watched
        wanted = int(np.count_nonzero(chosen))
        if not wanted:
            return 0
        found = min(self.places(request.model, request.row_bytes), len(request.kept))
        request.watched = chosen & (np.cumsum(chosen) <= found)
        request.keep(found)
        self.free -= found
        self.bytes[request.model] += found * request.row_bytes
        return wanted - found

    def leave(self, request: Request, rows: np.ndarray) -> None:
        """These rows are not watched any more, if they were."""
        left = rows[request.watched[rows]]
        if not len(left):
            return
        request.watched[left] = False
        self.free += len(left)
        if not request.watched.any():  # they lie in one piece of memory, which goes with the last of them
            self.bytes[request.model] -= len(request.kept) * request.row_bytes
            request.keep(0)

    def finish(
        self, request: Request, rows: np.ndarray, probabilities: np.ndarray, after: list[Callable[[], None]]
    ) -> None:
        """The last exit has spoken for answered rows [n], [n, K]; what is to be told goes to `after`."""
        here = np.flatnonzero(request.watched[rows])
        spoken, recorder = request.spoken, self._recorder
        if spoken is None or recorder is None:
            return
        now, planned = time.time(), _as_planned(request, spoken, rows)
        for place in here:
            row = int(rows[place])
            exit, early = int(spoken.exit[row]), spoken.probabilities[row].copy()
            final = probabilities[place].copy()
            if not np.isfinite(final).all():
                continue  # the backbone gives no answer to compare with, and a sum would be no number from here on
            sample = Sample(request.model, request.hosted.digest, request.row(row), exit, early, final, now)
            agrees = bool(early.argmax() == final.argmax())
            risk = _risk(request.hosted.manifest.risk, early, final) if planned[place] else None
            after.append(partial(recorder.record, sample))
            after.append(partial(self._observer.watched, request.model, request.hosted.digest, exit, agrees, risk))
        self.leave(request, rows[here])


def _as_planned(request: Request, spoken: Spoken, rows: np.ndarray) -> np.ndarray:
    """[n] bool: of answered rows [n], those that left where the default plan lets them."""
    limits = np.broadcast_to(request.limits, (len(request.open), request.limits.shape[-1]))[rows]
    exits = spoken.exit[rows]
    plain = np.array(request.hosted.manifest.thresholds(None), np.float32)
    passed = np.append(plain, np.float32(-np.inf))[exits]  # the last exit answers whatever its confidence
    planned: np.ndarray = (limits == plain).all(axis=1) & (spoken.confidence[rows] >= passed)
    return planned


def _risk(kind: str, early: np.ndarray, final: np.ndarray) -> float:
    """Of one answer, by the backbone's probabilities [K]; see `selection.bounds`."""
    given, best = early.argmax(), final.argmax()
    return float(final[best] - final[given]) if kind == REGRET else float(given != best)
