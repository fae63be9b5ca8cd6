"""Requests that were taken, and the chunks of them that are on their way through the stages.

A row is *open* until it is answered, fails or is dropped. Whoever closes it holds the engine's lock and finds it open,
so each row is closed once and delivered at most once. A *watched* row is run on to the last exit after it was answered;
it then travels in chunks of the background. A chunk is of one request: requests are joined when a stage runs, and
parted again behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..inputs import Arrays
from .work import Deliver, Hosted

if TYPE_CHECKING:
    from .clock import Alarm
    from .queues import Queue


@dataclass(frozen=True)
class Spoken:
    """By row, the deepest exit that has spoken, or the one that answered."""

    exit: np.ndarray  # [B] int64; -1: none has
    probabilities: np.ndarray  # [B, K] float32
    confidence: np.ndarray  # [B] float32

    @classmethod
    def nothing(cls, rows: int, classes: int) -> Spoken:
        """Of rows that no exit has seen."""
        return cls(np.full(rows, -1, np.int64), np.zeros((rows, classes), np.float32), np.zeros(rows, np.float32))

    def say(self, rows: np.ndarray, exit: int, probabilities: np.ndarray, confidence: np.ndarray) -> None:
        """Keep an exit's answer for rows [n]."""
        self.exit[rows] = exit
        self.probabilities[rows] = probabilities
        self.confidence[rows] = confidence


@dataclass(eq=False, slots=True)
class Request:
    """An accepted request. All but `delivering` is read and changed under the engine's lock, or never changes."""

    model: str
    hosted: Hosted
    limits: np.ndarray  # [B, E-1] float32; [E-1] where they are the same for all rows
    deliver: Deliver
    accepted: float
    keeps: bool  # its rows take the best answer so far: at the deadline, or where a stage is missing
    best_effort: bool
    watched: np.ndarray  # [B] bool: to be recorded
    inputs: Mapping[str, np.ndarray]  # those of the rows in `kept`
    kept: np.ndarray  # [w] int64, ascending: the rows that are watched, or were
    spoken: Spoken | None  # None: nothing of it is ever asked for
    open: np.ndarray  # [B] bool
    left: int  # open rows
    row_bytes: int  # of the inputs of each of its rows
    chunks: int = 0  # queued, at a worker, or pinned; at 0 the request is over
    queued: set[Chunk] = field(default_factory=set)
    overdue: bool = False  # past its deadline: the first exit that speaks answers
    cancelled: bool = False
    alarm: Alarm | None = None
    # Held while its rows are delivered, so that a cancel that has returned is the end of it.
    delivering: threading.RLock = field(default_factory=threading.RLock)

    def wants(self, rows: np.ndarray, exit: int) -> bool:
        """Whether an exit but the last has anything to say to these rows."""
        return self.keeps or bool(np.count_nonzero(self.limit(rows, exit) < np.inf))

    def limit(self, rows: np.ndarray, exit: int) -> np.ndarray:
        """[n] or [] float32: what an exit but the last must be sure of for these rows."""
        found: np.ndarray = self.limits[exit] if self.limits.ndim == 1 else self.limits[rows, exit]
        return found

    def keep(self, rows: int) -> None:
        """Let go of the inputs kept, those of the first rows apart."""
        if rows < len(self.kept):
            self.kept = self.kept[:rows]
            self.inputs = {name: value[:rows].copy() for name, value in self.inputs.items()}

    def row(self, row: int) -> dict[str, np.ndarray]:
        """The inputs of a watched row, without the batch dimension."""
        place = int(np.searchsorted(self.kept, row))
        return {name: value[place] for name, value in self.inputs.items()}


@dataclass(eq=False, slots=True)
class Chunk:
    """Rows of one request that wait for the same stage, or run in it."""

    request: Request
    rows: np.ndarray  # [n] int64, indices into the request's batch
    values: Arrays  # [n, ...] what this stage and later ones read
    since: float  # its patience counts from here: acceptance, then the end of its first stage
    live: bool = True  # False: answered, runs on because it is watched
    queue: Queue | None = None  # where it waits

    def only(self, chosen: np.ndarray) -> Chunk:
        """The rows chosen, [n] bool, in memory of their own: a slice would keep the whole batch alive."""
        if np.count_nonzero(chosen) == len(chosen):
            whole = {name: value.copy() for name, value in self.values.items()}
            return Chunk(self.request, self.rows, whole, self.since, self.live)
        places = np.flatnonzero(chosen)
        values = {name: value.take(places, axis=0) for name, value in self.values.items()}
        return Chunk(self.request, self.rows[places], values, self.since, self.live)

    def split(self, rows: int) -> tuple[Chunk, Chunk]:
        """The first rows and the others."""
        return self._part(slice(None, rows)), self._part(slice(rows, None))

    def _part(self, part: slice) -> Chunk:
        values = {name: value[part] for name, value in self.values.items()}
        return Chunk(self.request, self.rows[part], values, self.since, self.live)
