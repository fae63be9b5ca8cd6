"""Rows of many requests through the stages, batched again at each.

A request's rows wait for stage 0 of its model. A worker joins the rows that wait for the same stage, whoever sent
them, runs it, and parts them again: rows whose exit is sure enough are delivered at once, the others wait for the next
stage with the survivors of other batches. `queues` says which rows run next, `joined` how a batch is run, `ledger`
what a request's rows are owed, `watching` which of them run on for the record, `clock` when deadlines are.

One lock holds the state of all of it. Stages run, and callers are told, outside the lock; what a call of a neighbour
raises is logged, and costs nobody's rows.

Refused when a request comes: what `Session.run` refuses, more rows or bytes than the queue can ever hold, a queue
without room for all of them, an engine that is closing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..errors import BusyError, InputError, UsageError
from ..execution import Stage
from ..inputs import Batch, check_batch, check_tolerance
from .clock import Clock
from .joined import Outcome, as_ours, failed, run_joined
from .ledger import Ledger, Room
from .queues import Claim, Queues
from .requests import Chunk, Request, Spoken
from .watching import Watching
from .work import Asked, Deliver, Host, Hosted, Observer, Recorder, Silent, Ticket

_log = logging.getLogger(__name__)


class BatchingEngine:
    """An `Engine` of worker threads; made once per server, closed once."""

    def __init__(
        self,
        host: Host,
        *,
        workers: int,
        max_batch: int = 32,
        queue_rows: int = 1024,
        queue_bytes: int = 512 << 20,
        latency_budget: float = 0.05,
        observer: Observer | None = None,
        recorder: Recorder | None = None,
        watched_rows: int = 256,
    ) -> None:
        """`workers` batches of at most `max_batch` rows run at a time. A model has at most `queue_rows` rows that are
        accepted and not answered, and their inputs have at most `queue_bytes` bytes. Rows that left an exit wait for
        company at most `latency_budget` seconds.

        `recorder` chooses rows to run on to the end; at most `watched_rows` are on their way at a time, and their
        inputs, which are kept until then, have at most a quarter of `queue_bytes` more. No request is refused for them.
        """
        counts = {"workers": workers, "max_batch": max_batch, "queue_rows": queue_rows, "queue_bytes": queue_bytes}
        for name, count in counts.items():
            if count < 1:
                raise UsageError(f"{name} is {count}; give 1 or more")
        if not latency_budget >= 0 or watched_rows < 0:
            raise UsageError(f"latency_budget is {latency_budget}, watched_rows {watched_rows}; give 0 or more")
        self._host, self._observer = host, observer or Silent()
        self._room = Room(queue_rows, queue_bytes)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # there is something to run, or the engine stops
        self._idle = threading.Condition(self._lock)  # no row is open
        self._closing = False
        self._watching = Watching(recorder, self._observer, watched_rows, queue_bytes)
        self._queues = Queues(max_batch, latency_budget)
        self._ledger = Ledger(self._queues, self._watching, self._observer, self._room)
        self._clock = Clock()
        self._state = _State(self._lock, self._changes, self._tell)
        host.listen(self._changed)
        self._threads = [
            threading.Thread(target=self._serve, name=f"offramp-worker-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, model: str, batch: Batch, asked: Asked, deliver: Deliver, version: Hosted | None = None) -> Ticket:
        """See `Engine.submit`. The arrays must not be changed before their rows are answered."""
        if self._closing:
            raise self._closed(model, _rows_of(batch))
        hosted = self._held(model, version)
        taken = False
        try:
            request, chunk = self._read(model, hosted, batch, asked, deliver)
            taken = self._admit(request, chunk, asked)
        except (InputError, UsageError):
            self._tell(partial(self._observer.refused, model, _rows_of(batch), "input"))
            raise
        finally:
            if not taken:
                self._tell(hosted.release)
        return _Ticket(self._cancel, request)

    def depths(self) -> Mapping[tuple[str, int], int]:
        """See `Engine.depths`; rows that run at the moment do not wait, and watched rows are not counted."""
        with self._lock:
            return self._queues.depths()

    def close(self, patience: float) -> None:
        """See `Engine.close`. Watched rows that were answered are not waited for."""
        with self._state:
            self._closing = True
            self._idle.wait_for(lambda: not self._ledger.requests, max(0.0, min(patience, threading.TIMEOUT_MAX)))
            if left := sum(request.left for request in self._ledger.requests):
                _log.warning("%d rows that were accepted are refused: the server had no more time for them", left)
            self._ledger.abandon(BusyError("the server stopped before these rows were answered; send them again"))
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        self._clock.close()

    def _held(self, model: str, version: Hosted | None) -> Hosted:
        if version is None:
            return self._host.hold(model)
        version.hold()
        return version

    def _read(self, model: str, hosted: Hosted, batch: Batch, asked: Asked, deliver: Deliver) -> tuple[Request, Chunk]:
        """Check a batch and what is asked for it; nothing is taken yet."""
        manifest = hosted.manifest
        arrays, rows = check_batch(batch, manifest.inputs)
        limits = check_tolerance(asked.tolerance, rows, manifest)
        if not manifest.stages:
            raise UsageError(f"{model}: has no stages to serve; compile it with target onnx-segments")
        _check_deadline(asked.deadline)
        row_bytes = sum(array.nbytes for array in arrays.values()) // max(rows, 1)
        self._room.check(rows, row_bytes)
        watched = self._watching.chosen(model, rows)
        kept = watched.nonzero()[0][: self._watching.places(model, row_bytes)]
        keeps = asked.best_effort or asked.deadline is not None
        accepted = time.monotonic()
        request = Request(
            model=model,
            hosted=hosted,
            limits=limits,
            deliver=deliver,
            accepted=accepted,
            keeps=keeps,
            best_effort=asked.best_effort,
            watched=watched,
            inputs={name: array.take(kept, axis=0) for name, array in arrays.items()} if len(kept) else {},
            kept=kept,
            spoken=Spoken.nothing(rows, manifest.classes) if keeps or len(kept) else None,
            open=np.ones(rows, bool),
            left=rows,
            row_bytes=row_bytes,
        )
        return request, Chunk(request, np.arange(rows), arrays, accepted)

    def _admit(self, request: Request, chunk: Chunk, asked: Asked) -> bool:
        """Take all rows or raise `BusyError`; False where there are none to take."""
        model, rows = request.model, request.left
        try:
            with self._state:
                closing = self._closing
                if rows and not closing:
                    self._ledger.admit(request, chunk, len(request.hosted.manifest.stages))
                    if asked.deadline is not None:
                        moment = request.accepted + asked.deadline
                        request.alarm = self._clock.at(moment, partial(self._expire, request))
        except BusyError:
            self._tell(partial(self._observer.refused, model, rows, "busy"))
            raise
        if closing:
            raise self._closed(model, rows)
        self._tell(partial(self._observer.accepted, model, rows))
        return rows > 0

    def _closed(self, model: str, rows: int) -> BusyError:
        self._tell(partial(self._observer.refused, model, rows, "closing"))
        return BusyError("the server is closing and takes nothing more; send the rows to another one")

    def _serve(self) -> None:
        """A worker's life."""
        while self._serve_one():
            pass

    def _serve_one(self) -> bool:
        """Wait for a batch and run it; False: the engine stops. An idle worker's frame holds on to no request."""
        claim = self._next()
        if claim is None:
            return False
        try:
            self._step(claim)
        except Exception:  # noqa: BLE001  # a worker lost would slow down everybody for good
            _log.exception("a worker failed at stage %d of %s", claim.queue.place.stage, claim.queue.lane.model)
        finally:
            if not claim.over:
                with self._state:
                    self._done(claim)
        return True

    def _done(self, claim: Claim) -> None:
        claim.over = True
        self._queues.done(claim)
        self._ledger.finish(claim.first)

    def _next(self) -> Claim | None:
        """Wait for rows that can run; None: the engine stops."""
        with self._lock:
            while not self._ledger.stopped:
                claim = self._queues.claim(time.monotonic())
                if claim is not None:
                    return claim
                self._work.wait()
        return None

    def _step(self, claim: Claim) -> None:
        """Run the stage that a queue waits for on a batch of it."""
        hosted, index, _ = claim.queue.place
        try:
            stage = hosted.take(index)
        except Exception as error:  # noqa: BLE001  # of any kind: who waits for a stage that cannot be had must know
            with self._state:
                self._ledger.refuse(hosted, index, as_ours(error))
            return
        if stage is None:
            with self._state:
                self._queues.block(hosted, index, claim.generation)
                if self._queues.missing(hosted, index):
                    self._ledger.missing(hosted, index)
            return
        chunks: Sequence[Chunk] = ()
        try:
            with self._state:
                chunks = self._queues.draw(claim)
            outcomes, calls = self._run(claim, stage, chunks) if chunks else ([], [])
        finally:
            self._tell(partial(hosted.give, index))
        with self._state:
            self._settle_all(claim, outcomes, calls)
            self._done(claim)

    def _run(
        self, claim: Claim, stage: Stage, chunks: Sequence[Chunk]
    ) -> tuple[Sequence[Outcome], Sequence[tuple[int, float]]]:
        """Run drawn chunks -> what became of each, whatever happens; and the rows and seconds of every call."""
        index = claim.queue.place.stage
        last = index == len(claim.first.hosted.manifest.stages) - 1
        calls: list[tuple[int, float]] = []
        try:
            return run_joined(stage, index, last, chunks, lambda *call: calls.append(call)), calls
        except Exception as error:  # noqa: BLE001  # drawn rows are in no queue: the last chance to answer them
            return [failed(chunk, error) for chunk in chunks], calls

    def _settle_all(self, claim: Claim, outcomes: Sequence[Outcome], calls: Sequence[tuple[int, float]]) -> None:
        index, model = claim.queue.place.stage, claim.queue.lane.model
        last = index == len(claim.first.hosted.manifest.stages) - 1
        if any(outcome.chunk.live for outcome in outcomes):
            self._queues.charge(claim.queue, sum(seconds for _, seconds in calls))
        for outcome in outcomes:
            self._settle(outcome, index, last)
        # Last, so that rows are under way to their clients first.
        self._ledger.after.extend(partial(self._observer.ran, model, index, *call) for call in calls)

    def _settle(self, outcome: Outcome, index: int, last: bool) -> None:
        chunk = outcome.chunk
        try:
            self._ledger.settle(outcome, index, last)
        except Exception as error:  # noqa: BLE001  # out of memory, say, while rows are sorted
            self._tell(partial(self._ledger.settle, failed(chunk, error), index, last))
        finally:
            self._ledger.finish(chunk.request)

    def _changed(self) -> None:
        with self._state:
            self._queues.changed()
            self._work.notify_all()

    def _expire(self, request: Request) -> None:
        with self._state:
            self._ledger.expire(request)

    def _cancel(self, request: Request) -> None:
        with self._state:
            self._ledger.cancel(request)
        with request.delivering:  # what is being delivered now ends before the cancel does
            pass

    def _changes(self) -> list[Callable[[], None]]:
        """Wake who waits for what was changed -> what it has to tell."""
        after, self._ledger.after = self._ledger.after, []
        if self._queues.pushed:
            self._queues.pushed = False
            self._work.notify_all()
        if self._closing and not self._ledger.requests:
            self._idle.notify_all()
        return after

    def _tell(self, call: Callable[[], Any]) -> None:
        """Call a neighbour; what it raises must not reach the rows of others."""
        try:
            call()
        except Exception:  # noqa: BLE001  # logged; the rows of others come first
            _log.exception("a call that must not raise did")


class _State:
    """The lock, to change what it guards; then, without it, whatever the change has to tell. Entered for every request
    and several times for every batch, so it is no generator.
    """

    def __init__(
        self,
        lock: threading.Lock,
        changes: Callable[[], list[Callable[[], None]]],
        tell: Callable[[Callable[[], None]], None],
    ) -> None:
        self._lock, self._changes, self._tell = lock, changes, tell

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        try:
            after = self._changes()
        finally:
            self._lock.release()
        for call in after:
            self._tell(call)


class _Ticket:
    """An accepted request, as its sender knows it."""

    def __init__(self, cancel: Callable[[Request], None], request: Request) -> None:
        self._cancel, self._request = cancel, request

    def cancel(self) -> None:
        """See `Ticket.cancel`. Do not call it under a lock that the request's `deliver` takes."""
        self._cancel(self._request)


def _check_deadline(deadline: float | None) -> None:
    given: object = deadline
    if given is None:
        return
    if isinstance(given, bool) or not isinstance(given, int | float) or not given >= 0:
        raise UsageError(f"deadline {given!r} is not a number of seconds from 0 up; give one, or None")


def _rows_of(batch: Any) -> int:
    """The rows of a batch that was not checked, as far as it says."""
    arrays = batch.values() if isinstance(batch, Mapping) else [batch]
    return max((array.shape[0] for array in arrays if isinstance(array, np.ndarray) and array.ndim), default=0)
