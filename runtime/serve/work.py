"""What the parts of the server hand each other, and what each asks of its neighbours.

    web        protocols: parses a request, calls `Engine.submit`, turns what is delivered into messages
    engine     rows of many requests through the stages, batched again at each
    host       which stages are in memory
    recording  a sample of rows with the backbone's own answer
    metrics    counts what the others report

All times are `time.monotonic()` seconds. Everything here may be called from any thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import OfframpError
from ..execution import Stage
from ..inputs import Batch
from ..manifest import Manifest

VERSION_LENGTH = 12  # of a digest's characters, where people tell versions apart by them


@dataclass(frozen=True)
class Leaving:
    """Rows of one request that are answered together, or that cannot be."""

    rows: np.ndarray  # [n] int64, indices into the request's batch
    exit: int  # the exit that answers; 0 is the shallowest
    probabilities: np.ndarray  # [n, K] float32; [0, K] where there is an error
    confidence: np.ndarray  # [n] float32
    seconds: float  # since the request was accepted
    short: bool = False  # the best answer so far, of an exit less sure than was asked: deadline or missing stage
    error: OfframpError | None = None  # why these rows have no answer


@dataclass(frozen=True)
class Asked:
    """What a request may state beside its rows."""

    tolerance: float | np.ndarray | None = None  # one, or one per row [B]; None: the plan compiled for
    deadline: float | None = None  # seconds from acceptance after which the best answer so far is given
    best_effort: bool = False  # answer with the best so far rather than wait for a stage to be loaded


Deliver = Callable[[Leaving], None]  # called from a thread of the engine; must return at once and not raise


class Ticket(Protocol):
    """An accepted request."""

    def cancel(self) -> None:
        """Nobody waits for the rest: rows that are not answered yet are dropped, and nothing more is delivered."""


class Engine(Protocol):
    """Rows in, each row delivered exactly once unless its ticket is cancelled."""

    def submit(self, model: str, batch: Batch, asked: Asked, deliver: Deliver, version: Hosted | None = None) -> Ticket:
        """Take all rows of a batch or none. A batch without rows delivers nothing.

        `version` of the model answers, which the caller holds until this returns; None: the newest.

        Raises `UnknownModelError`, `InputError` and `UsageError` as `Session.run` does, and `BusyError` where its rows
        do not fit into the model's queue or the engine is closing.
        """

    def depths(self) -> Mapping[tuple[str, int], int]:
        """Rows that wait, by model and stage."""

    def close(self, patience: float) -> None:
        """Take nothing more, answer what was taken for at most `patience` seconds, refuse the rest; then stop."""


class Hosted(Protocol):
    """One version of a model. It stays usable until all who hold it let go, however often its name is swapped."""

    @property
    def name(self) -> str: ...

    @property
    def manifest(self) -> Manifest: ...

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, to tell versions apart."""

    def take(self, stage: int) -> Stage | None:
        """The stage, in memory until `give`; None where it is not: it is being loaded now, and the host's listener
        is called when that is done. Raises the `OfframpError` that its last loading ended in, once per failure.
        """

    def give(self, stage: int) -> None:
        """The stage taken is not used any more; call it once for each `take` that gave one."""

    def hold(self) -> None:
        """One more may use it until `release`; for those alone who hold it already."""

    def release(self) -> None:
        """The request that `Host.hold` gave this to is done with it."""


@dataclass(frozen=True)
class SegmentState:
    """One stage of a model as the host sees it."""

    model: str
    stage: int
    loaded: bool
    bytes: int  # measured when it was last loaded; 0 before the first time
    uses: int
    load_seconds: float  # of the last loading; 0 before


class Host(Protocol):
    """Models by name, within one budget of memory."""

    def hold(self, name: str) -> Hosted:
        """The newest version, kept usable until `Hosted.release`. Raises `UnknownModelError`."""

    def names(self) -> list[str]: ...

    def swap(self, name: str) -> None:
        """Read the model's path again; requests from now on get what stands there. The old one goes once released.

        Its first stage is in memory when this returns. Raises as `open_artifact`, leaving the old one in place.
        """

    def listen(self, changed: Callable[[], None]) -> None:
        """`changed` is called, from a thread of the host, whenever a stage was loaded or failed to be."""

    def segments(self) -> list[SegmentState]: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def held(host: Host, name: str) -> Iterator[Hosted]:
    """The newest version for as long as it is looked at. Raises `UnknownModelError`."""
    hosted = host.hold(name)
    try:
        yield hosted
    finally:
        hosted.release()


@dataclass(frozen=True)
class Sample:
    """One row that was watched to its end."""

    model: str
    digest: str  # of the version that answered
    inputs: Mapping[str, np.ndarray]  # without the batch dimension
    exit: int  # at which it was answered
    early: np.ndarray  # [K] float32 probabilities it was answered with
    final: np.ndarray  # [K] float32 probabilities of the backbone
    time: float  # `time.time()` seconds at which the backbone answered


class Recorder(Protocol):
    """Which rows are watched, and where their records go."""

    def chosen(self, model: str, rows: int) -> np.ndarray:
        """[rows] bool: those of a new request to run on to the end, drawn with a seed, whatever they will answer."""

    def record(self, sample: Sample) -> None:
        """Keep one. Returns at once; where the writer cannot keep up the sample is dropped, and counted."""


class Observer(Protocol):
    """Told what happens; every method returns at once."""

    def accepted(self, model: str, rows: int) -> None: ...

    def refused(self, model: str, rows: int, reason: str) -> None:
        """`reason` is one word: "busy", "input", "closing"."""

    def answered(self, model: str, exit: int, seconds: np.ndarray, short: bool) -> None:
        """Rows [n] left at an exit, so long after they were accepted."""

    def failed(self, model: str, rows: int) -> None: ...

    def cancelled(self, model: str, rows: int) -> None:
        """Nobody waits for these rows any more."""

    def ran(self, model: str, stage: int, rows: int, seconds: float) -> None:
        """One call of a stage: its batch, watched rows included, and how long it took."""

    def loaded(self, model: str, stage: int, seconds: float, bytes: int) -> None: ...

    def evicted(self, model: str, stage: int) -> None: ...

    def watched(self, model: str, version: str, exit: int, agrees: bool, risk: float | None) -> None:
        """A watched row reached the end of the version with this digest. `risk` of its answer, of the kind its
        manifest's tolerances bound; None where no tolerance of the default plan speaks of it: it asked for another, or
        was cut short.
        """

    def unplaced(self, rows: int) -> None:
        """So many more were chosen to be watched, and not, for there was no room for them."""


class Silent:
    """An `Observer` that keeps nothing."""

    def accepted(self, model: str, rows: int) -> None: ...

    def refused(self, model: str, rows: int, reason: str) -> None: ...

    def answered(self, model: str, exit: int, seconds: np.ndarray, short: bool) -> None: ...

    def failed(self, model: str, rows: int) -> None: ...

    def cancelled(self, model: str, rows: int) -> None: ...

    def ran(self, model: str, stage: int, rows: int, seconds: float) -> None: ...

    def loaded(self, model: str, stage: int, seconds: float, bytes: int) -> None: ...

    def evicted(self, model: str, stage: int) -> None: ...

    def watched(self, model: str, version: str, exit: int, agrees: bool, risk: float | None) -> None: ...

    def unplaced(self, rows: int) -> None: ...
