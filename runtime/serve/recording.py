"""A sample of what is served, with the backbone's own answer, kept in a store bounded in size.

Rows are chosen by a seeded draw before anything is known of them, so that the record is of the traffic as it comes and
not of the rows that went deep. One thread writes, from a bounded queue; whoever records never waits for it: what the
queue has no room for is dropped and counted. A disk that is full ends the recording with one warning, and serving goes
on; rows are still chosen then, for the live disagreement among them is worth knowing without a record.

Reading the record back: `record_reading`.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError, UsageError
from .record_format import Row, pack, sealed
from .record_store import Store, code_of
from .work import Sample

_LOGGER = logging.getLogger(__name__)
_WAITING_BYTES = 64 << 20  # of rows that wait to be written, whatever their number
_TOGETHER = 64  # rows in one transaction


@dataclass(frozen=True)
class Counts:
    """Watched rows since the start."""

    recorded: int  # in the store, or were until newer ones took their place
    dropped: int  # not: the writer could not keep up, the row was too large, or the disk is full


class Recording:
    """A `Recorder` that keeps rows in a folder."""

    def __init__(self, folder: Path, *, rate: float, seed: int, limit: int, queue: int = 256) -> None:
        """`rate` of all rows are chosen, from 0 to 1; the folder's files take `limit` bytes at most; at most `queue`
        rows wait to be written.

        Raises `UsageError` for what cannot be meant and for a folder that holds something else, `StorageError` for one
        that cannot be written.
        """
        if not 0 <= rate <= 1:
            raise UsageError(f"a share of {rate} of the rows cannot be recorded; give a number from 0 to 1")
        if queue < 1:
            raise UsageError(f"a queue of {queue} rows records nothing; give at least 1")
        if seed < 0:
            raise UsageError(f"the seed is {seed}; give a whole number from 0 up")
        self._rate, self._seed, self._room = rate, seed, queue
        self._draws: dict[str, np.random.Generator] = {}
        self._drawing = threading.Lock()
        self._store = Store(folder, limit)
        self._folder = folder
        self._changed = threading.Condition()  # over all below
        self._waiting: deque[Row] = deque()
        self._waiting_bytes = 0
        self._recorded = self._dropped = 0
        self._closing = self._stopped = self._warned_of_size = False
        self._writer = threading.Thread(target=self._write_all, name="offramp-recording", daemon=True)
        self._writer.start()

    def chosen(self, model: str, rows: int) -> np.ndarray:
        """[rows] bool. A model's n-th row is chosen or not by the seed, the model's name and n alone."""
        with self._drawing:
            draw = self._draws.get(model)
            if draw is None:
                word = int.from_bytes(hashlib.sha256(model.encode()).digest()[:8], "little")
                draw = self._draws[model] = np.random.default_rng([self._seed, word])
            return np.asarray(draw.random(rows) < self._rate)

    def record(self, sample: Sample) -> None:
        """Keep a copy of one, or drop and count it. Never waits for the disk."""
        try:
            row = pack(sample, checked=False)
        except InputError as error:
            self._drop(1, str(error))
            return
        if row.size > self._store.transaction_bytes:
            self._drop(1, f"rows of {row.size} bytes are too large for the recording; give it a larger limit")
            return
        with self._changed:
            full = len(self._waiting) >= self._room or self._waiting_bytes + row.size > _WAITING_BYTES
            if full or self._closing or self._stopped:
                self._dropped += 1
                return
            self._waiting.append(row)
            self._waiting_bytes += row.size
            self._changed.notify_all()

    def counts(self) -> Counts:
        """How many rows were recorded and dropped up to now."""
        with self._changed:
            return Counts(self._recorded, self._dropped)

    @property
    def stopped(self) -> bool:
        """It keeps nothing any more: the disk is full, or it is closed."""
        with self._changed:
            return self._stopped

    def close(self) -> None:
        """Write what waits, then let go of the store. What is recorded from now on is dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._writer.join()

    def _drop(self, rows: int, why: str) -> None:
        """Count rows that can never be kept, and say why the first time."""
        with self._changed:
            self._dropped += rows
            told, self._warned_of_size = self._warned_of_size, True
        if not told:
            _LOGGER.warning("%s: not recorded: %s", self._folder, why)

    def _write_all(self) -> None:
        """The writer: until closed and nothing waits."""
        try:
            while rows := self._next():
                self._write(rows)
        finally:
            with self._changed:
                self._stopped = True
                self._dropped += len(self._waiting)
                self._waiting.clear()
            self._store.close()

    def _next(self) -> list[Row]:
        """Rows for one transaction, once there are any; none: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            rows: list[Row] = []
            size = 0
            while self._waiting and len(rows) < _TOGETHER:
                size += self._waiting[0].size
                if rows and size > self._store.transaction_bytes:
                    break
                rows.append(self._waiting.popleft())
                self._waiting_bytes -= rows[-1].size
            return rows

    def _write(self, rows: list[Row]) -> None:
        kept = False
        try:
            kept = not self._stopped and self._store.add([sealed(row) for row in rows])
        except (sqlite3.Error, OSError) as error:
            # A store that another process holds for long is there again later; a full disk is not soon.
            if code_of(error) != sqlite3.SQLITE_BUSY:
                self._stop(error)
        with self._changed:
            self._recorded += len(rows) * kept
            self._dropped += len(rows) * (not kept)
            self._changed.notify_all()

    def _stop(self, error: Exception) -> None:
        with self._changed:
            self._stopped = True
        _LOGGER.warning(
            "%s: recording stops, serving goes on (%s); free space or choose another folder, then start again",
            self._folder, error,
        )  # fmt: skip
