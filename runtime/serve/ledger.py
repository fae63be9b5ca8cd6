"""What is owed to whom: every change of a request's state, from acceptance to its last row.

Called under the engine's lock, all of it. Whatever reaches outside (delivering, observing, recording, releasing a
model) is put into `after`, which the engine works off once the lock is free.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..errors import BusyError, InputError, OfframpError
from .joined import Outcome
from .queues import Lane, Queues
from .requests import Chunk, Request
from .watching import Watching
from .work import Hosted, Leaving, Observer


@dataclass(frozen=True)
class Room:
    """How many rows of a model may be open at a time, and how many bytes their inputs may have."""

    rows: int
    bytes: int

    def check(self, rows: int, row_bytes: int) -> None:
        """Raises `InputError` where a request of rows with inputs of `row_bytes` each never fits."""
        if rows > self.rows:
            raise InputError(f"the batch has {rows} rows, the server takes {self.rows}; send it in parts")
        if rows * row_bytes > self.bytes:
            raise InputError(
                f"the batch has {rows * row_bytes} bytes of inputs, the server takes {self.bytes}; send it in parts"
            )

    def check_now(self, lane: Lane, rows: int, row_bytes: int) -> None:
        """Raises `BusyError` where it does not fit beside what is open."""
        if lane.open + rows > self.rows:
            raise BusyError(
                f"{lane.model}: {lane.open} rows wait of {self.rows} that may, and {rows} more do not fit; "
                "send them again in a moment"
            )
        if lane.bytes + rows * row_bytes > self.bytes:
            raise BusyError(
                f"{lane.model}: inputs of {lane.bytes} bytes wait of {self.bytes} that may, and {rows * row_bytes} "
                "more do not fit; send them again in a moment"
            )


class Ledger:
    """Requests and their rows."""

    def __init__(self, queues: Queues, watching: Watching, observer: Observer, room: Room) -> None:
        self.queues = queues
        self.requests: set[Request] = set()  # with rows still open
        self.after: list[Callable[[], None]] = []
        self.stopped = False  # nothing goes on from here
        self._watching, self._observer, self._room = watching, observer, room

    def admit(self, request: Request, chunk: Chunk, stages: int) -> None:
        """Queue a request's rows, all in one chunk, for stage 0. Raises `BusyError` where they do not fit."""
        lane = self.queues.lane(request.model)
        self._room.check_now(lane, request.left, request.row_bytes)
        lane.open += request.left
        lane.bytes += request.left * request.row_bytes
        lane.stages = max(lane.stages, stages)
        if unplaced := self._watching.reserve(request):
            self.after.append(partial(self._observer.unplaced, unplaced))
        self.requests.add(request)
        self.queues.push(chunk, 0)

    def settle(self, outcome: Outcome, stage: int, last: bool) -> None:
        """A stage has run a chunk: answer the rows that leave, queue those that go on."""
        chunk, request = outcome.chunk, outcome.chunk.request
        if outcome.error is not None:
            self._stuck(chunk, stage, outcome.error)
            return
        if not chunk.live:
            if last:
                self._watching.finish(request, chunk.rows, outcome.probabilities, self.after)
            elif outcome.onward is not None:
                self._go_on(outcome.onward, stage + 1)
            return
        if outcome.spoken:
            self._hear(outcome, stage)
        if last:
            self._watching.finish(request, chunk.rows, outcome.probabilities, self.after)
        elif outcome.onward is not None:
            self._go_on(outcome.onward, stage + 1)

    def expire(self, request: Request) -> None:
        """The deadline: rows that an exit has spoken for are answered now, the others by the first one that speaks."""
        request.overdue = True
        self._answer_spoken(request, np.flatnonzero(request.open))
        for chunk in [chunk for chunk in request.queued if chunk.live and not request.open[chunk.rows].all()]:
            self._requeue(chunk)

    def cancel(self, request: Request) -> None:
        """Drop the rows that are open."""
        request.cancelled = True
        rows = np.flatnonzero(request.open)
        self._watching.leave(request, rows)
        self._close(request, rows)
        if len(rows):
            self.after.append(partial(self._observer.cancelled, request.model, len(rows)))
        for chunk in [chunk for chunk in request.queued if chunk.live]:
            self.queues.drop(chunk)
            self.finish(request)

    def missing(self, version: Hosted, stage: int) -> None:
        """A stage is not in memory: rows that would rather be answered than wait are."""
        for chunk in self.queues.waiting(version, stage):
            if chunk.live and chunk.request.best_effort:
                self._answer_spoken(chunk.request, chunk.rows[chunk.request.open[chunk.rows]])
                self._requeue(chunk)

    def refuse(self, version: Hosted, stage: int, error: OfframpError) -> None:
        """A stage cannot be had: whoever waits for it gets the best so far, if that was asked for, or the error."""
        for chunk in self.queues.waiting(version, stage):
            self.queues.drop(chunk)
            self._stuck(chunk, stage, error)
            self.finish(chunk.request)

    def abandon(self, error: OfframpError) -> None:
        """Fail every open row, forget every watched one."""
        self.stopped = True
        for request in list(self.requests):
            self.fail(request, np.flatnonzero(request.open), 0, error)
        for queue in list(self.queues):
            for chunk in list(queue):
                self.queues.drop(chunk)
                self._watching.leave(chunk.request, chunk.rows)
                self.finish(chunk.request)

    def fail(self, request: Request, rows: np.ndarray, stage: int, error: OfframpError) -> None:
        """Deliver an error for open rows."""
        if not len(rows):
            return
        self._watching.leave(request, rows)
        nothing = np.empty((0, request.hosted.manifest.classes), np.float32)
        seconds = time.monotonic() - request.accepted
        leaving = Leaving(rows, stage, nothing, np.zeros(len(rows), np.float32), seconds, error=error)
        self._close(request, rows)
        self._deliver(request, leaving)
        self.after.append(partial(self._observer.failed, request.model, len(rows)))

    def finish(self, request: Request) -> None:
        """One chunk or pin of the request is done with; the last one lets go of the model."""
        request.chunks -= 1
        if not request.chunks:
            self.after.append(request.hosted.release)

    def _hear(self, outcome: Outcome, stage: int) -> None:
        """An exit has spoken: deliver the rows it is sure enough of, and keep what it says of the others."""
        chunk, request = outcome.chunk, outcome.chunk.request
        open_ = request.open[chunk.rows]
        if request.keeps:
            self._say(request, open_ & ~outcome.leaves, outcome, stage)
        self._answer(request, open_ & outcome.leaves, outcome, stage, short=False)
        if request.overdue:
            self._answer(request, open_ & ~outcome.leaves, outcome, stage, short=True)

    def _say(self, request: Request, here: np.ndarray, outcome: Outcome, stage: int) -> None:
        if request.spoken is not None:
            rows = outcome.chunk.rows[here]
            request.spoken.say(rows, stage, outcome.probabilities[here], outcome.confidence[here])

    def _answer(self, request: Request, here: np.ndarray, outcome: Outcome, stage: int, short: bool) -> None:
        """Answer rows of an outcome, [n] bool of its chunk."""
        count = np.count_nonzero(here)
        if not count:
            return
        rows, shares, sure = outcome.chunk.rows, outcome.probabilities, outcome.confidence
        # In memory of their own either way: what waits to be sent would keep all of the batch.
        whole = count == len(here)
        shares, sure = (shares.copy(), sure.copy()) if whole else (shares[here], sure[here])
        rows = rows if whole else rows[here]
        if len(request.kept) and request.watched[rows].any():
            self._say(request, here, outcome, stage)
        self._leave(request, rows, stage, shares, sure, short)

    def _answer_spoken(self, request: Request, rows: np.ndarray) -> None:
        """Answer open rows with the best so far, those that have one."""
        spoken = request.spoken
        if spoken is None:
            return
        for exit in np.unique(spoken.exit[rows]):
            if exit >= 0:
                these = rows[spoken.exit[rows] == exit]
                said, sure = spoken.probabilities[these], spoken.confidence[these]
                self._leave(request, these, int(exit), said, sure, short=True)

    def _leave(
        self,
        request: Request,
        rows: np.ndarray,
        exit: int,
        probabilities: np.ndarray,
        confidence: np.ndarray,
        short: bool,
    ) -> None:
        finite = np.isfinite(confidence)
        if not finite.all():
            error = InputError("the model's answer to this row is no number; its input holds values that are too large")
            self.fail(request, rows[~finite], exit, error)
            if not finite.any():
                return
            rows, probabilities, confidence = rows[finite], probabilities[finite], confidence[finite]
        seconds = time.monotonic() - request.accepted
        leaving, each = Leaving(rows, exit, probabilities, confidence, seconds, short), np.full(len(rows), seconds)
        self._close(request, rows)  # before it is delivered: whatever fails after this delivers no row twice
        self._deliver(request, leaving)
        self.after.append(partial(self._observer.answered, request.model, exit, each, short))

    def _deliver(self, request: Request, leaving: Leaving) -> None:
        def deliver() -> None:
            with request.delivering:
                if not request.cancelled:
                    request.deliver(leaving)

        self.after.append(deliver)

    def _close(self, request: Request, rows: np.ndarray) -> None:
        """Open rows are not open any more, and give their room back."""
        request.open[rows] = False
        request.left -= len(rows)
        lane = self.queues.lane(request.model)
        lane.open -= len(rows)
        lane.bytes -= len(rows) * request.row_bytes
        if request.left:
            return
        self.requests.discard(request)
        if request.alarm is not None:
            self.after.append(request.alarm.cancel)

    def _go_on(self, chunk: Chunk, stage: int) -> None:
        """Queue the open rows of a chunk, and in the background those that are closed and watched."""
        request = chunk.request
        if self.stopped:
            self._watching.leave(request, chunk.rows)
            return
        if not chunk.live:
            self.queues.push(chunk, stage)
            return
        if request.best_effort and self.queues.missing(request.hosted, stage):
            self._answer_spoken(request, chunk.rows[request.open[chunk.rows]])
        open_ = request.open[chunk.rows]
        if open_.all():
            self.queues.push(chunk, stage)
            return
        if open_.any():
            self.queues.push(chunk.only(open_), stage)
        watched = ~open_ & request.watched[chunk.rows]
        if watched.any():
            background = chunk.only(watched)
            background.live = False
            self.queues.push(background, stage)

    def _requeue(self, chunk: Chunk) -> None:
        """Some rows of a waiting chunk may have been closed: queue what is left of it."""
        queue = chunk.queue
        if queue is not None and not chunk.request.open[chunk.rows].all():
            self.queues.drop(chunk)
            self._go_on(chunk, queue.place.stage)
            self.finish(chunk.request)

    def _stuck(self, chunk: Chunk, stage: int, error: OfframpError) -> None:
        """A chunk cannot go on."""
        request = chunk.request
        self._watching.leave(request, chunk.rows)
        self._answer_spoken(request, chunk.rows[request.open[chunk.rows]])
        self.fail(request, chunk.rows[request.open[chunk.rows]], stage, error)
