"""What is in memory, who has it, who asks for more, and what is to be done about it next.

All state of a host behind one lock, and no work: one thread asks `next` for a job, does it with the lock free, and
says how it ended. Jobs in order of urgency:

    evict   parts that were told to go and that nobody has
    load    what was asked for, in order of asking, once there is room; parts are told to go until there is
    load    parts nobody asked for, once each, the shallow ones of all models first, where they fit beside the others

Promises to those who ask: every `take` that gave None is followed by a loading or a failure. What was loaded for
somebody stays until it was taken once, for at most `GRACE` seconds; or two models in too little memory would throw
each other out for ever, and neither would run. What is told to go is taken by nobody any more, so a busy part cannot
keep others waiting for ever either.

A size that was never measured is expected to be that of the file, for the room made beforehand; after a loading what
was measured counts, and others go where it turns out too much. A part that seems larger than the whole budget goes at
once and, where somebody asked for it, is loaded again until enough figures agree; then it is refused for `REFUSAL`
seconds, after which an ask measures it anew. So no spoilt figure makes a part unusable, and a part that is too large
does not throw the others out at every ask.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import OfframpError, StorageError, UsageError
from ..execution import Stage
from .loader import Loaded
from .parts import Part, Slot
from .policies import Policy, victims

GRACE = 2.0  # seconds; a worker that is busy with another batch comes back within
REFUSAL = 60.0  # seconds


@dataclass(frozen=True)
class Evict:
    """Let go of the stages, which are the last references but those of whoever keeps what was given back."""

    parts: list[Part]
    stages: list[Stage]


@dataclass(frozen=True)
class LoadPart:
    """Load a part, and say `loaded` or `failed`."""

    part: Part
    uses: int | None  # of anything before it; None: something is in use now


@dataclass(frozen=True)
class Refused:
    """A part cannot be loaded, whatever goes; it has its error."""

    part: Part


Job = Evict | LoadPart | Refused


class Shelf:
    """Parts of all versions, within a budget."""

    def __init__(
        self, budget: int | None, policy: Policy, clock: Callable[[], float] = time.monotonic, grace: float = GRACE
    ) -> None:
        """`budget` in bytes, None: no bound."""
        self.lock = threading.Condition()
        self._budget = math.inf if budget is None else budget
        self._policy, self._clock, self._grace = policy, clock, grace
        self._parts: list[Part] = []
        self._asked: dict[Part, None] = {}  # in order of asking
        self._uses = 0  # of anything
        self._closed = False

    def add(self, parts: Iterable[Part]) -> None:
        """Parts of a new version."""
        with self.lock:
            self._parts += parts
            self.lock.notify_all()

    def forget(self, parts: Iterable[Part]) -> None:
        """Nobody will ask for them again. The room that makes is for others, those too that had to go before."""
        with self.lock:
            for part in self._parts:
                part.untried = True
            for part in parts:
                part.dead = True
            self.lock.notify_all()

    def take(self, part: Part, slot: Slot) -> Stage | None:
        """The stage of one of a part's slots, or None after asking for it. Raises what the part's loading ended in."""
        with self.lock:
            if part.loaded and not part.leaving:
                part.takers += 1
                if part.promised > -math.inf:
                    part.promised = -math.inf
                    self.lock.notify_all()
                self._uses += 1
                slot.use(self._clock(), self._uses)
                return slot.stage
            self._check_open(part)
            if part.error is not None:
                raise self._told(part)
            self._ask(part)
            return None

    def give(self, part: Part) -> None:
        """One `take` is over."""
        with self.lock:
            if not part.takers:
                raise UsageError(f"{part.title} is given back more often than it was taken; give once for each take")
            part.takers -= 1
            if not part.takers and (part.leaving or part.dead):
                self.lock.notify_all()

    def fetch(self, parts: Sequence[Part]) -> None:
        """Add a version; wait until its first part is in memory, and keep that there until `give`.

        Raises what the loading ends in, and forgets the version again.
        """
        first = parts[0]
        with self.lock:
            self._check_open(first)
            self.add(parts)
            while first.error is None and not self._closed:
                if first.loaded and not first.leaving:
                    first.takers += 1
                    first.promised = -math.inf
                    return
                self._ask(first)
                self.lock.wait()
            self._asked.pop(first, None)
            self._check_open(first)
            self.forget(parts)
            raise self._told(first)

    def fits(self, part: Part) -> bool:
        """Whether there is room for a part, as far as its size is known."""
        with self.lock:
            return self._used() + part.expected <= self._budget

    def check(self, part: Part) -> None:
        """Raises `StorageError` for a part whose files alone are larger than the budget."""
        if part.file_bytes > self._budget:
            raise self._too_large(part)

    def doubts(self, part: Part) -> bool:
        """Whether all that was measured of a part is larger than the budget, but too little was."""
        with self.lock:
            return part.least > self._budget and not part.certain

    def next(self) -> Job | None:
        """What is to be done now, as soon as there is something; None once closed."""
        with self.lock:
            while not self._closed:
                job = self.poll()
                if job is not None:
                    return job
                self.lock.wait(self._patience())
            return None

    def poll(self) -> Job | None:
        """What is to be done now; None: nothing, until something changes."""
        with self.lock:
            return self._evictions() or self._excess() or self._wanted() or self._spare()

    def evictions(self) -> Evict | None:
        """Those that can go now of all that were told to."""
        with self.lock:
            return self._evictions()

    def loading(self, part: Part) -> LoadPart:
        """The job of loading a part, whether or not it is asked for."""
        part.untried = False
        return LoadPart(part, None if any(other.takers for other in self._parts if other.loaded) else self._uses)

    def loaded(self, job: LoadPart, stages: Sequence[Loaded]) -> None:
        """A part is in memory. Where that is too much, it goes itself if nobody asked for it, else others do."""
        part = job.part
        with self.lock:
            quiet = job.uses == self._uses
            part.fill(stages, quiet)
            part.error = None
            if part.least > self._budget:
                part.leaving = True
                if part.certain:
                    part.refused = self._clock() + REFUSAL
                    self._refuse(part)
            elif part in self._asked:
                del self._asked[part]
                part.promised = self._clock() + self._grace
            elif self._used() > self._budget:
                part.leaving = True
            self.lock.notify_all()

    def failed(self, part: Part, error: OfframpError) -> None:
        """A part could not be loaded."""
        with self.lock:
            self._asked.pop(part, None)
            part.error = error
            self.lock.notify_all()

    def bytes(self) -> int:
        """Of all that is in memory."""
        with self.lock:
            return self._used()

    def close(self) -> None:
        """Nothing is asked for any more."""
        with self.lock:
            self._closed = True
            self._asked.clear()
            self.lock.notify_all()

    def clear(self) -> Evict:
        """All that is in memory, whoever has it."""
        with self.lock:
            gone = [part for part in self._parts if part.loaded]
            self._parts = []
            return Evict(gone, [stage for part in gone for stage in part.empty()])

    def _ask(self, part: Part) -> None:
        if part not in self._asked:
            self._asked[part] = None
            self.lock.notify_all()

    def _told(self, part: Part) -> OfframpError:
        error, part.error = part.error, None
        assert error is not None
        return error

    def _check_open(self, part: Part) -> None:
        if self._closed or part.dead:
            what = "the host was closed" if self._closed else "this version was released by all who held it"
            raise UsageError(f"{part.title} cannot be loaded, {what}; hold the model again where it is still served")

    def _evictions(self) -> Evict | None:
        gone = [part for part in self._parts if part.loaded and not part.takers and (part.leaving or part.dead)]
        self._parts = [part for part in self._parts if not part.dead or (part.loaded and part not in gone)]
        return Evict(gone, [stage for part in gone for stage in part.empty()]) if gone else None

    def _excess(self) -> Evict | None:
        """Others go where a part turned out larger than expected."""
        if self._used() <= self._budget:
            return None
        self._tell_to_go(None, 0)
        return self._evictions()

    def _wanted(self) -> Job | None:
        """The first that was asked for, if there is room; if not, others are told to go."""
        for gone in [part for part in self._asked if part.dead]:
            del self._asked[gone]
        part = next(iter(self._asked), None)
        if part is None or part.loaded:  # loaded: it was told to go, and somebody still has it
            return None
        if part.file_bytes > self._budget or self._clock() < part.refused:
            self._refuse(part)
            return Refused(part)
        if part.certain and part.least > self._budget:
            part.measure_again()
        need = min(part.expected, self._budget)
        if self._used() + need <= self._budget:
            return self.loading(part)
        self._tell_to_go(part, need)
        return self._evictions()

    def _refuse(self, part: Part) -> None:
        self._asked.pop(part, None)
        part.error = self._too_large(part)
        self.lock.notify_all()

    def _spare(self) -> LoadPart | None:
        """A part that was not tried yet and fits, once those before it are in memory."""
        if self._asked:
            return None
        for part in sorted(self._parts, key=lambda part: part.depth):
            if part.untried and not part.loaded and not part.dead and self._follows(part) and self.fits(part):
                return self.loading(part)
        return None

    def _follows(self, part: Part) -> bool:
        before = [other for other in self._parts if other.version == part.version and other.depth < part.depth]
        return all(other.loaded and not other.leaving for other in before)

    def _tell_to_go(self, wanted: Part | None, need: int | float) -> None:
        """Choose what goes so that `need` more bytes, of the part wanted, fit beside what stays."""
        going = sum(part.bytes for part in self._parts if part.loaded and part.leaving)
        excess = self._used() - going + need - self._budget
        now = self._clock()
        able = [part for part in self._parts if part.loaded and not part.leaving and part.promised <= now]
        residents = {part.resident(self._uses): part for part in able}
        place = (wanted.version, wanted.depth) if wanted else None
        for victim in victims(residents, math.ceil(max(excess, 0)), self._policy, place):
            residents[victim].leaving = True

    def _patience(self) -> float | None:
        """Seconds until the next promise ends, which may make room; None: for any change."""
        now = self._clock()
        ends = [part.promised - now for part in self._parts if part.loaded and part.promised > now]
        return min(ends, default=None)

    def _used(self) -> int:
        return sum(part.bytes for part in self._parts if part.loaded)

    def _too_large(self, part: Part) -> StorageError:
        return StorageError(
            f"{part.title} takes {_mib(part.least)} of memory, the budget for all models is {_mib(self._budget)}; "
            "raise the memory budget, or compile with more exits for smaller stages"
        )


def _mib(size: float) -> str:
    return f"{size / 2**20:.2f} MiB"
