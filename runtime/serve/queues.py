"""Which rows run next: queues by model version, stage and shape, and the order in which they are served.

Between models: each has a virtual time that grows by the seconds its stages ran, and the least is served. One that
comes back from idling starts at the least of the active ones, so that idling saves up nothing.

Within a model, of the queues whose stage is in memory:
1. A queue is ready when it fills a batch, or when its first row has waited for the latency budget: since it was
   accepted at stage 0, since its first stage ran at deeper ones. The deepest ready queue is next, then the one whose
   first row has waited longest. Deep rows come from stage 0 alone, so nothing starves, and a survivor waits for
   company no longer than the budget. Were it counted from acceptance at every stage, a full server would run deep
   stages on whatever few rows are there: all its rows are old.
2. Where none is ready, the shallowest, so that survivors gather for the deep stages.
Watched rows fill the room that live rows leave in a batch, and run alone where no live row can run; so does one batch
in a few of those that have waited for long, for a version that was replaced has no live rows any more.

Nothing here locks, and nothing waits: the engine calls it under its own lock.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .requests import Chunk, Request
from .work import Hosted

_EVERY, _LONG = 16, 5.0  # of so many claims one may be for rows that were watched so many seconds ago


class Place(NamedTuple):
    """Where rows wait that one batch may hold."""

    version: Hosted  # itself: two names may have the same artifact, and each has memory of its own
    stage: int
    shapes: tuple[tuple[int, ...], ...]  # of the values, without the batch dimension


class Pile:
    """Chunks in the order of their arrival."""

    def __init__(self) -> None:
        self._chunks: OrderedDict[Chunk, None] = OrderedDict()
        self.rows = 0

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._chunks)

    @property
    def since(self) -> float:
        """From when the patience of its first chunk counts; the pile is not empty."""
        return next(iter(self._chunks)).since

    def add(self, chunk: Chunk, *, first: bool = False) -> None:
        self._chunks[chunk] = None
        if first:
            self._chunks.move_to_end(chunk, last=False)
        self.rows += len(chunk.rows)

    def remove(self, chunk: Chunk) -> None:
        del self._chunks[chunk]
        self.rows -= len(chunk.rows)


class Queue:
    """The chunks of one place."""

    def __init__(self, lane: Lane, place: Place) -> None:
        self.lane, self.place = lane, place
        self.live, self.background = Pile(), Pile()
        self.claims = 0  # workers about to draw from it

    def __iter__(self) -> Iterator[Chunk]:
        return itertools.chain(self.live, self.background)

    def add(self, chunk: Chunk, *, first: bool = False) -> None:
        """Queue a chunk, which its request counts from now on."""
        (self.live if chunk.live else self.background).add(chunk, first=first)
        chunk.queue = self
        chunk.request.queued.add(chunk)
        chunk.request.chunks += 1

    def remove(self, chunk: Chunk) -> None:
        """Take a chunk out; its request counts it until the ledger is told that it is finished."""
        (self.live if chunk.live else self.background).remove(chunk)
        chunk.queue = None
        chunk.request.queued.discard(chunk)

    def draw(self, most: int) -> list[Chunk]:
        """Chunks of at most so many rows, live ones first; the last is split where it is too long."""
        drawn, room = [], most
        for pile in (self.live, self.background):
            while room and pile.rows:
                chunk = next(iter(pile))
                self.remove(chunk)
                if len(chunk.rows) > room:
                    chunk, rest = chunk.split(room)
                    self.add(rest, first=True)
                drawn.append(chunk)
                room -= len(chunk.rows)
        return drawn


class Lane:
    """One model, all its versions."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.queues: dict[Place, Queue] = {}
        self.stages = 0  # of the version with the most
        self.open = 0  # rows accepted and not closed, queued or not
        self.bytes = 0  # of the inputs of those rows
        self.virtual = 0.0  # seconds
        self.active = False
        self.running = 0  # claims not done
        self.served = 0  # which claim its last one was


@dataclass(eq=False, slots=True)
class Claim:
    """A worker's word that it serves a queue."""

    queue: Queue
    first: Request  # of the queue's first chunk, and kept from ending: it holds the version
    generation: int  # of what was known of the memory
    drawing: bool = True  # not drawn yet: its share of the queue is spoken for
    over: bool = False  # the worker is done with it


def _turn(lane: Lane) -> tuple[float, int]:
    return lane.virtual, lane.served


class Queues:
    """All that wait. `max_batch` rows run together at most; `latency_budget` is in seconds."""

    def __init__(self, max_batch: int, latency_budget: float) -> None:
        self._max_batch, self._budget = max_batch, latency_budget
        self._lanes: dict[str, Lane] = {}
        self._missing: set[tuple[Hosted, int]] = set()  # stages of a version not in memory
        self._order = itertools.count(1)
        self.generation = 0  # of what is known of the memory; grows by `changed`
        self.pushed = False  # there is something new; whoever wakes the workers resets it

    def lane(self, model: str) -> Lane:
        """The model's lane, made where it has none."""
        lane = self._lanes.get(model)
        if lane is None:
            lane = self._lanes[model] = Lane(model)
        return lane

    def __iter__(self) -> Iterator[Queue]:
        return itertools.chain.from_iterable(list(lane.queues.values()) for lane in self._lanes.values())

    def push(self, chunk: Chunk, stage: int) -> None:
        """Queue a chunk for a stage of its version."""
        lane = self.lane(chunk.request.model)
        shapes = tuple(value.shape[1:] for value in chunk.values.values())
        place = Place(chunk.request.hosted, stage, shapes)
        queue = lane.queues.get(place)
        if queue is None:
            queue = lane.queues[place] = Queue(lane, place)
        queue.add(chunk)
        self.pushed = True

    def drop(self, chunk: Chunk) -> None:
        """Take a waiting chunk out."""
        queue = chunk.queue
        if queue is not None:
            queue.remove(chunk)
            self._tidy(queue)

    def waiting(self, version: Hosted, stage: int) -> list[Chunk]:
        """All chunks that wait for a stage, whatever their shapes."""
        return [chunk for queue in self if queue.place[:2] == (version, stage) for chunk in queue]

    def missing(self, version: Hosted, stage: int) -> bool:
        """Whether the stage was not in memory when last asked for, and nothing has changed since."""
        return (version, stage) in self._missing

    def block(self, version: Hosted, stage: int, generation: int) -> None:
        """Pass by a stage that is not in memory, unless something has changed since `generation`."""
        if generation == self.generation:
            self._missing.add((version, stage))

    def changed(self) -> None:
        """Stages were loaded: ask for all of them again."""
        self.generation += 1
        self._missing.clear()

    def claim(self, now: float) -> Claim | None:
        """The queue to draw from next; None where no row can run. `done` ends the claim."""
        number = next(self._order)
        runnable: dict[Lane, list[Queue]] = {}
        for lane in self._lanes.values():
            if lane.queues and (queues := self._runnable(lane)):
                runnable[lane] = queues
        self._awake(runnable)
        watched = self._watched(now if runnable else math.inf) if not runnable or number % _EVERY == 0 else None
        if watched is not None:
            queue = watched
        elif runnable:
            lane = min(runnable, key=_turn) if len(runnable) > 1 else next(iter(runnable))
            queue = self._choose(runnable[lane], now)
            lane.served = number
        else:
            return None
        queue.claims += 1
        queue.lane.running += 1
        first = next(iter(queue)).request
        first.chunks += 1
        return Claim(queue, first, self.generation)

    def draw(self, claim: Claim) -> list[Chunk]:
        """A batch for the worker that claimed the queue; nothing where others have emptied it."""
        self._drawn(claim)
        chunks = claim.queue.draw(self._max_batch)
        self.pushed = self.pushed or next(iter(claim.queue), None) is not None  # the rest may run elsewhere
        return chunks

    def done(self, claim: Claim) -> None:
        """The worker is done; the request it kept is one chunk less, of which the ledger is to be told."""
        self._drawn(claim)
        self.pushed = True
        claim.queue.lane.running -= 1
        self._tidy(claim.queue)

    def charge(self, queue: Queue, seconds: float) -> None:
        """Stages of the model ran for live rows so long."""
        queue.lane.virtual += seconds

    def depths(self) -> dict[tuple[str, int], int]:
        """Live rows that wait, by model and stage, of every model that was ever asked."""
        depths = {(lane.model, stage): 0 for lane in self._lanes.values() for stage in range(lane.stages)}
        for queue in self:
            depths[queue.lane.model, queue.place.stage] += queue.live.rows
        return depths

    def _drawn(self, claim: Claim) -> None:
        if claim.drawing:
            claim.drawing = False
            claim.queue.claims -= 1

    def _here(self, queue: Queue) -> bool:
        return not self._missing or queue.place[:2] not in self._missing

    def _watched(self, now: float) -> Queue | None:
        """The queue of watched rows to run alone, of those that have waited for long at `now`."""
        late = now - _LONG
        idle = [
            queue
            for queue in self
            if queue.background.rows and not queue.claims and queue.background.since <= late and self._here(queue)
        ]
        return min(idle, key=lambda queue: (queue.place.stage, queue.background.since), default=None)

    def _runnable(self, lane: Lane) -> list[Queue]:
        """Queues with live rows beyond those that workers are about to draw."""
        return [
            queue
            for queue in lane.queues.values()
            if queue.live.rows > queue.claims * self._max_batch and self._here(queue)
        ]

    def _awake(self, runnable: dict[Lane, list[Queue]]) -> None:
        lanes, asleep = self._lanes.values(), False
        for lane in lanes:
            lane.active = lane.active and (lane in runnable or lane.running > 0)
            asleep = asleep or (lane in runnable and not lane.active)
        if not asleep:
            return
        ahead = [lane.virtual for lane in lanes if lane.active]
        start = min(ahead) if ahead else max(lane.virtual for lane in lanes)
        for lane in runnable:
            if not lane.active:
                lane.virtual, lane.active = max(lane.virtual, start), True

    def _choose(self, queues: list[Queue], now: float) -> Queue:
        if len(queues) == 1:
            return queues[0]
        late = now - self._budget
        ready = [queue for queue in queues if queue.live.rows >= self._max_batch or queue.live.since <= late]
        if ready:
            return min(ready, key=lambda queue: (-queue.place.stage, queue.live.since))
        return min(queues, key=lambda queue: (queue.place.stage, queue.live.since))

    def _tidy(self, queue: Queue) -> None:
        """Places come and go with the lengths of texts. A late worker's queue may have a successor, which stays."""
        queues, place = queue.lane.queues, queue.place
        if queues.get(place) is queue and not (queue.claims or queue.live.rows or queue.background.rows):
            del queues[place]
